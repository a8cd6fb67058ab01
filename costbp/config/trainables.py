"""What of a model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from costbp.config.entries import Strict

Blocks = Annotated[
    tuple[int, ...] | None,
    Field(
        min_length=1,
        description="Of the base's repeated blocks those that are trained, from 0, or from the last, "
        "which is -1; default: all.",
    ),
]


class LoraTraining(Strict):
    """LoRA adapters (Hu et al. 2021) and the classification head are trained, the base is frozen."""

    kind: Literal["lora"]
    rank: int = Field(ge=1, description="Rank of the adapters.")
    alpha: float = Field(gt=0, description="Scale: alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Before the adapters.")
    targets: tuple[str, ...] = Field(min_length=1, description="Names of the adapted linears.")
    blocks: Blocks = None
    dora: bool = Field(
        False,
        exclude_if=lambda said: not said,
        description="Lengths of the adapted weights' rows are trained, too (DoRA, Liu et al. 2024, arXiv "
        "2402.09353).",
    )
    beside: tuple[str, ...] = Field(
        (),
        exclude_if=lambda said: not said,
        description="Names of modules that are trained in full, as `embed_tokens` and `lm_head`; each is a "
        "copy of its own, also where the base ties them.",
    )


class HeadTraining(Strict):
    """Only the head is trained, on features of the frozen base, computed once and cached."""

    kind: Literal["head"]


class FullTraining(Strict):
    """Every parameter is trained, in the base's dtype, or those of some blocks and the head."""

    kind: Literal["full"]
    blocks: Blocks = None


class VirtualTokens(Strict):
    """Tokens before a language model's text are trained, the base is frozen: their keys and values in
    every block (`prefix`, Li & Liang 2021), or their embeddings (`prompt`, Lester et al. 2021)."""

    kind: Literal["prefix", "prompt"]
    tokens: int = Field(ge=1, description="That are put before the text; they take positions.")


class NormTraining(Strict):
    """Scales and shifts of the norms are trained, and a classification head."""

    kind: Literal["norms"]


Training = LoraTraining | HeadTraining | FullTraining | VirtualTokens | NormTraining
