"""Noise schedules: how much signal is left at which time, and where a sampler spends its steps.

Every schedule is a path noisy = alpha * clean + sigma * noise. They are compared on one axis, the noise level
tau = sigma / (alpha + sigma), 0 for clean and 1 for noise. The signal-to-noise ratio is (alpha / sigma)^2.
"""

import math

import torch
from show import BLUE, GREEN, GREY, OCHRE, PINK, RED, arguments, new_figure, print_table, save
from torch import Tensor

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Objective, noise_levels, set_timesteps

T, STEPS, SIDE = 1000, 20, 64
TIME = torch.arange(1, T + 1).double() / T  # of the T steps, in (0, 1]


def betas_of(kept: Tensor) -> Tensor:
    """Betas (T,) of a wanted abar (T,); the largest is 0.999, or no signal would be left at the end."""
    before = torch.cat([torch.ones(1), kept[:-1]])
    return (1 - kept / before).clamp(max=0.999)


def cosine(time: Tensor, offset: float) -> Tensor:
    """cos^2 of a quarter turn that begins at the offset (arXiv:2102.09672, equation 17)."""
    at = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    return at / math.cos(offset / (1 + offset) * math.pi / 2) ** 2


RAMP = (TIME * T - 1) / (T - 1)
SINE = 1 - cosine(TIME, 0.0)
BETAS = {  # the closed forms, (T,) float64
    "linear": 0.0001 + (0.02 - 0.0001) * RAMP,
    "scaled linear": (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * RAMP).square(),
    "cosine": betas_of(cosine(TIME, 0.008)),
    "1 - cos^2 as 1 - abar": betas_of(1 - SINE),
    "1 - cos^2 as beta": SINE,
}
NAMES = {"linear": "linear", "scaled linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
COLOURS = (BLUE, RED, "#f0a060", GREEN, OCHRE, PINK, "black")


def objectives() -> dict[str, Objective]:
    """The schedules as this package has them: by Diffusers' names, or by their betas."""
    found = {}
    for name, betas in BETAS.items():
        config = {"prediction_type": "v_prediction", "num_train_timesteps": T}
        ends = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
        own = {"beta_schedule": NAMES[name], **ends} if name in NAMES else {"trained_betas": betas.tolist()}
        found[name] = Objective(config | own)
        if name == "scaled linear":
            found[f"{name}, zero SNR"] = Objective(config | own | {"rescale_betas_zero_snr": True})
    return found | {"flow": Objective({"prediction_type": "flow_prediction"})}


def check(name: str, objective: Objective, kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Alpha and sigma (T,) at all times of a network, compared with the closed form."""
    times = TIME * T if objective.is_flow else torch.arange(T)
    alpha, sigma = (each.double() for each in objective.alpha_sigma(times))
    if objective.is_flow:
        wanted = 1 - TIME
    elif name in kept:
        wanted = kept[name].sqrt()
    else:  # arXiv:2305.08891, algorithm 1: alpha is shifted to end at 0 and stretched to begin where it did
        root = kept["scaled linear"].sqrt()
        wanted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert torch.allclose(alpha, wanted, rtol=1e-4, atol=1e-5), name
    for t in (100, 400, 700):  # from a ratio of signal and noise back to the time
        found = objective.network_point(float(alpha[t]), float(sigma[t]))[0]
        assert abs(found - float(times[t])) < 0.1 or alpha[t] < 1e-5, (name, t)
    return alpha, sigma


def levels_of(objective: Objective) -> Tensor:
    """Noise levels (STEPS,) at the steps of DDIM, or for a flow of Euler's method."""
    scheduler = build_scheduler(objective.config, "FlowMatchEulerDiscrete" if objective.is_flow else "DDIM")
    set_timesteps(scheduler, STEPS)
    return torch.tensor(noise_levels(scheduler, objective)).double()


def draw_brightness(axes, alpha: float) -> None:
    """Mean of SIDE x SIDE latents of dark and bright pictures at the last time, and of noise."""
    at = torch.linspace(-0.16, 0.16, 400)
    for centre, colour, label in ((-alpha, BLUE, "dark"), (alpha, OCHRE, "bright"), (0, GREY, "noise")):
        density = SIDE / (2 * math.pi) ** 0.5 * (-((at - centre) * SIDE).square() / 2).exp()
        axes.plot(at, density, color=colour, label=label)
    axes.set(xlabel="mean of the latents", yticks=[])
    axes.legend()
    axes.set_title("scaled linear at its last step")


if __name__ == "__main__":
    options, kept = arguments(__doc__), {name: (1 - betas).cumprod(0) for name, betas in BETAS.items()}
    (figure, axes), rows, known = new_figure(12, 4, 1, 3), [], objectives()
    for colour, (name, objective) in zip(COLOURS, known.items(), strict=True):
        alpha, sigma = check(name, objective, kept)
        levels, tau = levels_of(objective), sigma / (alpha + sigma)
        at = torch.arange(T - 1, -1, -T // STEPS)  # "trailing": the first step is at pure noise
        assert torch.allclose(levels, tau[at], atol=1e-3), f"{name}: levels of the steps"
        # SIDE x SIDE latents of mean 1 keep the mean alpha; the mean of noise deviates by 1 / SIDE.
        brightness = float(alpha[-1] / sigma[-1]) * SIDE
        bins = [int(((levels > low) & (levels <= low + 0.3)).sum()) for low in (0.7, 0.4, 0.1, -0.2)]
        rows.append((name, float(alpha[-1]), brightness, float(TIME[(tau < 0.5).sum()]), *bins))
        axes[0, 0].plot(TIME, 20 * (alpha / sigma).log10(), color=colour, linewidth=1.5)
        axes[0, 1].plot(levels, torch.full_like(levels, -len(rows)), "|", color=colour, markersize=16)
    print_table(
        "schedule | alpha at the end | brightness left | half noise at t/T | "
        "steps with tau above 0.7 | 0.4 to 0.7 | 0.1 to 0.4 | below 0.1",
        rows,
    )
    axes[0, 0].set(ylim=(-60, 40), xlabel="t / T")
    axes[0, 0].set_title("signal-to-noise ratio, decibels; colours as at the right")
    axes[0, 1].set(yticks=range(-len(rows), 0), yticklabels=list(known)[::-1], xlabel="noise level tau")
    axes[0, 1].set_title(f"levels of {STEPS} equal steps in time")
    for label, colour in zip(axes[0, 1].get_yticklabels(), COLOURS[::-1], strict=True):
        label.set_color(colour)
    draw_brightness(axes[0, 2], float(kept["scaled linear"][-1].sqrt()))
    save(figure, options.output)
