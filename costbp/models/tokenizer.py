"""Token ids for a text, from a model's own tokenizer or, for random weights, by hashing words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

Tokenizer = Callable[[Sequence[str]], list[list[int]]]
FIRST, LAST, RESERVED = 1, 2, 3


def hashed(vocab_size: int) -> Tokenizer:
    """Words and punctuation marks hashed (CRC-32) into ``vocab_size`` ids; 0 pads, 1 and 2 frame."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        words = (re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts)
        span = vocab_size - RESERVED
        return [
            [FIRST, *(RESERVED + zlib.crc32(w.encode()) % span for w in found), LAST]
            for found in words
        ]

    return encode


def pretrained(folder: Path) -> Tokenizer:
    """The tokenizer saved in a transformers folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda texts: tokenizer(list(texts), verbose=False)["input_ids"]
