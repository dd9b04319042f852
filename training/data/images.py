"""Image datasets: one split each, and what a run needs to know of both."""

import copy
import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from training.config import DataConfig, RunError
from training.data import columns, sources
from training.data.order import seeded_generator
from training.data.transform import TRANSFORM_VERSION, transform

MAX_HELD_OUT = 2000
SPLITS = ("train", "held_out")
FOREIGN_FORMATS = ("EPS", "WMF")  # to decode them Pillow hands the file to Ghostscript or to Windows


class ImageDataset(torch.utils.data.Dataset):
    """One split of a dataset: encoded images, which are decoded and transformed on access. Picklable.

    An item is asked for by a pair, `split[index, flip]`: `StepSampler` (order.py) decides which images are
    mirrored, so that this depends on (seed, step) alone. A DataLoader needs a sampler of such pairs.

    Args:
        dataset: rows whose image column is not decoded.
        image_column: the column of images: bytes, or a dict of "bytes" and "path".
        labels: int64 (rows,), or None for unlabelled images.
        name: the split's name, for messages.
        resolution, channels: see `transform`.
        folders: the folders that may hold files which rows name by paths; relative paths start at the first.
        captions: texts of every row, or None for images without captions.
        paired_column: another column of images, for `paired`.
    """

    nearest = False

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        labels: torch.Tensor | None,
        name: str,
        resolution: int,
        channels: int,
        folders: tuple[str, ...] = (),
        captions: list[tuple[str, ...]] | None = None,
        paired_column: str | None = None,
    ):
        self.all_captions, self.paired_column = captions, paired_column
        self.dataset, self.image_column, self.all_labels, self.name = dataset, image_column, labels, name
        self.resolution, self.channels, self.folders = resolution, channels, folders
        self.rows = torch.arange(len(dataset))  # the rows of `dataset` that this split consists of

    @property
    def labels(self) -> torch.Tensor | None:
        """The class of every image, int64 (len,), or None; read without decoding an image."""
        return None if self.all_labels is None else self.all_labels[self.rows]

    @property
    def captions(self) -> list[tuple[str, ...]] | None:
        """The captions of every image, at least one each, or None."""
        return self.all_captions and [self.all_captions[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, bool]) -> dict[str, torch.Tensor]:
        """The image at `(index, flip)`, mirrored if `flip`.

        Returns:
            "images" float32 (C, R, R) in [-1, 1], "indices" int64 (), and "class_labels" int64 () if the
            dataset has labels.

        Raises:
            RunError: the image cannot be read.
        """
        index, flip = item
        try:
            image = transform(self.raw(index), self.resolution, self.channels, flip, self.nearest)
        except Exception as error:  # Pillow's readers raise nearly every kind on broken files
            # One string, because PyTorch makes an error of a worker anew from its text.
            raise RunError(
                f"The image {self.name_of(index)} of split {self.name!r} cannot be read: {reason_of(error)}. "
                "Restore the file; or remove or touch it and start the same command again, with --data.scan "
                "full: all images are then looked at anew, and unreadable ones are left out."
            ) from error
        sample = {"images": image, "indices": torch.tensor(index)}
        if self.all_labels is not None:
            sample["class_labels"] = self.all_labels[self.rows[index]]
        return sample

    def encoded(self, index: int) -> bytes:
        """The picture's file. OSError or ValueError if there is none."""
        content, path = self._stored(index)
        if content is None and path is None:
            raise ValueError("the row has no image")
        content = _read_file(path, self.folders) if content is None else content
        if not content:
            raise ValueError("the file is empty")
        return content

    def raw(self, index: int) -> Image.Image:
        """The picture as it is stored, not yet decoded. OSError or ValueError if it cannot be opened."""
        return self.open(self.encoded(index))

    @staticmethod
    def open(content: bytes) -> Image.Image:
        """The picture of a file, not yet decoded. ValueError if it is none."""
        try:
            picture = Image.open(BytesIO(content))
        except UnidentifiedImageError as error:  # its own text holds a memory address
            raise ValueError("no image format that Pillow reads") from error
        if picture.format in FOREIGN_FORMATS:
            raise ValueError(f"{picture.format} is a format that other programs would have to read")
        return picture

    def name_of(self, index: int) -> str:
        """The image's name in messages: its path if it has one, else the split and the row."""
        return self._stored(index)[1] or f"{self.name}[{int(self.rows[index])}]"

    def subset(self, indices: torch.Tensor) -> "ImageDataset":
        """The split reduced to `indices`, in their order."""
        reduced = copy.copy(self)
        reduced.rows = self.rows[indices]
        return reduced

    def paired(self, nearest: bool = False) -> "ImageDataset":
        """The pictures in `paired_column` of the same rows; keeping their edges when resized if `nearest`."""
        other = copy.copy(self)
        other.image_column, other.nearest = self.paired_column, nearest
        return other

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        """The bytes and the path of an image; one of them may be None."""
        value = self.dataset[int(self.rows[index])][self.image_column]
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


