"""Encoded examples of one split, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from costbp.models.loss import IGNORED
from costbp.objective import Batch
from costbp.tasks.base import Example

PAD_TO = 8  # padded lengths are multiples of this, so that few shapes occur
Pixels = Callable[[list[int]], Batch]


@dataclass(frozen=True)
class Split:
    """Encoded examples of one split: token ids or hidden states of differing lengths, or feature
    vectors.

    Attributes:
        values: token ids, all examples end to end, [sum of lengths], or likewise hidden states,
            [sum of lengths, hidden]; or features, [n, hidden].
        labels: [n], the class; -1 where answers are free text.
        offsets: where each example starts in ``values``, [n + 1]; None for features.
        starts: where each example's answer starts, [n], for models that write text: what comes
            before is the prompt. None for classes.
        pad: token id of padding.
        image_token: token id that stands for a part of an image; batches say where it is.
        pixels: further entries of a batch, made of the images of the examples at given indices.
        examples: what is needed to score answers; empty for training.
    """

    values: Tensor
    labels: Tensor
    offsets: Tensor | None = None
    starts: Tensor | None = None
    pad: int = 0
    image_token: int | None = None
    pixels: Pixels | None = None
    examples: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Batch:
        """The examples at ``indices`` as one batch: ``features`` [n, hidden], or ``input_ids``
        (of states ``inputs_embeds``, [n, length, hidden]) and ``attention_mask`` [n, length] padded
        on the right to a multiple of 8; what their images add; and ``labels``: [n], or [n, length]
        of the tokens of the answers and -100."""
        labels = self.labels[indices]
        if self.offsets is None:
            return {"features": self.values[indices], "labels": labels}
        rows = [self.row(i) for i in indices.tolist()]
        length = -(-max(len(row) for row in rows) // PAD_TO) * PAD_TO
        batch = padded(rows, length, self.pad)
        if self.starts is not None:
            places = torch.arange(length)
            ends = torch.tensor([len(row) for row in rows]).unsqueeze(1)
            answer = (places >= self.starts[indices].unsqueeze(1)) & (places < ends)
            labels = batch["input_ids"].masked_fill(~answer, IGNORED)
        return {**batch, **self.seen(indices, batch), "labels": labels}

    def seen(self, indices: Tensor, batch: Batch) -> Batch:
        """What the images of the examples at ``indices`` add to a batch."""
        found = dict(self.pixels(indices.tolist())) if self.pixels is not None else {}
        if self.image_token is not None:
            found["mm_token_type_ids"] = (batch["input_ids"] == self.image_token).long()
        return found

    def row(self, index: int) -> Tensor:
        """Token ids of an example, prompt and answer, [length]."""
        assert self.offsets is not None
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> Tensor:
        """Token ids of an example's prompt, [length]."""
        assert self.starts is not None
        return self.row(index)[: self.starts[index]]

    def order(self) -> Tensor:
        """All indices, those of similar lengths together."""
        if self.offsets is None:
            return torch.arange(len(self))
        return (self.offsets[1:] - self.offsets[:-1]).argsort(stable=True)


def padded(rows: list[Tensor], length: int, pad: int, *, left: bool = False) -> Batch:
    """``input_ids`` and ``attention_mask`` [n, length] of rows padded at one side; of rows of hidden
    states, which are padded with zeros, ``inputs_embeds``."""
    states = rows[0].dim() == 2
    if states:
        ids = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    else:
        ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return {"inputs_embeds" if states else "input_ids": ids, "attention_mask": mask}
