"""A polite end: SIGTERM and SIGINT let the step finish and be saved."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command will go on
SAME_SIGNAL = 1.0  # seconds in which a launcher repeats to its processes what all have got already


def leave_signals_to_parent(worker: int) -> None:
    """Initialise a worker of a DataLoader: a signal to the whole process group must not end it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Interrupted(Exception):
    """Everything up to here is saved; the process ends."""


class Interruption:
    """Whether somebody has asked this run to end. Several processes agree, so all end after the same step.

    A second signal ends the process at once.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.since = 0.0
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own, on the CPU: asking must not wait for an accelerator.
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
        """Whether to save and end now; every process must ask equally often.

        Several processes get the answer to their previous question, so that none waits for the others.
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
        """Raise Interrupted if the run is to end; for places where everything is saved already."""
        if self.requested():
            raise Interrupted
