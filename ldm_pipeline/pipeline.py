"""Samples latent diffusion models; self-contained, as this very file travels to the Hub with every model."""

import inspect
import json
import math
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import diffusers
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
from safetensors import SafetensorError, safe_open

# Read at import: two dynamically loaded `pipeline.py` share one file name in the modules cache, so that later
# the file on disk may no longer be the code that runs.
SOURCE = Path(__file__).read_bytes()
FLOW_TIME = 1000.0  # a flow network sees 1000 * tau, the range its sinusoidal embedding was made for
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
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


# -------------------------------------------------------------------------------------------------- objective
class Objective:
    """What a network predicts, and its path: noisy = alpha * clean + sigma * noise at the network's times.

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
        self._tables = {} if self.is_flow else {"cpu": _alphas_cumprod(config)}  # by device

    def alphas_cumprod(self, device="cpu") -> torch.Tensor:
        """The squares of alpha, (num_train_timesteps,) float32; of variance-preserving objectives alone."""
        device = str(device)
        if device not in self._tables:
            self._tables[device] = self._tables["cpu"].to(device)
        return self._tables[device]

    def alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) at the network's own times, shaped like them."""
        if self.is_flow:
            tau = timesteps.float() / FLOW_TIME
            return 1 - tau, tau
        alphas_cumprod = self.alphas_cumprod(timesteps.device)[timesteps.long()]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def target(self, clean: torch.Tensor, noise: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """What a perfect network predicts; clean, noise: (N, ...); alpha, sigma: (N,) or numbers."""
        return prediction_target(self.prediction_type, clean, noise, alpha, sigma)

    def clean_and_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, alpha, sigma) -> tuple:
        """(clean, noise) that a prediction implies; shapes as in `target`. Epsilon needs alpha > 0."""
        return clean_and_noise(self.prediction_type, prediction, noisy, alpha, sigma)

    def network_point(self, alpha: float, sigma: float) -> tuple[float, float, float]:
        """(time, alpha, sigma) where the network's own path has the signal-to-noise ratio alpha / sigma.

        A flow network has every ratio; a variance-preserving one is interpolated in log(alpha / sigma)
        between its whole times and clamped to its first and last.
        """
        if self.is_flow:
            tau = sigma / (alpha + sigma)
            return FLOW_TIME * tau, 1 - tau, tau
        alpha2 = self.alphas_cumprod().double()
        alpha2 = alpha2.clamp(min=alpha2[alpha2 > 0].min() / 4)  # without any signal there is no logarithm
        log_snr = ((alpha2 / (1 - alpha2)).log() / 2).numpy()
        wanted = math.log(max(alpha, 1e-12)) - math.log(max(sigma, 1e-12))
        wanted = min(max(wanted, log_snr[-1]), log_snr[0])
        time = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1])
        return float(time), 1 / math.sqrt(1 + math.exp(-2 * wanted)), 1 / math.sqrt(1 + math.exp(2 * wanted))


def _alphas_cumprod(config: dict) -> torch.Tensor:
    try:
        alphas_cumprod = DDPMScheduler(**config).alphas_cumprod
        sound = len(alphas_cumprod) and 0 <= alphas_cumprod[-1] and alphas_cumprod[0] < 1
        sound = sound and not (alphas_cumprod.diff() > 0).any() and alphas_cumprod.isfinite().all()
    except Exception as error:  # a constructor may raise anything at a wrong value
        raise ValueError(f"objective={config}: {type(error).__name__}: {error}") from error
    if not sound:
        raise ValueError(
            f"objective={config}: no noise schedule whose signal falls from below 1 to 0 or more"
        )
    return alphas_cumprod


def _per_image(value, like: torch.Tensor):
    """(N,) tensors as (N, 1, ...) to broadcast over images; a number as it is."""
    return value.view(-1, *[1] * (like.ndim - 1)) if torch.is_tensor(value) and value.ndim else value


def prediction_target(prediction_type: str, clean, noise, alpha, sigma) -> torch.Tensor:
    """What a perfect network predicts: the noise, v (arXiv:2202.00512) or the velocity (arXiv:2209.03003)."""
    alpha, sigma = _per_image(alpha, clean), _per_image(sigma, clean)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * clean
    assert prediction_type == "flow_prediction", prediction_type
    return noise - clean


