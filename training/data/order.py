"""The order of the data and the seeds of all noise, as functions of (seed, step) alone."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator seeded by `key`, such as (seed, "noise", step): the one place where keys become seeds."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=seeded_generator("cpu", seed, "order", epoch))


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
    return torch.rand(batch_size, generator=seeded_generator("cpu", seed, "flip", step)) < 0.5


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
