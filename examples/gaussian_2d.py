"""The whole process in two dimensions, where every step has a closed form.

Data z0 ~ N([1, 2], diag(1, 2)), noise beta_t = t / T, T = 100. The forward process is taken step by step, the
reverse one by Diffusers' DDPM and DDIM through this package's adapter, with the exact denoiser.
"""

import torch
from matplotlib.patches import Ellipse
from show import BLUE, GREEN, PINK, RED, arguments, decimals, new_figure, print_table, save
from torch import Tensor

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Objective, scheduler_prediction

T, COUNT, STEPS, SHOWN = 100, 20_000, (2, 5, 10, 20, 50, 100), (0, 10, 20, 40, 100)
MEAN, VARIANCE = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double()
BETAS = torch.arange(1, T + 1).double() / T
# beta_T = 1 leaves no signal: there the noise is z itself and tells nothing of the data, while v does.
OBJECTIVE = {"prediction_type": "v_prediction", "num_train_timesteps": T, "trained_betas": BETAS.tolist()}


def signal_kept(t: int) -> Tensor:
    """abar_t: the product of 1 - beta."""
    return (1 - BETAS[:t]).prod()


def moments(abar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_t: those of the data, scaled, and the noise (DDPM, equation 4)."""
    return abar.sqrt() * MEAN, abar * VARIANCE + 1 - abar


def exact(noisy: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """E[clean | noisy] and E[noise | noisy], the best predictions; noise is -sigma times the score."""
    gap = (noisy - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
    return MEAN + alpha * VARIANCE * gap, sigma * gap


def forward() -> list[Tensor]:
    """Points (COUNT, 2) at every t from 0 to T, each made of the one before."""
    draw = torch.randn(T + 1, COUNT, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = [MEAN + VARIANCE.sqrt() * draw[0]]
    for beta, noise in zip(BETAS, draw[1:], strict=True):
        points.append((1 - beta).sqrt() * points[-1] + beta.sqrt() * noise)
    return points


def reverse(name: str, steps: int) -> list[Tensor]:
    """Points (COUNT, 2) from noise to data, by a scheduler of Diffusers and the exact denoiser."""
    objective, generator = Objective(OBJECTIVE), torch.Generator().manual_seed(1)
    scheduler = build_scheduler(OBJECTIVE, name)
    scheduler.set_timesteps(steps)

    def network(noisy, time, alpha, sigma):
        return objective.target(*exact(noisy, alpha, sigma), alpha, sigma)

    points = [torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)]
    for i, t in enumerate(scheduler.timesteps):
        output = scheduler_prediction(scheduler, objective, i, t, points[-1], network)
        points.append(scheduler.step(output, t, points[-1], generator=generator).prev_sample)
    return points


def reverse_variance(name: str, steps: int) -> Tensor:
    """Variance after all steps: each is linear in z, so a Gaussian stays one, and its mean is exact.

    DDIM (its equation 12): z' = a' clean + s' noise. DDPM (equations 6, 7): q(z' | z, clean) at E[clean | z].
    """
    variance = torch.ones(2).double()
    for t in range(T, 0, -T // steps):
        abar, before = signal_kept(t), signal_kept(t - T // steps)
        of_clean = abar.sqrt() * VARIANCE / moments(abar)[1]
        if name == "DDIM":
            of_noise, added = (1 - abar).sqrt() / moments(abar)[1], 0.0
            factor = before.sqrt() * of_clean + (1 - before).sqrt() * of_noise
        else:
            kept, added = abar / before, (1 - abar / before) * (1 - before) / (1 - abar)
            factor = (before.sqrt() * (1 - kept) * of_clean + kept.sqrt() * (1 - before)) / (1 - abar)
        variance = factor**2 * variance + added
    return variance


def compare(points: Tensor, mean: Tensor, variance: Tensor) -> list[str]:
    """Cells of a table; AssertionError unless mean and covariance are within five standard errors."""
    assert ((points.mean(0) - mean).abs() < 5 * (variance / COUNT).sqrt()).all()
    error = ((variance[:, None] * variance + torch.diag(variance**2)) / COUNT).sqrt()
    assert ((points.T.cov() - torch.diag(variance)).abs() < 5 * error).all()
    return [decimals(each) for each in (mean, points.mean(0), variance, points.T.cov().diag())]


def draw(axes, points: Tensor, t: int, colour: str, name: str) -> None:
    """Points (COUNT, 2), and the closed form at t as an ellipse of two deviations."""
    axes.scatter(*points[:1200].T, s=1.5, color=colour, alpha=0.5, linewidths=0)
    mean, variance = moments(signal_kept(t))
    axes.add_patch(Ellipse(mean, *4 * variance.sqrt(), fill=False))
    axes.set(xlim=(-4, 5), ylim=(-4, 6.5), aspect="equal", title=f"{name}, t = {t}")


if __name__ == "__main__":
    options, points = arguments(__doc__), forward()
    laws = [moments(signal_kept(t)) for t in range(T + 1)]
    cells = [compare(*each) for each in zip(points, *zip(*laws, strict=True), strict=True)]
    columns = "mean, closed form | of points | variance, closed form | of points"
    print_table(f"t | abar | {columns}", [(t, float(signal_kept(t)), *cells[t]) for t in SHOWN])
    walks = {(name, n): reverse(name, n) for name in ("DDPM", "DDIM") for n in STEPS}
    spread = {key: reverse_variance(*key) for key in walks}
    rows = [(*key, *compare(walk[-1], MEAN, spread[key])) for key, walk in walks.items()]
    print_table(f"scheduler | steps | {columns}", rows)
    figure, axes = new_figure(12, 4.6, 2, len(SHOWN) + 1)
    for i, t in enumerate(SHOWN):
        draw(axes[0, i], points[t], t, BLUE, "forward")
        draw(axes[1, i], walks["DDIM", 10][10 - t // 10], t, RED, "DDIM, 10 steps")
    for each, colour, name in zip(zip(*laws, strict=True), (GREEN, BLUE), ("mean", "variance"), strict=True):
        axes[0, -1].plot([float(values[1]) for values in each], color=colour, label=name)
    for name, colour in (("DDPM", PINK), ("DDIM", RED)):
        axes[1, -1].semilogx(STEPS, [spread[name, n][1] for n in STEPS], "o-", color=colour, label=name)
    axes[1, -1].axhline(2, color="black", linewidth=0.8)
    for each, title in zip(axes[:, -1], ("second coordinate, by t", "its variance, by steps"), strict=True):
        each.set_title(title)
        each.legend()
    save(figure, options.output)
