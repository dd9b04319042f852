"""A full look at the images before anything is trained on them."""

import sys
from collections import Counter
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.data.images import ImageData, ImageDataset, reason_of, transform

FEW_IMAGES = 1000  # below, networks of any use here reproduce their training images
BAR_FROM = 5000  # images worth a progress bar


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

    def __init__(self, split: ImageDataset):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[tuple[int, int], str] | str:
        try:
            picture = self.split.raw(index)
            found = picture.size, picture.mode
            transform(picture, self.split.resolution, self.split.channels, False)
        except Exception as error:  # Pillow's readers raise nearly every kind on broken files
            return reason_of(error)
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
