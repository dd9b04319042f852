"""How every script runs its stages."""

import sys
from collections.abc import Callable

import torch

from training.config import RunError
from training.dry_run import describe_plan, draw_data
from training.evaluation.features import load_network
from training.runtime.checkpoints import found_checkpoints
from training.runtime.folder import close_folder
from training.runtime.run import Run, fail, start
from training.runtime.signals import EXIT_CODE, Interrupted


def main(**stages: Callable[[Run], None]) -> Run | None:
    """Run the stages in order after all checks; under `--dry_run` only say and draw what they would do.

    Exits with code 2 and a message for what the user can mend, and with 75 after SIGTERM or SIGINT, when all
    is saved.
    """
    run = start(list(stages))
    check_features(run, list(stages))
    if run.config.dry_run:
        run.print(describe_plan(run))
        run.print(draw_data(run))
        return None
    for name, stage in stages.items():
        try:
            run.interruption.check()
            stage(run)
        except torch.OutOfMemoryError as error:
            section = getattr(run.config, name)
            raised = f"raise --{name}.gradient_accumulation_steps, " if hasattr(section, "max_steps") else ""
            fail(
                RunError(
                    f"out of memory in stage {name} ({error}): {raised}lower --{name}.batch_size, or set "
                    f"--latents.resident disk\n{last_good(run, name)}"
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


def check_features(run: Run, stages: list[str]) -> None:
    """Load the network of the figures before anything else costs time, if a stage will need it."""
    config = run.config
    if not (
        ("evaluation" in stages and config.evaluation.num_samples)
        or ("denoiser" in stages and config.denoiser.evaluate_every)
    ):
        return
    try:
        with run.accelerator.main_process_first():  # one downloads
            load_network(config.evaluation.features)
    except RunError as error:
        fail(error)


def last_good(run: Run, stage: str) -> str:
    """Where a stage's state is, from which the same command continues."""
    found = found_checkpoints(run.folder / stage)
    state = f"its last good state is {found[-1]}" if found else "it has no checkpoint yet"
    if stage in ("latents", "evaluation"):
        state = "what is done is kept"
    return f"{state}. The same command goes on from there."
