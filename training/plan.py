"""The plan of a run: the largest networks that see enough images in the given time, and where the time goes.

Everything here is a function of measured speeds, so that it can be tried without a clock.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

from training.config import Config, RunError
from training.data.tasks import RANDOM, cached, task_of
from training.recipes import (
    AMPLE,
    AUTOENCODER_BATCH,
    AUTOENCODER_SHARE,
    AUTOENCODERS,
    DENOISER_BATCH,
    EPOCHS_WITHOUT_DROPOUT,
    PARAMETERS_PER_IMAGE,
    UNETS,
    Facts,
    Measure,
    Speed,
    autoencoder_options,
    batch_size,
    cadence_options,
    denoiser_options,
    put,
    recipes_at,
    sampling_options,
    seen,
    smallest,
    unets_of,
)

RESERVE = 0.06  # of the time, for what no plan foresees
FIXED = 5.0  # seconds to start, load and save, beside all that is counted below
MONITOR_SHARE = 0.03  # of a stage, for validation and grids
JUDGING_SHARE = 0.06  # of the time, for metrics of samples
RECONSTRUCTION_SHARE = 0.01  # of the time, for metrics of held-out images
WORTH_DOUBLING = 0.65  # of the time per image, at most, at which a batch is doubled
CHECKS = 5  # validations and grids of a stage, at most
BETWEEN_CHECKPOINTS = 300  # seconds
DISK = 3e8  # bytes of a checkpoint a second
PREPARING_SHARE = 0.25  # of the time for scan, latents and denoiser: more is for images that are left out
FEW = 2000  # images, by which is estimated how many are left out
FAR = 20  # times too few images for a network to be worth a word
GRID_ROWS, FINAL_ROWS = 4, 8
NUMBERS_OF_SAMPLES = (50_000, 10_000, 5000, 2000, 1000, 500, 200)


@dataclass
class Plan:
    """A sized configuration, the seconds of its parts in their order, and why it is not larger."""

    config: Config
    parts: dict[str, float]
    reasons: list[str]

    def describe(self) -> str:
        """Resolution, networks and images seen, in one line."""
        size, first, second = self.config.data.resolution, self.config.autoencoder, self.config.denoiser
        own = first.pretrained or f"{first.kind} {first.widths} after {seen(first):,} images"
        return f"{size}x{size} pixels, {own}, U-Net {second.widths} after {seen(second):,}"


def choose(config: Config, facts: Facts, seconds: float, measure: Measure) -> Plan:
    """The best that `seconds` from now buy, with every option in `config.given` as it is.

    Of many images some are left out: those that the denoiser would not come to see, or that take more than a
    part of the time to be read and encoded. Mirror images are encoded only where both would be seen.

    Raises:
        RunError: they buy nothing useful; it names the least.
    """
    limit = None
    if "data.max_images" not in config.given:
        some = facts.of(FEW)
        plan = _choose(config, some, seconds, measure, mirrored=False)
        preparing, training = plan.parts["start"] - FIXED + plan.parts["latents"], plan.parts["denoiser"]
        each, step = preparing / some.images, training / seen(plan.config.denoiser)
        number = int((preparing + training) * min(1 / (each + step), PREPARING_SHARE / each))
        if number < facts.images:
            limit, facts = number, facts.of(number)
    plan = _choose(config, facts, seconds, measure, False, limit)
    if facts.drawn or config.data.dataset == "digits" or seen(plan.config.denoiser) < 2 * facts.images:
        return plan
    return _choose(config, facts, seconds, measure, True, limit)


def _choose(
    config: Config, facts: Facts, seconds: float, measure: Measure, mirrored: bool, limit: int | None = None
) -> Plan:
    """`choose` with or without mirror images, for `limit` images or all."""
    draft, reasons, everything = smallest(config, facts.typical_batch), [], facts.images + facts.held_out
    data = {"channels": 1 if facts.grey else 3, "horizontal_flip": mirrored, "max_images": limit}
    put(draft, {f"data.{name}": value for name, value in data.items()})
    put(draft, {"autoencoder.optimizer": "muon", "denoiser.optimizer": "adamw" if facts.sharded else "muon"})
    start = FIXED + facts.scanning
    left = seconds * (1 - RESERVE) - start - facts.captions
    draft, encoder, first = _choose_autoencoder(draft, facts, left, measure, reasons)
    decoding, passes = facts.decoding / max(1, facts.readers), 1 + draft.data.horizontal_flip
    encoding = everything * (decoding + passes * encoder.encode) / facts.processes
    encoding *= 1 + cached(task_of(draft.denoiser))
    left -= first + encoding
    draft, denoiser, second, last = _choose_denoiser(draft, facts, left, encoder, measure, reasons)
    latents = encoding + facts.captions
    parts = {"start": start, "autoencoder": first, "latents": latents, "denoiser": second, "evaluation": last}
    plan = Plan(draft, parts, reasons)
    _check_time(plan, seconds, encoder, denoiser)
    parts["reserve"] = seconds - sum(parts.values())
    return plan


def _climb(
    draft: Config, name: str, ladder: list, images: Callable, measure: Measure, reasons: list[str], slower=1.0
) -> tuple[Config, int]:
    """`draft` with the options of the highest rung that sees the images it needs, at least the first, and how
    many it needs.

    Args:
        ladder: (images needed, options) of the rungs, from the lowest.
        images: that a network of a speed sees.
        slower: a rung than the one below, at least; what cannot suffice is not measured.
    """
    best, needed, number = None, 0, 0.0
    for need, options in ladder:
        tried = copy.deepcopy(draft)
        put(tried, options)
        most = number / slower
        if best is None or most >= need:
            most = number = images(measure(tried, name))
        if best is not None and most < need:
            why = f"pays from {need:,} images on, and would see {most:,.0f} at most"
            why = why if most else f"has more than {PARAMETERS_PER_IMAGE:,} parameters per image"
            if not most or FAR * most > need:
                size = tried.data.resolution
                reasons.append(f"{name} {getattr(tried, name).widths} at {size} pixels {why}")
            break
        best, needed = tried, need
    return best, needed


def _choose_autoencoder(draft: Config, facts: Facts, seconds: float, measure: Measure, reasons: list[str]):
    """Resolution and autoencoder: the configuration, the network's speed and the seconds of its stage."""
    name = "autoencoder"
    if draft.autoencoder.pretrained:
        return draft, measure(draft, name), 0.0
    share = max(0.0, AUTOENCODER_SHARE * seconds)
    decoding = facts.decoding / facts.processes

    def cost(speed: Speed) -> float:
        return max(speed.step, decoding / facts.readers) if facts.readers else speed.step + decoding

    def images(speed: Speed) -> float:
        return share * (1 - MONITOR_SHARE) / cost(speed)

    sides = [side for side in AUTOENCODERS if side <= max(facts.side, 16)]
    sides = [draft.data.resolution] if "data.resolution" in draft.given else sides
    ladder = [
        (recipes_at(side)[0].need, autoencoder_options(draft, facts, side, recipes_at(side)[0]))
        for side in sides
    ]
    draft, _ = _climb(draft, name, ladder, images, measure, reasons, slower=3)
    side = draft.data.resolution
    ladder = [(recipe.need, autoencoder_options(draft, facts, side, recipe)) for recipe in recipes_at(side)]
    draft, need = _climb(draft, name, ladder, images, measure, reasons)

    def worth(speed: Speed) -> float:
        return min(images(speed), (AMPLE * need * images(speed)) ** 0.5)

    speed = _set_batch(draft, name, AUTOENCODER_BATCH, worth(measure(draft, name)), facts, measure)
    check = min(512, facts.held_out) * (speed.evaluate + facts.decoding) / facts.processes
    return draft, speed, _set_steps(draft, name, worth(speed), cost(speed), check, speed)


