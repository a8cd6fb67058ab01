"""How transformers and peft are imported: late, since they take seconds, and in silence."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger


@contextmanager
def with_transformers() -> Iterator[None]:
    """For blocks that import transformers or peft: no notes and bars, no warning of a name that peft
    still asks for, nor of copies of tied weights, and no garbage collection, which finds nothing and takes a
    fifth of ten seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        getLogger("bitsandbytes").setLevel(
            ERROR
        )  # it misses a package for CPUs that nothing here calls
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        if enabled:
            gc.enable()
