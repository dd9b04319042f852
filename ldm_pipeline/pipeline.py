"""Samples latent diffusion models. Self-contained: this very file travels to the Hub with every model."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch.nn import functional

# Read at import: two dynamically loaded `pipeline.py` share one file name in the modules cache, so that later
# the file on disk may no longer be the code that runs.
SOURCE = Path(__file__).read_bytes()
logger = logging.get_logger(__name__)
FLOW_TIME = 1000.0  # a flow network sees 1000 * tau, the range its sinusoidal embedding was made for
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")


# -------------------------------------------------------------------------------------------------- objective
class Objective:
    """A network's prediction, and its path: noisy = alpha * clean + sigma * noise at the network's times.

    Flow (arXiv:2209.03003): any time t in [0, 1000], alpha = 1 - t/1000, sigma = t/1000. Variance preserving
    (arXiv:2006.11239): whole times in [0, num_train_timesteps), alpha = sqrt(alphas_cumprod),
    sigma = sqrt(1 - alphas_cumprod).

    Args:
        config: {"prediction_type": "flow_prediction"}, or "epsilon" / "v_prediction" with the training's
            noise schedule under DDPMScheduler's names. This dict is saved with a pipeline.

    Raises:
        ValueError: if `config` is anything else, or its noise schedule is none.
    """

    def __init__(self, config: dict):
        self.config = config
        self.prediction_type = config.get("prediction_type") if isinstance(config, dict) else None
        self.is_flow = self.prediction_type == "flow_prediction"
        known = () if self.is_flow else inspect.signature(DDPMScheduler).parameters
        if self.prediction_type not in PREDICTION_TYPES or set(config) - {"prediction_type", *known}:
            raise ValueError(
                f"objective={config!r}; wanted {{'prediction_type': 'flow_prediction'}} alone, or 'epsilon' "
                "or 'v_prediction' with the noise schedule's arguments of DDPMScheduler"
            )
        if self.prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "objective: epsilon says nothing about the image where the signal is zero "
                "(arXiv:2305.08891); use prediction_type='v_prediction' or rescale_betas_zero_snr=False"
            )
        if self.is_flow:
            return
        self.alphas_cumprod = DDPMScheduler(**config).alphas_cumprod
        if not (self.alphas_cumprod.diff() <= 0).all():
            raise ValueError(f"objective={config!r}: the signal of its noise schedule does not fall")
        alpha2 = self.alphas_cumprod.double()
        alpha2 = alpha2.clamp(min=alpha2[alpha2 > 0].min() / 4)  # without any signal there is no logarithm
        self.log_snr = ((alpha2 / (1 - alpha2)).log() / 2).numpy()

    def alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) at the network's own times, shaped like them."""
        if self.is_flow:
            tau = timesteps.float() / FLOW_TIME
            return 1 - tau, tau
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)[timesteps.long()]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def target(self, clean: torch.Tensor, noise: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """The prediction of a perfect network; clean, noise: (N, ...); alpha, sigma: (N,) or numbers."""
        return prediction_target(self.prediction_type, clean, noise, alpha, sigma)

    def clean_and_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha, sigma) -> tuple:
        """(clean, noise) that a prediction implies; shapes as in `target`. Epsilon needs alpha > 0."""
        alpha, sigma = per_image(alpha, noisy), per_image(sigma, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        if self.prediction_type == "v_prediction":
            norm = alpha**2 + sigma**2
            return (alpha * noisy - sigma * prediction) / norm, (sigma * noisy + alpha * prediction) / norm
        return (noisy - sigma * prediction) / (alpha + sigma), (noisy + alpha * prediction) / (alpha + sigma)

    def network_point(self, alpha: float, sigma: float) -> tuple[float, float, float]:
        """(time, alpha, sigma) where the network's own path has the signal-to-noise ratio alpha / sigma.

        A flow network has every ratio; a variance-preserving one is interpolated in log(alpha / sigma)
        between its whole times and clamped to its first and last.
        """
        if self.is_flow:
            tau = sigma / (alpha + sigma)
            return FLOW_TIME * tau, 1 - tau, tau
        log_snr = self.log_snr
        wanted = math.log(max(alpha, 1e-12)) - math.log(max(sigma, 1e-12))
        wanted = min(max(wanted, log_snr[-1]), log_snr[0])
        time = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1])
        return float(time), 1 / math.sqrt(1 + math.exp(-2 * wanted)), 1 / math.sqrt(1 + math.exp(2 * wanted))


def per_image(value, like: torch.Tensor):
    """(N,) tensors as (N, 1, ...) to broadcast over images; a number as it is."""
    return value.view(-1, *[1] * (like.ndim - 1)) if torch.is_tensor(value) and value.ndim else value


def prediction_target(prediction_type: str, clean, noise, alpha, sigma) -> torch.Tensor:
    """Prediction of a perfect network: the noise, v (arXiv:2202.00512) or the velocity (arXiv:2209.03003)."""
    alpha, sigma = per_image(alpha, clean), per_image(sigma, clean)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * clean
    assert prediction_type == "flow_prediction", prediction_type
    return noise - clean


# ------------------------------------------------------------------------------------------ latent statistics
def set_latent_statistics(autoencoder, mean: list[float], std: list[float]) -> None:
    """Write mean and deviation per channel into the autoencoder's config, the one place where they are kept.

    As `latents_mean` and `latents_std`, or, for a class that does not know them (AutoencoderDC), with a
    leading underscore: Diffusers keeps such keys without a warning at every load.
    """
    prefix = "" if "latents_mean" in inspect.signature(type(autoencoder).__init__).parameters else "_"
    autoencoder.register_to_config(**{f"{prefix}latents_mean": list(mean), f"{prefix}latents_std": list(std)})


def _latent_statistics(autoencoder, like: torch.Tensor):
    names, channels = ("latents_mean", "latents_std"), like.shape[1]
    mean, std = (autoencoder.config.get(name, autoencoder.config.get(f"_{name}")) for name in names)
    if not (mean and std and len(mean) == len(std) == channels and min(std) > 0):
        raise ValueError(
            f"the autoencoder's config has latents_mean={mean} and latents_std={std}; wanted: {channels} "
            "numbers each, deviations above 0. Measure them over the training set and write them with "
            "set_latent_statistics()"
        )
    shape = (1, channels, *[1] * (like.ndim - 2))
    return (torch.tensor(v, dtype=torch.float32, device=like.device).view(shape) for v in (mean, std))


