"""The losses that runs are trained on: cross-entropy, or the error rate itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from costbp.objective import Batch

IGNORED = -100  # label of a place that doesn't count


def micro_batches(batch: Batch, rows: int) -> list[tuple[Tensor, Batch]]:
    """A batch in parts of ``rows`` examples, the last of what is left, each with its share [] of the
    terms that the batch's loss is the mean of: examples, or next tokens that count."""
    labels = batch["labels"]
    parts: list[dict[str, Tensor]] = [{} for _ in labels.split(rows)]
    for name, value in batch.items():
        sizes: Any = rows
        if len(value) != len(labels):  # patches, of which images have differing numbers
            grids = batch["image_grid_thw"].split(rows)
            sizes = [int(grid.prod(1).sum()) for grid in grids]
        for part, piece in zip(parts, value.split(sizes), strict=True):
            part[name] = piece
    terms = [next_tokens(p["labels"]) if labels.ndim > 1 else p["labels"] for p in parts]
    counts = torch.stack([(wanted != IGNORED).sum() for wanted in terms]).double()
    return list(zip(counts / counts.sum(), parts, strict=True))


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy [] of class logits [n, classes], or of next tokens for logits
    [n, length, vocabulary] (labels of -100 don't count), in float32 or wider. What a module has
    made a loss of itself [] stays as it is."""
    if logits.ndim == 0:
        return logits
    labels = batch["labels"]
    if logits.ndim == 3:
        labels, logits = next_tokens(labels), logits.flatten(0, 1)
    return F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED)


def error_rate(logits: Tensor, batch: Batch) -> Tensor:
    """Share [] of wrong classes, or of wrong next tokens, in float32: one minus the accuracy. It is
    piecewise constant, so only differences see it."""
    labels = batch["labels"]
    if logits.ndim == 3:
        labels, logits = next_tokens(labels), logits.flatten(0, 1)
    counts = labels != IGNORED
    return ((logits.argmax(-1) != labels) & counts).sum() / counts.sum()


def next_tokens(labels: Tensor) -> Tensor:
    """Each place's next token [n * length]. Labels move and logits don't: a copy of those would be
    the largest tensor of a step."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


LOSSES = {"cross_entropy": cross_entropy, "error_rate": error_rate}


class ChunkedLoss(nn.Module):
    """A language model's mean loss [] over next tokens, with the logits of ``chunk`` tokens at a
    time; the backward pass computes them again.

    Args:
        decoder: returns an object with ``last_hidden_state`` [n, length, hidden].
        head: hidden states to logits.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, chunk: int, vocabulary: int) -> None:
        super().__init__()
        self.decoder, self.head, self.chunk, self.vocabulary = decoder, head, chunk, vocabulary

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states = self.decoder(**inputs).last_hidden_state.flatten(0, 1)
        labels = next_tokens(batch["labels"])
        parts = zip(states.split(self.chunk), labels.split(self.chunk), strict=True)
        losses = []
        for part, wanted in parts:
            if torch.is_grad_enabled():
                losses.append(checkpoint(self._sum, part, wanted, use_reentrant=False))
            else:
                losses.append(self._sum(part, wanted))
        return torch.stack(losses).sum() / (labels != IGNORED).sum()

    def _sum(self, states: Tensor, labels: Tensor) -> Tensor:
        logits = _wide(self.head(states))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class PartedHead(nn.Module):
    """A language model whose head works on parts of the length, one after the other; returns the logits
    of all parts, each [n, part, vocabulary], to ``parted_cross_entropy``.

    Args:
        decoder: returns an object with ``last_hidden_state`` [n, length, hidden].
        head: hidden states to logits.
        places: length of a part; or, if ``at_once`` is False, there are as many parts.
        at_once: make all logits before the first loss; else each is made with its loss.
        upcast: logits in float32.
    """

    def __init__(
        self, decoder: nn.Module, head: nn.Module, vocabulary: int, *, places: int, at_once: bool
    ) -> None:
        super().__init__()
        self.decoder, self.head, self.vocabulary = decoder, head, vocabulary
        self.places, self.at_once = places, at_once

    def forward(self, batch: Batch) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states = self.decoder(**inputs).last_hidden_state
        if not self.at_once:
            return (self.head(part) for part in states.chunk(self.places, 1))
        return [self.head(part) for part in states.split(self.places, 1)]


def parted_cross_entropy(logits: Any, batch: Batch, upcast: bool = True) -> Tensor:
    """``cross_entropy`` of parts of the length [n, part, vocabulary]; ``upcast``: in float32."""
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    if upcast and isinstance(logits, list):
        logits[:] = [_wide(part) for part in logits]
    total, start = [], 0
    for part in logits:
        wanted = labels[:, start : start + part.shape[1]].flatten()
        start += part.shape[1]
        rows = part.flatten(0, 1)
        rows = _wide(rows) if upcast else rows
        total.append(F.cross_entropy(rows, wanted, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(total).sum() / (labels != IGNORED).sum()


def shifted_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """``cross_entropy`` of next tokens [n, length, vocabulary] by a copy of all logits but each row's
    last, as transformers did before 4.46."""
    rows = _wide(logits)[:, :-1].contiguous()
    wanted = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(rows.flatten(0, 1), wanted, ignore_index=IGNORED)
