"""Matrix products of a forward pass, read off a configuration: what forward units are made of.

Each product has as many *live* factors as depend on a trained parameter. A live factor costs one more
product of the same size in the backward pass (its gradient), and one per direction in forward mode
(its tangent). So backpropagation and forward mode with one direction cost the same, exactly, but for
fused attention, whose backward pass takes five products for two, whichever factors are live: it
computes the scores again and every gradient (Dao 2023, arXiv 2307.08691, algorithm 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from costbp.config.shares import Shares
from costbp.config.sources import ConfigSource
from costbp.config.trainables import (
    FullTraining,
    HeadTraining,
    LoraTraining,
    NormTraining,
    Training,
    VirtualTokens,
)
from costbp.errors import UserError, first_line


@dataclass(frozen=True)
class Product:
    """A product of two matrices.

    Attributes:
        flops: 2 m k n.
        live: how many of its two factors depend on a trained parameter.
        block: number of the block it belongs to; None outside of blocks.
        half: 0 in attention, 1 in the feed-forward part.
        last: the last product of its half, whose result nothing in this half's backward pass needs, so
            that recomputing the half stops before it.
        fused: one of the two of fused attention.
    """

    flops: float
    live: int
    block: int | None = None
    half: int = 1
    last: bool = False
    fused: bool = False

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass."""
        return self.flops * (2.5 * bool(self.live) if self.fused else self.live)


def shares(found: Sequence[Product], tensors: int = 1) -> Shares:
    """What closed forms know of a model whose products are ``found``."""
    total = sum(product.flops for product in found)
    blocks: dict[int, list[Product]] = {}
    for product in found:
        if product.block is not None:
            blocks.setdefault(product.block, []).append(product)
    run = [own for own in blocks.values() if any(p.live for p in own)]  # others save nothing
    again = [sum(p.flops for p in own if not (p.half and p.last)) for own in run]
    attention = sum(
        p.flops
        for own in run
        if any(p.live for p in own if not p.half)
        for p in own
        if not (p.half or p.last)
    )
    whole = [sum(p.flops for p in own) / total for own in run]
    return Shares(
        live=sum(product.flops * product.live for product in found) / total,
        backward=sum(product.backward for product in found) / total,
        recomputed=sum(again[:-1]) / total,
        halves=(sum(again) + attention) / total,
        tensors=tensors,
        blocks=1 + max(blocks, default=0),
        towers=tuple((len(list(alike)), one) for one, alike in itertools.groupby(whole)),
    )


@dataclass(frozen=True)
class _Sizes:
    """Of a stack of blocks; ``inner`` lists the feed-forward part's matrices, of which the last
    reads what the others make."""

    blocks: int
    hidden: int
    keys: int  # width of keys, of values
    inner: tuple[tuple[str, int, int], ...]
    names: dict[str, str]  # role in attention -> name of the linear layer
    attention_stops: bool  # nothing inside attention follows its last product and is saved
    stops_early: bool  # the same of the block


def knows(train: Training) -> bool:
    """Whether products say it all: DoRA also multiplies weights, and any module may stand beside."""
    if not isinstance(train, LoraTraining):
        return True
    return not train.dora and set(train.beside) <= {"embed_tokens", "lm_head"}


def products(
    source: ConfigSource, train: Training, batch: int, length: int, classes: int = 4, grid: int = 0
) -> list[Product]:
    """Every product of one forward pass of one batch.

    Args:
        grid: patches on a side of each row's image.

    Raises:
        UserError: the configuration lacks a key, or one holds something else than it should.
    """
    try:
        return _products(source, train, batch, length, classes, grid)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"configuration of a '{source.config['model_type']}' model: {what}"
        ) from error


def _products(
    source: ConfigSource, train: Training, batch: int, length: int, classes: int, grid: int
) -> list[Product]:
    config = source.config
    text = config.get("text_config", config)
    sizes = SIZES[config["model_type"]](text)
    full = isinstance(train, FullTraining)
    fused = source.attention == "sdpa"
    tokens, keys = batch * length, length
    if isinstance(train, VirtualTokens):  # a prompt's places are queries, too; a prefix's are keys
        keys += train.tokens
        tokens += batch * train.tokens * (train.kind == "prompt")
    norms = isinstance(train, NormTraining)
    found = list(_vision(config, batch, grid, full, norms, fused)) if grid else []
    below = "embed_tokens" in getattr(train, "beside", ())
    prompt = isinstance(train, VirtualTokens) and train.kind == "prompt"
    live_input = full or below or prompt or norms
    first = config["vision_config"]["depth"] if grid else 0  # the image tower's blocks come first
    for block in range(first, first + sizes.blocks):
        found += _block(sizes, train, block, tokens, keys, live_input, fused)
        live_input = not isinstance(train, HeadTraining)
    return found + _head(source, train, sizes, batch, batch * length, classes, live_input)