def normalize_latents(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Autoencoder space to network space: (latents - latents_mean) / latents_std per channel, in float32.

    latents: (N, C, ...). ValueError if the autoencoder's config lacks either list. `AutoencoderKL` does not
    apply them itself.
    """
    mean, std = _latent_statistics(autoencoder, latents)
    return (latents.float() - mean) / std


def denormalize_latents(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Network space to autoencoder space, the inverse of `normalize_latents`; the same shapes and errors."""
    mean, std = _latent_statistics(autoencoder, latents)
    return latents.float() * std + mean


# -------------------------------------------------------------------------------------- condition and denoise
@dataclass(frozen=True)
class Condition:
    """Inputs of a network besides the noisy latents and the time; every field is optional, batch first.

    class_labels: (N,) int64 in [0, K]; K = `num_classes(denoiser)` is the null class, "no label".
    encoder_hidden_states: (N, L, D), the encoded text, with
    encoder_attention_mask: (N, L) bool, true for real tokens, at least one per text: to a U-Net a text
        without any is one without a mask. The text that says nothing is the encoding of "".
    concat: (N, Cc, h, w), concatenated to the noisy latents.
    """

    class_labels: torch.Tensor | None = None
    encoder_hidden_states: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    concat: torch.Tensor | None = None

    @classmethod
    def null(cls, denoiser, batch_size: int, device=None) -> "Condition":
        """The null class of `batch_size` images; no condition where the denoiser takes no classes."""
        classes = num_classes(denoiser)
        return cls(torch.full((batch_size,), classes, device=device) if classes else None)

    def drop(self, mask: torch.Tensor, null: "Condition") -> "Condition":
        """This condition with `null` where `mask` (N,) bool is true (arXiv:2207.12598, algorithm 1)."""
        return self._combine(null, lambda own, nothing: torch.where(per_image(mask, own), nothing, own))

    def __getitem__(self, rows: torch.Tensor) -> "Condition":
        """The conditions of some of the images."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Condition(**{name: value[rows] for name, value in given.items()})

    def join(self, other: "Condition") -> "Condition":
        """One doubled batch: this condition, then `other`."""
        return self._combine(other, lambda own, others: torch.cat([own, others]))

    def _combine(self, other: "Condition", function) -> "Condition":
        """The function of every field that both have; the shorter of two texts is padded."""
        texts = [each.encoder_hidden_states for each in (self, other)]
        length = max((text.shape[1] for text in texts if text is not None), default=0)
        both = self._padded(length), other._padded(length)
        pairs = {f.name: tuple(getattr(each, f.name) for each in both) for f in fields(self)}
        return Condition(**{name: function(*pair) for name, pair in pairs.items() if pair[0] is not None})

    def _padded(self, length: int) -> "Condition":
        """This condition with texts of at least `length` tokens; those that are added count nowhere."""
        hidden, mask = self.encoder_hidden_states, self.encoder_attention_mask
        if hidden is None or hidden.shape[1] >= length:
            return self
        more = length - hidden.shape[1]
        hidden, mask = functional.pad(hidden, (0, 0, 0, more)), functional.pad(mask, (0, more))
        return replace(self, encoder_hidden_states=hidden, encoder_attention_mask=mask)


def denoise(denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The one call of a network, used by training and by sampling.

    noisy: (N, C, ...), of the network's dtype; timesteps: (N,) or scalar, the network's own time.
    Returns what the network predicts, shaped like `noisy`.
    """
    given = {name: value for name, value in vars(condition).items() if value is not None}
    if "concat" in given:
        noisy = torch.cat([noisy, given.pop("concat").to(noisy.dtype)], 1)
    if "encoder_hidden_states" in given:  # networks do not cast it themselves
        given["encoder_hidden_states"] = given["encoder_hidden_states"].to(noisy.dtype)
    return denoiser(noisy, timesteps, **given, return_dict=False)[0]


def num_classes(denoiser) -> int:
    """Classes K that the denoiser can be asked for; 0: it takes none. Number K is the null class."""
    return (denoiser.config.get("num_class_embeds") or 1) - 1


def text_width(denoiser) -> int:
    """Width D of the encoded text that the denoiser takes; 0: it takes none."""
    return denoiser.config.get("encoder_hid_dim") or 0


def downsampling(vae) -> int:
    """Pixels of an image per latent, along each side."""
    widths = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    return 2 ** (len(widths) - 1)


def is_conditional(denoiser) -> bool:
    """Whether the denoiser can be asked for classes or texts, to which guidance leads."""
    return num_classes(denoiser) > 0 or text_width(denoiser) > 0


def latent_shape(denoiser) -> tuple[int, ...]:
    """(C, H, W) of the latents of one image."""
    size = denoiser.config.sample_size
    return (denoiser.config.out_channels, *((size, size) if isinstance(size, int) else size))


# ------------------------------------------------------------------------------------------------------- text
def tokenize(tokenizer, text_encoder, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers (N, L) int64 and their mask (N, L) bool, true for real tokens; longer texts are cut.

    A text of no tokens keeps one that pads. SigLIP was trained without a mask, on texts padded to its full
    length, and gets them so.
    """
    whole = text_encoder.config.model_type.startswith("siglip")
    options = {"padding": "max_length" if whole else True, "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(texts, return_attention_mask=True, padding_side="right", **options)
    ids, mask = tokens["input_ids"].long(), tokens["attention_mask"].bool() | whole
    if not ids.shape[1]:
        ids = torch.full((len(texts), 1), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 0] |= ~mask.any(1)
    return ids, mask


def encode_tokens(text_encoder, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states (N, L, D) of tokens (N, L); a masked token changes none of the others'."""
    return text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state


# ------------------------------------------------------------------------------------------------------- task
class Task:
    """Images as a condition beside the noise, `Condition.concat`: a function of what a user gives.

    Args:
        config: {"kind": "inpaint"}, or "colorize", "deblur", "enhance"; {"kind": "superres", "factor": 4}; or
            {"kind": "column", "column": "depth", "nearest": False}, another picture of the same scene, which
            keeps its edges when resized if "nearest". This dict is saved with a pipeline.

    Raises:
        ValueError: if `config` is anything else.
    """

    KINDS = {name: () for name in ("inpaint", "colorize", "deblur", "enhance")}
    KINDS |= {"superres": ("factor",), "column": ("column", "nearest")}

    def __init__(self, config: dict):
        self.config, self.kind = config, config.get("kind") if isinstance(config, dict) else None
        if self.kind not in self.KINDS or set(config) != {"kind", *self.KINDS[self.kind]}:
            kinds = ", ".join(f"{name} {list(numbers) or ''}".strip() for name, numbers in self.KINDS.items())
            raise ValueError(f"task={config!r}; wanted a dict of a kind and its numbers: {kinds}")
        self.takes_mask = self.kind == "inpaint"

    def channels(self, latent_channels: int) -> int:
        """Channels of `concat`: those of latents, and one of the hole or the noise level."""
        return latent_channels + (self.kind in ("inpaint", "superres"))

    def shown(self, images: torch.Tensor, size: Sequence[int], hole: torch.Tensor | None = None):
        """The images (N, C, *size) in [0, 1] whose latents are the condition, of any (N, C, h, w) in [0, 1].

        hole: (N, 1, *size) bool, true where the image is unknown; it becomes grey.
        """
        if self.kind == "superres":
            return resize(self.low_resolution(images, size), size)
        images = fit(images, size, self.config.get("nearest", False))
        if self.kind == "colorize":
            return luminance(images).expand_as(images)
        return images if hole is None else torch.where(hole, 0.5, images)

    def low_resolution(self, images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Images (N, C, h, w) at 1 / factor of `size`; of that size already, they stay as they are."""
        return fit(images, [side // self.config["factor"] for side in size])

    def concat(self, latents: torch.Tensor, hole=None, level=None, noise=None) -> torch.Tensor:
        """The condition (N, channels, h, w), from the latents (N, C, h, w) of what is `shown`.

        Args:
            hole: (N, 1, H, W) bool for inpainting.
            level: (N,) in [0, 1), the deviation of the noise that superres has in its latents, against what
                an autoencoder makes of foreign small images (arXiv:2106.15282); None is 0.
            noise: standard normal like `latents`, if there is a level.
        """
        if self.kind == "inpaint":
            return torch.cat([latents, latent_mask(hole.to(latents), latents)], 1)
        if self.kind == "superres":
            level = latents.new_zeros(len(latents)) if level is None else level
            level = per_image(level, latents)
            noisy = latents if noise is None else (1 - level**2).sqrt() * latents + level * noise
            return torch.cat([noisy, level.expand_as(latents[:, :1])], 1)
        return latents


def latent_mask(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The mask (N, 1, h, w) of latents (N, C, h, w), of a mask of pixels, (N, 1, H, W) in [0, 1].

    The largest value of its pixels, as a latent is known only if all of them are.
    """
    return functional.max_pool2d(mask, mask.shape[-1] // latents.shape[-1])


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Grey (N, 1, h, w) of images (N, 1 or 3, h, w): ITU-R 601, like Pillow's mode L."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return images if images.shape[1] == 1 else (images * weights).sum(1, keepdim=True)


def resize(images: torch.Tensor, size: Sequence[int], nearest: bool = False) -> torch.Tensor:
    """Images (N, C, h, w) in [0, 1] at another size, bicubic without aliasing unless `nearest`."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if nearest:
        return functional.interpolate(images, tuple(size), mode="nearest-exact")
    return functional.interpolate(images, tuple(size), mode="bicubic", antialias=True).clamp(0, 1)


def frame(images: torch.Tensor, size: Sequence[int], mode: str = "crop") -> torch.Tensor:
    """Images (N, C, h, w) in the shape of `size`, not yet resized.

    mode: "crop" takes the largest part around the centre, "pad" continues the pixels of the border.
    """
    height, width = images.shape[-2:]
    scale = (max if mode == "pad" else min)(height / size[0], width / size[1])
    new_height, new_width = (round(side * scale) for side in size)
    if mode == "pad":
        top, left = (new_height - height) // 2, (new_width - width) // 2
        sides = left, new_width - width - left, top, new_height - height - top
        return functional.pad(images, sides, mode="replicate")
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return images[..., top : top + new_height, left : left + new_width]


def fit(images: torch.Tensor, size: Sequence[int], nearest: bool = False) -> torch.Tensor:
    """Images (N, C, h, w) in [0, 1] as (N, C, *size): their centre, resized."""
    return resize(frame(images, size), size, nearest)


def fill(images: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) whose hole (N, 1, H, W) bool is filled from its border inwards, by means of 3x3
    pixels; grey where all is hole. An autoencoder smears what is in a hole over what is beside it."""
    known = (~hole | hole.all((1, 2, 3), keepdim=True)).float()
    images = torch.where(hole, 0.5 * known, images)
    while not known.all():
        near, total = functional.avg_pool2d(known, 3, 1, 1), functional.avg_pool2d(images, 3, 1, 1)
        new = (known == 0) & (near > 0)
        images, known = torch.where(new, total / near.clamp(min=1e-6), images), known + new
    return images


def to_pixels(image, name: str = "image") -> list[torch.Tensor]:
    """Pictures of Pillow, arrays, tensors and lists of these as images (1 or 3, h, w), float32 in [0, 1].

    Arrays have the shape (h, w), (h, w, C) or (N, h, w, C), tensors (h, w), (C, h, w) or (N, C, h, w).
    Transparency is laid on white. ValueError for what is no image.
    """
    if isinstance(image, list | tuple):
        return [pixels for each in image for pixels in to_pixels(each, name)]
    if isinstance(image, Image.Image):
        image = _picture_array(image)
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.moveaxis(image, -1, -3).copy() if image.ndim > 2 else image.copy())
    else:
        pixels = image
    if not torch.is_tensor(pixels) or pixels.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} is {type(image).__name__} {getattr(image, 'shape', '')}; wanted a picture of Pillow, an "
            "array (h, w), (h, w, C) or (N, h, w, C), a tensor (C, h, w) or (N, C, h, w), or a list of these"
        )
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    pixels = pixels.float().reshape(-1, *[1] * (3 - pixels.ndim), *pixels.shape[-3:])
    if pixels.shape[1] not in (1, 2, 3, 4) or not (pixels.numel() and 0 <= pixels.min() <= pixels.max() <= 1):
        range_ = f"values from {pixels.min():g} to {pixels.max():g}" if pixels.numel() else "no values"
        raise ValueError(
            f"{name} has {pixels.shape[1]} channels and {range_}; wanted 1 to 4 channels of bytes, or of "
            "numbers from 0 to 1"
        )
    if pixels.shape[1] in (2, 4):
        pixels, alpha = pixels[:, :-1], pixels[:, -1:]
        pixels = pixels * alpha + (1 - alpha)
    return list(pixels)


def _picture_array(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return np.asarray(picture) / 65535
    if picture.mode != "F":
        grey = picture.mode in ("1", "L")
        mode = "RGBA" if picture.has_transparency_data else "L" if grey else "RGB"
        picture = picture.convert(mode)
    return np.asarray(picture)


# --------------------------------------------------------------------------------------------------- guidance
@dataclass(frozen=True)
class Guidance:
    """Guidance of a call: at every step the prediction for a condition is led away from a weaker one.

    scale: weaker + scale * (conditional - weaker), off at 1. The weaker one is the denoiser's for the null
        condition (classifier-free guidance, arXiv:2207.12598), unless there is a `guide`.
    interval: (low, high), the noise levels low < tau <= high that are guided (arXiv:2404.07724), where
        tau = sigma / (alpha + sigma) is 0 for clean latents and 1 for noise; see `noise_levels`. At all
        others the denoiser is evaluated once, for the condition.
    rescale: how much of the conditional prediction's deviation the guided one gets back, 0 to 1, per image of
        clean latents (arXiv:2305.08891, eq. 15 and 16).
    guide: a weaker denoiser, which gets the same condition (autoguidance, arXiv:2406.02507).
    guider: one of `diffusers.guiders` in the place of scale, interval and rescale; see `prepare_guider`.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    guide: torch.nn.Module | None = None
    guider: object | None = None

    def __post_init__(self):
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance_interval={self.interval}; wanted two rising noise levels in [0, 1]")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale}; wanted a number from 0 to 1")


_GUIDANCE = ("scale", "interval", "rescale")  # arguments of a call, there with `guidance_` before the name
# Guiders that their papers define on the velocity of a flow; the others get clean latents.
_ON_VELOCITY = ("ClassifierFreeZeroStarGuidance", "MagnitudeAwareGuidance")


def guided(
    objective: Objective,
    denoiser,
    noisy: torch.Tensor,
    point: tuple[float, float, float],
    condition: Condition,
    null: Condition | None,
    guidance: Guidance,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The denoiser's prediction under guidance, float32, shaped like `noisy` (N, C, ...).

    Linear guidance is the same for every kind of prediction. What is not linear, rescaling and guiders, acts
    on clean latents, and so means the same under every objective.

    point: (time, alpha, sigma) on the path of `objective`.
    dtype: of the networks.
    """
    (time, alpha, sigma), (low, high) = point, guidance.interval
    tau, scale = sigma / (alpha + sigma), guidance.scale
    guider = guidance.guider if tau else None
    states = guider.prepare_inputs({}) if guider else ()  # one for each prediction that it wants at this step
    both = len(states) == 2 if guider else scale != 1 and low < tau <= high

    def predict(network, noisy, condition):
        times = torch.full((len(noisy),), time, device=noisy.device)
        return denoise(network, noisy.to(dtype), times, condition).float()

    if not both:
        predictions = [predict(denoiser, noisy, condition)]
    elif guidance.guide is None:
        predictions = predict(denoiser, torch.cat([noisy, noisy]), null.join(condition)).chunk(2)
    else:
        predictions = [predict(network, noisy, condition) for network in (guidance.guide, denoiser)]
    if not guider and not (both and guidance.rescale):
        return torch.lerp(*predictions, scale) if both else predictions[0]
    cleans = [objective.clean_and_noise(each, noisy, alpha, sigma)[0] for each in predictions]
    if guider:
        clean = _combine(guider, states, cleans, noisy / (alpha + sigma), tau)
    else:
        clean = torch.lerp(*cleans, scale)
        wanted, found = (each.flatten(1).std(1) for each in (cleans[1], clean))
        clean = clean * per_image(1 + guidance.rescale * (wanted / found - 1), clean)
    return objective.target(clean, (noisy - alpha * clean) / sigma, alpha, sigma)


def _combine(guider, states: list, cleans: list, noisy: torch.Tensor, tau: float) -> torch.Tensor:
    """Clean latents by a guider, from those of the weaker and the conditional prediction, or of this alone.

    noisy = (1 - tau) * clean + tau * noise, so that the velocity is (noisy - clean) / tau.
    """
    on_velocity = any(kind.__name__ in _ON_VELOCITY for kind in type(guider).__mro__)
    for state, clean in zip(states, reversed(cleans), strict=True):
        # Flat, because one of these takes a norm over all axes, of which torch allows two.
        state.noise_pred = ((noisy - clean) / tau).flatten(1) if on_velocity else clean
    combined = guider(states).pred
    return noisy - tau * combined.view_as(noisy) if on_velocity else combined


@dataclass(frozen=True)
class Observation:
    """Known linear measurements of pictures that are drawn: `measure` of them shall give `wanted`.

    measure: linear function of images (N, C, H, W), as they are decoded, to (N, ...).
    wanted: (N, ...), its values.
    weight: largest factor of their error's gradient, in norms of standard normal latents; see `observed`.
    """

    measure: Callable
    wanted: torch.Tensor
    weight: float = 0.1


def observed(
    objective: Objective, observation: Observation, network, decode, noisy, point: tuple, reach: float
) -> torch.Tensor:
    """A network's prediction, led by the gradient of an observation's error (arXiv:2209.14687, algorithm 1).

    What that paper subtracts from the noisy latents after a step is subtracted from the clean ones before it,
    so that solvers of several steps know of it: the gradient of the error's norm, times what would take the
    error to 0 if it were linear (Polyak's step), at most times the observation's weight.

    network: f(noisy, time, alpha, sigma); point: (time, alpha, sigma), on the path of `objective`.
    decode: latents to images, with gradients.
    reach: change of the clean latents that changes the noisy ones by 1 in the next step.
    """
    _, alpha, sigma = point
    with torch.enable_grad():
        noisy = noisy.detach().requires_grad_()
        clean, _ = objective.clean_and_noise(network(noisy, *point), noisy, alpha, sigma)
        error = (observation.measure(decode(clean)) - observation.wanted).flatten(1).norm(dim=1)
        gradient = torch.autograd.grad(error.sum(), noisy)[0] * (alpha + sigma)
    polyak = error.detach() / gradient.flatten(1).square().sum(1).clamp(min=1e-12)
    length = reach * polyak.clamp(max=observation.weight * math.sqrt(noisy[0].numel()))
    noisy, clean = noisy.detach(), clean.detach() - per_image(length, gradient) * gradient
    return objective.target(clean, (noisy - alpha * clean) / sigma, alpha, sigma)


def prepare_guider(guider, latents: torch.Tensor, steps: int):
    """A copy of one of `diffusers.guiders` for one call of `steps`, as momentum must not outlive it.

    The threshold of adaptive projected guidance, where it is Diffusers' default for much larger latents,
    becomes half the norm of standard normal latents (N, C, ...).

    Raises:
        ValueError: for one that cannot work here.
    """
    from diffusers.guiders import BaseGuidance  # here, because older versions have none

    kind, name = type(guider), type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider is {name}; wanted one of diffusers.guiders, AdaptiveProjectedGuidance(...)")
    two = guider._input_predictions == ["pred_cond", "pred_uncond"]
    if not two or kind.prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"{name} changes layers of certain transformers; wanted a guider of two predictions, such as "
            "AdaptiveProjectedGuidance, or autoguidance=True, which has a network of its own"
        )
    if getattr(guider, "zero_init_steps", 0) and steps <= 8:
        raise ValueError(f"{name} loses one of {steps} steps; wanted zero_init_steps=0, or more than 8 steps")
    guider, threshold = copy.deepcopy(guider), "adaptive_projected_guidance_rescale"  # new() loses arguments
    default = inspect.signature(kind.__init__).parameters.get(threshold)
    given = threshold not in guider.config.get("_use_default_values", ())
    # Diffusers counts positional arguments as not given.
    if default and not given and getattr(guider, threshold) == default.default:
        setattr(guider, threshold, 0.5 * math.sqrt(latents[0].numel()))
    return guider


# ------------------------------------------------------------------------------------------ scheduler adapter
# How each scheduler states where on its path it stands; see `scheduler_point`. By name, as equal attributes
# may mean something else (MiniMaxH3Scheduler has flow sigmas but wants -velocity).
_FAMILIES = {
    "table": "DDIM DDIMParallel DDPM DDPMParallel PNDM TCD CogVideoXDDIM",
    "scaled": "EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete "
    "LMSDiscrete",
    "solver": "DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver",
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMapEulerDiscrete LTXEulerAncestralRF",
    "edm": "EDMEuler EDMDPMSolverMultistep",
    "ipndm": "IPNDM",
}
SCHEDULERS = {f"{name}Scheduler": family for family, names in _FAMILIES.items() for name in names.split()}


def schedulers_for(objective: Objective) -> dict[str, str]:
    """{class name: family} of the schedulers that can sample a model of this objective; the same for all.

    Few-step schedulers (LCM, SCM, ...) are made for distilled networks: to others they give wrong pictures.
    """
    return SCHEDULERS


def scheduler_family(scheduler, objective: Objective) -> str:
    """The kind of path that `scheduler` walks; ValueError, with those that can be used, where it cannot."""
    names, supported = [c.__name__ for c in type(scheduler).__mro__], schedulers_for(objective)
    family = next((supported[name] for name in names if name in supported), None)
    if family is None:
        raise ValueError(f"{names[0]} is not supported; these are: {', '.join(sorted(supported))}")
    for option in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        if family in ("flow", "solver") and scheduler.config.get(option):
            raise ValueError(f"{names[0]} with {option}=True is not supported; set it to False")
    return family


def scheduler_point(scheduler, family: str, i: int, t) -> tuple[float, float]:
    """(alpha, sigma) of what `scale_model_input` gives at step i of the scheduler's timesteps."""
    if family == "table":
        alpha2 = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt(alpha2), math.sqrt(1 - alpha2)
    if family == "ipndm":
        return float(scheduler.alphas[i]), float(scheduler.betas[i])
    if family == "scaled":  # x / sqrt(1 + sigma^2); only a probe knows the midpoints of the two-stage solvers
        alpha = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t))
        return alpha, math.sqrt(max(1 - alpha**2, 0.0))
    sigma = float(scheduler.sigmas[i])
    if family == "flow" or family == "solver" and scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def step_prediction_type(scheduler, family: str) -> str:
    """The prediction type to step with: the scheduler's own where its class computes with that.

    After `X.from_config(pipe.scheduler.config)` X may not: DDIM knows no flow_prediction.
    """
    if family == "flow" or family == "solver" and scheduler.config.get("use_flow_sigmas"):
        return "flow_prediction"
    if family == "ipndm":  # its `ets` is sigma * x + alpha * output: the output is v
        return "v_prediction"
    # Where the signal all but ends (cosine and zero terminal SNR schedules), a step from epsilon magnifies
    # its errors by 1 / alpha; those of PNDM's Runge-Kutta steps grow to thousands of deviations.
    faint = family == "table" and scheduler.alphas_cumprod[-1] < 1e-6
    own = scheduler.config.get("prediction_type")
    return own if own == "epsilon" and not faint else "v_prediction"


