"""What every script starts with: the checked configuration, the processes, the run folder, the images and a log."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import atomic_write, write_json
from training.config import Config, OptimizationConfig, parse_config
from training.data import ImageData, load_images
from training.networks import check_networks
from training.run_folder import open_run
from training.scan import Scan, scan


@dataclass
class Run:
    """One run of this process: its configuration, its share of the work, its folder and its images."""

    config: Config
    accelerator: Accelerator
    folder: Path
    data: ImageData
    scan: Scan

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def done(self, stage: str) -> dict | None:
        """The record that a finished stage left, or None."""
        path = self.folder / stage / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Record that a stage is finished; call it last."""
        if self.accelerator.is_main_process:
            write_json(self.folder / stage / "done.json", record)
        self.accelerator.wait_for_everyone()

    def print(self, *message) -> None:
        """Print once, not once a process."""
        self.accelerator.print(*message, flush=True)


def start(argv: list[str] | None = None) -> Run:
    """Read the configuration, open the run folder, load and scan the images: all checks before the first step.

    Exits with code 2 and a message for what the user can mend.
    """
    try:
        config = parse_config(argv)
        accelerator = Accelerator(
            mixed_precision=choose_precision(config.mixed_precision),
            log_with=config.trackers or None,
            project_dir=config.output_dir,
        )
        set_seed(config.seed)
        if accelerator.device.type == "cpu":
            torch.set_num_threads(cpu_threads())
            torch.set_flush_denormal(True)  # SiLU of -90 is one, and a convolution of them takes three times as long
        with accelerator.main_process_first():
            data = load_images(config.data)
            folder = open_run(config)
            (folder / "samples").mkdir(exist_ok=True)
            found = _scan_once(config, data, folder)
        accelerator.print(found.describe(), flush=True)
        data.drop(found.unreadable)
        check_networks(config, data, accelerator.num_processes)
    except ValueError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return Run(config, accelerator, folder, data, found)


def choose_precision(setting: str) -> str:
    """Accelerate's name of the arithmetic: bf16 where the hardware multiplies it, unless `setting` decides."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def cpu_threads() -> int:
    """This process's share of the cores it may use: `accelerate launch` gives a CPU process one thread unless told."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def build_optimizer(config: OptimizationConfig, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over all parameters; the loop sets the rate of every step."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=tuple(config.adam_betas),
        weight_decay=config.weight_decay,
        fused=True,
    )


def _scan_once(config: Config, data: ImageData, folder: Path) -> Scan:
    """The scan of these images, from the run folder if an earlier start has left it there."""
    path = folder / "data.json"
    if path.exists() and (stored := json.loads(path.read_text()))["fingerprint"] == data.fingerprint:
        return Scan(**stored["scan"])
    found = scan(data, config.data.num_workers)
    write_json(path, {"fingerprint": data.fingerprint, "scan": asdict(found)})
    return found


class RunLog:
    """The log of one stage: a progress bar, `metrics.jsonl` and the trackers.

    Values are summed on the device and read only when a line is written, so logging does not stall the device.
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
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if self._stands(json.loads(line))]
            atomic_write(self.path, "".join(kept).encode())
        self.bar = tqdm(
            total=config.max_steps,
            initial=record["step"],
            desc=stage,
            unit="step",
            disable=not run.accelerator.is_main_process,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        self._trackers("init_trackers", f"{run.folder.name}-{stage}")

    def _stands(self, line: dict) -> bool:
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
        """Advance the bar; write a line of means every `log_every` steps.

        Raises:
            FloatingPointError: if the mean loss of these steps is not finite.
        """
        self.step = step
        self.bar.update()
        self.count += 1
        if not self.due(self.config.log_every):
            return
        keys = sorted(self.sums)
        means = self.run.accelerator.reduce(
            torch.stack([self.sums[key] / self.count for key in keys]), "mean"
        )
        means = dict(zip(keys, means.tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"{self.stage}: the loss of steps {step - self.count + 1} to {step} is {means['loss']} "
                f"(mixed_precision {self.run.accelerator.mixed_precision}); the last good checkpoint is in "
                f"{self.run.folder / self.stage}. Lower --{self.stage}.learning_rate or set --mixed_precision no"
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
        numbers = {f"{self.stage}/{key}": value for key, value in values.items() if isinstance(value, float)}
        self._trackers("log", numbers, self.step)

    def close(self) -> None:
        """End the bar and this stage's trackers."""
        self.bar.close()
        for tracker in self.run.accelerator.trackers:
            tracker.finish()

    def _trackers(self, method: str, *arguments) -> None:
        if not self.run.config.trackers:
            return
        try:
            getattr(self.run.accelerator, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - a logger, of whatever kind, must never end a run
            self.run.print(f"tracker: {method} failed ({error}); metrics.jsonl is complete without it")
