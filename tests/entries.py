"""Small entries with a configuration: what traces and fits are tested on."""

from __future__ import annotations

from benchmarks.families import CLASSIFIERS, family_source
from costbp.config.catalog import ModelEntry
from costbp.config.trainables import LoraTraining

METHODS = (
    "bp_vanilla",
    "bp_checkpointing",
    "bp_selective",
    "fmad_vanilla",
    "zo_vanilla",
)


def lora(family, **options):
    targets = ("query", "value") if family in CLASSIFIERS else ("q_proj", "v_proj")
    return LoraTraining(kind="lora", rank=2, alpha=1, targets=targets, **options)


def small(family, train=None, **sizes):
    sizes = {"hidden": 32, "layers": 3, "heads": 2, "vocabulary": 64} | sizes
    source = family_source(family, **sizes)
    return ModelEntry(label=family, source=source, train=train or lora(family))
