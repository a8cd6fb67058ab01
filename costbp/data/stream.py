"""Training batches by number."""

from __future__ import annotations

import torch

from costbp.data.encoded import Split
from costbp.objective import Batch, Key


class BatchStream:
    """Training batches by number: epoch after epoch, each in an order of its own; an incomplete
    last batch is left out. Batch i is a function of (seed, i)."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self.split, self.size, self.seed = split, batch_size, seed
        self.per_epoch = len(split) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = Key(self.seed, epoch, (0,)).generator()
            self._order = torch.randperm(len(self.split), generator=generator)
            self._epoch = epoch
        return self.split.batch(self._order[place * self.size : (place + 1) * self.size])
