"""Accidents at every moment of the tiny run: `make chaos`. Prints the accidents and every loss.

Signals hit a run from outside, at random moments; torn files and full disks come from inside its writes, by
`atomic.on_write`. The same command goes on until the run ends, which is then compared with a straight run.
"""

import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from captioned import captioned_digits
from fork_server import ROOT, Child

from training.runtime import atomic
from training.runtime.folder import LOCK
from training.runtime.signals import EXIT_CODE

TINY = ROOT / "training" / "configs" / "tiny.yaml"
OPTIONS = (
    "--data.held_out=0.7",  # epochs of 90 images end in the middle of a batch
    "--denoiser.text_encoder=words",
    "--denoiser.task=inpaint",
    "--autoencoder.gradient_accumulation_steps=2",
    "--autoencoder.gan_weight=0.1",
    "--autoencoder.gan_start=5",
    "--denoiser.gradient_accumulation_steps=2",
    "--evaluation.batch_size=800",
    "--autoencoder.log_every=1",  # a signal between two lines of the log would add one
    "--denoiser.log_every=1",
)
TIMED = {"seconds", "images_per_second", "data_wait"}
LINES = 8  # of a log, between two accidents in its writing
Write = tuple[str, str, int]  # a path in the run folder, a moment of its writing, a log's lines // LINES


