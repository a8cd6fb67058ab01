"""The loss that everything here is trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from costbp.objective import Batch


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy [] of class logits [n, classes], or of next tokens for logits
    [n, length, vocabulary] (labels of -100 don't count), in float32 or wider."""
    labels = batch["labels"]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels)
