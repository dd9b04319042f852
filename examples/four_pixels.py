"""The forward process of a picture of four pixels, in numbers that can be checked by hand.

Three steps z_t = sqrt(1 - beta_t) z_(t-1) + sqrt(beta_t) eps_t, and the shortcut that training uses instead:
z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, where abar_t is the product of the 1 - beta.
"""

import torch
from show import BLUE, RED, arguments, new_figure, print_table, save

from ldm_pipeline.pipeline import Objective

CLEAN = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
BETAS = torch.tensor([0.1, 0.2, 0.3]).double()
NOISES = torch.tensor(
    [[[0.2, -0.1], [0.3, -0.4]], [[-0.1, 0.2], [0.4, -0.3]], [[0.4, -0.2], [-0.1, 0.5]]]
).double()


def steps() -> list[torch.Tensor]:
    """The picture (2, 2) at t = 0, 1, 2, 3, one step after the other."""
    pictures = [CLEAN]
    for beta, noise in zip(BETAS, NOISES, strict=True):
        pictures.append((1 - beta).sqrt() * pictures[-1] + beta.sqrt() * noise)
    return pictures


def one_noise(t: int) -> torch.Tensor:
    """The one noise (2, 2) that does in a single step what the first t noises do.

    The noise of step s is scaled by sqrt(beta_s), and by every later step; variances of independent noises
    add up, so the squares of the weights are 1 in sum, and the noise is standard normal again.
    """
    abar = (1 - BETAS[:t]).prod()
    later = torch.stack([(1 - BETAS[s + 1 : t]).prod() for s in range(t)])
    weights = (BETAS[:t] * later / (1 - abar)).sqrt()
    assert abs(weights.square().sum() - 1) < 1e-12, "the combined noise is not of unit variance"
    return (weights.view(-1, 1, 1) * NOISES[:t]).sum(0)


def draw_numbers(axes, values: torch.Tensor, title: str, colours: str) -> None:
    """Values (2, 2) as coloured squares, and as numbers on them."""
    low, high = (-1.0, 1.5) if colours == "Oranges" else (0.0, 6.0)
    axes.imshow(values, cmap=colours, vmin=low, vmax=high)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        axes.text(x, y, f"{values[y, x]:.3f}", ha="center", va="center")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


if __name__ == "__main__":
    options, pictures = arguments(__doc__), steps()
    config = {"prediction_type": "epsilon", "num_train_timesteps": 3, "trained_betas": BETAS.tolist()}
    objective, rows, noises = Objective(config), [], []
    for t in (1, 2, 3):
        abar, noise = (1 - BETAS[:t]).prod(), one_noise(t)
        shortcut = abar.sqrt() * CLEAN + (1 - abar).sqrt() * noise
        assert torch.allclose(pictures[t], shortcut, atol=1e-12), f"shortcut, t = {t}"
        # This package counts the times of a network from 0, and knows abar in float32.
        alpha, sigma = (each.double() for each in objective.alpha_sigma(torch.tensor(t - 1)))
        assert abs(alpha**2 - abar) < 1e-6 and abs(sigma**2 - 1 + abar) < 1e-6, "abar of the package"
        clean, _ = objective.clean_and_noise(noise, pictures[t], alpha, sigma)
        assert torch.allclose(clean, CLEAN, atol=1e-5), "the true noise leads back to the picture"
        noises.append(noise)
        rows.append((t, *(float(x) for x in (BETAS[t - 1], abar, BETAS[:t].prod(), abar / (1 - abar)))))
        rows[-1] += tuple(", ".join(f"{x:.3f}" for x in each.flatten()) for each in (pictures[t], noise))
    assert abs(pictures[1][0, 0] - 1.0119) < 1e-4, "0.9487 * 1 + 0.3162 * 0.2"
    header = "t | beta | abar | product of beta | signal-to-noise | z_t, step by step | the one noise"
    print_table(header, rows)
    figure, axes = new_figure(9, 4.8, 2, 4)
    kept, product = (torch.cat([torch.ones(1), each.cumprod(0)]) for each in (1 - BETAS, BETAS))
    axes[1, 0].plot(kept, "o-", color=BLUE)
    axes[1, 0].plot(product, "o--", color=RED)
    axes[1, 0].text(1.15, 0.92, "product of 1 - beta", color=BLUE, fontsize=8)
    axes[1, 0].text(1.15, 0.12, "product of beta: wrong", color=RED, fontsize=8)
    axes[1, 0].set(xticks=range(4), xlabel="t")
    for t, picture in enumerate(pictures):
        draw_numbers(axes[0, t], picture, "z0" if t == 0 else f"z{t}, of z{t - 1}", "Blues")
        if t > 0:
            weights = f"{kept[t].sqrt():.3f} z0 + {(1 - kept[t]).sqrt():.3f} eps"
            draw_numbers(axes[1, t], noises[t - 1], f"z{t} = {weights}", "Oranges")
    save(figure, options.output)
