"""How every script runs its stages."""

from collections.abc import Callable

import torch

from training.plan import describe_plan, draw_data
from training.run import Run, start
from training.run_folder import close_folder


def main(**stages: Callable[[Run], None]) -> Run | None:
    """Run the stages in order after all checks; under `--dry_run` only say and draw what they would do."""
    run = start(list(stages))
    if run.config.dry_run:
        run.print(describe_plan(run))
        run.print(draw_data(run))
        return None
    for name, stage in stages.items():
        try:
            stage(run)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory in stage {name}: raise --{name}.gradient_accumulation_steps, lower "
                f"--{name}.batch_size, or set --latents.resident disk"
            ) from error
    if run.accelerator.is_main_process:
        close_folder(run.folder)
    return run
