"""Training scripts in processes that are forked from one that has the libraries loaded.

Importing them takes longer than most runs of the tiny configuration. The server is a fresh interpreter that
multiprocessing starts at the first request and that ends with this process.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("training.train_autoencoder", "training.encode_latents", "training.train_denoiser"),
        *("training.evaluate_ldm", "sklearn.datasets", "torch.utils.tensorboard"),
    ]
)


def environment() -> dict[str, str]:
    """The environment of a child: no Hub, no accelerator, no progress bars."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}


class Child:
    """A script in a forked process, with the attributes of `subprocess.Popen` and `CompletedProcess`.

    `stdout` and `stderr` are the texts written so far. Unless it is waited for, use it in a `with`
    statement, which kills it at the end.

    Args:
        script: Path of the script; a relative one is in training/.
        options: Its command line; all become strings.
        prepare: Called in the child before the script. It is pickled: `partial(exec, "code", {})` works.
        env: The whole environment, by default `environment()`. Libraries have read theirs already.
        own_group: Whether the child leads a process group, as the foreground job of a terminal does.
    """

    def __init__(
        self,
        script: str | Path,
        *options,
        prepare: Callable[[], object] | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        own_group: bool = False,
    ):
        self.args = [str(ROOT / "training" / script), *map(str, options)]
        pipes = [CONTEXT.Pipe(duplex=False) for _ in ("stdout", "stderr")]
        self._readers = [reader for reader, _ in pipes]
        self._printed = [b"", b""]
        settings = ([writer for _, writer in pipes], cwd or Path.cwd(), env or environment(), own_group)
        _start_server()
        self._process = CONTEXT.Process(target=_run, args=(self.args, settings, prepare))
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        reader = self._readers[number]
        while reader.poll() and (part := os.read(reader.fileno(), 1 << 16)):
            self._printed[number] += part
        return self._printed[number].decode(errors="replace")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        self.wait_until(lambda: self._process.join(0.005) or self.returncode is not None, timeout)
        return self.returncode

    def wait_until(self, condition: Callable[[], object], timeout: float = 120) -> None:
        """Wait until something is true that a running child brings about."""
        deadline = time.monotonic() + timeout
        while not condition():
            printed = self.stdout + self.stderr  # a full pipe would stop it
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, printed)
            assert self.returncode is None or condition(), printed
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.join()


@cache
def _start_server() -> None:
    """In the children's environment, in which libraries look for their settings as they are imported."""
    before = dict(os.environ)
    os.environ.update(environment())
    ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _run(arguments: list[str], settings: tuple, prepare: Callable | None) -> None:
    """Body of the forked process, which becomes the script."""
    writers, cwd, env, own_group = settings
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    if own_group:
        os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    multiprocessing.set_start_method(None, force=True)  # for its own children the platform's, as usual
    if prepare:
        prepare()
    code = None
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    # Outside of the handler, whose frames may hold processes that multiprocessing would wait for.
    sys.exit(code)


@atexit.register
def _kill_children() -> None:
    """multiprocessing would wait for those that a failed test has left."""
    for process in multiprocessing.active_children():
        process.kill()
