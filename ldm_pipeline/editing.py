"""Edits pictures with any model that was not trained for a task: without training, by its velocity alone.

The functions take a `LDMPipeline` first. Pictures are given as to its call, one or a list, and come back as
it gives them, by `output_type` "pil", "np", "pt" or "latent". A condition is a class (its name or number), a
prompt, a list of these, a dict of both, {"prompt": ..., "class_labels": ...}, or None, which says nothing.

Latents are normalised, (N, C, h, w) float32, on the path noisy = (1 - tau) * clean + tau * noise: tau = 0 is
a picture, tau = 1 noise. The velocity is noise - clean (arXiv:2209.03003), whatever the model's objective.
An evaluation is one of the denoiser for all pictures.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional

from .pipeline import (
    Condition,
    Guidance,
    Observation,
    clean_and_noise_at,
    first_latents,
    guided,
    luminance,
    per_image,
    set_timesteps,
    text_width,
    to_pixels,
)


# --------------------------------------------------------------------------------------------------- velocity
def velocity(
    pipe, noisy: torch.Tensor, tau: float, condition: Condition, null=None, guidance_scale: float = 1.0
) -> torch.Tensor:
    """noise - clean at noisy latents (N, C, h, w) of the noise level tau in [0, 1], shaped like them.

    guidance_scale: away from the `null` condition; off at 1. Then one evaluation is of N latents, else of 2N.
    """
    objective, denoiser = pipe.objective, pipe.denoiser
    tau = max(tau, 1e-3)  # no network was trained without noise
    given = condition, null, Guidance(guidance_scale), denoiser.dtype

    def network(scaled, *point):
        return guided(objective, denoiser, scaled, point, *given)

    clean, noise = clean_and_noise_at(objective, noisy, 1 - tau, tau, network)
    return noise - clean


def _velocity(pipe, condition, batch_size: int, guidance_scale: float = 1.0) -> Callable:
    """f(noisy, tau), the velocity of N latents under a condition as a user says it."""
    scale = guidance_scale if condition is not None else 1.0
    given = make_condition(pipe, condition, batch_size), make_condition(pipe, None, batch_size), scale
    return lambda noisy, tau: velocity(pipe, noisy, tau, *given)


def make_condition(pipe, condition, batch_size: int) -> Condition:
    """The condition of N pictures, of what a user says; ValueError where the model has no such."""
    if pipe.task is not None:
        raise ValueError(
            f"this model was trained for the task {pipe.task.kind}, and wants an image as its condition; "
            "wanted a model without a task"
        )
    if not isinstance(condition, dict):
        first = condition[0] if isinstance(condition, list | tuple) and condition else condition
        name = "prompt" if isinstance(first, str) and text_width(pipe.denoiser) else "class_labels"
        condition = {} if condition is None else {name: condition}
    if unknown := set(condition) - {"prompt", "class_labels"}:
        raise ValueError(f"the condition has {sorted(unknown)}; wanted prompt and class_labels")
    lists = {
        name: list(value) if isinstance(value, list | tuple) else [value] * batch_size
        for name, value in condition.items()
    }
    for name, values in lists.items():
        if len(values) != batch_size:
            raise ValueError(f"{name} has {len(values)} entries for {batch_size} pictures")
    prompts = pipe._check_text(lists.get("prompt"), None, None)
    return pipe._condition(prompts, lists.get("class_labels"), batch_size)


def _levels(start: float, end: float, steps: int) -> list[float]:
    """Noise levels from start to end in equal steps."""
    if not 0 <= min(start, end) < max(start, end) <= 1 or steps < 1:
        raise ValueError(
            f"strength={max(start, end)}, num_inference_steps={steps}; wanted a noise level above 0 and up "
            "to 1, and 1 step or more"
        )
    return [start + (end - start) * i / steps for i in range(steps + 1)]


@contextmanager
def _session(pipe):
    """No gradients, and afterwards the models where offloading wants them."""
    try:
        with torch.no_grad():
            yield
    finally:
        pipe.maybe_free_model_hooks()


def _finish(pipe, latents: torch.Tensor, output_type: str):
    """Pictures of latents, as the call of the pipeline gives them."""
    return latents if output_type == "latent" else pipe.to_output(pipe.decode(latents), output_type)


# -------------------------------------------------------------------------------------------------- inversion
@dataclass
class Inverted:
    """Pictures as noise, with all that leads back to them.

    latents: (N, C, h, w) at the noise level `tau`; velocity: the solver's at the same place, like them.
    num_inference_steps: of the way from the pictures to here.
    """

    latents: torch.Tensor
    velocity: torch.Tensor
    tau: float
    num_inference_steps: int

    def __getitem__(self, index) -> "Inverted":
        return Inverted(self.latents[index], self.velocity[index], self.tau, self.num_inference_steps)


def _leapfrog(pipe, velocity: Callable, latents, speed, levels: list[float]) -> tuple:
    """Latents and the solver's velocity after a walk along the levels: the asynchronous leapfrog method
    (arXiv:2102.04668). It is its own inverse: the way back ends where it began, up to rounding.
    """
    for tau, to in pipe.progress_bar(list(zip(levels, levels[1:], strict=False))):
        middle = latents + (to - tau) / 2 * speed
        speed = 2 * velocity(middle, (tau + to) / 2) - speed
        latents = middle + (to - tau) / 2 * speed
    return latents, speed


def invert(pipe, image, condition=None, num_inference_steps: int = 20, strength: float = 1.0) -> Inverted:
    """The noise of pictures: what a deterministic sampler would have drawn them from.

    `revert` under the same condition returns to the latents of the pictures within 1e-5, at any number of
    steps. Evaluations: num_inference_steps + 1.

    Args:
        condition: what the pictures are.
        strength: the noise level in (0, 1] up to which they are taken.
    """
    with _session(pipe):
        clean = pipe.to_latents(image)
        f = _velocity(pipe, condition, len(clean))
        levels = _levels(0.0, strength, num_inference_steps)
        end = _leapfrog(pipe, f, clean, f(clean, 0.0), levels)
        return Inverted(*end, strength, num_inference_steps)


def revert(pipe, inverted: Inverted, condition=None, guidance_scale: float = 1.0, output_type: str = "pil"):
    """Pictures of inverted ones: the same under the same condition and without guidance, or others.

    Evaluations: as many as the inversion had steps, twice as large under guidance.
    """
    with _session(pipe):
        f = _velocity(pipe, condition, len(inverted.latents), guidance_scale)
        return _revert(pipe, f, inverted, output_type)


def _revert(pipe, velocity: Callable, inverted: Inverted, output_type: str):
    levels = _levels(inverted.tau, 0.0, inverted.num_inference_steps)
    latents, _ = _leapfrog(pipe, velocity, inverted.latents, inverted.velocity, levels)
    return _finish(pipe, latents, output_type)


# ------------------------------------------------------------------------------ from one condition to another
def edit(
    pipe,
    image,
    source=None,
    target=None,
    strength: float = 0.7,
    method: Literal["flowedit", "inversion"] = "flowedit",
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    generator=None,
    output_type: str = "pil",
):
    """Pictures of one condition as ones of another that are like them.

    "flowedit" (arXiv:2412.08629) walks from the picture by the difference of the velocities under both
    conditions, at the same noise; from a condition to itself nothing changes. "inversion" takes the picture
    to noise under the source and back under the target. Evaluations: 2 * num_inference_steps, under guidance
    twice as large.

    Args:
        source: what the pictures are; None says nothing.
        target: what they shall be.
        strength: the noise level in (0, 1] of the first step; more changes more.
        guidance_scale: towards the target.
        generator: of flowedit's noise; one, or one per picture.
    """
    if method not in ("flowedit", "inversion"):
        raise ValueError(f"method={method!r}; wanted 'flowedit' or 'inversion'")
    if method == "inversion":
        inverted = invert(pipe, image, source, num_inference_steps, strength)
        return revert(pipe, inverted, target, guidance_scale, output_type)
    with _session(pipe):
        clean = pipe.to_latents(image)
        # Under the same scale, so that equal conditions give equal velocities.
        to, of = (_velocity(pipe, each, len(clean), guidance_scale) for each in (target, source))
        edited, levels = clean.clone(), _levels(strength, 0.0, num_inference_steps)
        for tau, following in pipe.progress_bar(list(zip(levels, levels[1:], strict=False))):
            noise = randn_tensor(clean.shape, generator, clean.device, torch.float32)
            noisy = (1 - tau) * clean + tau * noise
            edited = edited + (following - tau) * (to(noisy + edited - clean, tau) - of(noisy, tau))
        return _finish(pipe, edited, output_type)


def variations(pipe, image, number: int = 4, strength: float = 0.5, **options):
    """Other pictures like each of the given, by image to image of the call, which takes the `options`."""
    return pipe(image=image, strength=strength, num_images_per_prompt=number, **options).images


# ---------------------------------------------------------------------------------- interpolation, directions
def slerp(first: torch.Tensor, last: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of two tensors (...) at weights (F,) in [0, 1]: (F, ...).

    Of equal norms it keeps the norm, which samples of noise have in common; a straight line shortens it.
    """
    cosine = functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.double().acos().clamp(min=1e-6).to(first)
    weights = weights.to(first).view(-1, *[1] * first.ndim)
    return (((1 - weights) * angle).sin() * first + (weights * angle).sin() * last) / angle.sin()