def _block(
    sizes: _Sizes,
    train: Training,
    block: int,
    tokens: int,
    keys: int,
    live_input: bool,
    fused: bool,
) -> list[Product]:
    hidden, found = sizes.hidden, []
    adapted = set(train.targets) if isinstance(train, LoraTraining) else set()
    weights = int(isinstance(train, FullTraining))
    live = {}

    def linear(
        name: str, wide: int, tall: int, given: int, half: int = 0, last: bool = False
    ) -> int:
        trained = name in adapted
        parts = [(wide, tall, given + weights)]
        if trained:
            rank = train.rank  # type: ignore[union-attr]
            parts += [(wide, rank, given + 1), (rank, tall, 2)]
        for place, (m, n, live) in enumerate(parts, 1):
            ends = last and place == len(parts)
            found.append(Product(2.0 * tokens * m * n, live, block, half, ends))
        return int(bool(given or weights or trained))

    given = int(live_input)
    for role, width in (("query", hidden), ("key", sizes.keys), ("value", sizes.keys)):
        live[role] = linear(sizes.names[role], hidden, width, given)
    if isinstance(train, VirtualTokens) and train.kind == "prefix":
        live |= {"key": 1, "value": 1}
    scores = 2.0 * tokens * keys * hidden
    mixed = int(bool(live["query"] or live["key"]))
    found.append(Product(scores, live["query"] + live["key"], block, 0, fused=fused))
    found.append(Product(scores, mixed + live["value"], block, 0, fused=fused))
    given_on = int(bool(mixed or live["value"]))
    stops = sizes.attention_stops
    after = linear(sizes.names["output"], hidden, hidden, given_on, last=stops) or given
    *inner, (name, wide, tall) = sizes.inner
    made = [linear(*matrix, after, 1) for matrix in inner]
    linear(name, wide, tall, max(made), 1, sizes.stops_early)
    return found


def _head(
    source: ConfigSource,
    train: Training,
    sizes: _Sizes,
    batch: int,
    tokens: int,
    classes: int,
    live: bool,
) -> list[Product]:
    hidden, given = sizes.hidden, int(live)
    trained = int(
        isinstance(train, FullTraining | HeadTraining) or "lm_head" in getattr(train, "beside", ())
    )
    kind = source.config["model_type"]
    if source.form != "classifier":
        text = source.config.get("text_config", source.config)
        return [Product(2.0 * tokens * hidden * text["vocab_size"], given + trained)]
    if kind == "bert":  # the pooler belongs to the frozen base
        full = int(isinstance(train, FullTraining))
        pooled = Product(2.0 * batch * hidden * hidden, given + full)
        return [pooled, Product(2.0 * batch * hidden * classes, given + 1)]
    if kind == "roberta":
        dense = Product(2.0 * batch * hidden * hidden, given + 1)
        return [dense, Product(2.0 * batch * hidden * classes, 2)]
    return [Product(2.0 * tokens * hidden * classes, given + 1)]  # scores every token


def _vision(
    config: dict[str, Any], batch: int, grid: int, full: bool, norms: bool, fused: bool
) -> Sequence[Product]:
    """Qwen2-VL's image tower: patches attend within their image."""
    vision = config["vision_config"]
    width, given, patches = vision["embed_dim"], int(full or norms), batch * grid * grid
    live = given + full
    inner = int(width * vision["mlp_ratio"])
    merged = width * vision.get("spatial_merge_size", 2) ** 2
    pixels = 3 * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2
    found = [Product(2.0 * patches * pixels * width, int(full))]
    for block in range(vision["depth"]):
        number = block if given else None  # without a gradient to pass on nothing is recomputed
        per_patch = 2.0 * patches * width
        found += [
            Product(per_patch * 3 * width, live, number, 0),
            Product(per_patch * 2 * grid * grid, 2 * given, number, 0, fused=fused),
            Product(per_patch * width, live, number, 0, last=True),
            Product(per_patch * inner, live, number),
            Product(per_patch * inner, live, number, last=True),
        ]
    tokens = patches * width / merged
    found.append(Product(2.0 * tokens * merged * (merged + vision["hidden_size"]), live))
    return found


ENCODER = {"query": "query", "key": "key", "value": "value", "output": "dense"}
OPT = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
LLAMA = {**OPT, "output": "o_proj"}


def _encoder(c: dict[str, Any]) -> _Sizes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    matrices = (("dense", hidden, inner), ("dense", inner, hidden))
    return _Sizes(c["num_hidden_layers"], hidden, hidden, matrices, ENCODER, False, False)


def _opt(c: dict[str, Any]) -> _Sizes:
    hidden, inner = c["hidden_size"], c["ffn_dim"]
    stops = c.get("dropout", 0.1) == 0  # else the last product's dropout mask is asked for
    matrices = (("fc1", hidden, inner), ("fc2", inner, hidden))
    return _Sizes(c["num_hidden_layers"], hidden, hidden, matrices, OPT, True, stops)


def _llama(c: dict[str, Any]) -> _Sizes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads = c["num_attention_heads"]
    keys = hidden // heads * (c.get("num_key_value_heads") or heads)
    matrices = (
        *((name, hidden, inner) for name in ("gate_proj", "up_proj")),
        ("down_proj", inner, hidden),
    )
    return _Sizes(c["num_hidden_layers"], hidden, keys, matrices, LLAMA, True, True)


SIZES: dict[str, Callable[[dict[str, Any]], _Sizes]] = {
    "bert": _encoder,
    "roberta": _encoder,
    "opt": _opt,
    "llama": _llama,
    "qwen2_vl": _llama,
}
