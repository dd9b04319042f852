"""The images: scanned, turned into tensors, and served in an order that is a function of seed and step."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from training import sources
from training.config import DataConfig

TRANSFORM_VERSION = 1  # raise it when `transform` changes: caches made with the old one are then rebuilt
MAX_HELD_OUT = 2000
FEW_IMAGES = 1000  # below, networks of any use here reproduce their training images
BAR_FROM = 5000  # images worth a progress bar


class ImageSplit(torch.utils.data.Dataset):
    """One split of a data set: encoded images, opened and transformed on access. Picklable.

    Args:
        dataset: rows whose image column is not decoded.
        image_column: the column of images: bytes, or a dict of "bytes" and "path".
        labels: int64 (rows,), or None for unlabelled images.
        name: the split's name, for messages.
        resolution, channels: see `transform`.
        rows: int64 (len,), the rows this split consists of. All if None.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        labels: torch.Tensor | None,
        name: str,
        resolution: int,
        channels: int,
        rows: torch.Tensor | None = None,
    ):
        self.dataset, self.image_column, self.all_labels, self.name = dataset, image_column, labels, name
        self.resolution, self.channels = resolution, channels
        self.rows = torch.arange(len(dataset)) if rows is None else rows

    @property
    def labels(self) -> torch.Tensor | None:
        """The class of every image, int64 (len,), or None; read without decoding an image."""
        return None if self.all_labels is None else self.all_labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, bool]) -> dict[str, torch.Tensor]:
        """The image at (index, flip): "images" float32 (C, R, R) in [-1, 1], "indices" int64 (), and
        "class_labels" int64 () if the data set has labels."""
        index, flip = item
        sample = {
            "images": transform(self.raw(index), self.resolution, self.channels, flip),
            "indices": torch.tensor(index),
        }
        if self.all_labels is not None:
            sample["class_labels"] = self.all_labels[self.rows[index]]
        return sample

    def raw(self, index: int) -> Image.Image:
        """The picture as it is stored, not yet decoded. OSError or ValueError if it cannot be opened."""
        encoded, path = self._stored(index)
        content = Path(path).read_bytes() if encoded is None else encoded
        if not content:
            raise ValueError("the file is empty")
        try:
            return Image.open(BytesIO(content))
        except UnidentifiedImageError as error:  # its own text holds a memory address
            raise ValueError("no image format that Pillow reads") from error

    def name_of(self, index: int) -> str:
        """What to call the image in messages: its path if it has one, else the split and the row."""
        return self._stored(index)[1] or f"{self.name}[{int(self.rows[index])}]"

    def subset(self, indices: torch.Tensor) -> "ImageSplit":
        """The split reduced to `indices`, in their order."""
        return ImageSplit(
            self.dataset,
            self.image_column,
            self.all_labels,
            self.name,
            self.resolution,
            self.channels,
            self.rows[indices],
        )

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        value = self.dataset[int(self.rows[index])][self.image_column]
        if value is None:
            raise ValueError("the row has no image")
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


@dataclass
class ImageData:
    """The images of a run; `fingerprint` is a hash of their source, columns and transform."""

    train: ImageSplit
    held_out: ImageSplit
    id2label: dict[int, str] | None
    fingerprint: str

    def keep_readable(self, scan: "Scan") -> None:
        """Leave out the images that `scan` could not read; the order of the others stays."""
        for key in ("train", "held_out"):
            split = getattr(self, key)
            keep = torch.ones(len(split), dtype=torch.bool)
            keep[[entry["index"] for entry in scan.unreadable if entry["split"] == key]] = False
            setattr(self, key, split.subset(keep.nonzero().flatten()))


def load_images(config: DataConfig) -> ImageData:
    """Find the images that `config` describes. Nothing is decoded yet.

    Raises:
        ValueError: the data set, a split or a column does not exist or is ambiguous, or a label is no class.
    """
    splits, identity = sources.load_splits(config)
    train_name, held_out_name = sources.split_names(splits, config)
    rows = splits[train_name]
    images = sources.image_column(rows.features, config)
    labels = sources.label_column(rows.features, config)
    names = None if labels is None else sources.class_names(rows, labels)
    train = _build_split(rows, train_name, images, labels, names, config)
    if held_out_name is None:
        train_rows, held_out_rows = _share(len(train), config)
        train, held_out = train.subset(train_rows), train.subset(held_out_rows)
    else:
        held_out = _build_split(splits[held_out_name], held_out_name, images, labels, names, config)
    key = [identity, train_name, held_out_name, len(train), len(held_out), images, labels, names]
    key += [config.resolution, config.channels, TRANSFORM_VERSION]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return ImageData(train, held_out, None if names is None else dict(enumerate(names)), fingerprint)