def interpolate(
    pipe,
    image=None,
    condition=None,
    frames: int = 8,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    generator=None,
    output_type: str = "pil",
):
    """A row of pictures from one to another.

    Args:
        image: two pictures, the first and the last of the row, which go through inversion; or one, which
            stays as far as the condition lets it. None draws two.
        condition: of all pictures; or a list of two, of the first and of the last. In between, the velocities
            of both are mixed, by two evaluations instead of one.
        frames: pictures in the row, 2 or more.
        guidance_scale: off at 1, where the row begins and ends with the given pictures.
        generator: of the noise that is drawn, one, or a list of two.
    """
    conditions = list(condition) if isinstance(condition, list | tuple) else [condition] * 2
    if frames < 2 or len(conditions) != 2:
        raise ValueError(
            f"frames={frames}, condition={condition}; wanted 2 frames or more, and one condition or two"
        )
    with _session(pipe):
        weights = torch.linspace(0, 1, frames, device=pipe._execution_device)
        f = _mixed(pipe, conditions, weights, guidance_scale)
        if image is None:
            latents = slerp(*pipe._noise(None, 2, generator), weights)
            return _revert(pipe, f, Inverted(latents, f(latents, 1.0), 1.0, num_inference_steps), output_type)
        first = last = invert(pipe, image, conditions[0], num_inference_steps)
        if len(first.latents) > 2:
            raise ValueError(f"{len(first.latents)} pictures are given; wanted one or two")
        if conditions[0] != conditions[1]:
            last = invert(pipe, image, conditions[1], num_inference_steps)
        latents = slerp(first.latents[0], last.latents[-1], weights)
        speed = torch.lerp(first.velocity[:1], last.velocity[-1:], per_image(weights, latents))
        return _revert(pipe, f, Inverted(latents, speed, 1.0, num_inference_steps), output_type)


