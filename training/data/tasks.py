"""Tasks in training: arguments of a call, made of the images, with all that is random in them.

Masks, degradations and noise are functions of (seed, step, row of the global batch): N processes and a
resumed run draw the same.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm_pipeline.pipeline import Task, normalize_latents, to_pixels
from training.config import DenoiserConfig, RunError
from training.data.images import ImageData
from training.data.latents import LatentDataset, encode
from training.data.order import StepSampler, seeded_generator

MAX_LEVEL = 0.35  # deviation of the noise in the latents of superres, at most
RANDOM = ("inpaint", "deblur", "enhance")  # encoded when they are needed
TASK_CACHE = "task"  # folder of the other tasks' latents, in that of the images'


def task_of(config: DenoiserConfig, data: ImageData | None = None) -> Task | None:
    """The task of `--denoiser.task`, or None.

    Args:
        data: decides whether the pictures of a column keep their edges; False without.
    """
    if config.task is None:
        return None
    kind, _, value = config.task.partition(":")
    numbers = {}
    if kind == "superres":
        numbers = {"factor": int(value or 4)}
    elif kind == "column":
        numbers = {"column": value, "nearest": data is not None and data.maps}
    return Task({"kind": kind} | numbers)


def cached(task: Task | None) -> bool:
    """Whether the conditions of a task are encoded once: only noise in their latents is random."""
    return task is not None and task.kind not in RANDOM


def paired_column(config: DenoiserConfig) -> str | None:
    """The column of `--denoiser.task column:NAME`, or None."""
    task = task_of(config)
    return task.config.get("column") if task else None


class TaskImages(Dataset):
    """Arguments of a call, made of the images of one split: "image" `(C, R, R)` in [0, 1], and for inpainting
    "mask_image" `(1, R, R)` bool. Picklable.

    An item is asked for by (index, flip, *key): equal keys draw the same mask or degradation.
    """

    def __init__(self, task: Task, data: ImageData, split: str):
        self.task, self.originals = task, getattr(data, split)
        # What these pictures are made of: whatever else is computed from them is kept under it.
        self.key = {"task": task.config, "data": data.fingerprint, "pairs": data.pairs, "split": split}
        column = task.kind == "column"
        self.images = self.originals.paired(task.config["nearest"]) if column else self.originals

    def __getitem__(self, item: tuple) -> dict[str, Tensor]:
        index, flip, *key = item
        image = self.images[index, flip]["images"] / 2 + 0.5
        if cached(self.task):
            return {"image": image}
        generator = seeded_generator("cpu", *key)
        if self.task.kind == "inpaint":
            return {"image": image, "mask_image": draw_hole(image.shape[-1], generator)}
        return {"image": degrade(image, generator, everything=self.task.kind == "enhance")}


class ShownImages(TaskImages):
    """The conditions as images `(C, R, R)` in [-1, 1], "images" of an item, where nothing is random."""

    def __getitem__(self, item: tuple) -> dict[str, Tensor]:
        return {"images": shown(self.task, default_collate([super().__getitem__(item)]))[0] * 2 - 1}


def shown(task: Task, batch: dict[str, Tensor]) -> Tensor:
    """The conditions as images `(N, C, R, R)` in [0, 1], of a batch of `TaskImages`."""
    return task.shown(batch["image"], batch["image"].shape[-2:], batch.get("mask_image"))


def draw_hole(size: int, generator: torch.Generator) -> Tensor:
    """A random hole, `(1, size, size)` bool: the whole image in a quarter, else boxes or strokes.

    As for LaMa (arXiv:2109.07161): up to 3 boxes, whose sides are an eighth to two thirds of the image, or 3
    brush strokes of up to 5 segments, a twentieth to a fifth of the image wide.
    """
    kind, count, *numbers = torch.rand(64, generator=generator).tolist()
    if kind < 0.25:
        return torch.ones(1, size, size, dtype=torch.bool)
    picture, numbers = Image.new("1", (size, size)), iter(numbers)
    draw = ImageDraw.Draw(picture)
    for _ in range(1 + int(3 * count)):
        x, y = next(numbers) * size, next(numbers) * size
        if kind < 0.5:
            half_width, half_height = (size * (1 / 16 + 13 / 48 * next(numbers)) for _ in range(2))
            draw.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=1)
            continue
        width = max(1, round(size * (0.05 + 0.15 * next(numbers))))
        for _ in range(1 + int(5 * next(numbers))):
            length, angle = size * (0.1 + 0.4 * next(numbers)), 2 * math.pi * next(numbers)
            end = x + length * math.cos(angle), y + length * math.sin(angle)
            draw.line((x, y, *end), fill=1, width=width)
            x, y = end
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
    return to_pixels(picture)[0] > 0


def degrade(image: Tensor, generator: torch.Generator, everything: bool) -> Tensor:
    """A worse copy of an image `(C, R, R)` in [0, 1], in 8 bits: blurred, and if `everything` also of fewer
    pixels, noisy and compressed as JPEG, in this order (arXiv:2107.10833, its first round)."""
    blur, pixels, noise, quality = torch.rand(4, generator=generator).tolist()
    size = image.shape[-1]
    radius = size / 64 * (0.2 + 1.5 * blur if everything else 0.5 + 2.5 * blur)
    picture = to_picture(image).filter(ImageFilter.GaussianBlur(radius))
    if everything:
        small = max(1, round(size / (1 + 3 * pixels)))
        picture = picture.resize((small, small), Image.Resampling.BILINEAR)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        grain = torch.randn(image.shape, generator=generator) * 0.1 * noise
        file = BytesIO()
        to_picture(to_pixels(picture)[0] + grain).save(file, "JPEG", quality=round(30 + 65 * quality))
        picture = Image.open(file)
    return to_pixels(picture)[0]


def to_picture(image: Tensor) -> Image.Image:
    """A picture of 8 bits, of an image `(1 or 3, h, w)` in [0, 1]; values beyond are clipped."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def image_conditions(
    task: Task | None,
    data: ImageData,
    split: str,
    autoencoder: nn.Module,
    folder: Path,
    resident: str,
) -> "ImageConditions | None":
    """The image conditions of a split, "train" or "held_out"; None without a task.

    Args:
        autoencoder: on the device of the results.
        folder, resident: as for `LatentDataset`.

    Raises:
        RunError: the latents of the task are not there.
    """
    if task is None:
        return None
    device = next(autoencoder.parameters()).device
    cache = None
    if cached(task):
        manifest = folder / TASK_CACHE / "manifest.json"
        stored = (
            json.loads(manifest.read_text(encoding="utf-8"))["key"]["task"] if manifest.exists() else None
        )
        if stored != task.config:
            raise RunError(
                f"{manifest.parent} has no latents of {task.config}: run training/encode_latents.py"
            )
        cache = LatentDataset(folder / TASK_CACHE, split, autoencoder, device, resident)
    return ImageConditions(TaskImages(task, data, split), autoencoder, cache, device)