def _set_batch(
    draft: Config, name: str, rule: tuple[float, int], images: float, facts: Facts, measure: Measure
) -> Speed:
    """Set the batch size: as much as fits into memory of what a `rule` of recipes gives for `images` to see,
    or a multiple of it, up to that at which networks are compared, where a GPU waits for Python and takes
    hardly longer for it. Returns the speed."""
    option, size = f"{name}.batch_size", batch_size(*rule, images, facts)
    put(draft, {option: size})
    while math.isinf(measure(draft, name).step) and size % 2 == 0 and option not in draft.given:
        size //= 2
        put(draft, {option: size})
    while 2 * size <= min(facts.typical_batch, facts.images) and option not in draft.given:
        larger = copy.deepcopy(draft)
        put(larger, {option: 2 * size})
        if measure(larger, name).step > WORTH_DOUBLING * measure(draft, name).step:
            break
        size *= 2
        put(draft, {option: size})
    return measure(draft, name)


def _set_steps(draft: Config, name: str, images: float, cost: float, check: float, speed: Speed) -> float:
    """Set the steps of a stage and its cadence; returns the seconds of the stage.

    Args:
        images: to see.
        cost: seconds per image.
        check: seconds of a validation, with grids.
    """
    stage = getattr(draft, name)
    put(draft, {f"{name}.max_steps": max(1, int(images / stage.batch_size))})
    training = seen(stage) * cost
    checks = min(CHECKS, max(1, int(MONITOR_SHARE * training / max(check, 1e-6))))
    saves = max(2, round(training / BETWEEN_CHECKPOINTS))
    put(draft, cadence_options(name, stage.max_steps, checks, saves))
    if guide := getattr(stage, "guide_step", 0):
        put(draft, {f"{name}.checkpoint_every": guide})
    checked = math.ceil(stage.max_steps / stage.validate_every) * check
    return training + checked + saves * 16 * speed.parameters / DISK + speed.compiling


