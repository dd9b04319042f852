"""Samples latent diffusion models; self-contained, as this very file travels to the Hub with every model."""

import inspect
import json
import math
import warnings
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

# Read at import: two dynamically loaded `pipeline.py` share one file name in the modules cache, so that later
# the file on disk may no longer be the code that runs.
SOURCE = Path(__file__).read_bytes()
FLOW_TIME = 1000.0  # a flow network sees 1000 * tau, the range its sinusoidal embedding was made for
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample")
# How each scheduler states where on its path it stands; see `_scheduler_point`. By name; what is absent is
# refused: equal attributes may mean something else (MiniMaxH3Scheduler has flow sigmas but wants -velocity).
_FAMILIES = {
    "table": "DDIM DDIMParallel DDPM DDPMParallel PNDM TCD CogVideoXDDIM",
    "scaled": "EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete "
    "LMSDiscrete",
    "solver": "DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver",
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMapEulerDiscrete LTXEulerAncestralRF",
    "edm": "EDMEuler EDMDPMSolverMultistep",
    "ipndm": "IPNDM",
}
_REFUSALS = {
    "it is made for distilled (few-step) networks":
        "LCM FlowMatchLCM CMStochasticIterative SCM Piflow HeliosDMD ConsistencyDecoder",
    "it runs from the image to the noise":
        "DDIMInverse DPMSolverMultistepInverse",
    "it is made for discrete tokens":
        "Amused VQDiffusion BlockRefinement DiscreteDDIM EntropyBound",
    "its step() wants more than a prediction, the time and the latents":
        "CogVideoXDPM RePaint UnCLIP KarrasVe ScoreSdeVe ScoreSdeVp DDPMWuerstchen",
    "its noise comes from torchsde's own seed instead of the generator":
        "DPMSolverSDE CosineDPMSolverMultistep",
    "it is made for one model's own path and time":
        "MiniMaxH3 Helios RFD4Proteina",
}  # fmt: skip


def _by_name(groups: dict) -> dict:
    return {f"{name}Scheduler": group for group, names in groups.items() for name in names.split()}


SCHEDULERS, REFUSED = _by_name(_FAMILIES), _by_name(_REFUSALS)


# -------------------------------------------------------------------------------------- condition and network
@dataclass(frozen=True)
class Condition:
    """What a network is told besides the noisy latents and the time; every field is optional, batch first.

    class_labels: (N,) int64 in [0, K]; K = `unet.config.num_class_embeds` - 1 is the null class, "no label".
    """

    class_labels: torch.Tensor | None = None

    @classmethod
    def null(cls, unet, batch_size: int, device=None) -> "Condition":
        """The condition that says nothing, for `batch_size` images; of no fields where `unet` takes none."""
        classes = unet.config.get("num_class_embeds")
        return cls(None if classes is None else torch.full((batch_size,), classes - 1, device=device))

    def drop(self, mask: torch.Tensor, null: "Condition") -> "Condition":
        """This condition with `null` where `mask` (N,) bool is true (arXiv:2207.12598, algorithm 1)."""
        return self._combine(null, lambda own, nothing: torch.where(_per_image(mask, own), nothing, own))

    def join(self, other: "Condition") -> "Condition":
        """One doubled batch: this condition, then `other`."""
        return self._combine(other, lambda own, others: torch.cat([own, others]))

    def given(self) -> dict:
        """The fields that are not None, by name: the keyword arguments of a network."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def _combine(self, other, function):
        return Condition(**{name: function(own, getattr(other, name)) for name, own in self.given().items()})


def denoise(unet, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The one call of a network, used by training and by sampling.

    noisy: (N, C, H, W), of the network's dtype; timesteps: (N,) or scalar, the network's own time.
    Returns what the network predicts, (N, C, H, W).
    """
    return unet(noisy, timesteps, **condition.given(), return_dict=False)[0]