def contents(run: Path) -> dict:
    """Everything in a run folder by file, without the values that depend on the clock."""
    found = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name in (LOCK, "report.html") or name.startswith("logs/"):
            continue  # the report shows the other files, and rates
        if path.suffix == ".json":
            found[name] = _untimed(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def _untimed(values: dict) -> dict:
    return {key: value for key, value in values.items() if key not in TIMED}


def differences(a: Path, b: Path) -> list[str]:
    """Files of two run folders that are not equal to the bit."""
    first, second = contents(a), contents(b)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def kill_and_tear(moment: str, path: Path) -> None:
    """Leave half of what is being written, as a loss of power may, and die."""
    aside = path.with_name(f".{path.name}.tmp")
    if moment == "written":
        for file in [aside] if aside.is_file() else [f for f in aside.rglob("*") if f.is_file()]:
            os.truncate(file, file.stat().st_size // 2)
    if moment == "begun" and path.suffix == ".jsonl":
        with open(path, "a") as file:
            file.write('{"stage": "autoenc')
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(moment: str, path: Path) -> None:
    """From here on no file may be longer than ten bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))


def strike_in_writes(
    accident: Callable[[str, Path], None], wanted: Callable[[Write], bool], known: set[Write], report: Path
) -> None:
    """Have an accident at the first `wanted` moment that is not `known`; `report` then tells which."""

    def on_write(moment: str, path: Path) -> None:
        lines = len(path.read_bytes().splitlines()) if path.suffix == ".jsonl" and path.exists() else 0
        write = (re.sub(r"^.*?/run/", "", path.as_posix()), moment, lines // LINES)
        if write not in known and wanted(write) and not report.exists():  # a process has one accident
            report.write_text(json.dumps(write))
            accident(moment, path)

    atomic.on_write = on_write


class Campaign:
    """Accidents of one kind, in one run folder after another.

    Args:
        folder: Where the run folders are made.
        straight: Run folder of a run without accidents.
        options: Options of the main job.
    """

    def __init__(self, folder: Path, straight: Path, options: tuple[str, ...]):
        self.folder, self.straight, self.options = folder, straight, options
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    @property
    def run(self) -> Path:
        return self.folder / str(self.counts["runs"]) / "run"

    def start(self, prepare: Callable[[], None] | None = None) -> Child:
        """Begin, or go on with, the present run."""
        options = ("--config", TINY, "--output_dir", self.run, *self.options)
        return Child("train_ldm.py", *options, prepare=prepare)

    def expect(self, condition: bool, child: Child) -> None:
        if not condition:
            self.lost.append(f"{self.run}: exit code {child.returncode}\n{child.stdout}{child.stderr}")

    def compare(self) -> None:
        """Compare the run, which has ended, with the straight one, and go on to a new run."""
        self.lost += [f"{self.run}: {name}" for name in differences(self.straight, self.run)]
        self.counts["runs"] += 1

    def random_signals(self, signals: list[int], number: int, seed: int, longest: float) -> "Campaign":
        """Send signals within `longest` seconds, until `number` of them have ended a process."""
        generator = random.Random(seed)
        while self.counts["accidents"] < number:
            sent = signals[self.counts["accidents"] % len(signals)]
            child = self.start()
            time.sleep(generator.uniform(0, longest))
            child.send_signal(sent)
            code = child.wait()
            if code == 0:
                self.compare()
            elif code == EXIT_CODE:
                self.counts["saved first"] += 1
                self.counts["accidents"] += 1
                self.expect("stopped in stage" in child.stdout, child)
            else:
                # Before its stages a run has nothing to save, and Python makes an exception of SIGINT.
                interrupted = child.stderr.rstrip().endswith("KeyboardInterrupt")
                self.expect(code == -sent or interrupted, child)
                self.counts["accidents"] += sent == signal.SIGKILL
        child = self.start()
        self.expect(child.wait() == 0, child)
        self.compare()
        return self

    def in_writes(self, accident: Callable[[str, Path], None], wanted: Callable[[Write], bool]) -> "Campaign":
        """Have an accident at every `wanted` moment of a write, each once, until a run ends without."""
        known: set[Write] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        report = self.folder / "struck.json"
        while True:
            report.unlink(missing_ok=True)
            child = self.start(partial(strike_in_writes, accident, wanted, known, report))
            code = child.wait()
            if not report.exists():
                break
            known.add(tuple(json.loads(report.read_text())))
            self.counts["accidents"] += 1
            full_disk = code == 2 and "cannot be written" in child.stderr and "Traceback" not in child.stderr
            self.counts["disk full"] += full_disk
            self.expect(full_disk or code == -signal.SIGKILL, child)
        self.expect(code == 0, child)
        self.compare()
        return self


def every_second(core: int, moments: tuple[str, ...], write: Write) -> bool:
    """Whether the write is among the half that this core has the accidents of."""
    return write[1] in moments and sum(str(write).encode()) % 2 == core


def half(folder: Path, core: int) -> dict[str, tuple[Counter, list[str]]]:
    """Half of all accidents, on one core: counts and losses by kind."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    options = (f"--data.dataset={captioned_digits(folder / 'data')}", *OPTIONS)
    straight = Campaign(folder / "straight", folder, options)
    begun = time.monotonic()
    child = straight.start()
    assert child.wait() == 0, child.stderr
    longest = time.monotonic() - begun
    campaigns = [Campaign(folder / str(number), straight.run, options) for number in range(4)]
    moments = ("begun", "written", "done")
    results = {
        "SIGKILL at a random moment": campaigns[0].random_signals([signal.SIGKILL], 30, core, longest),
        "SIGTERM or SIGINT at a random moment": campaigns[1].random_signals(
            [signal.SIGTERM, signal.SIGINT], 10, 100 + core, longest
        ),
        "SIGKILL inside a write, file torn": campaigns[2].in_writes(
            kill_and_tear, partial(every_second, core, moments)
        ),
        "disk full at a write": campaigns[3].in_writes(fill_disk, partial(every_second, core, ("begun",))),
    }
    return {kind: (campaign.counts, campaign.lost) for kind, campaign in results.items()}


def main() -> int:
    """Print the table; exit code 1 if anything was lost."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        folders = [Path(folder) / str(core) for core in (0, 1)]
        first, second = pool.map(half, folders, (0, 1))
    print("| accident | times | saved first | runs compared | lost |\n|---|---|---|---|---|")
    lost = []
    for kind in first:
        counts, new = first[kind][0] + second[kind][0], first[kind][1] + second[kind][1]
        print("|", kind, "|", " | ".join(str(counts[name]) for name in ("accidents", "saved first", "runs")),
              "|", len(new), "|")  # fmt: skip
        lost += new
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