def reason_of(error: Exception) -> str:
    """An error's kind and text without memory addresses: the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")[:500]


def _read_file(path: str, folders: tuple[str, ...]) -> bytes:
    """The content of a file below one of `folders`; links that lie there may lead elsewhere."""
    # Only the names count, not where links lead: who links a picture into the folder wants it, while a path
    # that came with the rows of a foreign dataset must not make private files a part of the training.
    path = os.path.normpath(os.path.join(folders[0] if folders else "", path))
    if not any(path.startswith(os.path.join(folder, "")) for folder in folders):
        raise ValueError(f"its path {path!r} leaves the dataset's folder")
    with open(path, "rb") as file:
        return file.read()


@dataclass
class ImageData:
    """The images of a run.

    `fingerprint` is a hash of their source and transform: of the files' names, sizes and times, or the Hub's
    commit, and the columns; once they are all scanned, of their bytes and classes, which a copy has too.
    `pairs` is one of the bytes of the paired pictures, once they are checked.
    """

    train: ImageDataset
    held_out: ImageDataset
    id2label: dict[int, str] | None
    fingerprint: str
    pairs: str | None = None

    @cached_property
    def maps(self) -> bool:
        """Whether the first paired pictures have a palette or few colours: label maps, drawings, masks."""
        pictures = map(self.train.paired().raw, range(min(8, len(self.train))))
        return all(picture.mode in ("1", "P") or picture.getcolors(32) for picture in pictures)

    def drop(self, unreadable: list[dict[str, Any]]) -> None:
        """Leave out these images (dicts of "split" and "index"); the order of the others stays."""
        for key in ("train", "held_out"):
            split = getattr(self, key)
            keep = torch.ones(len(split), dtype=torch.bool)
            keep[[entry["index"] for entry in unreadable if entry["split"] == key]] = False
            setattr(self, key, split.subset(keep.nonzero().flatten()))


def load_images(config: DataConfig, captioned: bool = False, paired_column: str | None = None) -> ImageData:
    """Find the images that `config` describes. Nothing is decoded yet.

    Args:
        captioned: whether they have captions.
        paired_column: a column of other pictures of the same scenes.

    Raises:
        RunError: the dataset, a split or a column does not exist or is ambiguous, or a label is no class.
    """
    splits, identity = sources.load_splits(config)
    train_name, held_out_name = sources.split_names(splits, config)
    rows = splits[train_name]
    images = columns.image_column(rows.features, config, paired_column)
    labels = columns.label_column(rows.features, config)
    captions = columns.caption_column(rows.features, config) if captioned else None
    names = None if labels is None else columns.class_names(rows, labels)
    chosen = images, labels, captions, names, config, paired_column
    train = _build_split(rows, train_name, *chosen)
    if held_out_name is None:
        train_rows, held_out_rows = _share(len(train), config)
        train, held_out = train.subset(train_rows), train.subset(held_out_rows)
    else:
        held_out = _build_split(splits[held_out_name], held_out_name, *chosen)
    if config.max_images is not None:
        train = _some(train, config.max_images)
        held_out = _some(held_out, max(1, config.max_images // 10))
    key = [identity, train_name, held_out_name, len(train), len(held_out), images, labels, names]
    key += [config.resolution, config.channels, TRANSFORM_VERSION]
    if config.scan == "sample":  # other images may then be left out: latents of a full scan are not theirs
        key += [config.scan]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return ImageData(train, held_out, None if names is None else dict(enumerate(names)), fingerprint)


def _some(split: ImageDataset, number: int) -> ImageDataset:
    """At most `number` images of a split, always the same, in their order."""
    order = torch.randperm(len(split), generator=seeded_generator("cpu", "some images", split.name))
    return split.subset(order[:number].sort().values)


def _build_split(
    rows: Dataset,
    name: str,
    images: str,
    labels: str | None,
    captions: str | None,
    names: list[str] | None,
    config: DataConfig,
    paired: str | None,
) -> ImageDataset:
    if missing := {images, labels, captions, paired} - {None, *rows.column_names}:
        raise RunError(
            f"Split {name!r} lacks the column {missing.pop()!r} of the training split; it has "
            f"{', '.join(rows.column_names)}. Choose another --data.test_split or column."
        )
    numbers = None
    if names is not None:
        numbers = torch.tensor(columns.class_numbers(rows, labels, names, name), dtype=torch.int64)
    texts = None if captions is None else columns.captions(rows, captions, name)
    pictures = list(dict.fromkeys(filter(None, (images, paired))))
    for column in pictures:
        if isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
    rows = rows.select_columns(pictures).with_format(None)  # a stored format would change what rows are
    size, folders = (config.resolution, config.channels), sources.folders_of(config)
    return ImageDataset(rows, images, numbers, name, *size, folders, texts, paired)


def _share(count: int, config: DataConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows to hold out, both ascending, the same whatever the seed of the run."""
    size = min(MAX_HELD_OUT, max(1, round(count * config.held_out)))
    if size >= count:
        raise RunError(f"{count} images are too few to hold out {size} (--data.dataset, --data.held_out)")
    order = torch.randperm(count, generator=seeded_generator("cpu", "held out"))
    return order[:-size].sort().values, order[-size:].sort().values
