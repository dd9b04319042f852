"""Accidents at every moment of the tiny run: `make chaos`. Prints what was injected, and what was lost.

Every life of a run is a real process, forked from one that has the libraries loaded (so it needs Linux or
macOS). Accidents hit it from outside, at random moments, or inside its writes, through `atomic.on_write`.
"""

import json
import os
import random
import re
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training import encode_latents, evaluate_ldm, train_autoencoder, train_denoiser  # noqa: E402, F401
from training.runtime import atomic  # noqa: E402
from training.runtime.folder import LOCK  # noqa: E402
from training.runtime.signals import EXIT_CODE  # noqa: E402

TINY = ROOT / "training" / "configs" / "tiny.yaml"
# Epochs end in the middle of a batch, a step has two parts, and the discriminator joins in. Every step has a
# line in the log, because a signal between two lines adds one.
OPTIONS = (
    "--data.held_out=0.95",
    "--autoencoder.gradient_accumulation_steps=2",
    "--autoencoder.gan_weight=0.1",
)
OPTIONS += ("--autoencoder.gan_start=5", "--denoiser.gradient_accumulation_steps=2")
OPTIONS += ("--evaluation.batch_size=800", "--autoencoder.log_every=1", "--denoiser.log_every=1")
TIMED = {"seconds", "images_per_second", "data_wait"}
Key = tuple[str, str, int]


def contents(run: Path) -> dict:
    """Everything that a run leaves, by file, without what depends on the clock: equal or not, to the bit."""
    found = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name == LOCK or name.startswith("logs/"):
            continue
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
    """Files of two runs that are not the same."""
    first, second = contents(a), contents(b)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


class Life:
    """One process of the main job.

    Args:
        run: its run folder.
        prepare: called in the process before the job, to arrange an accident inside it.
    """

    def __init__(self, run: Path, prepare: Callable[[], None] = lambda: None):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
            arguments = ["train_ldm.py", "--config", str(TINY), "--output_dir", str(run), *OPTIONS]
            _live(arguments, writer, prepare)
        os.close(writer)
        self.reader = reader

    def end(self) -> tuple[int, str]:
        """Wait for its exit code, negative for a signal, and what it printed."""
        with open(self.reader, errors="replace") as file:
            printed = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), printed


