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

from training.config import OptimizationConfig, RunError, redact
from training.data.order import batch_indices
from training.runtime.atomic import append_line, write_bytes
from training.runtime.run import Run

MAX_SKIPPED = 5  # steps in a row whose gradient is not finite: beyond bad luck


class RunLog:
    """The log of one stage: a progress bar, `metrics.jsonl` and the trackers.

    Values are summed on the device and read only when a line is written, so logging does not stall it.
    Reopening drops lines beyond the restored step, which the resumed run writes again.

    Args:
        stage: name in the lines.
        config: cadence and number of steps.
        record: the restored checkpoint's record: "step" and what `record()` put into it.
    """

    def __init__(self, run: Run, stage: str, config: OptimizationConfig, record: dict):
        self.run = run
        self.stage = stage
        self.config = config
        self.step = record["step"]
        self.path = run.folder / "metrics.jsonl"
        self.earlier_seconds = record.get("seconds", 0.0)
        self.started = time.perf_counter()
        self.current: dict[str, Tensor] = {}
        sums, place = record.get("sums", {}), run.accelerator.process_index
        if sums and len(next(iter(sums.values()))) != run.accelerator.num_processes:
            sums = {key: [math.fsum(values) / len(values)] for key, values in sums.items()}
            place = 0
        self.sums = {key: torch.tensor(values[place], device=run.device) for key, values in sums.items()}
        # Steps in a row that were skipped, up to now and at most since the last line, and the first of them.
        self.bad = torch.tensor(record.get("bad", [0, 0, 0]), device=run.device)
        self.waiting = 0.0
        self.count, self.marked = record.get("count", 0), self.started
        if run.accelerator.is_main_process and self.path.exists():
            kept = filter(self._stands, self.path.read_text().splitlines(keepends=True))
            write_bytes(self.path, "".join(kept).encode())
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
        """Add to the values `()` of the present optimizer step."""
        for key, value in values.items():
            self.current[key] = self.current.get(key, 0) + value.detach().float()

    def step_done(self, step: int, skipped: Tensor) -> None:
        """Advance the bar; write a line of means every `log_every` steps.

        Args:
            step: optimizer steps done.
            skipped: bool `()`, whether the last one was not applied; then its values do not count.

        Raises:
            RunError: when too many in a row were skipped.
        """
        self.step = step
        self.bar.update()
        self.count += 1
        for key, value in self.current.items():
            self.sums[key] = self.sums.get(key, 0) + torch.where(skipped, 0, value)
        self.sums["skipped"] = self.sums.get("skipped", 0) + skipped.float()
        self.current = {}
        run_length = (self.bad[0] + 1) * skipped
        first = torch.where(run_length == 1, step - 1, self.bad[2])
        self.bad = torch.stack([run_length, torch.maximum(run_length, self.bad[1]), first])
        if self.due(self.config.log_every):
            self._write_means()

    def _write_means(self) -> None:
        keys = sorted(self.sums)
        totals = self.run.accelerator.reduce(torch.stack([self.sums[key] for key in keys]), "mean").tolist()
        totals = dict(zip(keys, totals, strict=True))
        skipped = round(totals.pop("skipped"))
        good = self.count - skipped
        means = {key: total / good for key, total in totals.items()} if good else {}
        if skipped:
            means["skipped"] = skipped
        self._refuse_streak()
        if means.get("loss") is not None:
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        elapsed = time.perf_counter() - self.marked
        speed = {
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "images_per_second": round(self.count * self.config.batch_size / elapsed, 2),
            "data_wait": round(self.waiting / elapsed, 4),
            "seconds": round(self.seconds, 1),
        }
        self.write({**means, **speed})
        self.sums, self.count, self.waiting, self.marked = {}, 0, 0.0, time.perf_counter()

    def _refuse_streak(self) -> None:
        last, most, first = self.bad.tolist()
        self.bad[1] = last
        if most >= MAX_SKIPPED:
            indices = batch_indices(
                self.run.config.seed, first, self.config.batch_size, len(self.run.data.train)
            )
            raise RunError(
                f"{self.stage}: loss or gradient not finite in {most} steps in a row, from step {first} on "
                f"(mixed_precision {self.run.accelerator.mixed_precision}); none of them was applied. The "
                f"training images of step {first}: {indices.tolist()}. Lower --{self.stage}.learning_rate or "
                "set --mixed_precision no"
            )

    def record(self) -> dict:
        """What a checkpoint must remember, so that the next line is that of an unbroken run.

        Every process calls this.
        """
        sums = {}
        if keys := sorted(self.sums):
            each = self.run.accelerator.gather(torch.stack([self.sums[key] for key in keys])[None])
            sums = dict(zip(keys, each.T.tolist(), strict=True))
        return {"seconds": self.seconds, "count": self.count, "sums": sums, "bad": self.bad.tolist()}

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
            append_line(self.path, json.dumps({"stage": self.stage, "step": self.step, **values}))
        numbers = {}
        for key, value in values.items():
            each = {f"{key}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
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
            self.run.print(f"tracker failed ({redact(str(error))}); metrics.jsonl is complete without it")
