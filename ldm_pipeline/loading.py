"""Strict loading of pipelines and autoencoders: all weights or an error, safetensors only, no code."""

import json
import logging
import re
from pathlib import Path
from typing import get_type_hints

import diffusers
import torch
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download

from ldm_pipeline import pipeline
from ldm_pipeline.pipeline import check_weights, denormalize_latents, forget_local_path

WEIGHTS = "diffusion_pytorch_model"
AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC)}
# Options of Diffusers' `from_pretrained` of a pipeline that its networks take as they are.
NETWORK_OPTIONS = ("low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "disable_mmap")


class LDMPipeline(pipeline.LDMPipeline):
    __doc__ = pipeline.LDMPipeline.__doc__

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Load a hosted `["pipeline", "LDMPipeline"]` as this very class: no code of the folder is run."""
        config = read_json(json_file)
        name = config.get("_class_name")
        config["_class_name"] = name[-1] if isinstance(name, list) and name else name
        if config["_class_name"] not in [c.__name__ for c in cls.__mro__]:
            raise ValueError(f"{json_file}: _class_name is {name!r}; wanted {cls.__name__!r}")
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """Like `DiffusionPipeline.from_pretrained`, but raises where that warns, and reads safetensors only.

        Raises:
            ValueError: for weights that are missing, unexpected, misshapen or not finite, for components that
                are not stock classes of Diffusers, and for pickles.
            OSError: where there is no such model.
        """
        source = str(pretrained_model_name_or_path)
        if options.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                f"{source}: only safetensors are read, never a pickle; leave use_safetensors out"
            )
        folder = _folder(source, lambda: cls.download(source, **options))
        parts = {}
        for name, kind in cls._stock_classes(folder, options).items():
            if issubclass(kind, ModelMixin):
                chosen = _network_options(name, folder / name, options)
                parts[name] = load_strictly(kind, folder / name, **chosen)
        if options.get("quantization_config") or options.get("device_map") == "balanced":
            parts = {}  # sound; Diffusers reads them again, to quantize them or to choose their devices
        try:
            pipe = super().from_pretrained(str(folder), **parts, **options)
            denormalize_latents(pipe.vae, torch.empty(0, pipe.vae.config.latent_channels, 1, 1))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        pipe.register_to_config(_name_or_path=source)
        return pipe

    @classmethod
    def _stock_classes(cls, folder: Path, options: dict) -> dict[str, type]:
        """The classes of the components that are read from `folder`, Diffusers' own ones alone."""
        index, hints, classes = cls.load_config(folder), get_type_hints(cls.__init__), {}
        for name in [name for name in ("vae", "unet", "scheduler") if name not in options]:
            library, kind = index.get(name) or (None, None)
            if options.get("trust_remote_code") and library != "diffusers":
                continue  # code of the folder, which answers for itself
            found = getattr(diffusers, str(kind), None) if library == "diffusers" else None
            if not (isinstance(found, type) and issubclass(found, hints[name])):
                raise ValueError(
                    f"{folder / cls.config_name}: {name} is {index.get(name)}; wanted {hints[name]} of "
                    "diffusers (code in the folder is run with trust_remote_code=True alone)"
                )
            classes[name] = found
        return classes


def _folder(source: str, download) -> Path:
    """The local folder `source`, or what `download()` fetches of this id of the Hub; errors name `source`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(download())
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} is no local folder and no model that the Hub gives: {error}") from error


def _network_options(name: str, folder: Path, options: dict) -> dict:
    """The options of a pipeline's `from_pretrained` as one of its networks takes them."""
    chosen = {key: options[key] for key in NETWORK_OPTIONS if key in options}
    dtype = options.get("torch_dtype") or options.get("dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default", torch.float32))
    if options.get("device_map") != "balanced":
        chosen["device_map"] = options.get("device_map")
    if (variant := options.get("variant")) and any(folder.glob(f"{WEIGHTS}.{variant}*")):
        chosen["variant"] = variant  # a network without it is read as it is
    return chosen | {"torch_dtype": dtype}


def load_strictly(kind: type, folder: Path, **options):
    """A network of stock class `kind` from a local folder, with all weights of its class and no others.

    Raises:
        ValueError: for weights that are missing, unexpected or misshapen.
        OSError: for files that are missing or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    for path in folder.glob(f"{WEIGHTS}*.index*.json"):  # Diffusers would read other suffixes as pickles
        shards = read_json(path).get("weight_map", {}).values()
        if bad := sorted({str(n) for n in shards if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(n))}):
            raise ValueError(f"{path}: {bad[:3]} are no names of safetensors files in its folder")
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)  # what it would warn of is an error here
    try:
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # not ignored, but told
        model, info = kind.from_pretrained(folder, use_safetensors=True, **told, **options)
    finally:
        diffusers_logging.set_verbosity(level)
    info = {what: list(map(str, keys)) for what, keys in info.items() if keys}
    if faults := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in info.items()]:
        raise ValueError(f"{folder}: the weights are not those of its {kind.__name__}: {'; '.join(faults)}")
    return model


def load_autoencoder(source: str | Path) -> AutoencoderKL | AutoencoderDC:
    """An existing autoencoder from a local folder or a Hub id, whichever of the two classes it is.

    Raises:
        ValueError: if it is of another class, or if its weights are not all of that class and finite.
        OSError: if there is none at `source`, or no safetensors.
    """
    names = ["config.json", f"{WEIGHTS}.safetensors*", f"{WEIGHTS}-*.safetensors"]
    folder = _folder(str(source), lambda: snapshot_download(str(source), allow_patterns=names))
    kind = read_json(folder / "config.json").get("_class_name")
    if str(kind) not in AUTOENCODERS:
        raise ValueError(f"{source} holds a {kind}: want {' or '.join(AUTOENCODERS)}")
    autoencoder = load_strictly(AUTOENCODERS[kind], folder)
    check_weights(autoencoder, str(source))
    autoencoder.register_to_config(_name_or_path=str(source))
    forget_local_path(autoencoder)
    return autoencoder


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; ValueError or OSError, which name the file, where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}; wanted an object")
    return config
