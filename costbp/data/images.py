"""Images of a pair's examples: kept once as files, made into tensors when a batch needs them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from costbp.config.catalog import ModelEntry
from costbp.config.sources import RandomSource, Source
from costbp.data.encoded import Pixels
from costbp.errors import UserError, first_line
from costbp.files import ensure_folder, writing
from costbp.models.weights import configuration, weights_folder
from costbp.objective import Batch
from costbp.tasks.base import EncodedImage, Example

if TYPE_CHECKING:
    from PIL.Image import Image

Settings = dict[str, Any]
# an image processor's settings -> keys of a configuration's vision part
SIZES = {k: k for k in ("patch_size", "temporal_patch_size")} | {"merge_size": "spatial_merge_size"}
MARKS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


def open_image(data: bytes, where: str = "image") -> Image:
    """The picture in an encoded file, RGB.

    Raises:
        UserError: it can't be read; names ``where``.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} can't be read ({first_line(error).split(' <')[0]})") from None


def shrunk(picture: Image, side: int) -> Image:
    """The picture with at most ``side`` x ``side`` pixels in its own proportions."""
    from PIL import Image

    scale = side / (picture.width * picture.height) ** 0.5
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


# --- files and tensors -----------------------------------------------------------------------------


def store_images(
    parts: Mapping[str, Sequence[Example]], path: Path, side: int, processor: Settings | None
) -> dict[str, Any]:
    """Write the splits' images beside a prepared file, each once, under its checksum.

    Args:
        path: of the prepared file.
        side: see ``image_side`` of a model.
        processor: settings of what makes tensors of them; None: plain pixels.

    Returns:
        What ``pixels_of`` needs: with ``side`` and ``processor`` the images' names by split.

    Raises:
        UserError: an image can't be read, or there is no room; the folder is removed then.
    """
    folder = path.with_suffix(".images")
    shutil.rmtree(folder, ignore_errors=True)
    ensure_folder(folder)
    try:
        with writing(folder):
            names = {split: [_store(e, folder) for e in part] for split, part in parts.items()}
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"side": side, "processor": processor, "names": names}


def _store(example: Example, folder: Path) -> str:
    assert example.image is not None
    name = example.image.digest[:32]
    if not (folder / name).exists():
        data = example.image.read()
        open_image(data, f"the image of '{example.text[:60]}'")
        (folder / name).write_bytes(data)
    return name


def pixels_of(facts: Mapping[str, Any], split: str, path: Path) -> Pixels:
    """What the images of a split add to a batch: ``pixel_values`` [n, 3, side, side] of bytes, or
    what the model's own image processor makes (for Qwen2-VL ``pixel_values`` [patches, width] and
    ``image_grid_thw`` [n, 3])."""
    folder, names, side = path.with_suffix(".images"), facts["names"][split], facts["side"]

    def plain(indices: list[int]) -> Batch:
        return {"pixel_values": torch.stack([_square(folder / names[i], side) for i in indices])}

    def processed(indices: list[int]) -> Batch:
        pictures = [shrunk(open_image((folder / names[i]).read_bytes()), side) for i in indices]
        made = image_processor(json.dumps(facts["processor"]))
        return dict(made(images=pictures, return_tensors="pt"))

    return processed if facts["processor"] else plain


@lru_cache(maxsize=2048)  # half a GiB at the largest default side
def _square(file: Path, side: int) -> torch.Tensor:
    picture = open_image(file.read_bytes(), str(file)).resize((side, side))
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(side, side, 3).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=2)
def image_processor(settings: str) -> Any:
    """What makes a model's tensors of images.

    Args:
        settings: JSON of ``{"folder": ...}`` of a transformers folder, or of sizes of Qwen2-VL's.

    Raises:
        UserError: there is none that works here.
    """
    found = json.loads(settings)
    if "folder" not in found:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

        return qwen2_vl.Qwen2VLImageProcessorPil(**found)
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(found["folder"], local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{found['folder']}: no image processor that works here ({first_line(error)})"
        ) from error


# --- in prompts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTokens:
    """How an image stands in a prompt of a model of Qwen2-VL's kind: one token for each square of
    patches, between two marks.

    Attributes:
        token, first, last: ids of the image's token and of the marks around it.
        side: see ``image_side`` of a model.
        processor: the model's image processor.
        settings: of the processor.
        counts: tokens of the images met so far, by digest.
    """

    token: int
    first: int
    last: int
    side: int
    processor: Any
    settings: Settings = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def shown(self, row: list[int], image: EncodedImage) -> list[int]:
        """A prompt with the image's tokens: where its template has one, or at its beginning."""
        cells = [self.token] * self._count(image)
        if self.token in row:
            place = row.index(self.token)
            return [*row[:place], *cells, *row[place + 1 :]]
        return [self.first, *cells, self.last, *row]

    def _count(self, image: EncodedImage) -> int:
        if image.digest not in self.counts:  # many questions are asked of one
            picture = shrunk(open_image(image.read()), self.side)
            patches = self.processor.get_number_of_image_patches(picture.height, picture.width)
            self.counts[image.digest] = int(patches) // self.processor.merge_size**2
        return self.counts[image.digest]


def image_tokens(model: ModelEntry, assets: Path) -> ImageTokens:
    """How a model of form ``image_text`` is shown an image.

    Raises:
        UserError: the weights are missing, or of a family whose images aren't known.
    """
    config, source = configuration(model, assets), model.source
    assert isinstance(source, Source)
    if isinstance(source, RandomSource):
        vision = config["vision_config"]
        settings = {ours: vision[theirs] for ours, theirs in SIZES.items() if theirs in vision}
    else:
        settings = {"folder": str(weights_folder(model, assets))}
    processor = image_processor(json.dumps(settings))
    if not all(mark in config for mark in MARKS) or not hasattr(processor, "merge_size"):
        raise UserError(
            f"model '{model.label}': images are known of models of Qwen2-VL's kind alone, whose "
            f"config.json holds {', '.join(MARKS)}"
        )
    token, first, last = (int(config[mark]) for mark in MARKS)
    return ImageTokens(token, first, last, source.image_side, processor, settings)
