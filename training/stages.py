"""The stages of a job in their order: which are skipped, and how a run ends."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.config import Config, RunError, fail
from training.dry_run import describe_plan, save_data_grid
from training.evaluation.checks import check_evaluation
from training.evaluation.report import renew_report
from training.runtime.checkpoints import found_checkpoints
from training.runtime.folder import close_folder
from training.runtime.run import Run, start
from training.runtime.signals import EXIT_CODE, Interrupted
from training.sizing import sized


@dataclass(frozen=True)
class Stage:
    """One part of the job.

    Args:
        name: section of the configuration, folder below the run folder and value of `--redo`.
        work: does it, and leaves its result in the run folder.
        stands: the skip rule; returns the line to print where the result is there already, else None.
    """

    name: str
    work: Callable[[Run], None]
    stands: Callable[[Run], str | None]


def run_stages(config: Config, *stages: Stage) -> Run | None:
    """Run the stages in order after all checks; under `--dry_run` print and draw the plan and return None.

    Exits with code 2 and a message for what the user can mend, and with 75 after SIGTERM or SIGINT, when
    everything is saved.
    """
    try:
        names = [stage.name for stage in stages]
        config = sized(config, names)
        run = start(config, names)
        check_evaluation(run, names)
        if config.dry_run:
            run.print(describe_plan(run))
            run.print(save_data_grid(run))
            return None
        for stage in stages:
            run_stage(run, stage)
    except RunError as error:
        fail(error)
    if run.accelerator.is_main_process:
        close_folder(run.folder)
    run.accelerator.end_training()
    return run


def run_stage(run: Run, stage: Stage) -> None:
    """Run one stage unless its result stands. RunError says where the run can go on from.

    However it ends, the report of the run is renewed.
    """
    try:
        run.interruption.check()
        if line := stage.stands(run):
            run.print(f"{stage.name}: {line}; --redo '[{stage.name}]' does it again")
        else:
            stage.work(run)
    except torch.OutOfMemoryError as error:
        trained = hasattr(getattr(run.config, stage.name), "gradient_accumulation_steps")
        # Another batch size would be another training, which a run folder refuses to continue with.
        advice = "raise --{}.gradient_accumulation_steps" if trained else "lower --{}.batch_size"
        raise RunError(
            f"out of memory in stage {stage.name} ({error}): {advice.format(stage.name)}, or set "
            f"--latents.resident disk\n{continuation(run, stage)}"
        ) from error
    except RunError as error:
        raise RunError(f"{error}\nStage {stage.name} has stopped; {continuation(run, stage)}") from error
    except Interrupted:
        run.print(f"stopped in stage {stage.name}; {continuation(run, stage)}")
        sys.exit(EXIT_CODE)
    finally:
        renew_report(run)


def continuation(run: Run, stage: Stage) -> str:
    """The state that the same command continues from, in words."""
    checkpoints = found_checkpoints(run.folder / stage.name)
    state = f"its last good state is {checkpoints[-1]}" if checkpoints else "it has no checkpoint yet"
    if stage.name in ("latents", "evaluation"):
        state = "what is done is kept"
    return f"{state}. The same command goes on from there."
