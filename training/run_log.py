"""The log of a stage, for people and for programs."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import atomic_write
from training.config import OptimizationConfig
from training.run import Run


class RunLog:
    """The log of one stage: a progress bar, `metrics.jsonl` and the trackers.

    Values are summed on the device and read only when a line is written, so logging does not stall it.
    Reopening drops lines beyond `step`, which the resumed run writes again.

    Args:
        stage: name in the lines.
        config: cadence and number of steps.
        record: the restored checkpoint's record, with "step" and, after the first save, "seconds".
    """

    def __init__(self, run: Run, stage: str, config: OptimizationConfig, record: dict):
        self.run = run
        self.stage = stage
        self.config = config
        self.step = record["step"]
        self.path = run.folder / "metrics.jsonl"
        self.earlier_seconds = record.get("seconds", 0.0)
        self.started = time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.waiting = 0.0
        self.count, self.marked = 0, self.started
        if run.accelerator.is_main_process and self.path.exists():
            kept = filter(self._stands, self.path.read_text().splitlines(keepends=True))
            atomic_write(self.path, "".join(kept).encode())
        self.bar = tqdm(
            total=config.max_steps,
            initial=record["step"],
            desc=stage,
            unit="step",
            disable=not run.accelerator.is_main_process,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        self._tracked(run.accelerator.init_trackers, f"{run.folder.name}-{stage}")

    def _stands(self, text: str) -> bool:
        """Whether a line was written before the checkpoint; a line torn by a crash was not."""
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            return False
        return line["stage"] != self.stage or line["step"] <= self.step

    @property
    def seconds(self) -> float:
        """Time spent in this stage, over all its continuations."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def wait(self, function: Callable, *arguments):
        """Call `function` and count its time as waiting for data."""
        begun = time.perf_counter()
        result = function(*arguments)
        self.waiting += time.perf_counter() - begun
        return result

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one optimizer step."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()

    def step_done(self, step: int) -> None:
        """Advance the bar; write a line of means every `log_every` steps and before every checkpoint.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite; no checkpoint holds it.
        """
        self.step = step
        self.bar.update()
        self.count += 1
        if not (self.due(self.config.log_every) or self.due(self.config.checkpoint_every)):
            return
        keys = sorted(self.sums)
        means = self.run.accelerator.reduce(
            torch.stack([self.sums[key] / self.count for key in keys]), "mean"
        )
        means = dict(zip(keys, means.tolist(), strict=True))
        if bad := {key: value for key, value in means.items() if not math.isfinite(value)}:
            raise FloatingPointError(
                f"{self.stage}: not finite in steps {step - self.count + 1} to {step}: {bad} "
                f"(mixed_precision {self.run.accelerator.mixed_precision}); the last good checkpoint is in "
                f"{self.run.folder / self.stage}. Lower --{self.stage}.learning_rate or set "
                "--mixed_precision no"
            )
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        elapsed = time.perf_counter() - self.marked
        speed = {
            "learning_rate": self.config.learning_rate_at(step - 1),
            "images_per_second": round(self.count * self.config.batch_size / elapsed, 2),
            "data_wait": round(self.waiting / elapsed, 4),
            "seconds": round(self.seconds, 1),
        }
        self.write({**means, **speed})
        self.sums, self.count, self.waiting, self.marked = {}, 0, 0.0, time.perf_counter()

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is due now."""
        return self.step % every == 0 or self.step == self.config.max_steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the `with` block is not training, and not counted in its rate."""
        begun = time.perf_counter()
        yield
        self.marked += time.perf_counter() - begun

    def write(self, values: dict) -> None:
        """One line of metrics.jsonl, and its numbers to the trackers."""
        if self.run.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"stage": self.stage, "step": self.step, **values}) + "\n")
        numbers = {}
        for key, value in values.items():
            each = (
                {key: value} if isinstance(value, float) else {f"{key}_{i}": v for i, v in enumerate(value)}
            )
            numbers |= {f"{self.stage}/{name}": number for name, number in each.items()}
        self._tracked(self.run.accelerator.log, numbers, self.step)

    def close(self) -> None:
        """End the bar and this stage's trackers."""
        self.bar.close()
        for tracker in self.run.accelerator.trackers:
            self._tracked(tracker.finish)
        self.run.accelerator.trackers.clear()  # init_trackers of the next stage would start them again

    def _tracked(self, call: Callable, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:  # a logger, of whatever kind, must never end a run
            self.run.print(f"tracker failed ({error}); metrics.jsonl is complete without it")