@contextmanager
def _suited(scheduler, family: str):
    """The scheduler with options that suit `step` here; afterwards its config says what its owner wrote.

    Clipping and thresholding are made for pixels: latents would end clipped, and colours washed out.
    """
    suited = {"clip_sample": False, "thresholding": False}
    suited["prediction_type"] = step_prediction_type(scheduler, family)
    own = {k: scheduler.config[k] for k in suited if scheduler.config.get(k, suited[k]) != suited[k]}
    if not own:
        yield
        return
    scheduler.register_to_config(**{key: suited[key] for key in own})
    try:
        yield
    finally:
        scheduler.register_to_config(**own)


def clean_and_noise_at(objective: Objective, noisy, alpha: float, sigma: float, network) -> tuple:
    """(clean, noise) of noisy = alpha * clean + sigma * noise, on any path, by the objective's network.

    network: f(noisy, time, alpha, sigma), of a point on the objective's own path.
    """
    time, net_alpha, net_sigma = objective.network_point(alpha, sigma)
    net_noisy = noisy * (math.hypot(net_alpha, net_sigma) / math.hypot(alpha, sigma))
    prediction = network(net_noisy, time, net_alpha, net_sigma)
    clean, noise = objective.clean_and_noise(prediction, net_noisy, net_alpha, net_sigma)
    # The half that the given point magnifies less; it matters where the network's time was clamped.
    if sigma > alpha:
        return clean, (noisy - alpha * clean) / sigma
    return (noisy - sigma * noise) / alpha, noise


