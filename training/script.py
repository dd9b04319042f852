"""How every script runs its stages."""

import sys
from collections.abc import Callable

import torch

from training.checkpoint import found_checkpoints
from training.errors import RunError
from training.interruption import EXIT_CODE, Interrupted
from training.plan import describe_plan, draw_data
from training.run import Run, fail, start
from training.run_folder import close_folder


def main(**stages: Callable[[Run], None]) -> Run | None:
    """Run the stages in order after all checks; under `--dry_run` only say and draw what they would do.

    Exits with code 2 and a message for what the user can mend, and with 75 after SIGTERM or SIGINT, when all
    is saved.
    """
    run = start(list(stages))
    if run.config.dry_run:
        run.print(describe_plan(run))
        run.print(draw_data(run))
        return None
    for name, stage in stages.items():
        try:
            run.interruption.check()
            stage(run)
        except torch.OutOfMemoryError as error:
            fail(
                RunError(
                    f"out of memory in stage {name} ({error}): raise --{name}.gradient_accumulation_steps, "
                    f"lower --{name}.batch_size, or set --latents.resident disk\n{last_good(run, name)}"
                )
            )
        except RunError as error:
            fail(RunError(f"{error}\nStage {name} has stopped; {last_good(run, name)}"))
        except Interrupted:
            run.print(f"stopped in stage {name}; {last_good(run, name)}")
            sys.exit(EXIT_CODE)
    if run.accelerator.is_main_process:
        close_folder(run.folder)
    run.accelerator.end_training()
    return run


def last_good(run: Run, stage: str) -> str:
    """Where a stage's state is, from which the same command continues."""
    found = found_checkpoints(run.folder / stage)
    state = f"its last good state is {found[-1]}" if found else "it has no checkpoint yet"
    return f"{state}. The same command goes on from there."