def _mixed(pipe, conditions: list, weights: torch.Tensor, guidance_scale: float) -> Callable:
    """The velocity under the first condition to that under the last, by the weight (N,) of each image."""
    first, last = (_velocity(pipe, each, len(weights), guidance_scale) for each in conditions)
    if conditions[0] == conditions[1]:
        return first
    return lambda noisy, tau: torch.lerp(first(noisy, tau), last(noisy, tau), per_image(weights, noisy))


def direction(pipe, positive, negative, condition=None, num_inference_steps: int = 20, strength: float = 0.6):
    """Direction of an attribute, for `shift`: the difference of the means of pictures with and without it,
    inverted. Evaluations: num_inference_steps + 1 for each of both.

    Args:
        positive, negative: pictures with and without the attribute, some tens of each. For a class or a
            prompt, draw them with the pipeline.
        condition: of all of them.
        strength: noise level in (0, 1] up to which they are inverted.
    """
    ends = [invert(pipe, each, condition, num_inference_steps, strength) for each in (positive, negative)]
    latents, velocity = (
        getattr(ends[0], name).mean(0, keepdim=True) - getattr(ends[1], name).mean(0, keepdim=True)
        for name in ("latents", "velocity")
    )
    return Inverted(latents, velocity, strength, num_inference_steps)


