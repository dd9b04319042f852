"""The size of a run: `--minutes` becomes networks and steps before the start, and a plan that can be read."""

import copy
import time
from functools import partial

from training.config import Config, RunError, check_config
from training.options import options
from training.plan import Plan, choose
from training.recipes import expects_copies, put, seen
from training.runtime.accelerator import join_processes
from training.runtime.folder import continued
from training.speeds import Bench, agreed

WORTH_COMPILING = 600  # seconds of denoiser training from which on compiling is tried
SINGLE_CALL = {"output_dir", "redo", "dry_run"}  # no part of a recipe
NETWORK = ("widths", "layers_per_block", "attention", "attention_head_dim", "learning_rate", "batch_size")


def sized(config: Config, stages: list[str]) -> Config:
    """`config` with all that nobody gave: as the run has it that it continues, or chosen for `--minutes`.

    Says the choice and its plan. Without `--minutes` nothing changes.

    Raises:
        RunError: the time suffices for nothing useful.
    """
    if config.minutes is None:
        return config
    state = join_processes()
    if stored := continued(config):
        put(config, stored)
    if stored or stages == ["evaluation"] or config.given >= options(Config).keys() - SINGLE_CALL:
        check_config(config)
        return config
    if config.autoencoder.pretrained and "data.resolution" not in config.given:
        raise RunError("--autoencoder.pretrained: --minutes needs the size of its images, --data.resolution")
    if unknown := [name for name in ("gan_weight", "lpips_weight") if getattr(config.autoencoder, name)]:
        raise RunError(
            f"--minutes does not know the time of --autoencoder.{unknown[0]}: leave it out, or give every "
            "size in a file by --config"
        )
    bench = Bench(config, state)
    plan = choose(bench.config, bench.facts, _left(config), bench.measure)
    others, sized_for = _others(bench), _compiled(bench, plan)
    plan = choose(sized_for, bench.facts, _left(config), bench.measure)  # the timings took their time too
    check_config(plan.config)
    bench.free()
    state.print("\n".join(_told(bench, plan) + others), flush=True)
    return plan.config


def _left(config: Config) -> float:
    """Seconds of `--minutes` that this process has not used yet."""
    return config.minutes * 60 - agreed(time.monotonic() - config.started)


def _compiled(bench: Bench, plan: Plan) -> Config:
    """The configuration to size, with the plan's denoiser compiled where that gains more than it takes."""
    known = bench.device.type != "cuda" or "denoiser.compile" in plan.config.given
    if known or plan.parts["denoiser"] < WORTH_COMPILING:
        return bench.config
    config = copy.deepcopy(plan.config)
    config.denoiser.compile = True
    slow, fast = bench.measure(plan.config, "denoiser"), bench.measure(config, "denoiser")
    if (slow.step - fast.step) * seen(plan.config.denoiser) < fast.compiling:
        return bench.config
    chosen = copy.deepcopy(bench.config)
    chosen.denoiser = config.denoiser
    chosen.given |= {f"denoiser.{name}" for name in (*NETWORK, "compile")}
    return chosen


def _told(bench: Bench, plan: Plan) -> list[str]:
    """The lines that a person reads before a run: the choice, its reasons, and the minutes of its parts."""
    config, facts, minutes = plan.config, bench.facts, plan.config.minutes
    first, second = config.autoencoder, config.denoiser
    images = min(facts.images, config.data.max_images or facts.images)
    epochs = seen(second) / images
    parts = {"sizing": 60 * minutes - sum(plan.parts.values())} | plan.parts
    arithmetic = f"{config.mixed_precision}{', compiled' * second.compile}"
    threads = f", {config.num_threads} of {bench.cores} threads" if config.num_threads else ""
    kind = "drawings" if facts.drawn else "images"
    lines = [
        f"Sized for --minutes {minutes:g}{'' if 'minutes' in config.given else ' (the default)'}: "
        f"{facts.images:,} {'grey ' * facts.grey}{kind} of {facts.side} pixels",
        f"  {plan.describe()}, which are {epochs:.3g} epochs"
        + f" of {images:,} images: there is no time for more" * (images < facts.images),
        f"  precision {arithmetic}{threads}; batches of {first.batch_size} and {second.batch_size}"
        + "; mirrored too" * config.data.horizontal_flip
        + f"; dropout {second.dropout:g}" * (second.dropout > 0),
        "  minutes: " + ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items()),
        *(f"  {reason}" for reason in plan.reasons),
    ]
    if expects_copies(second, images):
        lines.append(
            f"  warning: {images:,} images, each seen {epochs:.0f} times: expect copies of them; more "
            "images or fewer --minutes avoid that"
        )
    if not config.evaluation.num_samples:
        lines.append("  no metrics of samples" + _why_no_metrics(bench))
    return lines


def _why_no_metrics(bench: Bench) -> str:
    if bench.facts.judging is None:
        return ": --evaluation.features names a network for them"
    return f": {bench.config.evaluation.features} would take too much of the time"


def _others(bench: Bench) -> list[str]:
    """The lines of twice and half the time."""
    lines, config = [], bench.config
    for factor, word in ((2, "twice"), (0.5, "half")):
        seconds = _left(config) + (factor - 1) * config.minutes * 60
        try:
            plan = choose(config, bench.facts, seconds, partial(bench.measure, exact=False)).describe()
        except RunError:
            plan = "too little for anything useful"
        lines.append(f"  {word} the time: {plan}")
    return lines
