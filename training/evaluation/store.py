"""Results on disk: computed batch by batch by all processes, continued after an interruption."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from training.config import RunError
from training.runtime.atomic import write_tensors
from training.runtime.signals import Interruption

Compute = Callable[[list[range]], Iterable[dict[str, Tensor]]]


@dataclass(frozen=True)
class BatchStore:
    """Tensors with a row per image, computed batch by batch by all processes and kept on disk.

    A stored batch is never computed again, so a killed evaluation continues. Batches do not depend on the
    number of processes: their results are equal to the bit.
    """

    accelerator: Accelerator
    folder: Path
    batch_size: int
    interruption: Interruption

    def compute(self, name: str, count: int, compute: Compute, title: str, without: str = "") -> dict:
        """Tensors of `count` images by name, read from disk where they are. Every process calls this.

        Args:
            name: of the subfolder, with a hash of whatever the results depend on; see `cache_key`.
            compute: yields the tensors of each of the given batches of image numbers, in their order.
            title: of the progress bar.
            without: a tensor to keep on disk only.

        Raises:
            Interrupted: after SIGTERM or SIGINT; the finished batches stay.
        """
        accelerator = self.accelerator
        missing = [batch for batch in self._batches(count) if not self._path(name, batch).exists()]
        accelerator.wait_for_everyone()  # all processes have listed the same files before one is written
        rank, processes = accelerator.process_index, accelerator.num_processes
        own = missing[rank::processes]
        # A sharded network must be called equally often by every process: the last call may be a repetition.
        rounds = -(-len(missing) // processes)
        calls = own + missing[: rounds - len(own)]
        done, quiet = count - sum(map(len, missing)), not (missing and accelerator.is_main_process)
        pause = 1 if sys.stderr.isatty() else 30
        bar = tqdm(total=count, initial=done, desc=title, unit="image", disable=quiet, mininterval=pause)
        for number, (batch, tensors) in enumerate(zip(calls, compute(calls), strict=True)):
            if number < len(own):
                path = self._path(name, batch)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, {key: value.cpu().contiguous() for key, value in tensors.items()})
            bar.update(min(len(batch) * processes, count - bar.n))
            self.interruption.check()
        bar.close()
        accelerator.wait_for_everyone()
        columns: dict[str, list[Tensor]] = {}
        for _, tensors in self.batches(name, count):
            for key in tensors.keys() - {without}:
                columns.setdefault(key, []).append(tensors[key])
        return {key: torch.cat(parts) for key, parts in columns.items()}

    def batches(self, name: str, count: int) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """The image numbers and the tensors of every batch, read from disk one after the other."""
        for batch in self._batches(count):
            path = self._path(name, batch)
            try:
                yield batch, load_file(path)
            except (OSError, SafetensorError) as error:
                raise RunError(f"{path} is damaged ({error}): delete it to compute it again") from error

    def _batches(self, count: int) -> list[range]:
        starts = range(0, count, self.batch_size)
        return [range(start, min(start + self.batch_size, count)) for start in starts]

    def _path(self, name: str, batch: range) -> Path:
        return self.folder / name / f"{batch.start:07d}-{batch.stop:07d}.safetensors"


def cache_key(**parts) -> str:
    """A short hash of everything that a stored result depends on."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:12]
