"""SIGTERM and SIGINT: the step is finished and saved, then the process ends."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
SAME_SIGNAL = 1.0  # seconds in which a launcher forwards to its processes a signal that they have got already


def leave_signals_to_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: the worker ignores signals that reach the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Interrupted(Exception):
    """The run was asked to end, and everything is saved."""


class Interruption:
    """Notes SIGTERM and SIGINT. Several processes agree, so that all end after the same step.

    A second signal, a second or more later, ends the process at once.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.since = 0.0
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own, on the CPU, so that asking does not wait for an accelerator.
        self.group = dist.new_group(backend="gloo") if several else None
        self.asked: tuple[torch.Tensor, dist.Work] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), now
            message = f"\n{self.signal.name}: saving after this step; once more to stop at once\n"
            os.write(sys.stderr.fileno(), message.encode())  # print() is not safe inside a print()
        elif now - self.since > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def requested(self) -> bool:
        """Whether to save and end now; every process calls this equally often.

        With several processes the answer is to the previous call, so that none waits for the others.
        """
        if self.group is None:
            return self.signal is not None
        before = self.asked
        flag = torch.tensor(int(self.signal is not None))
        self.asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def check(self) -> None:
        """Raise Interrupted if the run is to end; called where everything is saved already."""
        if self.requested():
            raise Interrupted