def set_latent_statistics(autoencoder, mean: list[float], std: list[float]) -> None:
    """Write mean and deviation per channel into the autoencoder's config, the one place where they are kept.

    As `latents_mean` and `latents_std`, or, for a class that does not know them (AutoencoderDC), with a
    leading underscore: Diffusers keeps such keys without a warning at every load.
    """
    prefix = "" if "latents_mean" in inspect.signature(type(autoencoder).__init__).parameters else "_"
    autoencoder.register_to_config(**{f"{prefix}latents_mean": list(mean), f"{prefix}latents_std": list(std)})


def _latent_statistics(autoencoder, like: torch.Tensor):
    config = autoencoder.config
    mean, std = (config.get(key, config.get(f"_{key}")) for key in ("latents_mean", "latents_std"))
    channels = like.shape[1]
    if mean is None or std is None or len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"the autoencoder's config has latents_mean={mean} and latents_std={std}; wanted: a list of "
            f"{channels} numbers each. Measure them over the training set and write them with "
            "set_latent_statistics()"
        )
    return (torch.tensor(v, dtype=torch.float32, device=like.device).view(1, -1, 1, 1) for v in (mean, std))


def normalize_latents(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Autoencoder space to network space: (latents - latents_mean) / latents_std per channel, in float32.

    latents: (N, C, H, W). ValueError if the autoencoder's config lacks either list. `AutoencoderKL` does not
    apply them itself.
    """
    mean, std = _latent_statistics(autoencoder, latents)
    return (latents.float() - mean) / std


def denormalize_latents(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Network space to autoencoder space, the inverse of `normalize_latents`; the same shapes and errors."""
    mean, std = _latent_statistics(autoencoder, latents)
    return latents.float() * std + mean


# -------------------------------------------------------------------------------------------------- objective
@lru_cache(maxsize=16)
def _alphas_cumprod(objective_json: str, device: str) -> torch.Tensor:
    """(num_train_timesteps,) float32; ValueError for no objective. Keyed by text: a dict has no hash."""
    objective = json.loads(objective_json)
    prediction_type, known = objective.get("prediction_type"), inspect.signature(DDPMScheduler).parameters
    unknown = [key for key in objective if key not in known]
    if prediction_type not in ("epsilon", "v_prediction") or unknown:
        raise ValueError(
            f"objective {objective}: wanted prediction_type 'flow_prediction' alone, or 'epsilon' or "
            f"'v_prediction' with the noise schedule's arguments of DDPMScheduler (unknown here: {unknown})"
        )
    if prediction_type == "epsilon" and objective.get("rescale_betas_zero_snr"):
        raise ValueError(
            "objective: epsilon says nothing about the image where the signal is zero (arXiv:2305.08891); "
            "use prediction_type='v_prediction' or rescale_betas_zero_snr=False"
        )
    return DDPMScheduler(**objective).alphas_cumprod.to(device)


def _schedule(objective: dict, device="cpu") -> torch.Tensor:
    return _alphas_cumprod(json.dumps(objective, sort_keys=True), str(device))


def is_flow(objective: dict) -> bool:
    return objective.get("prediction_type") == "flow_prediction"


def alpha_sigma(objective: dict, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) of noisy = alpha * clean + sigma * noise at the network's own times, shaped like them.

    Flow (arXiv:2209.03003): any t in [0, 1000], (1 - t/1000, t/1000). Variance preserving (arXiv:2006.11239):
    integers in [0, num_train_timesteps), (sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod)).
    """
    if is_flow(objective):
        tau = timesteps.float() / FLOW_TIME
        return 1 - tau, tau
    alphas_cumprod = _schedule(objective, timesteps.device)[timesteps.long()]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def _per_image(value, like: torch.Tensor):
    """(N,) tensors as (N, 1, 1, 1), whatever is one number as it is."""
    return value.view(-1, *[1] * (like.ndim - 1)) if torch.is_tensor(value) and value.ndim else value


def prediction_target(prediction_type: str, clean, noise, alpha, sigma) -> torch.Tensor:
    """What a perfect network predicts; clean, noise: (N, C, H, W); alpha, sigma: (N,) or numbers.

    v of arXiv:2202.00512, the velocity of arXiv:2209.03003. ValueError for an unknown type.
    """
    alpha, sigma = _per_image(alpha, clean), _per_image(sigma, clean)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * clean
    if prediction_type == "flow_prediction":
        return noise - clean
    if prediction_type == "sample":
        return clean
    raise ValueError(f"prediction_type {prediction_type!r}: wanted one of {', '.join(PREDICTION_TYPES)}")


def clean_and_noise(prediction_type: str, prediction, noisy, alpha, sigma) -> tuple:
    """(clean, noise) that a prediction implies, so that noisy = alpha * clean + sigma * noise.

    Shapes as in `prediction_target`. v and flow are safe on the whole path; epsilon needs alpha > 0 and
    sample sigma > 0: elsewhere the prediction does not determine the other half and the result is not finite.
    """
    alpha, sigma = _per_image(alpha, noisy), _per_image(sigma, noisy)
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha, prediction
    if prediction_type == "sample":
        return prediction, (noisy - alpha * prediction) / sigma
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * noisy - sigma * prediction) / norm, (sigma * noisy + alpha * prediction) / norm
    if prediction_type == "flow_prediction":
        return (noisy - sigma * prediction) / (alpha + sigma), (noisy + alpha * prediction) / (alpha + sigma)
    raise ValueError(f"prediction_type {prediction_type!r}: wanted one of {', '.join(PREDICTION_TYPES)}")


# -------------------------------------------------------------------------------------- network and scheduler
def scheduler_family(scheduler) -> str:
    """The kind of path `scheduler` walks; ValueError, with those that can be used, where there is none."""
    config = scheduler.config
    names = [c.__name__ for c in type(scheduler).__mro__]
    family = next((SCHEDULERS[name] for name in names if name in SCHEDULERS), None)
    reason = None
    if family is None:
        reason = next((REFUSED[name] for name in names if name in REFUSED), "its step() is unknown here")
    elif config.get("use_dynamic_shifting") or config.get("invert_sigmas"):
        reason = "use_dynamic_shifting needs a `mu` and invert_sigmas runs backwards; set both to False"
    elif config.get("stochastic_sampling"):
        reason = "stochastic_sampling is made for distilled models; set it to False"
    elif family == "table" and config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        reason = "epsilon has no answer where the signal is zero; set its prediction_type to 'v_prediction'"
    elif family == "solver":
        flow_sigmas, wanted = bool(config.get("use_flow_sigmas")), config.get("prediction_type")
        if wanted == ("v_prediction" if flow_sigmas else "flow_prediction"):
            reason = f"its use_flow_sigmas={flow_sigmas} contradicts its prediction_type={wanted!r}"
    if reason:
        raise ValueError(
            f"{names[0]} cannot sample this model: {reason}. These can: {', '.join(sorted(SCHEDULERS))}"
        )
    return family


def _scheduler_point(scheduler, family: str, i: int, t) -> tuple[float, float, str]:
    """(alpha, sigma) of what `scale_model_input` gives at step i, and the prediction type `step` expects."""
    prediction_type = scheduler.config.get("prediction_type")
    if family == "table":
        alpha2 = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt(alpha2), math.sqrt(1 - alpha2), prediction_type
    if family == "ipndm":  # its `ets` is sigma * x + alpha * output: the output is v
        return float(scheduler.alphas[i]), float(scheduler.betas[i]), "v_prediction"
    if family == "scaled":  # x / sqrt(1 + sigma^2); only a probe knows the midpoints of the two-stage solvers
        alpha = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t))
        return alpha, math.sqrt(max(1 - alpha**2, 0.0)), prediction_type
    sigma = float(scheduler.sigmas[i])
    if family == "flow" or scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma, "flow_prediction" if family == "flow" else prediction_type
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma), prediction_type


def network_point(objective: dict, alpha: float, sigma: float) -> tuple[float, float, float]:
    """(time, alpha, sigma) where the network's own path has the signal-to-noise ratio alpha / sigma.

    A flow network has every ratio; a variance-preserving one is interpolated in log(alpha / sigma) between
    its integer times and clamped to its first and last.
    """
    if is_flow(objective):
        tau = sigma / (alpha + sigma)
        return FLOW_TIME * tau, 1 - tau, tau
    alpha2 = _schedule(objective).double()
    alpha2 = alpha2.clamp(min=alpha2[alpha2 > 0].min() / 4)  # a last time without any signal has no logarithm
    log_snr = ((alpha2 / (1 - alpha2)).log() / 2).numpy()
    wanted = math.log(max(alpha, 1e-12)) - math.log(max(sigma, 1e-12))
    wanted = min(max(wanted, log_snr[-1]), log_snr[0])
    time = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1])
    return float(time), 1 / math.sqrt(1 + math.exp(-2 * wanted)), 1 / math.sqrt(1 + math.exp(2 * wanted))


def scheduler_prediction(scheduler, family: str, objective: dict, i: int, t, sample, network) -> torch.Tensor:
    """What `scheduler.step(..., t, sample)` wants, from a `network(noisy, time)` on the path of `objective`.

    sample: (N, C, H, W) float32. Rescaled, it moves from the scheduler's path to the network's at the same
    signal-to-noise ratio; the prediction comes back as (clean, noise) and is put in the scheduler's terms.
    """
    alpha, sigma, wanted = _scheduler_point(scheduler, family, i, t)
    noisy = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
    if family == "edm":  # its inputs are scaled to unit variance by sigma_data; here by 1
        noisy = sample * alpha
    time, net_alpha, net_sigma = network_point(objective, alpha, sigma)
    net_noisy = noisy * (math.hypot(net_alpha, net_sigma) / math.hypot(alpha, sigma))
    prediction = network(net_noisy, time)
    clean, noise = clean_and_noise(objective["prediction_type"], prediction, net_noisy, net_alpha, net_sigma)
    # The half that the scheduler's own point magnifies less; it matters where the network's time was clamped.
    if sigma > alpha:
        noise = (noisy - alpha * clean) / sigma
    else:
        clean = (noisy - sigma * noise) / alpha
    if family == "edm":  # clean = c_skip * sample + c_out * output (arXiv:2206.00364, eq. 7)
        at = float(scheduler.sigmas[i])
        c_skip, c_out = scheduler.precondition_outputs(1, 0, at), scheduler.precondition_outputs(0, 1, at)
        return (clean - c_skip * sample) / c_out
    return prediction_target(wanted, clean, noise, alpha, sigma)


# --------------------------------------------------------------------------------------------------- pipeline
class LDMPipeline(DiffusionPipeline):
    """Latent diffusion, unconditional or by class, with any scheduler of `SCHEDULERS` under any objective.

    Args:
        vae: the autoencoder, with `latents_mean` and `latents_std` in its config.
        unet: the denoiser of normalised latents, (N, C, H, W).
        scheduler: what steps; `ValueError` at the call if it cannot.
        objective: {"prediction_type": "flow_prediction"}, or "epsilon" / "v_prediction" with the training's
            noise schedule under DDPMScheduler's names (num_train_timesteps, beta_schedule, beta_start,
            beta_end, rescale_betas_zero_snr). Saved with the model: sampling cannot disagree with training.
        id2label: names of the classes, {0: "cat", ...}; a dict, as the Hub loader cannot read a list.

    >>> pipe = LDMPipeline.from_pretrained("org/model")
    >>> pipe(class_labels=["cat", 3], guidance_scale=1.5).images[0].save("cat.png")
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        objective: dict | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if objective is None:
            raise ValueError('objective=None; wanted a dict such as {"prediction_type": "flow_prediction"}')
        if not is_flow(objective) or len(objective) > 1:
            _schedule(objective)  # raises where it is none
        if vae.config.latent_channels != unet.config.out_channels:
            raise ValueError(
                f"the autoencoder has latent_channels={vae.config.latent_channels}, but the denoiser has "
                f"out_channels={unet.config.out_channels}; build one for the other"
            )
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        names = None if id2label is None else {str(number): name for number, name in id2label.items()}
        self.register_to_config(objective=dict(objective), id2label=names)

    # ---- saving and loading
    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Load a hosted `["pipeline", "LDMPipeline"]` as this very class: no code of the folder is run."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    def save_pretrained(self, save_directory, **kwargs):
        """As `DiffusionPipeline.save_pretrained`, plus `pipeline.py`; ValueError unless safetensors."""
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False would write a pickle; only safetensors are written")
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)

    def save_config(self, save_directory, **kwargs):
        """Write `model_index.json` and the code it names; `save_pretrained` calls this before it uploads."""
        super().save_config(save_directory, **kwargs)
        path = Path(save_directory) / self.config_name
        own = next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)
        index = json.loads(path.read_text(encoding="utf-8")) | {"_class_name": ["pipeline", own]}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (path.parent / "pipeline.py").write_bytes(SOURCE)

    def enable_vae_slicing(self):
        """Decode one image at a time, in less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        """Decode the whole batch at once."""
        self.vae.disable_slicing()

    # ---- what the user asked for
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

    def _condition(self, class_labels: list | None, batch_size: int, guidance_scale: float) -> Condition:
        null = Condition.null(self.unet, batch_size, self._execution_device)
        if class_labels is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs class_labels to guide to; 1 is off")
            return null
        if null.class_labels is None:
            raise ValueError(f"class_labels={class_labels}, but this model has no classes; leave it out")
        classes = self.unet.config.num_class_embeds - 1
        numbers = [self._class_number(label, classes) for label in class_labels]
        condition = Condition(class_labels=torch.tensor(numbers, device=null.class_labels.device))
        return condition if guidance_scale == 1 else null.join(condition)

    def _prepare_latents(self, latents, batch_size: int, generator, device) -> torch.Tensor:
        """(N, C, H, W) float32 of the deviation that the scheduler starts from."""
        size, channels = self.unet.config.sample_size, self.unet.config.out_channels
        if latents is None:
            shape = (batch_size, channels, *((size, size) if isinstance(size, int) else size))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; wanted (N, {channels}, H, W)")
        return latents.to(device, torch.float32) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def _set_timesteps(self, num_inference_steps: int, timesteps, sigmas, device):
        scheduler, given = self.scheduler, {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: list(value) for name, value in given.items() if value is not None}
        taken = inspect.signature(scheduler.set_timesteps).parameters
        # LTXEulerAncestralRF wants a final 0 and evaluates there; the EDM schedulers take a ramp, not sigmas.
        odd = ("LTXEulerAncestralRFScheduler", "EDMEulerScheduler", "FlowMapEulerDiscreteScheduler")
        if len(given) > 1 or any(name not in taken or type(scheduler).__name__ in odd for name in given):
            raise ValueError(
                f"{type(scheduler).__name__} cannot take {' and '.join(given)}; use num_inference_steps, or "
                "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler with sigmas"
            )
        if not given and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}; wanted at least 1")
        if not given and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            # Its own grid ends at 0.001, so that the last evaluation is wasted, and applies `shift` twice
            # (huggingface/diffusers issue 13243).
            given["sigmas"] = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        if given:
            scheduler.set_timesteps(device=device, **given)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)

    def _step_kwargs(self, generator, eta: float) -> dict:
        taken = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in taken:
            raise ValueError(f"eta={eta}, but {type(self.scheduler).__name__} takes none; DDIMScheduler does")
        given = {"eta": eta, "generator": generator, "return_dict": False}
        return {name: value for name, value in given.items() if name in taken}

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size: int | None = None,
        num_inference_steps: int = 20,
        timesteps: list | None = None,
        sigmas: list | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: tuple = ("latents",),
        eta: float = 0.0,
    ):
        """Sample images.

        Args:
            class_labels: a name or a number, or a list of them, one an image; None is unconditional.
            batch_size: number of images; by default as many as labels, generators or latents, or one.
            num_inference_steps: steps of the scheduler.
            timesteps, sigmas: a grid of one's own instead, where the scheduler takes it.
            guidance_scale: null + guidance_scale * (conditional - null) (arXiv:2207.12598); off at 1.
            generator: one, or one per image: then a picture does not depend on its batch.
            latents: (N, C, H, W) standard normal noise to start from.
            output_type: "pil"; "np" (N, H, W, C) and "pt" (N, C, H, W), float32 in [0, 1]; "latent", the
                normalised latents (N, C, H, W).
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: f(pipe, i, t, kwargs) -> dict; may return other "latents".
            callback_on_step_end_tensor_inputs: what of `_callback_tensor_inputs` it gets in kwargs.
            eta: stochasticity of DDIM and TCD, 0 to 1.

        Raises:
            ValueError: what cannot be meant, before the first step; non-finite latents or images after it.
        """
        family, device = scheduler_family(self.scheduler), self._execution_device
        self._check_options(output_type, callback_on_step_end_tensor_inputs)
        class_labels = _as_list(class_labels)
        batch_size, class_labels = _batch_size(batch_size, class_labels, generator, latents)
        condition = self._condition(class_labels, batch_size, guidance_scale)
        step_kwargs = self._step_kwargs(generator, eta)
        self._set_timesteps(num_inference_steps, timesteps, sigmas, device)
        latents = self._prepare_latents(latents, batch_size, generator, device)

        def network(noisy, time):
            noisy = noisy.to(self.unet.dtype)
            if guidance_scale != 1:
                noisy = torch.cat([noisy, noisy])
            times = torch.full((len(noisy),), time, device=device)
            prediction = denoise(self.unet, noisy, times, condition).float()
            return prediction if guidance_scale == 1 else torch.lerp(*prediction.chunk(2), guidance_scale)

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = scheduler_prediction(
                self.scheduler, family, self.config.objective, i, t, latents, network
            )
            latents = self.scheduler.step(output, t, latents, **step_kwargs)[0]
            if callback_on_step_end is not None:
                values = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, values) or {}).get("latents", latents)

        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_options(self, output_type: str, tensor_inputs):
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}; wanted 'pil', 'np', 'pt' or 'latent'")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; wanted some of "
                f"{self._callback_tensor_inputs}"
            )
        clipping = [key for key in ("clip_sample", "thresholding") if self.scheduler.config.get(key)]
        if clipping:
            warnings.warn(
                f"{type(self.scheduler).__name__} has {clipping[0]}=True, made for pixels: latents will "
                f"be clipped and colours wash out. Build it with from_config(..., {clipping[0]}=False)",
                stacklevel=4,  # the caller of the pipeline, past __call__ and its no_grad
            )

    def _decode(self, latents: torch.Tensor, output_type: str):
        _require_finite(latents, f"latents after {type(self.scheduler).__name__}", "unet", self.unet.dtype)
        if output_type == "latent":
            return latents
        latents = denormalize_latents(self.vae, latents).to(self.vae.dtype)  # (N, C, H, W)
        images = self.vae.decode(latents, return_dict=False)[0].float()  # (N, 1 or 3, f * H, f * W)
        _require_finite(images, "images after the decoder", "vae", self.vae.dtype)
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, f * H, f * W, 1 or 3)
        if output_type == "np":
            return images
        images = (images * 255).round().astype(np.uint8)
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]


def _as_list(class_labels) -> list | None:
    if class_labels is None:
        return None
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, list | tuple | range) else [class_labels]


def _batch_size(batch_size, class_labels, generator, latents) -> tuple[int, list | None]:
    """The number of images that everything given agrees on, and one label for each."""
    labels = None if class_labels is None or len(class_labels) == 1 else len(class_labels)
    found = {
        "batch_size": batch_size,
        "class_labels": labels,
        "generator": len(generator) if isinstance(generator, list) else None,
        "latents": None if latents is None else len(latents),
    }
    found = {name: number for name, number in found.items() if number is not None}
    if len(set(found.values())) > 1 or any(number < 1 for number in found.values()):
        raise ValueError(f"one positive number of images is wanted, but these are given: {found}")
    number = next(iter(found.values()), 1)
    return number, class_labels * number if class_labels is not None and labels is None else class_labels


def _require_finite(values: torch.Tensor, what: str, component: str, dtype: torch.dtype):
    """Black images are never written."""
    bad = (~values.isfinite()).flatten(1).any(1).sum().item()
    if bad:
        raise ValueError(
            f"{bad} of {len(values)} {what} are not finite (the {component} runs in {dtype}); try "
            f"pipe.{component}.to(torch.float32) or bfloat16. In float32, the weights themselves are broken"
        )