def scheduler_prediction(scheduler, objective: Objective, i: int, t, sample, network) -> torch.Tensor:
    """Input of `scheduler.step(..., t, sample)`, from the prediction of a `network` for the `objective`.

    network: f(noisy, time, alpha, sigma), of a point on the objective's own path.
    sample: (N, C, ...) float32; i: index of t in the scheduler's timesteps. Rescaled, the sample moves from
    the scheduler's path to the network's at the same signal-to-noise ratio; the prediction comes back as
    (clean, noise) and is put in the terms of `step_prediction_type`.
    """
    family = scheduler_family(scheduler, objective)
    alpha, sigma = scheduler_point(scheduler, family, i, t)
    noisy = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
    if family == "edm":  # its inputs are scaled to unit variance by sigma_data; here by 1
        noisy = sample * alpha
    clean, noise = clean_and_noise_at(objective, noisy, alpha, sigma, network)
    if family == "edm":  # clean = c_skip * sample + c_out * output (arXiv:2206.00364, eq. 7)
        at = float(scheduler.sigmas[i])
        c_skip, c_out = scheduler.precondition_outputs(1, 0, at), scheduler.precondition_outputs(0, 1, at)
        return (clean - c_skip * sample) / c_out
    return prediction_target(step_prediction_type(scheduler, family), clean, noise, alpha, sigma)


def noise_levels(scheduler, objective: Objective) -> list[float]:
    """tau = sigma / (alpha + sigma) of the denoiser's input at each timestep, falling from 1 to 0.

    scheduler: after `set_timesteps`, and before its first step.
    """
    levels, sample = [], torch.zeros(1, 1, 1, 1)
    scheduler, family = copy.deepcopy(scheduler), scheduler_family(scheduler, objective)

    def network(noisy, time, alpha, sigma):
        levels.append(sigma / (alpha + sigma))
        return torch.zeros_like(noisy)

    with torch.random.fork_rng(devices=[]):  # stochastic steps draw noise
        for i, t in enumerate(scheduler.timesteps):
            with _suited(scheduler, family):
                output = scheduler_prediction(scheduler, objective, i, t, sample, network)
                sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return levels