def _choose_denoiser(
    draft: Config, facts: Facts, seconds: float, encoder: Speed, measure: Measure, reasons: list[str]
):
    """Denoiser and evaluation: the configuration, the network's speed, and the seconds of both stages."""
    name, task = "denoiser", task_of(draft.denoiser)
    # A task of random conditions makes and encodes them in every step.
    live = facts.decoding / max(1, facts.readers) + encoder.encode if task and task.kind in RANDOM else 0.0

    def cost(speed: Speed) -> float:
        return speed.step + live / facts.processes

    def images(speed: Speed) -> float:
        return max(0.0, seconds * (1 - MONITOR_SHARE - JUDGING_SHARE) - speed.compiling) / cost(speed)

    def suitable(speed: Speed) -> float:
        return images(speed) if speed.parameters <= PARAMETERS_PER_IMAGE * facts.images else 0.0

    ladder = [
        (rung.need, denoiser_options(draft, rung, encoder.side, facts.typical_batch))
        for rung in unets_of(draft)
    ]
    draft, need = _climb(draft, name, ladder, suitable, measure, reasons)
    put(draft, sampling_options(draft, facts, need))
    speed = _set_batch(draft, name, DENOISER_BATCH, images(measure(draft, name)), facts, measure)
    stage, columns = draft.denoiser, min(facts.classes, 10) or 8
    least, most = (0.0, 0.0) if stage.guidance_scale == 1 else stage.guidance_interval
    passes = stage.sample_steps * (1 + most - least)  # two evaluations where it guides
    picture = (passes * speed.evaluate + encoder.decode) / facts.processes
    judged = FINAL_ROWS * columns * picture + _set_evaluation(draft, facts, seconds, encoder, speed, picture)
    check = min(1024, facts.held_out) * speed.evaluate / facts.processes + 2 * GRID_ROWS * columns * picture
    training = seconds - judged - speed.compiling
    checks = min(max(check, MONITOR_SHARE * training), CHECKS * check)
    spent = _set_steps(draft, name, (training - checks) / cost(speed), cost(speed), check, speed)
    put(draft, {"denoiser.dropout": 0.1 if seen(stage) > EPOCHS_WITHOUT_DROPOUT * facts.images else 0.0})
    return draft, speed, spent, judged


def _set_evaluation(
    draft: Config, facts: Facts, seconds: float, encoder: Speed, speed: Speed, picture: float
) -> float:
    """Set the numbers of images and samples of the evaluation; returns its seconds.

    Args:
        picture: seconds of a sample.
    """
    held_out = (encoder.evaluate + facts.decoding + speed.evaluate) / facts.processes
    put(draft, {"evaluation.num_images": max(64, min(2000, int(RECONSTRUCTION_SHARE * seconds / held_out)))})
    number = min(draft.evaluation.num_images, facts.held_out)
    if facts.judging is None:
        put(draft, {"evaluation.num_samples": 0})
        return number * held_out
    judging = (facts.judging + facts.decoding) / facts.processes
    real = (facts.images + facts.held_out + 2 * number) * judging
    sample = picture + facts.judging / facts.processes
    most = (JUDGING_SHARE * seconds - real) / sample
    put(draft, {"evaluation.num_samples": next((n for n in NUMBERS_OF_SAMPLES if n <= most), 0)})
    samples = draft.evaluation.num_samples
    return number * held_out + (real + samples * sample if samples else 0.0)


def _check_time(plan: Plan, seconds: float, encoder: Speed, denoiser: Speed) -> None:
    """RunError where the plan takes longer than `seconds`, or its networks see too few images."""
    config, least = plan.config, dict(plan.parts)
    for name, need, speed in (
        ("autoencoder", AUTOENCODERS[16][0].need, encoder),
        ("denoiser", UNETS[0].need, denoiser),
    ):
        if f"{name}.max_steps" not in config.given and not getattr(getattr(config, name), "pretrained", None):
            least[name] += max(0, need - seen(getattr(config, name))) * speed.step
    if sum(least.values()) > seconds:
        least = {"sizing": config.minutes * 60 - seconds} | least
        parts = ", ".join(f"{name} {part / 60:.1f}" for name, part in least.items())
        minutes = math.ceil(10 * sum(least.values()) / (1 - RESERVE) / 60) / 10
        raise RunError(
            f"--minutes {config.minutes:g}: too few for these images and options on this machine; it "
            f"needs at least {minutes:g} ({parts})"
        )
