"""How every script runs its stages."""

from collections.abc import Callable

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
    for stage in stages.values():
        stage(run)
    if run.accelerator.is_main_process:
        close_folder(run.folder)
    return run