def step_reaches(scheduler, objective: Objective) -> list[float]:
    """Change of the clean latents that changes the noisy ones by 1, at each whole step of the scheduler.

    A step from tau to a lower level takes on 1 - lower / tau of the clean latents. Steps shorter than the
    average count as the average: more is too much for schedulers that extrapolate from several steps.
    """
    levels = noise_levels(scheduler, objective)[:: scheduler.order]
    pairs = zip(levels, [*levels[1:], 0.0], strict=True)
    return [tau / max(tau - lower, 1 / len(levels)) for tau, lower in pairs]


def first_latents(scheduler, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal noise as the scheduler has it before its first step, after `set_timesteps`."""
    return noise * float(getattr(scheduler, "init_noise_sigma", 1.0))


def noised(scheduler, family: str, i: int, t, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Clean latents with standard normal noise, as the scheduler has them before step i of its timesteps."""
    alpha, sigma = scheduler_point(scheduler, family, i, t)
    return (alpha * clean + sigma * noise) / (alpha if family in ("scaled", "edm") else 1)


@dataclass(frozen=True)
class Source:
    """Pictures that sampling starts from.

    clean: (N, C, h, w), their normalised latents; noise: standard normal, like them.
    free: (N, 1, h, w) in [0, 1], the noise level below which each latent is repainted: at 1 from noise, at 0
        it stays (arXiv:2306.00950). None: all are free.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    free: torch.Tensor | None = None


def set_timesteps(scheduler, num_inference_steps: int, timesteps=None, sigmas=None, device=None) -> None:
    """Choose the scheduler's steps, or those of a grid of one's own; ValueError where it takes none."""
    given = {"timesteps": timesteps, "sigmas": sigmas}
    given = {name: list(value) for name, value in given.items() if value is not None}
    taken, name = inspect.signature(scheduler.set_timesteps).parameters, type(scheduler).__name__
    # LTXEulerAncestralRF wants a final 0 and evaluates there; the EDM schedulers take a ramp, not sigmas.
    odd = ("LTXEulerAncestralRFScheduler", "EDMEulerScheduler", "FlowMapEulerDiscreteScheduler")
    if len(given) > 1 or any(key not in taken or name in odd for key in given):
        raise ValueError(
            f"{name} cannot take {' and '.join(given)}; use num_inference_steps, or "
            "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler with sigmas"
        )
    if not given and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}; wanted at least 1")
    if not given and isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        # Its own grid ends at 0.001, so that the last evaluation is wasted, and applies `shift` twice
        # (huggingface/diffusers issue 13243).
        given["sigmas"] = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    given = given or {"num_inference_steps": num_inference_steps}
    scheduler.set_timesteps(device=device, **given)


# --------------------------------------------------------------------------------------------------- pipeline
class LDMPipeline(DiffusionPipeline):
    """Latent diffusion, unconditional, by class, text or image, with any scheduler of `SCHEDULERS`.

    Args:
        vae: the autoencoder, with `latents_mean` and `latents_std` in its config.
        unet: the denoiser of normalised latents, (N, C, H, W).
        scheduler: what steps; `ValueError` at the call if it cannot.
        objective: {"prediction_type": "flow_prediction"}, or "epsilon" / "v_prediction" with the training's
            noise schedule under DDPMScheduler's names (num_train_timesteps, beta_schedule, beta_start,
            beta_end, rescale_betas_zero_snr). Saved with the model: sampling cannot disagree with training.
        id2label: names of the classes, {0: "cat", ...}; a dict, as the Hub loader cannot read a list.
        defaults: what a call uses that says nothing else: "num_inference_steps", "autoguidance" and, where
            there is something to guide to, "guidance_scale", "guidance_interval" and "guidance_rescale".
        text_encoder: of transformers, for a denoiser that takes text; its last hidden states are used.
        tokenizer: the text encoder's; `model_max_length` is the number of tokens that a prompt may have.
        task: how the image of a call becomes a condition, for a denoiser that was trained so; see `Task`.
        guide_unet: a weaker denoiser for autoguidance, such as an early checkpoint of the same training.

    >>> pipe = LDMPipeline.from_pretrained("org/model")
    >>> pipe(class_labels=["cat", 3], guidance_scale=1.5).images[0].save("cat.png")
    >>> LDMPipeline.from_pretrained("org/text-model")("a red heart, google style").images[0]
    """

    model_cpu_offload_seq = "text_encoder->guide_unet->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "guide_unet"]
    _callback_tensor_inputs = ["latents", "clean"]
    _defaults = ("num_inference_steps", "autoguidance", *(f"guidance_{name}" for name in _GUIDANCE))
    _guidance_scale, _num_timesteps = 1.0, 0  # of the running or last call; a callback may set the scale

    def __init__(
        self,
        vae: diffusers.AutoencoderKL | diffusers.AutoencoderDC,
        unet: diffusers.UNet2DModel | diffusers.UNet2DConditionModel,
        scheduler: diffusers.SchedulerMixin,
        objective: dict | None = None,
        id2label: dict | None = None,
        defaults: dict | None = None,
        text_encoder=None,
        tokenizer=None,
        task: dict | None = None,
        guide_unet: diffusers.UNet2DModel | diffusers.UNet2DConditionModel | None = None,
    ):
        super().__init__()
        self.objective, self.task = Objective(objective), None if task is None else Task(task)
        if vae.config.latent_channels != unet.config.out_channels:
            raise ValueError(
                f"the autoencoder has latent_channels={vae.config.latent_channels}, but the denoiser has "
                f"out_channels={unet.config.out_channels}; build one for the other"
            )
        wanted = unet.config.out_channels + (self.task.channels(vae.config.latent_channels) if task else 0)
        if unet.config.in_channels != wanted:
            raise ValueError(
                f"the denoiser has in_channels={unet.config.in_channels}, but task={task} wants {wanted}; "
                "give the task that it was trained for"
            )
        networks = {"vae": vae, "unet": unet} | ({"guide_unet": guide_unet} if guide_unet else {})
        for name, model in networks.items():
            check_weights(model, name)
            forget_local_path(model)
        if text_encoder is not None:
            check_weights(text_encoder, "text_encoder")
        if guide_unet and (found := _interface(guide_unet)) != (wanted := _interface(unet)):
            raise ValueError(f"guide_unet has {found}, but unet has {wanted}; wanted two of the same inputs")
        self.register_modules(
            vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
            guide_unet=guide_unet,
        )  # fmt: skip
        if unknown := set(defaults or {}) - set(self._defaults):
            raise ValueError(f"defaults has {sorted(unknown)}; wanted some of {', '.join(self._defaults)}")
        names = _checked_names(id2label, num_classes(unet))
        self.register_to_config(objective=dict(objective), id2label=names, defaults=defaults, task=task)

    @property
    def denoiser(self):
        """The network that denoises normalised latents."""
        return self.unet

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images of training."""
        _, *sides = latent_shape(self.denoiser)
        return (self.vae.config.in_channels, *(side * downsampling(self.vae) for side in sides))

    @property
    def guidance_scale(self) -> float:
        """The scale of the running or last call; a callback may set `_guidance_scale` for the next steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step is guided: not at scale 1."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or last call."""
        return self._num_timesteps

    # ---- saving
    def save_pretrained(self, save_directory, **kwargs):
        """Like `DiffusionPipeline.save_pretrained`, plus `pipeline.py`; ValueError unless safetensors."""
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False would write a pickle; only safetensors are written")
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)

    def save_config(self, save_directory, **kwargs):
        """Write `model_index.json` and the code it names; `save_pretrained` calls this before it uploads."""
        super().save_config(save_directory, **kwargs)
        path = Path(save_directory) / self.config_name
        own = next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)
        index = json.loads(path.read_text(encoding="utf-8")) | {"_class_name": ["pipeline", own]}
        index.pop("_name_or_path", None)  # often a folder of this machine, which is nobody else's business
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (path.parent / "pipeline.py").write_bytes(SOURCE)

    def enable_vae_slicing(self):
        """Decode one image at a time, in less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        """Decode the whole batch at once."""
        self.vae.disable_slicing()

    # ---- images and latents
    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 1 or 3, H, W) in [0, 1] to normalised latents (N, C, h, w): the posterior's mode."""
        images = (images * 2 - 1).to(self._execution_device, self.vae.dtype)
        encoded = self.vae.encode(images, return_dict=False)[0]
        return normalize_latents(self.vae, encoded if torch.is_tensor(encoded) else encoded.mode())

    def to_latents(self, image) -> torch.Tensor:
        """Pictures, as a call takes them, of any size to normalised latents (N, C, h, w)."""
        pictures = to_pixels(image)
        if not pictures:
            raise ValueError("image is an empty list; wanted one picture or more")
        images, _ = self._pixels(pictures, None, self.image_shape[1:])
        return self.encode(torch.cat([resize(each, self.image_shape[1:]) for each in images]))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (N, C, h, w) to images (N, 1 or 3, H, W) in [0, 1]; ValueError if not finite."""
        images = self._decode(latents)
        _require_finite(images, "images after the decoder", "vae", self.vae.dtype)
        return images.clamp(0, 1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents to images that may leave [0, 1], with gradients."""
        latents = denormalize_latents(self.vae, latents).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5

    @torch.no_grad()
    def denoise_latents(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        null: Condition | None = None,
        guidance: Guidance = Guidance(),
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: tuple = ("latents",),
        eta: float = 0.0,
        source: Source | None = None,
        observation: Observation | None = None,
    ) -> torch.Tensor:
        """Step noisy latents to clean ones, (N, C, ...) float32; `__call__` has the other arguments.

        Args:
            latents: as the scheduler has them at the first of `timesteps`.
            timesteps: `scheduler.timesteps` after `set_timesteps`, or the end of it: `timesteps[start:]`.
            condition: what the N images shall be.
            null: what they shall not be; guidance without a `guide` needs it.
            source: from the middle of the timesteps, its noised latents take the place of `latents`
                (SDEdit, arXiv:2108.01073). After every step, what is not yet free is put back, with the
                same noise as at first (blended latent diffusion, arXiv:2206.02779).
            observation: measurements of the pictures that sampling is led to; see `observed`.

        Raises:
            ValueError: for a scheduler that cannot sample this model or cannot start there, before the first
                step; for latents that are not finite after the last.
        """
        scheduler, family = self.scheduler, scheduler_family(self.scheduler, self.objective)
        begin = len(scheduler.timesteps) - len(timesteps)
        if observation and isinstance(scheduler, diffusers.PNDMScheduler | diffusers.LMSDiscreteScheduler):
            name = type(scheduler).__name__
            raise ValueError(
                f"{name} cannot be led by a gradient: it extrapolates from steps that were led otherwise"
            )
        # PNDM counts through a fixed list of first steps; solvers of two stages need both of them.
        if begin and isinstance(scheduler, diffusers.PNDMScheduler) or begin % scheduler.order:
            name = type(scheduler).__name__
            raise ValueError(f"{name} cannot start at timesteps[{begin}:], as a strength below 1 asks")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        step_kwargs, dtype = self._step_kwargs(generator, eta), self.denoiser.dtype
        if source is not None and begin:
            latents = noised(scheduler, family, begin, timesteps[0], source.clean, source.noise)
        guider = guidance.guider
        if guider is not None:
            guider = prepare_guider(guider, latents, len(timesteps))
        self._guidance_scale, self._num_timesteps = guidance.scale, len(timesteps)

        def network(noisy, *point):
            now = replace(guidance, scale=self._guidance_scale, guider=guider)
            return guided(self.objective, self.denoiser, noisy, point, condition, null, now, dtype)

        reaches, clean = (), latents
        if observation:
            reaches = step_reaches(scheduler, self.objective)
            self._hold_models()

        def predict(noisy, *point):
            nonlocal clean
            prediction = network(noisy, *point)
            if observation:
                given = observation, network, self._decode, noisy, point, reaches[step]
                prediction = observed(self.objective, *given)
            clean, _ = self.objective.clean_and_noise(prediction, noisy, *point[1:])
            return prediction

        for i, t in enumerate(self.progress_bar(timesteps)):
            if guider is not None:
                guider.set_state(i, len(timesteps), t)
            step = (begin + i) // scheduler.order  # of two stages
            with _suited(scheduler, family):
                output = scheduler_prediction(scheduler, self.objective, begin + i, t, latents, predict)
                latents = scheduler.step(output, t, latents, **step_kwargs)[0]
            if source is not None and source.free is not None:
                latents = self._keep(source, latents, begin + i + 1, family)
            if callback_on_step_end is not None:
                values = {"latents": latents, "clean": clean}
                values = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, values) or {}).get("latents", latents)
        _require_finite(latents, f"latents after {type(scheduler).__name__}", "unet", dtype)
        return latents

    def _hold_models(self):
        """All networks on the device until the end of the call, where they are offloaded one by one: a
        network that has been moved away has no backward pass."""
        if hooks := getattr(self, "_all_hooks", None):
            device = self._execution_device
            self.remove_all_hooks()
            self.to(device)
            self._all_hooks = hooks  # for `maybe_free_model_hooks`, which offloads again

    def _keep(self, source: Source, latents: torch.Tensor, i: int, family: str) -> torch.Tensor:
        """Latents before step i, of the source where the last step was above the noise level of the free."""
        scheduler, last = self.scheduler, i == len(self.scheduler.timesteps)
        start = i - scheduler.order if not last else (i - 1) // scheduler.order * scheduler.order
        if i % scheduler.order and not last:  # between the two stages of a step
            return latents
        alpha, sigma = scheduler_point(scheduler, family, start, scheduler.timesteps[start])
        known = source.clean
        if not last:
            known = noised(scheduler, family, i, scheduler.timesteps[i], source.clean, source.noise)
        return torch.where(source.free < sigma / (alpha + sigma), known, latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels=None,
        image=None,
        mask_image=None,
        strength: float | None = None,
        method: Literal["blend", "gradient"] = "blend",
        height: int | None = None,
        width: int | None = None,
        resize_mode: Literal["crop", "pad"] = "crop",
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        autoguidance: bool | None = None,
        guider=None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: tuple = ("latents",),
        eta: float = 0.0,
    ):
        """Sample images.

        Args:
            prompt: a text, or a list of texts, one per image; for a model that takes text.
            class_labels: a name or a number, or a list of them, one per image; None is unconditional.
            image: what a model of a task (`config.task`) is made for; any other changes it (SDEdit,
                arXiv:2108.01073). A picture of Pillow, an array or tensor in [0, 1], or a list of these, one
                per image, of any size. A model that colours keeps its brightness.
            mask_image: white where inpainting shall repaint, of the image's size. Black pixels of the result
                are those of the image. A model without a task repaints grey by strength: up to the noise
                level that it says, from 0 (black) to 1 (white), and mixed as much with the image. Below 0.05
                and above 0.95 count as black and white.
            strength: for a model without a task, the noise level in (0, 1] up to which the image is noised:
                the first of the scheduler's that is not above it. It means the same under every scheduler; 1
                leaves nothing of the image. None: 0.6, or 1 with a mask.
            method: of inpainting without a task. "blend": the known latents are put back after every step.
                "gradient": every step is led to the known pixels (`observed`), through network and decoder:
                three times the time, and more memory.
            height, width: in pixels; None: those of the training.
            resize_mode: how an image of another shape becomes one of height and width: "crop" takes its
                centre, "pad" continues its border.
            batch_size: number of images; by default that of prompts, labels, images, generators or latents,
                or one.
            num_images_per_prompt: images of each prompt, label or image, one after the other.
            num_inference_steps: steps of the scheduler; None: what the model's `defaults` say, or 20.
            timesteps, sigmas: a grid of one's own instead, where the scheduler takes it.
            negative_prompt: what guidance leads away from; None is the empty text.
            guidance_scale, guidance_interval, guidance_rescale: scale, interval and rescale of `Guidance`.
                None: what the model's `defaults` say where there is something to guide to, or no guidance.
            autoguidance: guide away from the component `guide_unet` for the same condition, or for none
                (arXiv:2406.02507), rather than away from the null condition. None: as `defaults` say, or not.
            guider: one of `diffusers.guiders` in place of the three; see `prepare_guider`.
            generator: one, or one per image: then a picture does not depend on its batch.
            latents: (N, C, H, W) standard normal noise to start from.
            prompt_embeds, negative_prompt_embeds: (N, L, D) instead of texts, from `encode_prompt`, with
            prompt_attention_mask, negative_prompt_attention_mask: (N, L), true for real tokens.
            output_type: "pil"; "np" (N, H, W, C) and "pt" (N, C, H, W), float32 in [0, 1]; "latent", the
                normalised latents (N, C, H, W).
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: f(pipe, i, t, kwargs) -> dict; may return other "latents".
            callback_on_step_end_tensor_inputs: what it gets in kwargs: "latents", and "clean", the clean
                latents that the network predicted last, for previews.
            eta: stochasticity of DDIM and TCD, 0 to 1.

        Raises:
            ValueError: what cannot be meant, before the first step; non-finite latents or images after it.
        """
        self._check_options(output_type, callback_on_step_end_tensor_inputs)
        text = self._check_text(prompt, prompt_embeds, prompt_attention_mask)
        negative = self._check_text(
            negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, "negative_"
        )
        pictures, masks = self._check_images(image, mask_image, strength, method, resize_mode)
        inputs = {"prompt": text, "negative_prompt": negative, "class_labels": _as_list(class_labels)}
        inputs |= {"image": pictures, "mask_image": masks}
        others = {
            "batch_size": batch_size,
            "generator": len(generator) if isinstance(generator, list) else None,
            "latents": None if latents is None else len(latents),
        }
        batch_size, inputs = _batch(inputs, others, num_images_per_prompt)
        defaults, asked = self.config.defaults or {}, text is not None or class_labels is not None
        if num_inference_steps is None:
            num_inference_steps = defaults.get("num_inference_steps", 20)
        given = dict(zip(_GUIDANCE, (guidance_scale, guidance_interval, guidance_rescale), strict=True))
        guidance = self._guidance(given, autoguidance, guider, asked)
        if guidance.guide is not None and negative is not None:
            raise ValueError("negative_prompt is not read under autoguidance; leave out one of them")
        try:
            condition = self._condition(inputs["prompt"], inputs["class_labels"], batch_size)
            null = self._condition(inputs["negative_prompt"], None, batch_size) if asked else condition
            set_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas, self._execution_device)
            noise = self._noise(latents, batch_size, generator, height, width)
            begin, source, observation, mask = 0, None, None, None
            if pictures:
                size = [side * downsampling(self.vae) for side in noise.shape[-2:]]
                pixels, mask = self._pixels(inputs["image"], inputs["mask_image"], size, resize_mode)
                known = torch.cat([resize(each, size) for each in pixels])
            if self.task:
                mask = None if mask is None else (mask >= 0.5).float()
                concat = self._image_condition(pixels, mask, size)
                condition, null = (replace(each, concat=concat) for each in (condition, null))
            elif pictures:
                begin = self._begin(strength or (1.0 if masks else 0.6))
                source, observation = self._source(known, mask, noise, method)
            latents = first_latents(self.scheduler, noise)
            start = latents, self.scheduler.timesteps[begin:], condition, null, guidance, generator
            callback = callback_on_step_end, callback_on_step_end_tensor_inputs
            latents = self.denoise_latents(*start, *callback, eta, source, observation)
            if output_type == "latent":
                images = latents
            else:
                images = self.decode(latents)
                images = images if mask is None else torch.lerp(known, images, mask)
                if self.task and self.task.kind == "colorize":  # only the colours are drawn
                    images = (images + luminance(known) - luminance(images)).clamp(0, 1)
                images = self.to_output(images, output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded texts (N, L, D) and their mask (N, L): the arguments `prompt_embeds` and
        `prompt_attention_mask` of a call."""
        texts = _as_list(prompt)
        tokens = tokenize(self.tokenizer, self.text_encoder, texts)
        ids, mask = (each.to(self._execution_device) for each in tokens)
        full = ids.shape[1] == self.tokenizer.model_max_length  # else nothing was cut
        if full and any(len(self.tokenizer(text)["input_ids"]) > ids.shape[1] for text in texts):
            logger.warning(f"a prompt has more than {ids.shape[1]} tokens; the rest is not read")
        return encode_tokens(self.text_encoder, ids, mask), mask

    # ---- what the user asked for
    def _check_options(self, output_type: str, tensor_inputs):
        scheduler_family(self.scheduler, self.objective)
        if output_type != "latent":
            denormalize_latents(self.vae, torch.empty(0, self.vae.config.latent_channels, 1, 1))
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}; wanted 'pil', 'np', 'pt' or 'latent'")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; wanted some of "
                f"{self._callback_tensor_inputs}"
            )

    def _guidance(self, given: dict, autoguidance: bool | None, guider, asked: bool) -> Guidance:
        """The guidance of a call; of what is None, that of the model's `defaults`.

        given: the arguments by their names in `_GUIDANCE`. asked: whether there is a prompt or a label.
        """
        given = {name: value for name, value in given.items() if value is not None}
        defaults = self.config.defaults or {}
        autoguidance = defaults.get("autoguidance", False) if autoguidance is None else autoguidance
        if autoguidance and self.guide_unet is None:
            raise ValueError("autoguidance=True, but the component guide_unet is None: load or train one")
        if guider is not None and given:
            raise ValueError(f"guider is given, and has its own guidance_{' and guidance_'.join(given)}")
        possible = asked or autoguidance
        if not possible and (guider is not None or given.get("scale", 1) != 1):
            what = f"guidance_scale={given['scale']}" if guider is None else type(guider).__name__
            wanted = "a prompt" if text_width(self.denoiser) else "class_labels"
            wanted += " (or autoguidance=True)" if self.guide_unet else ""
            raise ValueError(f"{what} needs {wanted} to guide to; guidance_scale=1 is off")
        if possible and guider is None:
            own = {name: defaults.get(f"guidance_{name}") for name in _GUIDANCE}
            given = {name: value for name, value in own.items() if value is not None} | given
        return Guidance(**given, guide=self.guide_unet if autoguidance else None, guider=guider)

    def _class_number(self, label, classes: int) -> int:
        names = self.config.id2label or {}
        found = [int(number) for number, name in names.items() if name == label]
        if not isinstance(label, str) and label in range(classes):
            return int(label)
        if isinstance(label, str) and len(found) == 1:
            return found[0]
        shown = [f"{number}: {name}" for number, name in names.items()]
        shown = shown if len(shown) <= 50 else [*shown[:50], "..."]
        raise ValueError(
            f"class_labels has {label!r}{', shared by several classes' if len(found) > 1 else ''}; wanted a "
            f"number from 0 to {classes - 1} or one of the names {{{', '.join(shown)}}}"
        )

    def _check_text(self, prompt, embeds, mask, prefix: str = "") -> list | None:
        """The texts, or the rows of their encodings with masks; None where neither is given."""
        given, width = prompt is not None or embeds is not None, text_width(self.denoiser)
        name = f"{prefix}prompt"
        if given and not width:
            raise ValueError(f"{name} is given, but this model was trained without text; leave it out")
        if prompt is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds are both given; wanted one of them")
        if embeds is not None:
            if mask is None or embeds.ndim != 3 or embeds.shape[2] != width or mask.shape != embeds.shape[:2]:
                found = None if mask is None else tuple(mask.shape)
                raise ValueError(
                    f"{name}_embeds has shape {tuple(embeds.shape)} and {name}_attention_mask {found}; "
                    f"wanted (N, L, {width}) and (N, L), as `encode_prompt` gives them"
                )
            return list(zip(embeds, mask.bool(), strict=True))
        if prompt is not None and (bad := [p for p in _as_list(prompt) if not isinstance(p, str)]):
            raise ValueError(f"{name} has {bad[0]!r}; wanted a text or a list of texts")
        return _as_list(prompt)

    def _condition(self, texts: list | None, class_labels: list | None, batch_size: int) -> Condition:
        """The condition of N images; of what is None, it says nothing."""
        classes, device = num_classes(self.denoiser), self._execution_device
        condition = Condition.null(self.denoiser, batch_size, device)
        if class_labels is not None:
            if not classes:
                raise ValueError(f"class_labels={class_labels}, but this model has no classes; leave it out")
            numbers = [self._class_number(label, classes) for label in class_labels]
            condition = replace(condition, class_labels=torch.tensor(numbers, device=device))
        if text_width(self.denoiser):
            texts = texts or [""] * batch_size
            if isinstance(texts[0], str):
                different = list(dict.fromkeys(texts))
                rows = torch.tensor([different.index(text) for text in texts], device=device)
                hidden, mask = (each[rows] for each in self.encode_prompt(different))
            else:
                hidden, mask = (torch.stack(each).to(device) for each in zip(*texts, strict=True))
            condition = replace(condition, encoder_hidden_states=hidden, encoder_attention_mask=mask)
        return condition

    def _check_images(
        self, image, mask_image, strength, method: str, resize_mode: str
    ) -> tuple[list | None, list | None]:
        """Images and masks as tensors (1 or 3, h, w); ValueError where they and the task do not fit."""
        if resize_mode not in ("crop", "pad"):
            raise ValueError(f"resize_mode={resize_mode!r}; wanted 'crop' or 'pad'")
        if method != "blend" and (method != "gradient" or self.task or mask_image is None):
            raise ValueError(
                f"method={method!r}; wanted 'blend', or 'gradient' with an image and a mask_image, for a "
                "model without a task"
            )
        if self.task is None:
            if image is None and (mask_image is not None or strength is not None):
                given = "strength" if mask_image is None else "mask_image"
                raise ValueError(f"{given} is given, but no image; give one, or leave {given} out")
            if strength is not None and not 0 < strength <= 1:
                raise ValueError(f"strength={strength}; wanted a noise level above 0 and up to 1")
        else:
            masked, kind = self.task.takes_mask, self.task.kind
            if image is None or masked and mask_image is None:
                wanted = "image and mask_image" if masked else "image"
                missing = "image" if image is None else "mask_image"
                raise ValueError(f"{missing} is missing: this model of the task {kind} wants {wanted}")
            if mask_image is not None and not masked:
                raise ValueError(f"mask_image is given, but the task {kind} takes none; leave it out")
            if strength is not None:
                raise ValueError(f"strength={strength}, but the task {kind} takes none; leave it out")
        masks = None if mask_image is None else to_pixels(mask_image, "mask_image")
        return None if image is None else to_pixels(image), masks

    def _pixels(self, images: list, masks: list | None, size: list[int], resize_mode="crop") -> tuple:
        """N images (1, C, h, w) as the autoencoder takes them, in the shape of `size` (height, width), and
        their masks (N, 1, *size) in [0, 1] or None."""
        for image, mask in zip(images, masks or images, strict=True):
            if mask.shape[-2:] != image.shape[-2:]:
                found = tuple(mask.shape[-2:]), tuple(image.shape[-2:])
                raise ValueError(f"mask_image has height and width {found[0]}, its image has {found[1]}")
        device, channels = self._execution_device, self.vae.config.in_channels
        images = [each[None].to(device) for each in images]
        images = [luminance(x) if channels == 1 else x.expand(-1, channels, -1, -1) for x in images]
        images = [frame(each, size, resize_mode) for each in images]
        if masks is None:
            return images, None
        masks = [frame(luminance(each[None].to(device)), size, resize_mode) for each in masks]
        # A pixel is known only as well as the least known that it is made of.
        mask = torch.cat([functional.adaptive_max_pool2d(each, size) for each in masks])
        return images, torch.where(mask > 0.95, 1, torch.where(mask < 0.05, 0, mask))

    def _image_condition(self, images: list, mask: torch.Tensor | None, size: list[int]) -> torch.Tensor:
        """The condition's `concat` of what `_pixels` gives; the mask is 0 or 1."""
        holes = [None] * len(images) if mask is None else (mask > 0).split(1)
        shown = [self.task.shown(x, size, each) for x, each in zip(images, holes, strict=True)]
        return self.task.concat(self.encode(torch.cat(shown)), mask)

    def _source(
        self, images: torch.Tensor, mask: torch.Tensor | None, noise: torch.Tensor, method: str
    ) -> tuple[Source, Observation | None]:
        """Source and observation for images (N, C, H, W), of which sampling keeps what the mask
        (N, 1, H, W) in [0, 1] says."""
        if mask is None:
            return Source(self.encode(images), noise), None
        clean, known = self.encode(fill(images, mask == 1)), 1 - mask
        if method == "gradient":
            return Source(clean, noise), Observation(lambda drawn: drawn * known, images * known)
        return Source(clean, noise, latent_mask(mask, noise)), None

    def _begin(self, strength: float) -> int:
        """Index of the first timestep whose noise level is not above `strength`."""
        levels, order = noise_levels(self.scheduler, self.objective), self.scheduler.order
        for i in range(0, len(levels), order):
            if levels[i] <= strength:
                return i
        raise ValueError(
            f"strength={strength} is below the last noise level of the {-(-len(levels) // order)} steps, "
            f"{levels[-1]:.3g}; raise it, or num_inference_steps"
        )

    def _noise(self, latents, batch_size: int, generator, height=None, width=None) -> torch.Tensor:
        """Standard normal (N, C, H, W) float32, drawn for images of height and width in pixels, or given."""
        (channels, *sides), device = latent_shape(self.denoiser), self._execution_device
        if latents is None:
            # A U-Net halves its latents once less than it has widths.
            pixels, halved = downsampling(self.vae), 2 ** (len(self.denoiser.config.block_out_channels) - 1)
            for i, (name, side) in enumerate({"height": height, "width": width}.items()):
                if side is not None and (side < 1 or side % (pixels * halved)):
                    raise ValueError(f"{name}={side}; wanted a multiple of {pixels * halved}, in pixels")
                sides[i] = sides[i] if side is None else side // pixels
            latents = randn_tensor((batch_size, channels, *sides), generator, device, torch.float32)
        elif latents.ndim != 4 or latents.shape[1] != channels or height or width:
            given = f" with height={height} and width={width}" if height or width else ""
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}{given}; wanted (N, {channels}, H, W) alone"
            )
        return latents.to(device, torch.float32)

    def _step_kwargs(self, generator, eta: float) -> dict:
        taken = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in taken:
            raise ValueError(f"eta={eta}, but {type(self.scheduler).__name__} takes none; DDIMScheduler does")
        given = {"eta": eta, "generator": generator, "return_dict": False}
        return {name: value for name, value in given.items() if name in taken}

    def to_output(self, images: torch.Tensor, output_type: str):
        """Images (N, 1 or 3, H, W) in [0, 1] as `output_type` of a call says: "pil", "np" or "pt"."""
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 1 or 3)
        return images if output_type == "np" else self.numpy_to_pil(images)


