"""Where a model's weights are, and what the model puts out: the `source` of a model's entry."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from costbp.config.entries import PythonFile, Seed, Strict

Form = Literal["encoder", "classifier", "causal", "image_text"]
FORMS = """What the model puts out: `encoder` (hidden states, whose mean a head of ours reads),
`classifier` (classes, by the library's own head), `causal` (next tokens), `image_text` (next tokens
on text and image)."""
TRACED = ("classifier", "causal", "image_text")  # forms whose steps are traced without weights
DType = Literal["float32", "bfloat16", "float16"]
DTYPE = "Of the frozen base; what is trained is float32."


COUNTS = (  # keys of a configuration that are whole numbers, as this package reads them
    *("hidden_size", "intermediate_size", "ffn_dim", "vocab_size", "num_hidden_layers"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "embed_dim",
        "depth",
    ),
    *("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"),
)
MAY_BE_NULL = ("num_key_value_heads", "max_position_embeddings")
PARTS = ("text_config", "vision_config")


def _counts(config: dict[str, Any]) -> dict[str, Any]:
    """``config``, if it can be read: its parts hold keys, and what counts is a whole number."""
    for name in ("", *(part for part in PARTS if part in config)):
        values = config[name] if name else config
        if not isinstance(values, dict):
            raise ValueError(f"{name} must hold keys and values")
        for key in COUNTS:
            value = values.get(key, 1)
            if value is None and key in MAY_BE_NULL:
                continue
            if type(value) is not int or not 1 <= value <= 10**7:
                place = f"{name}.{key}" if name else key
                raise ValueError(f"{place} is {value!r}, and wants a whole number from 1 to 10^7")
    return config


Config = Annotated[dict[str, Any], AfterValidator(_counts)]


class Source(Strict):
    """What every source of a transformers model says: its form, its precision, how it is asked."""

    form: Form = Field("encoder", description=FORMS)
    dtype: DType = Field("float32", description=DTYPE)
    bits: Literal[4] | None = Field(None, description="4: the base's linear layers are packed.")
    packing: Literal["rtn", "nf4", "gptq"] = Field(
        "rtn",
        description="`rtn`: groups of integers rounded to the nearest; `nf4`: bitsandbytes; `gptq`: as a "
        "GPTQ checkpoint stores them.",
    )
    group: int = Field(128, ge=2, description="Weights that share a scale, where packed.")
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa",
        description="`sdpa`: fused, in memory that grows with the length, where transformers has it for "
        "the model (else `eager`, and a notice); `eager`: keeps the scores of every pair of tokens.",
    )
    image_side: int = Field(280, ge=8, description="Images are shrunk to as many pixels squared.")
    chat: bool = Field(False, description="Prompts go through the tokenizer's chat template.")

    @model_validator(mode="after")
    def _packs(self) -> Self:
        if self.packing != "rtn" and self.bits is None:
            raise ValueError(f"packing {self.packing} needs bits: 4")
        return self


class Repository(Strict):
    """A repository of the Hugging Face hub at a fixed state."""

    repo: str = Field(
        pattern="^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$", description="`owner/name` on the hub."
    )
    revision: str = Field(
        "main",
        pattern="^[A-Za-z0-9_.-]+$",
        description="Commit; with `main` the first fetch decides.",
    )

    @property
    def folder(self) -> str:
        """Name of the folder that it is fetched into."""
        return "--".join(["model", *self.repo.split("/"), self.revision[:8]])


class AssetSource(Source):
    """A transformers folder inside a fetched asset."""

    kind: Literal["asset"]
    asset: str = Field(description="Name in assets.yaml.")
    folder: str = Field(".", description="Folder of the model inside the asset.")
    gguf: str | None = Field(None, description="Weights' GGUF file there, unpacked once.")

    @model_validator(mode="after")
    def _writes(self) -> Self:
        if self.gguf and self.form != "causal":
            raise ValueError("source.gguf holds a language model: source.form = causal")
        return self


class HubSource(Source, Repository):
    """A model of the hub, fetched once."""

    kind: Literal["hub"]


class FolderSource(Source):
    """A transformers folder on this machine: config.json, weights, tokenizer."""

    kind: Literal["folder"]
    path: str = Field(description="Relative to the working directory, or absolute.")


class RandomSource(Source):
    """An architecture with seeded random weights; words are hashed to token ids, or bytes are
    tokens where the model puts out text."""

    kind: Literal["random"]
    model_type: str = Field(description="transformers model type, for example `bert`.")
    config: Config = Field(description="Overrides of its config.")
    seed: Seed = Field(0, description="Of the weights.")


class ConfigSource(Source):
    """An architecture in the hub's configuration format. Its cost can be traced at full size without
    weights; it can be trained where `weights` says which."""

    kind: Literal["config"]
    form: Literal["classifier", "causal", "image_text"] = Field(description=FORMS)
    config: Config = Field(description="Content of the model's `config.json`.")
    dtype: DType = Field("bfloat16", description=DTYPE)
    loss_chunk: int | None = Field(None, ge=1, description="Tokens whose logits exist at a time.")
    weights: Repository | None = Field(None, description="Where the weights are, for training.")

    @model_validator(mode="after")
    def _is_typed(self) -> Self:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type must say which architecture it is")
        if self.loss_chunk is not None and self.form == "classifier":
            raise ValueError("loss_chunk splits the logits of tokens, which a classifier has not")
        return self


Base = Annotated[AssetSource | HubSource | FolderSource | RandomSource, Field(discriminator="kind")]


class PythonSource(PythonFile):
    """A classifier of your own: a function in a file returns the module. It is called with `base`,
    `classes`, `train` (the entry's), `assets` (name -> folder) and the options."""

    base: Base | None = Field(
        None, description="transformers model that the function is handed; its tokenizer is used."
    )
    vocabulary: int = Field(2048, ge=8, description="No base: ids that words are hashed into.")
    assets: tuple[str, ...] = Field((), description="Further assets, whose folders it is handed.")
    images: bool = Field(False, description="Batches hold images, and tasks must have them.")
    image_side: int = Field(128, ge=8, description="Images are resized to squares of this side.")
    image_positions: int = Field(0, ge=0, description="Positions that an image takes from text.")

    form: ClassVar[Form] = "classifier"
    chat: ClassVar[bool] = False
