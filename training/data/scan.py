"""A look at the images before the first step: their sizes, modes and classes, and which cannot be read."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.config import RunError
from training.data.images import ImageData, ImageDataset, reason_of
from training.data.transform import TRANSFORM_VERSION, transform

FEW_IMAGES = 1000  # below, networks of any use here reproduce their training images
MANY_IMAGES = 5000  # worth a progress bar, and the start of several processes
SAMPLE_SIZE = 2000  # images of each split that --data.scan sample looks at
ORIENTATION = 0x0112  # EXIF: above 4 the sides are exchanged
SAME_SHAPE = 0.03  # difference of width / height that rounding explains


@dataclass
class Scan:
    """Result of a scan, in JSON's types: `Scan(**asdict(scan))` is the same scan.

    `counts` are the images of "train" and "held_out" without the unreadable ones, `sizes` the 1,000 most
    frequent as "WIDTHxHEIGHT", `shorter_sides` the least, median and largest, `enlarged` how many are smaller
    than the resolution, `classes` the training images by class name; the dicts of `unreadable` have the keys
    "split", "index", "name" and "reason". `sampled` is the number of images looked at, 0 for all; then
    `fingerprint` is the SHA-256 of the usable images, their classes and the transform, else None.
    """

    resolution: int
    counts: dict[str, int]
    sizes: dict[str, int]
    shorter_sides: list[int]
    enlarged: int
    modes: dict[str, int]
    classes: dict[str, int] | None
    unreadable: list[dict[str, Any]]
    sampled: int = 0
    fingerprint: str | None = None

    def describe(self) -> str:
        """The lines a person reads before a run: the images' properties, and warnings."""
        train, total = self.counts["train"], self.sampled or sum(self.counts.values())
        least, median, largest = self.shorter_sides
        lines = [f"Images: {train:,} to train on, {self.counts['held_out']:,} held out"]
        if self.sampled:
            lines += [
                f"Scanned: {self.sampled:,} of these, evenly spread (--data.scan sample); sizes, modes and "
                "unreadable images are of this sample"
            ]
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
    """Images of a split as ((width, height), mode) and SHA-256, or the reason why they cannot be used."""

    def __init__(self, split: ImageDataset):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[tuple[tuple[int, int], str], bytes] | str:
        split = self.split
        try:
            content = split.encoded(index)
            picture = split.open(content)
            found = picture.size, picture.mode
            transform(picture, split.resolution, split.channels, False)
        except Exception as error:  # Pillow's readers raise nearly every kind on broken files
            return reason_of(error)
        return found, hashlib.sha256(content).digest()


class _PairInspection(_Inspection):
    """Paired pictures of a split as SHA-256, or the reason why they cannot be used."""

    def __getitem__(self, index: int) -> bytes | str:
        try:
            content = self.split.paired().encoded(index)
            image, other = self.split.raw(index), self.split.open(content)
            transform(other, self.split.resolution, self.split.channels, False)  # it is upright afterwards
        except Exception as error:
            return reason_of(error)
        width, height = image.size[::-1] if image.getexif().get(ORIENTATION, 1) > 4 else image.size
        if abs(width * other.height - height * other.width) > SAME_SHAPE * width * other.height:
            return f"it is {other.width}x{other.height}, its image {width}x{height}: another shape"
        return hashlib.sha256(content).digest()


def check_pairs(
    data: ImageData, num_workers: int = 0, worker_init_fn: Callable[[int], None] | None = None
) -> str:
    """The SHA-256 of the pictures in the paired column.

    Raises:
        RunError: one is missing, unreadable, or of another shape than its image.
    """
    fingerprint = hashlib.sha256()
    for split in (data.train, data.held_out):
        bad = {}
        for digest in _inspect(_PairInspection(split), range(len(split)), bad, num_workers, worker_init_fn):
            fingerprint.update(digest)
        if bad:
            shown = "".join(f"\n  {split.name_of(index)}: {bad[index]}" for index in list(bad)[:10])
            raise RunError(
                f"--denoiser.task column:{split.paired_column}: {len(bad):,} of {len(split):,} pictures of "
                f"split {split.name!r} cannot be paired; mend or remove these rows:{shown}"
            )
    return fingerprint.hexdigest()


