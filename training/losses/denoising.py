"""The denoiser's objective: its target, its timesteps and the weight of each."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, Objective, denoise, encode_tokens, per_image
from training.config import DenoiserConfig, objective_of


def sample_timesteps(config: DenoiserConfig, uniform: Tensor) -> Tensor:
    """Training timesteps `(N,)` from uniform numbers `(N,)` in [0, 1), by their inverse distribution."""
    if config.timestep_density == "logit_normal":
        uniform = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform))
    return network_timesteps(config.prediction_type, uniform)


def network_timesteps(prediction_type: str, time: Tensor) -> Tensor:
    """Time in [0, 1], clean to noise, as the network knows it.

    A flow has continuous time in [0, 1000]; epsilon and v have the indices 0 to 999 of their noise schedule.
    """
    return 1000 * time if prediction_type == "flow_prediction" else (1000 * time).long().clamp(max=999)


def stratified(uniform: Tensor) -> Tensor:
    """One of N equal strata of [0, 1) for each of N uniform numbers: less noisy losses, the same density.

    (Kingma et al., "Variational Diffusion Models", arXiv:2107.00630, appendix I.1.)
    """
    return (torch.arange(len(uniform), device=uniform.device) + uniform) / len(uniform)


def min_snr_weight(prediction_type: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weight `(N,)` of min-SNR (arXiv:2303.09556): min(SNR, gamma) on the error of the clean latents.

    The error of the prediction becomes one of the clean latents by its derivative: sigma / alpha for epsilon,
    sigma for v and for the flow.
    """
    to_clean = sigma / alpha if prediction_type == "epsilon" else sigma
    snr = (alpha / sigma.clamp(min=1e-4)) ** 2
    return snr.clamp(max=gamma) * to_clean**2


class Uncertainty(nn.Module):
    """Learned log-variance of the loss as a function of the timestep (EDM2, arXiv:2312.02696, eq. 21)."""

    def __init__(self, channels: int = 128):
        super().__init__()
        self.register_buffer(
            "frequencies", torch.linspace(0, 1, channels // 2) * channels / 2, persistent=False
        )
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps `(N,)` in [0, 1000] to log-variances `(N,)`."""
        angles = timesteps.float()[:, None] / 1000 * self.frequencies * torch.pi
        return self.linear(torch.cat([angles.cos(), angles.sin()], 1))[:, 0]


def denoising_errors(
    unet: nn.Module,
    objective: Objective,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Condition,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean squared error of the prediction per image, `(N,)`, and the path's alpha and sigma, `(N,)` each.

    Args:
        objective: the target of the network, and its path.
        clean: normalised latents `(N, C, ...)`.
        noise: standard normal, like `clean`.
        timesteps: `(N,)` in [0, 1000].
    """
    alpha, sigma = objective.alpha_sigma(timesteps)
    noisy = per_image(alpha, clean) * clean + per_image(sigma, clean) * noise
    prediction = denoise(unet, noisy, timesteps, condition).float()
    target = objective.target(clean, noise, alpha, sigma)
    return (prediction - target).square().flatten(1).mean(1), (alpha, sigma)


class DenoisingLoss(nn.Module):
    """The denoiser with its loss: the one module that is trained and wrapped for several processes.

    Args:
        unet: predicts what `config.prediction_type` says.
        config: objective and weight.
        text_encoder: trained with the denoiser, if it takes text that is not encoded yet.
    """

    def __init__(self, unet: nn.Module, config: DenoiserConfig, text_encoder: nn.Module | None = None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.uncertainty = Uncertainty() if config.loss_weight == "uncertainty" else None
        self.config = config
        self.objective = Objective(objective_of(config))

    def forward(
        self, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """The loss to minimise `()` and the plain squared errors `(N,)`; arguments: `denoising_errors`."""
        if self.text_encoder is not None:
            mask = condition.encoder_attention_mask
            hidden = encode_tokens(self.text_encoder, condition.encoder_hidden_states, mask)
            condition = replace(condition, encoder_hidden_states=hidden)
        errors, (alpha, sigma) = denoising_errors(
            self.unet, self.objective, clean, noise, timesteps, condition
        )
        if self.config.loss_weight == "uncertainty":
            log_variance = self.uncertainty(timesteps)
            loss = errors / log_variance.exp() + log_variance
        elif self.config.loss_weight == "min_snr":
            loss = errors * min_snr_weight(
                self.config.prediction_type, alpha, sigma, self.config.min_snr_gamma
            )
        else:
            loss = errors
        return loss.mean(), errors.detach()

    @property
    def networks(self) -> nn.Module:
        """Networks that samples are drawn with: the denoiser alone, or "unet" and "text_encoder"."""
        if self.text_encoder is None:
            return self.unet
        return nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