def _build_split(
    rows: Dataset, name: str, images: str, labels: str | None, names: list[str] | None, config: DataConfig
) -> ImageSplit:
    if missing := {images, labels} - {None, *rows.column_names}:
        raise ValueError(
            f"Split {name!r} lacks the column {missing.pop()!r} of the training split; it has "
            f"{', '.join(rows.column_names)}. Choose another --data.test_split or column."
        )
    numbers = None
    if names is not None:
        numbers = torch.tensor(sources.class_numbers(rows, labels, names, name), dtype=torch.int64)
    if isinstance(rows.features[images], ImageFeature):
        rows = rows.cast_column(images, ImageFeature(decode=False))
    rows = rows.select_columns([images])
    return ImageSplit(rows, images, numbers, name, config.resolution, config.channels)


def _share(count: int, config: DataConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows to hold out, both ascending, the same whatever the seed of the run."""
    if not 0 < config.held_out < 1:
        raise ValueError(f"--data.held_out must lie between 0 and 1, not {config.held_out}")
    size = min(MAX_HELD_OUT, max(1, round(count * config.held_out)))
    if size >= count:
        raise ValueError(f"{count} images are too few to hold out {size} (--data.dataset, --data.held_out)")
    order = torch.randperm(count, generator=generator("cpu", "held out"))
    return order[:-size].sort().values, order[-size:].sort().values


def transform(picture: Image.Image, resolution: int, channels: int, flip: bool) -> torch.Tensor:
    """What a network sees of a picture: turned as EXIF says, on white, resized, its centre cropped.

    Args:
        picture: any mode; the first frame counts. It may be turned and decoded at reduced size.
        resolution: height and width R of the result. A picture of that size is not resampled.
        channels: 1 (grey) or 3 (RGB).
        flip: mirror left and right.

    Returns:
        float32 (channels, R, R) in [-1, 1].

    Raises:
        ValueError: deep grey values out of range. OSError and others: Pillow cannot decode the file.
    """
    picture.draft(None, (2 * resolution, 2 * resolution))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
    ImageOps.exif_transpose(picture, in_place=True)
    picture = _to_eight_bits(picture, "L" if channels == 1 else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == resolution:
        picture = picture.crop(box)
    else:
        size = (resolution, resolution)
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(picture).reshape(resolution, resolution, channels).transpose(2, 0, 1)      # (C, R, R)
    pixels = (pixels[..., ::-1] if flip else pixels).astype(np.float32, order="C")
    return torch.from_numpy(pixels / np.float32(127.5) - np.float32(1))


def _to_eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # Pillow itself would clip these at 255
        return Image.fromarray(_scale_grey(np.asarray(picture), picture.mode)).convert(mode)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _scale_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values as uint8: integers range to 65,535, floats to the next of 1, 255 and 65,535."""
    values = values.astype(np.float64)
    top = 65535
    if mode == "F":
        top = next((limit for limit in (1, 255) if values.max() <= limit), top)
    if not (values.min() >= 0 and values.max() <= top):  # so written, NaN is refused too
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}, not within 0..{top}")
    return np.round(values * (255 / top)).astype(np.uint8)


@dataclass
class Scan:
    """What a full look at the images found, in JSON's types: `Scan(**asdict(scan))` is the same scan.

    `counts` are the readable images of "train" and "held_out", `sizes` the 1,000 most frequent as
    "WIDTHxHEIGHT", `shorter_sides` the least, median and largest, `enlarged` how many are smaller than the
    resolution, `classes` the training images by class name; the dicts of `unreadable` have the keys "split",
    "index", "name" and "reason".
    """

    resolution: int
    counts: dict[str, int]
    sizes: dict[str, int]
    shorter_sides: list[int]
    enlarged: int
    modes: dict[str, int]
    classes: dict[str, int] | None
    unreadable: list[dict[str, Any]]

    def describe(self) -> str:
        """The lines a person reads before a run: what there is, and what is wrong with it."""
        train, total = self.counts["train"], sum(self.counts.values())
        least, median, largest = self.shorter_sides
        lines = [f"Images: {train:,} to train on, {self.counts['held_out']:,} held out"]
        lines += [f"Sizes: {_listing(self.sizes)}; shorter side {least} to {largest}, median {median}"]
        lines += [f"Modes: {_listing(self.modes)}"]
        lines += ["Classes: none" if self.classes is None else f"Classes: {_listing(self.classes)}"]
        if self.enlarged:
            smaller = f"{self.enlarged:,} of {total:,} images are below --data.resolution {self.resolution}"
            lines += [f"Warning: {smaller} and will be enlarged"]
        if train < FEW_IMAGES:
            lines += [f"Warning: {train:,} images: expect copies of the training images"]
        if self.unreadable:
            lines += [f"Warning: {len(self.unreadable):,} images cannot be read and are left out:"]
            lines += [f"  {entry['name']}: {entry['reason']}" for entry in self.unreadable[:10]]
            lines += ["  ..."] if len(self.unreadable) > 10 else []
        return "\n".join(lines)