def check_weights(model, name: str) -> None:
    """ValueError where weights of `model` are not finite, or where nothing was ever read into them."""
    weights = {k: w for k, w in model.state_dict().items() if w.is_floating_point() and w.numel()}
    absent = [key for key, weight in weights.items() if weight.is_meta and not hasattr(model, "_hf_hook")]
    # One pass without a copy; float8 has no aminmax.
    real = {k: w for k, w in weights.items() if not w.is_meta and w.dtype.itemsize > 1}
    bad = [key for key, weight in real.items() if not torch.stack(weight.aminmax()).isfinite().all()]
    if absent or bad:
        fault = f"not finite in {real[bad[0]].dtype}" if bad else "in no file"
        raise ValueError(
            f"{name}: {len(bad or absent)} weights are {fault} ({', '.join((bad or absent)[:3])})"
        )


def _interface(denoiser) -> dict:
    """The sizes of everything that goes into a denoiser and comes out of it."""
    names = "in_channels", "out_channels", "num_class_embeds", "encoder_hid_dim"
    return {name: denoiser.config.get(name) for name in names}


def forget_local_path(model) -> None:
    """Drop a folder of this machine from a config, where Diffusers notes it: configs are saved and shared."""
    if Path(str(model.config.get("_name_or_path"))).exists():
        model.register_to_config(_name_or_path=None)


