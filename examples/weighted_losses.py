"""One loss under four names: the error of sample, epsilon, v or flow is that of the clean latents, weighted.

A wrong guess of the clean latents is a wrong guess of the noise, of v and of the flow. The squares of these
errors differ by a weight w(SNR) alone. Min-SNR is another weight; a learned uncertainty divides by the error
that is left. Both are this package's, tried with networks whose errors are known in closed form.
"""

import torch
from show import BLUE, GREEN, GREY, OCHRE, PINK, arguments, new_figure, print_table, save
from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, Objective
from training.config import DenoiserConfig, objective_of
from training.losses.denoising import DenoisingLoss, denoising_errors, min_snr_weight, stratified

GAMMA, VARIANCE, STEPS = 5.0, 0.25, 600  # of min-SNR; of the Gaussian data; of training the uncertainty
WEIGHTS = {  # of |clean - guess|^2 in each loss, by the signal-to-noise ratio
    "sample": lambda snr: torch.ones_like(snr),
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "flow_prediction": lambda snr: (snr.sqrt() + 1).square(),
    "min-SNR": lambda snr: snr.clamp(max=GAMMA),
}
COLOURS = dict(zip(WEIGHTS, (GREY, BLUE, GREEN, PINK, OCHRE), strict=True))


class Guess(nn.Module):
    """A denoiser that guesses clean latents, and returns what its objective wants.

    guess: f(noisy, alpha, sigma), the clean latents (N, ...) for noisy ones like them.
    """

    def __init__(self, objective: Objective, guess):
        super().__init__()
        self.objective, self.guess = objective, guess

    def forward(self, noisy: Tensor, timesteps: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        alpha, sigma = (each.view(-1, 1, 1, 1) for each in self.objective.alpha_sigma(timesteps))
        clean = self.guess(noisy, alpha, sigma)
        return (self.objective.target(clean, (noisy - alpha * clean) / sigma, alpha, sigma),)


def best_guess(noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[clean | noisy] of latents N(0, VARIANCE)."""
    return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * noisy


def error_left(snr: Tensor) -> Tensor:
    """Var[clean | noisy], the error of the best guess."""
    return VARIANCE / (VARIANCE * snr + 1)


def check_weights(prediction_type: str) -> None:
    """The loss of a wrong guess is w(SNR) times its error; min-SNR undoes that weight and sets its own."""
    objective = Objective(objective_of(DenoiserConfig(prediction_type=prediction_type)))
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 7, 4, 8, 8, generator=generator)
    timesteps = torch.linspace(100, 900, 7)
    guess = Guess(objective, lambda noisy, alpha, sigma: wrong)
    errors, (alpha, sigma) = denoising_errors(guess, objective, clean, noise, timesteps, Condition())
    of_clean, snr = (clean - wrong).square().flatten(1).mean(1), (alpha / sigma).square()
    assert torch.allclose(errors, WEIGHTS[prediction_type](snr) * of_clean, rtol=1e-3), prediction_type
    weighted = errors * min_snr_weight(prediction_type, alpha, sigma, GAMMA)
    assert torch.allclose(weighted, WEIGHTS["min-SNR"](snr) * of_clean, rtol=1e-3), prediction_type


def learned_uncertainty(tau: Tensor) -> Tensor:
    """The log of the error that is left, as a loss with learned uncertainty finds it, at flow times tau."""
    trained = DenoisingLoss(nn.Identity(), DenoiserConfig(loss_weight="uncertainty"))
    trained.unet = Guess(trained.objective, best_guess)
    optimizer, generator = torch.optim.Adam(trained.parameters(), lr=0.003), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        clean, noise = torch.randn(2, 256, 1, 4, 4, generator=generator)
        timesteps = 1000 * stratified(torch.rand(256, generator=generator))
        loss, _ = trained(VARIANCE**0.5 * clean, noise, timesteps, Condition())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained.uncertainty(1000 * tau).detach()


if __name__ == "__main__":
    options, tau = arguments(__doc__), torch.linspace(0.02, 0.98, 97)
    for prediction_type in ("epsilon", "v_prediction", "flow_prediction"):
        check_weights(prediction_type)
    snr = ((1 - tau) / tau).square()
    learned, wanted = learned_uncertainty(tau), (WEIGHTS["flow_prediction"](snr) * error_left(snr)).log()
    assert (learned - wanted).abs().mean() < 0.1, "the uncertainty is the log of the error that is left"
    rows = [
        (float(tau[i]), float(snr[i]), *(float(weight(snr)[i]) for weight in WEIGHTS.values()))
        + (f"{learned[i]:.2f}", f"{wanted[i]:.2f}")
        for i in (8, 23, 48, 73, 88)
    ]
    print_table(f"tau | SNR | w: {' | w: '.join(WEIGHTS)} | learned uncertainty | closed form", rows)

    figure, axes = new_figure(12, 3.8, 1, 3)
    for name, weight in WEIGHTS.items():
        line = {"color": COLOURS[name], "linestyle": "--" if name == "min-SNR" else "-"}
        axes[0, 0].semilogy(tau, weight(snr), label=name, **line)
        axes[0, 1].semilogy(tau, weight(snr) * error_left(snr), **line)
    axes[0, 0].set_ylim(1e-2, 1e3)
    axes[0, 1].set_ylim(1e-3, 3)
    axes[0, 0].legend()
    axes[0, 0].set_title("weight of the error of the clean latents")
    axes[0, 1].set_title("loss of the best possible network")
    axes[0, 2].plot(tau, wanted, color="black", label="log of the flow's loss, closed form")
    axes[0, 2].plot(tau, learned, "--", color=PINK, label="learned uncertainty")
    axes[0, 2].legend()
    axes[0, 2].set_title(f"uncertainty after {STEPS} steps")
    for each in axes[0]:
        each.set_xlabel("noise level tau")
    save(figure, options.output)