def _live(arguments: list[str], output: int, prepare: Callable[[], None]) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = arguments
        prepare()
        runpy.run_path(str(ROOT / "training" / arguments[0]), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def one_core(number: int) -> None:
    """Bind this process, and what it forks, to one core: so all have as many threads, and the same bits."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def strike_in_writes(
    known: set[Key], report: Path, accident: Callable, wanted: Callable[[Key], bool]
) -> None:
    """Have `accident(moment, path)` at the first `wanted` moment of a write that is not `known` yet."""

    def on_write(moment: str, path: Path) -> None:
        lines = len(path.read_bytes().splitlines()) if path.suffix == ".jsonl" and path.exists() else 0
        key = (re.sub(r"^.*?/run/", "", path.as_posix()), moment, lines)
        if key not in known and wanted(key):
            report.write_text(json.dumps(key))
            accident(moment, path)

    atomic.on_write = on_write


def kill_torn(moment: str, path: Path) -> None:
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


class Campaign:
    """Accidents of one kind, in one run folder after another, each compared with the straight run.

    Args:
        folder: for the run folders.
        straight: the run folder of the straight run.
    """

    def __init__(self, folder: Path, straight: Path):
        self.folder, self.straight = folder, straight
        self.done: Counter = Counter()
        self.lost: list[str] = []
        self.new_run()

    def new_run(self) -> None:
        self.runs = self.done["runs"]
        self.run = self.folder / str(self.runs) / "run"
        self.run.parent.mkdir(parents=True)

    def compare(self) -> None:
        """The run has ended: whether anything is lost, and a new one."""
        self.done["runs"] += 1
        self.lost += [f"{self.run}: {name}" for name in differences(self.straight, self.run)]
        self.new_run()

    def finish(self) -> "Campaign":
        """End the last run undisturbed."""
        code, printed = Life(self.run).end()
        assert code == 0, printed
        self.compare()
        return self

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            self.lost.append(f"{self.run}: {what}")

    def random_signals(self, number: int, signals: list[int], seed: int, longest: float) -> "Campaign":
        """Send signals at random moments, until `number` have ended a life."""
        draws = random.Random(seed)
        while self.done["accidents"] < number:
            sent = signals[self.done["accidents"] % len(signals)]
            life = Life(self.run)
            time.sleep(draws.uniform(0, longest))
            os.kill(life.pid, sent)
            code, printed = life.end()
            if code == 0:
                self.compare()
            elif code == EXIT_CODE:
                self.done["saved first"] += 1
                self.done["accidents"] += 1
                self.expect("stopped in stage" in printed, printed)
            else:
                # Before its stages a run has nothing to save, and Python makes an exception of SIGINT.
                self.expect(code == -sent or printed.rstrip().endswith("KeyboardInterrupt"), printed)
                self.done["accidents"] += sent == signal.SIGKILL
        return self.finish()

    def in_writes(self, accident: Callable, wanted: Callable[[Key], bool]) -> "Campaign":
        """Have an accident at every moment of every write that is `wanted`, each once."""
        known: set[Key] = set()
        report = self.folder / "struck.json"
        while True:
            report.unlink(missing_ok=True)
            code, printed = Life(self.run, lambda: strike_in_writes(known, report, accident, wanted)).end()
            if not report.exists():
                self.expect(code == 0, printed)
                break
            known.add(tuple(json.loads(report.read_text())))
            self.done["accidents"] += 1
            if accident is fill_disk:
                self.expect(code == 2 and "cannot be written" in printed, printed)
                self.expect("Traceback" not in printed, printed)
            else:
                self.expect(code == -signal.SIGKILL, printed)
        return self.finish()


def straight_run(folder: Path) -> tuple[Path, float]:
    """The run that nothing happens to, and its seconds."""
    run = folder / "straight" / "run"
    run.parent.mkdir()
    begun = time.monotonic()
    code, printed = Life(run).end()
    assert code == 0, printed
    return run, time.monotonic() - begun


def _campaign(kind: str, number: int, core: int, folder: Path, straight: Path, longest: float) -> Campaign:
    one_core(core)
    campaign = Campaign(folder / f"{list(FULL).index(kind)}-{core}", straight)
    if kind == "SIGKILL at a random moment":
        return campaign.random_signals(number, [signal.SIGKILL], core, longest)
    if kind == "SIGTERM or SIGINT at a random moment":
        return campaign.random_signals(number, [signal.SIGTERM, signal.SIGINT], 100 + core, longest)
    # `number` is the share of the writes here: 1 is each, 10 every tenth.
    accident, moments = {
        "SIGKILL inside a write, file torn": (kill_torn, ("begun", "written", "done")),
        "disk full at a write": (fill_disk, ("begun",)),
    }[kind]
    return campaign.in_writes(
        accident, lambda key: key[1] in moments and sum(str(key).encode()) % (2 * number) == core
    )


# How many of each, or for the last two: in every how many-th write.
FULL = {
    "SIGKILL at a random moment": 60,
    "SIGTERM or SIGINT at a random moment": 20,
    "SIGKILL inside a write, file torn": 1,
    "disk full at a write": 1,
}


def chaos(folder: Path, numbers: dict[str, int]) -> dict[str, Campaign]:
    """Run all campaigns, half of each on each of two cores; results by kind."""
    one_core(0)
    straight, longest = straight_run(folder)
    os.sched_setaffinity(0, range(os.cpu_count()))
    total: dict[str, Campaign] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = [
            (
                kind,
                pool.submit(
                    _campaign,
                    kind,
                    -(-number // 2) if "random" in kind else number,
                    core,
                    folder,
                    straight,
                    longest,
                ),
            )
            for kind, number in numbers.items()
            for core in (0, 1)
        ]
        for kind, job in jobs:
            part = job.result()
            if kind in total:
                total[kind].done += part.done
                total[kind].lost += part.lost
            else:
                total[kind] = part
    return total


def main() -> int:
    """Print the table; exit code 1 if anything was lost."""
    with tempfile.TemporaryDirectory() as folder:
        results = chaos(Path(folder), FULL)
    print("| accident | times | saved first | runs compared | lost |\n|---|---|---|---|---|")
    for kind, campaign in results.items():
        figures = (campaign.done[name] for name in ("accidents", "saved first", "runs"))
        print("|", " | ".join(map(str, [kind, *figures, len(campaign.lost)])), "|")
    lost = [what for campaign in results.values() for what in campaign.lost]
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