def clean_and_noise(prediction_type: str, prediction, noisy, alpha, sigma) -> tuple:
    """(clean, noise) with noisy = alpha * clean + sigma * noise, as `prediction` implies them."""
    alpha, sigma = _per_image(alpha, noisy), _per_image(sigma, noisy)
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * noisy - sigma * prediction) / norm, (sigma * noisy + alpha * prediction) / norm
    assert prediction_type == "flow_prediction", prediction_type
    return (noisy - sigma * prediction) / (alpha + sigma), (noisy + alpha * prediction) / (alpha + sigma)


# ------------------------------------------------------------------------------------------ latent statistics
def set_latent_statistics(autoencoder, mean: list[float], std: list[float]) -> None:
    """Write mean and deviation per channel into the autoencoder's config, the one place where they are kept.

    As `latents_mean` and `latents_std`, or, for a class that does not know them (AutoencoderDC), with a
    leading underscore: Diffusers keeps such keys without a warning at every load.
    """
    prefix = "" if "latents_mean" in inspect.signature(type(autoencoder).__init__).parameters else "_"
    autoencoder.register_to_config(**{f"{prefix}latents_mean": list(mean), f"{prefix}latents_std": list(std)})


def _latent_statistics(autoencoder, like: torch.Tensor):
    config = autoencoder.config
    mean, std = given = [config.get(k, config.get(f"_{k}")) for k in ("latents_mean", "latents_std")]
    try:
        mean, std = (torch.tensor(v, dtype=torch.float32, device=like.device) for v in given)
        sound = mean.shape == std.shape == (like.shape[1],) and mean.isfinite().all()
        sound = sound and std.isfinite().all() and std.min() > 0
    except (TypeError, ValueError, RuntimeError, OverflowError):  # None, text, nested lists, 10**400
        sound = False
    if not sound:
        raise ValueError(
            f"the autoencoder's config has latents_mean={given[0]} and latents_std={given[1]}; wanted: a "
            f"list of {like.shape[1]} finite numbers each, deviations above 0. Measure them over the "
            "training set and write them with set_latent_statistics()"
        )
    shape = (1, -1, *[1] * (like.ndim - 2))
    return mean.view(shape), std.view(shape)


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
    """What a network is told besides the noisy latents and the time; every field is optional, batch first.

    class_labels: (N,) int64 in [0, K]; K = `num_classes(denoiser)` is the null class, "no label".
    """

    class_labels: torch.Tensor | None = None

    @classmethod
    def null(cls, denoiser, batch_size: int, device=None) -> "Condition":
        """The condition that says nothing, for `batch_size` images; of no fields where none are taken."""
        classes = num_classes(denoiser)
        return cls(torch.full((batch_size,), classes, device=device) if classes else None)

    def drop(self, mask: torch.Tensor, null: "Condition") -> "Condition":
        """This condition with `null` where `mask` (N,) bool is true (arXiv:2207.12598, algorithm 1)."""
        return self._combine(null, lambda own, nothing: torch.where(_per_image(mask, own), nothing, own))

    def join(self, other: "Condition") -> "Condition":
        """One doubled batch: this condition, then `other`."""
        return self._combine(other, lambda own, others: torch.cat([own, others]))

    def _combine(self, other: "Condition", function) -> "Condition":
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Condition(**{name: function(*pair) for name, pair in pairs.items() if pair[0] is not None})


def denoise(denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The one call of a network, used by training and by sampling.

    noisy: (N, C, ...), of the network's dtype; timesteps: (N,) or scalar, the network's own time.
    Returns what the network predicts, shaped like `noisy`.
    """
    keywords = {"class_labels": condition.class_labels}
    given = {name: value for name, value in keywords.items() if value is not None}
    return denoiser(noisy, timesteps, **given, return_dict=False)[0]


def num_classes(denoiser) -> int:
    """Classes K that the denoiser can be asked for; 0: it takes none. Number K is the null class."""
    return (denoiser.config.get("num_class_embeds") or 1) - 1


def latent_shape(denoiser) -> tuple[int, ...]:
    """(C, H, W) of the latents of one image."""
    size = denoiser.config.sample_size
    return (denoiser.config.out_channels, *((size, size) if isinstance(size, int) else size))


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


def scheduler_prediction(
    scheduler, family: str, objective: Objective, i: int, t, sample, network
) -> torch.Tensor:
    """What `scheduler.step(..., t, sample)` wants, from a `network(noisy, time)` on the path of `objective`.

    sample: (N, C, H, W) float32. Rescaled, it moves from the scheduler's path to the network's at the same
    signal-to-noise ratio; the prediction comes back as (clean, noise) and is put in the scheduler's terms.
    """
    alpha, sigma, wanted = _scheduler_point(scheduler, family, i, t)
    noisy = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
    if family == "edm":  # its inputs are scaled to unit variance by sigma_data; here by 1
        noisy = sample * alpha
    time, net_alpha, net_sigma = objective.network_point(alpha, sigma)
    net_noisy = noisy * (math.hypot(net_alpha, net_sigma) / math.hypot(alpha, sigma))
    prediction = network(net_noisy, time)
    clean, noise = objective.clean_and_noise(prediction, net_noisy, net_alpha, net_sigma)
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


# ---------------------------------------------------------------------------------------------- model folders
def model_folder(source: str, download) -> Path:
    """The local folder `source`, or what `download()` fetches of this id of the Hub; errors name `source`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(download())
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} is no local folder and no model that the Hub gives: {error}") from error