def scan(
    data: ImageData,
    extent: str = "full",
    num_workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Scan:
    """Read, decode and transform every image once, or some of each split if `extent` is "sample".

    A large set is divided among `num_workers` processes, or if that is 0 among one process per core that this
    process may use; the result does not depend on their number.

    Raises:
        RunError: no image of a split can be used.
    """
    found, unreadable, counts, sampled, classes = Counter(), [], {}, 0, None
    settings = [data.train.resolution, data.train.channels, data.id2label, TRANSFORM_VERSION]
    fingerprint = hashlib.sha256(json.dumps(settings).encode())
    for key, split in (("train", data.train), ("held_out", data.held_out)):
        indices = range(len(split))
        if extent == "sample" and len(split) > SAMPLE_SIZE:
            indices = [number * (len(split) - 1) // (SAMPLE_SIZE - 1) for number in range(SAMPLE_SIZE)]
        sampled += len(indices)
        bad = {}
        for kind, digest in _inspect(_Inspection(split), indices, bad, num_workers, worker_init_fn):
            found[kind] += 1
            fingerprint.update(digest)
        for index, reason in bad.items():
            unreadable.append({"split": key, "index": index, "name": split.name_of(index), "reason": reason})
        counts[key] = len(split) - len(bad)
        fingerprint.update(str(counts[key]).encode())
        if split.labels is not None:
            fingerprint.update(np.delete(split.labels.numpy(), list(bad)).tobytes())
        if len(bad) == len(indices):
            first = f"{split.name_of(indices[0])}: {bad[indices[0]]}" if bad else "it is empty"
            raise RunError(f"No {key} image of split {split.name!r} can be read (--data.dataset); {first}")
        if key == "train" and data.id2label is not None:
            names = [data.id2label[label] for i, label in enumerate(split.labels.tolist()) if i not in bad]
            classes = {name: 0 for name in data.id2label.values()} | Counter(names)
    some = sampled < len(data.train) + len(data.held_out)
    sides, sizes, modes = Counter(), Counter(), Counter()
    for (size, mode), count in found.items():
        sides[min(size)] += count
        sizes["{}x{}".format(*size)] += count
        modes[mode] += count
    return Scan(
        resolution=data.train.resolution,
        counts=counts,
        sizes=dict(sizes.most_common(1000)),
        shorter_sides=[min(sides), median_low(sides.elements()), max(sides)],
        enlarged=sum(count for side, count in sides.items() if side < data.train.resolution),
        modes=dict(modes.most_common()),
        classes=classes,
        unreadable=unreadable,
        sampled=sampled if some else 0,
        fingerprint=None if some else fingerprint.hexdigest(),
    )


def _inspect(
    dataset: _Inspection,
    indices: Sequence[int],
    bad: dict[int, str],
    num_workers: int,
    worker_init_fn: Callable | None,
) -> Iterator[Any]:
    """What an inspection found, in the order of `indices`; `bad` gets the reasons of what cannot be used."""
    many = len(indices) >= MANY_IMAGES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (num_workers or (cores if cores > 1 else 0)) if many else 0
    options = {"num_workers": workers, "worker_init_fn": worker_init_fn, "collate_fn": list}
    loader = DataLoader(dataset, 64, sampler=indices, **options)
    every = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file keeps every line
    bar = tqdm(loader, f"scanning {dataset.split.name}", mininterval=every, disable=not many)
    results = (result for batch in bar for result in batch)
    for index, result in zip(indices, results, strict=True):
        if isinstance(result, str):
            bad[index] = result
        else:
            yield result