def shift(pipe, image, direction: Inverted, amount: float = 1.0, condition=None, output_type: str = "pil"):
    """Pictures with more of the attribute of a `direction`, or, below 0, with less.

    Evaluations: 2 * num_inference_steps + 1 of the direction's.

    Args:
        amount: in differences of the means; 0 returns the pictures' reconstructions.
        condition: the direction's.
    """
    start = invert(pipe, image, condition, direction.num_inference_steps, direction.tau)
    latents = start.latents + amount * direction.latents
    velocity = start.velocity + amount * direction.velocity
    moved = Inverted(latents, velocity, direction.tau, direction.num_inference_steps)
    return revert(pipe, moved, condition, output_type=output_type)


# ------------------------------------------------------------------------------------------------ restoration
def operator(name: str | Callable) -> Callable:
    """A linear degradation of images (N, C, H, W): "downscale:F" by a factor, "grey", or "blur:S", Gaussian
    with a deviation of S pixels; or any linear function of them as it is."""
    if callable(name):
        return name
    kind, _, number = name.partition(":")
    if name == "grey":
        return luminance
    if kind == "downscale" and number.isdecimal() and int(number) > 1:
        return lambda images: functional.interpolate(
            images, scale_factor=1 / int(number), mode="bicubic", antialias=True
        )
    if kind == "blur" and number.replace(".", "", 1).isdecimal() and float(number) > 0:
        return lambda images: _blurred(images, float(number))
    raise ValueError(
        f"degradation={name!r}; wanted 'downscale:F' with a factor above 1, 'grey', 'blur:S' with a "
        "deviation in pixels, or a linear function of images (N, C, H, W)"
    )


def _blurred(images: torch.Tensor, deviation: float) -> torch.Tensor:
    radius = math.ceil(3 * deviation)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1, device=images.device) ** 2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = functional.pad(images, [radius] * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel[..., None, :], groups=images.shape[1])
    return functional.conv2d(rows, kernel[..., None], groups=images.shape[1])


