"""The log of a stage: progress bar, metrics.jsonl and trackers."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from training.config import OptimizationConfig, RunError, redact
from training.data.order import batch_indices
from training.runtime.atomic import append_line, write_bytes
from training.runtime.run import Run

MAX_SKIPPED = 5  # steps in a row without a finite gradient that end a run

Result = TypeVar("Result")


class RunLog:
    """Averages what a training loop adds per step, and writes the means every `log_every` steps.

    Values stay on the device until a line is written, so logging does not make the host wait. Opening the log
    drops the lines beyond the restored step, which the resumed run writes again.

    Args:
        stage: its name in the lines.
        config: of the stage; how often lines are written, and the number of steps.
        record: of the restored checkpoint, with "step" and "seconds".
    """

    def __init__(self, run: Run, stage: str, config: OptimizationConfig, record: dict):
        self.run, self.stage, self.config = run, stage, config
        self.step = record["step"]
        self.path = run.folder / "metrics.jsonl"
        self.started = time.perf_counter()
        self.earlier_seconds = record.get("seconds", 0.0)
        self.current: dict[str, Tensor] = {}  # values of the present step
        # Skipped steps in a row: how many up to now, the most since the last line, and the first of these.
        self.streak = torch.zeros(3, dtype=torch.long, device=run.device)
        self._begin_line()
        if run.accelerator.is_main_process and self.path.exists():
            kept = filter(self._is_kept, self.path.read_text().splitlines(keepends=True))
            write_bytes(self.path, "".join(kept).encode())
        self.bar = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=stage,
            unit="step",
            disable=not run.accelerator.is_main_process,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        self._track(run.accelerator.init_trackers, f"{run.folder.name}-{stage}")

    def _is_kept(self, text: str) -> bool:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # torn by a crash
            return False
        return line["stage"] != self.stage or line["step"] <= self.step

    def _begin_line(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count, self.waiting, self.line_started = 0, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent in this stage, over all its continuations."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def wait(self, function: Callable[..., Result], *arguments) -> Result:
        """Call `function` and count its time as waiting for data."""
        begun = time.perf_counter()
        result = function(*arguments)
        self.waiting += time.perf_counter() - begun
        return result

    def add(self, values: dict[str, Tensor]) -> None:
        """Add scalars `()` to the values of the present optimizer step."""
        for key, value in values.items():
            self.current[key] = self.current.get(key, 0) + value.detach().float()

    def step_done(self, step: int, skipped: Tensor) -> None:
        """Count an optimizer step; write a line if one is due.

        Args:
            step: optimizer steps done.
            skipped: bool `()`, whether the last one was not applied; its values do not count.

        Raises:
            RunError: if `MAX_SKIPPED` steps in a row were skipped.
        """
        self.step = step
        self.bar.update()
        self.count += 1
        for key, value in self.current.items():
            self.sums[key] = self.sums.get(key, 0) + torch.where(skipped, 0, value)
        self.sums["skipped"] = self.sums.get("skipped", 0) + skipped.float()
        self.current = {}
        now, most, first = self.streak
        now = (now + 1) * skipped
        first = torch.where(now == 1, step - 1, first)
        self.streak = torch.stack([now, torch.maximum(now, most), first])
        if self.due(self.config.log_every):
            self.flush()

    def flush(self) -> None:
        """Write the means of the steps since the last line, if there are any; every process calls this.

        Called before a checkpoint too, so that a checkpoint need not hold what is not written yet.
        """
        if not self.count:
            return
        keys = sorted(self.sums)
        totals = self.run.accelerator.reduce(torch.stack([self.sums[key] for key in keys]), "mean").tolist()
        totals = dict(zip(keys, totals, strict=True))
        skipped = round(totals.pop("skipped"))
        applied = self.count - skipped
        means = {key: total / applied for key, total in totals.items()} if applied else {}
        if skipped:
            means["skipped"] = skipped
        self._end_at_streak()
        if "loss" in means:
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        elapsed = time.perf_counter() - self.line_started
        speed = {
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "images_per_second": round(self.count * self.config.batch_size / elapsed, 2),
            "data_wait": round(self.waiting / elapsed, 4),
            "seconds": round(self.seconds, 1),
        }
        self.write({**means, **speed})
        self._begin_line()

    def _end_at_streak(self) -> None:
        now, most, first = self.streak.tolist()
        self.streak[1] = now
        if most < MAX_SKIPPED:
            return
        images = batch_indices(self.run.config.seed, first, self.config.batch_size, len(self.run.data.train))
        raise RunError(
            f"{self.stage}: loss or gradient not finite in {most} steps in a row, from step {first} on "
            f"(mixed_precision {self.run.accelerator.mixed_precision}); none of them was applied. The "
            f"training images of step {first}: {images.tolist()}. Lower --{self.stage}.learning_rate or "
            "set --mixed_precision no"
        )

    def due(self, *every: int) -> bool:
        """Whether the present step is the last one or a multiple of one of `every`."""
        return self.step == self.config.max_steps or any(self.step % each == 0 for each in every)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the `with` block in the training speed."""
        begun = time.perf_counter()
        yield
        self.line_started += time.perf_counter() - begun

    def write(self, values: dict) -> None:
        """Write one line to metrics.jsonl, and its numbers to the trackers."""
        if self.run.accelerator.is_main_process:
            append_line(self.path, json.dumps({"stage": self.stage, "step": self.step, **values}))
        numbers = {}
        for key, value in values.items():
            parts = (
                {f"{key}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
            )
            numbers |= {f"{self.stage}/{name}": number for name, number in parts.items()}
        self._track(self.run.accelerator.log, numbers, self.step)

    def close(self) -> None:
        """End the bar and this stage's trackers."""
        self.bar.close()
        for tracker in self.run.accelerator.trackers:
            self._track(tracker.finish)
        self.run.accelerator.trackers.clear()  # init_trackers of the next stage would start them again

    def _track(self, call: Callable, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:  # a tracker, of whatever kind, must never end a run
            self.run.print(f"tracker failed ({redact(str(error))}); metrics.jsonl is complete without it")
