"""How somebody's training loop holds memory: what a profile says beside model and method."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from costbp.config.entries import Entry, Strict
from costbp.config.methods import Family

Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd", "adamw_in_backward"
]


class FourBit(Strict):
    """How bitsandbytes' four-bit layers hold memory (QLoRA, arXiv 2305.14314)."""

    double: bool = Field(True, description="Scales are quantised, too.")
    keeps_inputs: bool = Field(
        False, description="A layer keeps its input until its graph is gone (before 0.44)."
    )
    unpacked: Literal["base", "float16"] = Field(
        "base", description="Dtype that weights are unpacked to, and copied from if it differs."
    )
    head: Literal["packed", "base"] = Field("base", description="The head of next tokens.")
    float32: bool = Field(
        False, description="What isn't packed is float32 (`prepare_model_for_kbit_training`)."
    )


class Profile(Entry):
    """What a training loop keeps, and for how long, beside what its method needs."""

    loop: Literal["ours", "plain", "in_place"] = Field(
        "plain",
        description="`ours`: of this package, for all methods; `plain`: backward pass and torch's "
        "optimiser; `in_place`: parameters moved by expressions, as MeZO's.",
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Fused, or written out.")
    repeats: bool = Field(
        False, description="Keys and values are copied for every head of queries that shares them."
    )
    adapters: Literal["float32", "base"] = Field("float32", description="Dtype of adapters.")
    ties: bool = Field(True, description="False: the head is a weight of its own in any model.")
    padding: bool = Field(True, description="Batches have padding, and attention a mask of it.")
    fused_gelu: bool = Field(False, description="GELU by tanh is one operator.")
    last_block: Literal["kept", "recomputed"] = Field(
        "kept", description="By checkpointing of blocks."
    )
    upcast: bool = Field(True, description="Logits become float32 before the loss.")
    shifts: Literal["labels", "logits"] = Field(
        "labels",
        description="What moves by a place; logits are copied for it (transformers before 4.46).",
    )
    chunk: int | None = Field(None, ge=1, description="Places whose logits are made at a time.")
    chunks: int | None = Field(None, ge=1, description="Parts in which logits are made.")
    keeps: Literal["nothing", "logits", "graph"] = Field(
        "nothing",
        description="What the loop still holds: `logits` in the backward pass, `graph` (by the loss) "
        "into the next step, too.",
    )
    gradients: Literal["made", "zeroed"] = Field(
        "made",
        description="In each step's backward pass; or they stay, and are filled with zeros (torch before "
        "2.0).",
    )
    optimizer: Optimizer | None = Field(None, description="Instead of the method's own.")
    foreach: bool = Field(
        False, description="The optimiser takes all tensors at once, with copies; else one by one."
    )
    autocast: Literal["float16", "bfloat16"] | None = Field(
        None, description="Products in this dtype, on float32 weights (AMP)."
    )
    four_bit: FourBit = Field(FourBit(), description="For models with `bits: 4`.")

    @model_validator(mode="after")
    def _means_what_it_says(self) -> Self:
        """Refuse what the loop would not do."""
        said = self.model_fields_set - {"loop", *self.cosmetic}
        could = {"plain": set(), "ours": said, "in_place": said - MODEL}[self.loop]
        idle = {n for n in could if getattr(self, n) != type(self).model_fields[n].default}
        if idle:
            raise ValueError(f"{', '.join(sorted(idle))}: loop '{self.loop}' has no such setting")
        if self.chunk and self.chunks:
            raise ValueError("set one of 'chunk' and 'chunks'")
        if self.shifts == "logits" and (self.chunk or self.chunks):
            raise ValueError("shifts: logits makes them whole: no 'chunk' and no 'chunks'")
        if (self.chunk or self.chunks) is None and not self.upcast:
            raise ValueError("upcast: false needs 'chunk' or 'chunks'")
        return self

    @property
    def families(self) -> tuple[Family, ...]:
        """Of the methods that it runs."""
        return LOOPS[self.loop]


LOOPS: dict[str, tuple[Family, ...]] = {
    "ours": ("bp", "fmad", "zo"),
    "plain": ("bp",),
    "in_place": ("zo",),
}
MODEL = {
    "attention",
    "repeats",
    "adapters",
    "ties",
    "padding",
    "fused_gelu",
    "four_bit",
}  # not of the loop