def restore(
    pipe,
    image,
    degradation: str | Callable,
    condition=None,
    weight: float = 0.1,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    generator=None,
    output_type: str = "pil",
):
    """Pictures that, degraded, are the given ones (DPS, arXiv:2209.14687; see `observed` of the pipeline).

    By the pipeline's scheduler. Evaluations: num_inference_steps, with gradients through denoiser and
    decoder, which take about three times the time.

    Args:
        image: degraded pictures: small, grey or blurred.
        degradation: see `operator`.
        condition: what the pictures are.
        weight: see `Observation` of the pipeline.
    """
    measure = operator(degradation)
    with _session(pipe):
        given = torch.stack(to_pixels(image)).to(pipe._execution_device)
        drawn = measure(torch.zeros(1, *pipe.image_shape, device=given.device))
        given = luminance(given) if drawn.shape[1] == 1 else given.expand(-1, drawn.shape[1], -1, -1)
        if given.shape[1:] != drawn.shape[1:]:
            raise ValueError(
                f"the pictures have the shape {tuple(given.shape[1:])}, but {degradation} makes "
                f"{tuple(drawn.shape[1:])} of this model's"
            )
        conditions = (make_condition(pipe, each, len(given)) for each in (condition, None))
        guidance = Guidance(guidance_scale if condition is not None else 1.0)
        set_timesteps(pipe.scheduler, num_inference_steps, device=given.device)
        latents = first_latents(pipe.scheduler, pipe._noise(None, len(given), generator))
        latents = pipe.denoise_latents(
            latents, pipe.scheduler.timesteps, *conditions, guidance, generator,
            observation=Observation(measure, given, weight),
        )  # fmt: skip
        return _finish(pipe, latents, output_type)


# --------------------------------------------------------------------------------------------- classification
@dataclass
class Ranking:
    """Candidates of a picture, the likeliest first, with their mean errors, and the evaluations it took.

    A candidate that left early has the error of its last round.
    """

    candidates: list
    errors: list[float]
    evaluations: int


def classify(
    pipe,
    image,
    candidates: Sequence,
    samples: Sequence[int] = (4, 16, 64),
    keep: Sequence[int] = (10, 3),
    generator=None,
    batch_size: int = 64,
) -> list[Ranking]:
    """Rank classes or prompts by how well the model denoises each picture under them (arXiv:2303.16203).

    The error is that of the velocity, at noise levels spread over (0, 1), with the same noise for all
    pictures and candidates. In rounds: after each, the best candidates of a picture stay.

    Args:
        candidates: conditions, two or more.
        samples: evaluations of each candidate until the end of each round, rising.
        keep: candidates that stay after each round but the last, falling.
        generator: of the noise.
        batch_size: latents per evaluation.
    """
    candidates, rounds = list(candidates), list(zip(samples, [*keep, None], strict=False))
    if len(candidates) < 2 or len(samples) != len(keep) + 1 or list(samples) != sorted(set(samples)):
        raise ValueError(
            f"{len(candidates)} candidates, samples={samples}, keep={keep}; wanted two candidates or more, "
            "rising samples, and a number to keep after each round but the last"
        )
    with _session(pipe):
        clean, conditions = pipe.to_latents(image), make_condition(pipe, candidates, len(candidates))
        device, number = clean.device, len(clean)
        errors, means = (torch.zeros(number, len(candidates), device=device) for _ in range(2))
        order = torch.arange(len(candidates), device=device).repeat(number, 1)
        left = order.clone()
        done, evaluations, bar = 0, 0, pipe.progress_bar(total=samples[-1])
        for upto, kept in rounds:
            pictures = torch.arange(number, device=device).repeat_interleave(left.shape[1])
            pairs = torch.stack([pictures, left.flatten()], 1)
            for i in range(done, upto):
                tau = (0.618034 * i + 0.5) % 1  # the golden ratio spreads them evenly, however many
                noise = randn_tensor((1, *clean.shape[1:]), generator, device, torch.float32)
                for rows, columns in (chunk.T for chunk in pairs.split(batch_size)):
                    found = clean[rows]
                    drawn = velocity(pipe, torch.lerp(found, noise, tau), tau, conditions[columns])
                    errors[rows, columns] += (drawn - (noise - found)).square().flatten(1).mean(1)
                bar.update()
            evaluations, done = evaluations + left.shape[1] * (upto - done), upto
            means.scatter_(1, left, errors.gather(1, left) / upto)
            left = left.gather(1, means.gather(1, left).argsort(1))
            order[:, : left.shape[1]] = left
            left = left[:, :kept]
        return [
            Ranking([candidates[i] for i in row], means[n, row].tolist(), evaluations)
            for n, row in enumerate(order.tolist())
        ]