def forget_local_path(model) -> None:
    """Drop a folder of this machine from a config, where Diffusers notes it: configs are saved and shared."""
    if Path(str(model.config.get("_name_or_path"))).exists():
        model.register_to_config(_name_or_path=None)


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; ValueError or OSError, which name the file, where there is none."""
    if not Path(path).is_file():  # nor may it be a pipe or a device, which would be read without an end
        raise FileNotFoundError(f"{path} is missing")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}; wanted an object")
    return config


def build_from_config(kind: type, path: Path, device: str = "cpu"):
    """A `kind` of the config at `path`, its weights untrained; ValueError with the file if there is none."""
    config = read_json(path)
    if config.get("_class_name") != kind.__name__ or config.get("quantization_config"):
        raise ValueError(
            f"{path} is of a {config.get('_class_name')}; wanted a {kind.__name__}, not quantized"
        )
    taken = inspect.signature(kind.__init__).parameters
    wrong = {k: v for k, v in config.items() if isinstance(v, str | dict) and k in taken}
    if wrong := {k: v for k, v in wrong.items() if isinstance(taken[k].default, int | float)}:
        raise ValueError(f"{path} has {wrong}; wanted a number, true or false")  # "false" would pass for true
    try:
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model = kind.from_config(config)
            _try(model)
    except Exception as error:  # what a wrong value raises, a constructor or a network does not say
        raise ValueError(f"{path} makes no {kind.__name__}: {type(error).__name__}: {error}") from error
    return model


def _try(model) -> None:
    """Run a component without numbers: what its config breaks, breaks before the first weight is read."""
    if isinstance(model, SchedulerMixin):
        if type(model).__name__ not in SCHEDULERS or model.config.get("use_dynamic_shifting"):
            return  # loaded all the same, for the user to replace
        model.set_timesteps(4)
        for t in model.timesteps:
            x = torch.zeros(1, 1, 1, 1)
            model.step(model.scale_model_input(x, t) if hasattr(model, "scale_model_input") else x, t, x)
    elif not isinstance(model, UNet2DConditionModel):
        config, unet = model.config, isinstance(model, UNet2DModel)
        shape = (1, *latent_shape(model)) if unet else (1, config.in_channels, 256, 256)
        given = (
            (torch.zeros(shape), torch.zeros(1), Condition.null(model, 1)) if unet else (torch.zeros(shape),)
        )
        result = denoise(model, *given) if unet else model(*given, return_dict=False)[0]
        if result.shape != shape:
            raise ValueError(f"it makes {tuple(result.shape)} of {shape}")


def _stored_weights(folder: Path, variant: str | None) -> dict:
    """{key: (shape, is a float)} of the safetensors that Diffusers would read, from their headers."""
    name = "diffusion_pytorch_model"
    infix = f".{variant}" if variant and any(folder.glob(f"{name}.{variant}*")) else ""
    index, names, found = folder / f"{name}.safetensors.index{infix}.json", None, {}
    if index.exists():
        names = (content := read_json(index)).get("weight_map")
        if not isinstance(names, dict) or not names or not isinstance(content.get("metadata"), dict):
            raise ValueError(f"{index}: no weight_map and metadata")
        # Diffusers would read a shard of another suffix as a pickle.
        if bad := [n for n in names.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(n))]:
            raise ValueError(f"{index}: {bad[:3]} are no names of .safetensors files in its own folder")
    for path in (
        [folder / n for n in sorted(set(names.values()))]
        if names
        else [folder / f"{name}{infix}.safetensors"]
    ):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; pickles (.bin, .pt, .ckpt) are never read")
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    weight = file.get_slice(key)
                    stored = (tuple(weight.get_shape()), weight.get_dtype().startswith(("F", "BF")))
                    found[key if not names or names.get(key) == path.name else f"{key} in {path.name}"] = (
                        stored
                    )
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    return found


def check_model_folder(kind: type, folder: Path, variant: str | None = None) -> None:
    """ValueError or OSError unless `folder` has all weights of the `kind` in its config, and no more."""
    model = build_from_config(kind, folder / "config.json", "meta")
    wanted = {key: (tuple(t.shape), t.is_floating_point()) for key, t in model.state_dict().items()}
    found = _stored_weights(folder, variant)
    model._fix_state_dict_keys_on_load(found)  # autoencoders of 2022 name their attention's weights otherwise
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "of another shape or type": [key for key in wanted if found.get(key, wanted[key]) != wanted[key]],
    }
    if told := [f"{len(keys)} {fault} ({', '.join(keys[:3])})" for fault, keys in faults.items() if keys]:
        raise ValueError(f"{folder}: the weights are not those of its {kind.__name__}: {'; '.join(told)}")


def check_weights(model, name: str) -> None:
    """ValueError where weights of `model` are not finite, or where nothing was ever read into them."""
    weights = {k: w for k, w in model.state_dict().items() if w.is_floating_point() and w.numel()}
    absent = [key for key, weight in weights.items() if weight.is_meta and not hasattr(model, "_hf_hook")]
    # One pass without a copy; float8 has no aminmax.
    real = {k: w for k, w in weights.items() if not w.is_meta and w.dtype.itemsize > 1}
    bad = [key for key, weight in real.items() if not torch.stack(weight.aminmax()).isfinite().all()]
    if absent or bad:
        what = f"not finite in {real[bad[0]].dtype}" if bad else "in no file"
        raise ValueError(
            f"{name}: {len(bad or absent)} weights are {what} ({', '.join((bad or absent)[:3])})"
        )


def _checked_names(id2label, classes: int) -> dict | None:
    """Names by number as text, as JSON has them; ValueError unless every number is a class."""
    if id2label is None:
        return None
    names = {str(number): name for number, name in id2label.items()} if isinstance(id2label, dict) else {}
    classes = classes or math.inf
    good = [n for n in names if n.isdecimal() and n == str(int(n)) and int(n) < classes]
    if (
        not isinstance(id2label, dict)
        or len(good) < len(names)
        or not all(isinstance(n, str) for n in names.values())
    ):
        raise ValueError(
            f"id2label={str(id2label)[:200]}; wanted a dict of names by number, from 0 to {classes - 1}"
        )
    return names


def _checked_defaults(defaults) -> dict | None:
    """ValueError unless it is None or a dict of what a call can take."""
    given = dict(defaults) if isinstance(defaults, dict) else {}
    steps, scale = given.pop("num_inference_steps", 20), given.pop("guidance_scale", 1.0)
    good = not given and type(steps) is int and steps >= 1 and type(scale) in (int, float)
    if not (good and math.isfinite(scale) and isinstance(defaults, dict | None)):
        raise ValueError(
            f"defaults={str(defaults)[:200]}; wanted a dict of num_inference_steps, a whole number from 1, "
            "and guidance_scale, a finite number"
        )
    return defaults


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
        defaults: what a call uses that says nothing else: "num_inference_steps" and, where there are
            class labels, "guidance_scale".

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
        defaults: dict | None = None,
    ):
        super().__init__()
        self.objective = Objective(objective)
        if vae.config.latent_channels != unet.config.out_channels:
            raise ValueError(
                f"the autoencoder has latent_channels={vae.config.latent_channels}, but the denoiser has "
                f"out_channels={unet.config.out_channels}; build one for the other"
            )
        for name, model in {"vae": vae, "unet": unet}.items():
            check_weights(model, name)
            forget_local_path(model)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        id2label = _checked_names(id2label, num_classes(unet))
        self.register_to_config(
            objective=dict(objective), id2label=id2label, defaults=_checked_defaults(defaults)
        )

    @property
    def denoiser(self):
        """The network that denoises normalised latents."""
        return self.unet

    # ---- saving and loading
    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Load a hosted `["pipeline", "LDMPipeline"]` as this very class: no code of the folder is run."""
        config = read_json(json_file)
        name = config.get("_class_name")
        config["_class_name"] = name[-1] if isinstance(name, list) and name else name
        if config["_class_name"] not in [c.__name__ for c in cls.__mro__ if issubclass(c, LDMPipeline)]:
            raise ValueError(f"{json_file}: _class_name is {name!r}; wanted {cls.__name__!r}")
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As `DiffusionPipeline.from_pretrained`, but all of the model or an error, and never a pickle.

        Diffusers itself only warns of weights that a file lacks or has too many.

        Raises:
            ValueError: which names the file or the folder and what is wrong there.
            OSError: where there is no such model.
        """
        source = str(pretrained_model_name_or_path)
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                f"{source}: use_safetensors=False would read a pickle; only safetensors are read"
            )
        kwargs["use_safetensors"] = True
        folder = model_folder(source, lambda: cls.download(source, **kwargs))
        for name, kind in cls._component_classes(folder, kwargs).items():
            if issubclass(kind, SchedulerMixin):
                build_from_config(kind, folder / name / kind.config_name)
            else:
                check_model_folder(kind, folder / name, kwargs.get("variant"))
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
            denormalize_latents(pipe.vae, torch.empty(0, pipe.vae.config.latent_channels, 1, 1))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        except (LookupError, TypeError, AttributeError) as error:
            # The entry of a component that is passed instead, or a file without a dot beside a variant.
            raise ValueError(f"{source}: Diffusers cannot load it so: {error!r}") from error
        pipe.register_to_config(_name_or_path=source)
        return pipe

    @classmethod
    def _component_classes(cls, folder: Path, given: dict) -> dict[str, type]:
        """The classes of the components that are read from `folder`, Diffusers' own ones alone."""
        index, path = cls.load_config(folder), folder / cls.config_name
        (wanted, options), types = cls._get_signature_keys(cls), cls._get_signature_types()
        known = {*wanted, *options}
        unknown = [key for key in index if key not in known and key[:1] != "_"]
        if bad := unknown + [key for key in options if index.get(key) == []]:  # Diffusers stumbles over []
            raise ValueError(f"{path} has {bad} unknown or empty; wanted {sorted(known)}")
        classes = {}
        for name in sorted(wanted - given.keys()):
            entry = index.get(name)
            library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if given.get("trust_remote_code") and library not in (None, "diffusers"):
                continue  # code of the folder, which answers for itself
            found = (
                getattr(diffusers, kind, None) if library == "diffusers" and isinstance(kind, str) else None
            )
            if not (isinstance(found, type) and issubclass(found, types[name])):
                raise ValueError(
                    f"{path}: {name} is {entry}; wanted {[c.__name__ for c in types[name]]} of diffusers "
                    "(code in the folder is run with trust_remote_code=True alone)"
                )
            classes[name] = found
        return classes

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
        index.pop("_name_or_path", None)  # often a folder of this machine, which is nobody else's business
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
        if not (classes := num_classes(self.unet)):
            raise ValueError(f"class_labels={class_labels}, but this model has no classes; leave it out")
        numbers = [self._class_number(label, classes) for label in class_labels]
        condition = Condition(class_labels=torch.tensor(numbers, device=null.class_labels.device))
        return condition if guidance_scale == 1 else null.join(condition)

    def _prepare_latents(self, latents, batch_size: int, generator, device) -> torch.Tensor:
        """(N, C, H, W) float32 of the deviation that the scheduler starts from."""
        shape = latent_shape(self.unet)
        if latents is None:
            shape = (batch_size, *shape)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.ndim != len(shape) + 1 or latents.shape[1] != shape[0]:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; wanted (N, {shape[0]}, H, W)")
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
        num_inference_steps: int | None = None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        guidance_scale: float | None = None,
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
            num_inference_steps: steps of the scheduler; None: what the model's `defaults` say, or 20.
            timesteps, sigmas: a grid of one's own instead, where the scheduler takes it.
            guidance_scale: null + guidance_scale * (conditional - null) (arXiv:2207.12598); off at 1. None:
                what the model's `defaults` say where there are class_labels, or 1.
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
        defaults = self.config.defaults or {}
        if num_inference_steps is None:
            num_inference_steps = defaults.get("num_inference_steps", 20)
        if guidance_scale is None:
            guidance_scale = 1.0 if class_labels is None else defaults.get("guidance_scale", 1.0)
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
            output = scheduler_prediction(self.scheduler, family, self.objective, i, t, latents, network)
            latents = self.scheduler.step(output, t, latents, **step_kwargs)[0]
            if callback_on_step_end is not None:
                values = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, values) or {}).get("latents", latents)

        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_options(self, output_type: str, tensor_inputs):
        if output_type != "latent":
            denormalize_latents(self.vae, torch.empty(0, self.unet.config.out_channels, 1, 1))
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
            f"pipe.{component}.to(torch.float32) or bfloat16. In float32, the scheduler's config or the "
            "weights are broken"
        )