def _checked_names(id2label, classes: int) -> dict | None:
    """Names by number as text, as JSON has them; ValueError unless every number is a class."""
    if id2label is None:
        return None
    names = {str(n): name for n, name in id2label.items()} if isinstance(id2label, dict) else {"": None}
    unknown = names.keys() - {str(number) for number in range(classes)} if classes else ()
    if unknown or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"id2label={id2label}; wanted a dict of names by number, from 0 to {classes - 1}")
    return names


def _as_list(class_labels) -> list | None:
    if class_labels is None:
        return None
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, list | tuple | range) else [class_labels]


def _batch(inputs: dict, others: dict, copies: int) -> tuple[int, dict]:
    """The number of images that everything given agrees on, and each input as a list of one entry per image.

    inputs: lists by argument, of one entry for all images or of one for every `copies` images; or None.
    others: numbers of images by argument, or None.
    """
    lists = {name: values for name, values in inputs.items() if values is not None and len(values) != 1}
    found = {name: len(values) * copies for name, values in lists.items()}
    found |= {name: number for name, number in others.items() if number is not None}
    if len(set(found.values())) > 1 or any(number < 1 for number in [*found.values(), copies]):
        copied = "" if copies == 1 else f" (num_images_per_prompt={copies})"
        raise ValueError(f"one positive number of images is wanted, but these are given{copied}: {found}")
    number = next(iter(found.values()), copies)
    repeats = {name: copies if name in lists else number for name in inputs}
    return number, {
        name: values and [value for value in values for _ in range(repeats[name])]
        for name, values in inputs.items()
    }


def _require_finite(values: torch.Tensor, what: str, component: str, dtype: torch.dtype):
    """Black images are never written."""
    bad = (~values.isfinite()).flatten(1).any(1).sum().item()
    if bad:
        raise ValueError(
            f"{bad} of {len(values)} {what} are not finite (the {component} runs in {dtype}); try float32 or "
            "bfloat16. In these, the scheduler's config or the weights are broken"
        )