@dataclass(frozen=True)
class ImageConditions:
    """The field `concat` of the conditions of one split.

    Args:
        autoencoder: its config holds the latents' statistics; it encodes what is random.
        cache: latents of what is shown, where nothing is random.
        device: of the results.
    """

    images: TaskImages
    autoencoder: nn.Module
    cache: LatentDataset | None
    device: torch.device

    def of(self, indices: Tensor, *key: int | str) -> Tensor:
        """`(N, channels, h, w)` of images `indices` `(N,)`, not mirrored, with what (*key, index) draws.

        Superres has no noise here, as in a call.
        """
        if self.cache:
            return self.images.task.concat(self._cached(indices, torch.zeros_like(indices)))
        items = [self.images[index, False, *key, index] for index in indices.tolist()]
        return self._encoded(default_collate(items))

    def batches(self, sampler: StepSampler, **options) -> Iterator[Tensor]:
        """`(n, channels, h, w)` of each batch of a sampler of this split.

        Args:
            options: of the DataLoader that draws masks and degradations.
        """
        parts = zip(sampler, product(sampler.steps, sampler.slices), strict=True)
        if not self.cache:
            items = (_with_keys(pairs, sampler.seed, *part) for pairs, part in parts)
            yield from map(self._encoded, DataLoader(self.images, batch_sampler=items, **options))
            return
        for pairs, part in parts:
            latents = self._cached(*torch.tensor(pairs, dtype=torch.int64).T)
            noise = self._noise(latents.shape, sampler, *part) if self.images.task.kind == "superres" else {}
            yield self.images.task.concat(latents, **noise)

    def _noise(self, shape: tuple[int, ...], sampler: StepSampler, step: int, rows: slice) -> dict:
        generator = seeded_generator(self.device, sampler.seed, "task", step)
        options = {"generator": generator, "device": self.device}
        level = MAX_LEVEL * torch.rand(sampler.batch_size, **options)
        return {"level": level[rows], "noise": torch.randn(sampler.batch_size, *shape[1:], **options)[rows]}

    def _cached(self, indices: Tensor, flips: Tensor) -> Tensor:
        return self.cache.batch(indices, flips, torch.empty(0))

    @torch.no_grad()
    def _encoded(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: values.to(self.device) for name, values in batch.items()}
        latents = encode(self.autoencoder, shown(self.images.task, batch) * 2 - 1)[0]
        return self.images.task.concat(normalize_latents(self.autoencoder, latents), batch.get("mask_image"))


def _with_keys(pairs: list[tuple[int, bool]], seed: int, step: int, rows: slice) -> list[tuple]:
    numbered = zip(pairs, range(rows.start, rows.stop), strict=True)
    return [(*pair, seed, "task", step, row) for pair, row in numbered]
