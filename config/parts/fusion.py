"""A small vision-language model from two pretrained parts: a text encoder that reads an image's
features as its first tokens, as a projection hands them over (the way of LLaVA, Liu et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costbp.config.catalog import Training
from costbp.errors import UserError, first_line
from costbp.models.modules import Classifier, mean_pool
from costbp.models.trainable import trainable
from costbp.objective import Batch

# EfficientNet-lite0 (Tan and Le 2019, arXiv 1905.11946; without squeeze-and-excitation, ReLU6):
# blocks, kernel, stride of the first, channels widened by, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the carrier's images


class _Convolution(nn.Conv2d):
    """Padded as TensorFlow does: the odd pixel goes to the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Widen, filter each channel, narrow; added to its input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        width = inputs * wider
        if wider > 1:
            self._expand_conv, self._bn0 = _Convolution(inputs, width, 1), _norm(width)
        self._depthwise_conv = _Convolution(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = _Convolution(width, outputs, 1), _norm(outputs)
        self.wider, self.adds = wider > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(x))) if self.wider else x
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        found = self._bn2(self._project_conv(wide))
        return x + found if self.adds else found


class VisionEncoder(nn.Module):
    """EfficientNet-lite0 up to its last block, frozen, its normalisation always in evaluation mode;
    names of tensors are those of the published weights."""

    width = STAGES[-1][-1]
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Convolution(3, STEM, 3, 2), _norm(STEM)
        blocks, inputs = [], STEM
        for count, kernel, stride, wider, outputs in STAGES:
            for index in range(count):
                blocks.append(_Block(inputs, outputs, kernel, 1 if index else stride, wider))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def read(self, file: Path) -> VisionEncoder:
        """Itself, with the weights of a state dict.

        Raises:
            UserError: the file isn't such a state dict.
        """
        try:
            state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            self.load_state_dict({name: state[name] for name in self.state_dict()})
        except Exception as error:
            raise UserError(
                f"{file}: no weights of EfficientNet-lite0 ({first_line(error)})"
            ) from error
        return self

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Vectors [n, cells, width] of images [n, 3, side, side], bytes; a cell is 32 x 32."""
        x = (pixels.to(self.mean.dtype) - self.mean) / self.deviation
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return x.flatten(2).transpose(1, 2)


class Fusion(nn.Module):
    """Image and question to a feature vector [n, hidden]; the projection is trained.

    Args:
        model: a BERT-like encoder.
        vision: gives ``width`` numbers for each cell of an image.
    """

    def __init__(self, model: Any, vision: VisionEncoder) -> None:
        super().__init__()
        self.model, self.vision = model, vision
        self.width: int = model.config.hidden_size
        embedding = model.get_input_embeddings().weight
        self.projection = nn.Linear(vision.width, self.width)
        nn.init.normal_(self.projection.weight, std=float(embedding.std()) / vision.width**0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            cells = self.vision(batch["pixel_values"])
        seen = self.projection(cells)
        words = self.model.get_input_embeddings()(batch["input_ids"])
        mask = batch["attention_mask"]
        mask = torch.cat([mask.new_ones(seen.shape[:2]), mask], 1)
        states = self.model(
            inputs_embeds=torch.cat([seen.to(words.dtype), words], 1), attention_mask=mask
        ).last_hidden_state
        return mean_pool(states, mask)


def build(base: Any, classes: int, train: Training, assets: dict[str, Path]) -> nn.Module:
    """The classifier of images and questions: adapters in the text encoder, projection and head are
    trained."""
    adapted = trainable(base, "encoder", train)
    vision = VisionEncoder().read(assets["efficientnet_lite0"] / "efficientnet-lite0.pth")
    return Classifier(Fusion(adapted, vision), classes)