def _listing(counts: dict[str, int], most: int = 10) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:most])
    return shown + (f" and {len(counts) - most:,} more" if len(counts) > most else "")


class _Inspection(torch.utils.data.Dataset):
    """Every image of a split as its ((width, height), mode), or the reason why it cannot be used."""

    def __init__(self, split: ImageSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[tuple[int, int], str] | str:
        try:
            picture = self.split.raw(index)
            found = picture.size, picture.mode
            transform(picture, self.split.resolution, self.split.channels, False)
        except Exception as error:  # Pillow's readers raise nearly every kind on broken files
            return f"{type(error).__name__}: {error}"
        return found


def scan(data: ImageData, num_workers: int = 0) -> Scan:
    """Read, decode and transform every image once; a progress bar shows for larger sets.

    Raises:
        ValueError: no image of a split can be used.
    """
    found, unreadable, counts, classes = [], [], {}, None
    for key, split in (("train", data.train), ("held_out", data.held_out)):
        loader = DataLoader(_Inspection(split), 64, num_workers=num_workers, collate_fn=list)
        every = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file keeps every line
        bar = tqdm(loader, f"scanning {split.name}", mininterval=every, disable=len(split) < BAR_FROM)
        results = [result for batch in bar for result in batch]
        bad = {index: reason for index, reason in enumerate(results) if isinstance(reason, str)}
        for index, reason in bad.items():
            unreadable.append({"split": key, "index": index, "name": split.name_of(index), "reason": reason})
        counts[key] = len(split) - len(bad)
        if counts[key] == 0:
            first = f"{split.name_of(0)}: {bad[0]}" if bad else "it is empty"
            raise ValueError(f"No {key} image of split {split.name!r} can be read (--data.dataset); {first}")
        if key == "train" and data.id2label is not None:
            names = [data.id2label[label] for i, label in enumerate(split.labels.tolist()) if i not in bad]
            classes = {name: 0 for name in data.id2label.values()} | Counter(names)
        found += [result for index, result in enumerate(results) if index not in bad]
    sides = sorted(min(size) for size, _ in found)
    sizes = Counter(f"{width}x{height}" for (width, height), _ in found)
    return Scan(
        resolution=data.train.resolution,
        counts=counts,
        sizes=dict(sizes.most_common(1000)),
        shorter_sides=[sides[0], median_low(sides), sides[-1]],
        enlarged=sum(side < data.train.resolution for side in sides),
        modes=dict(Counter(mode for _, mode in found).most_common()),
        classes=classes,
        unreadable=unreadable,
    )


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by `key`, such as (seed, "noise", step): the one place where keys become seeds."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator("cpu", seed, "order", epoch))


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> torch.Tensor:
    """The global batch of a step, int64 (batch_size,) below `count`: positions [step * batch_size, ...) of an
    endless sequence of permutations, each a function of seed and epoch alone. No earlier step is replayed."""
    position, end, parts = step * batch_size, (step + 1) * batch_size, []
    while position < end:
        epoch, offset = divmod(position, count)
        parts.append(_epoch(seed, epoch, count)[offset : offset + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


def batch_flips(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """Which images of the global batch of a step are mirrored: bool (batch_size,), half on average."""
    return torch.rand(batch_size, generator=generator("cpu", seed, "flip", step)) < 0.5


def slice_of_batch(
    batch_size: int, process_index: int, num_processes: int, accumulation: int, micro: int
) -> slice:
    """Part of the global batch that a process computes as its micro-batch `micro` of `accumulation`.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """
    size, rest = divmod(batch_size, num_processes * accumulation)
    if rest or not size:
        raise ValueError(
            f"A batch_size of {batch_size} cannot be cut into {num_processes} processes x {accumulation} "
            "gradient_accumulation_steps of equal size. Change the stage's batch_size (such as "
            "--autoencoder.batch_size), its gradient_accumulation_steps or the number of processes."
        )
    start = (process_index * accumulation + micro) * size
    return slice(start, start + size)


class StepSampler(Sampler[list[tuple[int, bool]]]):
    """A batch sampler: one list of (index, flip) a micro-batch of this process, for steps start to stop - 1.

    Raises:
        ValueError: see `slice_of_batch`.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        flips: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
    ):
        self.count, self.batch_size, self.seed, self.flips = count, batch_size, seed, flips
        self.steps = range(start, stop)
        self.slices = [
            slice_of_batch(batch_size, process_index, num_processes, accumulation, micro)
            for micro in range(accumulation)
        ]

    def __len__(self) -> int:
        return len(self.steps) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for step in self.steps:
            indices = batch_indices(self.seed, step, self.batch_size, self.count)
            flips = torch.zeros(self.batch_size, dtype=torch.bool)
            if self.flips:
                flips = batch_flips(self.seed, step, self.batch_size)
            for part in self.slices:
                yield list(zip(indices[part].tolist(), flips[part].tolist(), strict=True))
