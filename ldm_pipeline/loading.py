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
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ldm_pipeline import pipeline
from ldm_pipeline.pipeline import check_weights, denormalize_latents, forget_local_path

WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"  # transformers' name
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
            if hasattr(kind, "save_pretrained") and issubclass(kind, torch.nn.Module):
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
        """The classes of the components that are read from `folder`: of Diffusers and transformers alone."""
        index, hints, classes = cls.load_config(folder), get_type_hints(cls.__init__), {}
        wanted = {name: (diffusers, hints[name]) for name in ("vae", "unet", "scheduler")}
        if index.get("guide_unet") not in (None, [None, None]):
            wanted["guide_unet"] = diffusers, hints["guide_unet"]
        if any(index.get(name) not in (None, [None, None]) for name in ("text_encoder", "tokenizer")):
            import transformers  # here, because only models with text need it

            wanted["text_encoder"] = transformers, transformers.PreTrainedModel
            wanted["tokenizer"] = transformers, transformers.PreTrainedTokenizerBase
        for name in wanted.keys() - options.keys():
            home, base = wanted[name]
            library, kind = index.get(name) or (None, None)
            if options.get("trust_remote_code") and library != home.__name__:
                continue  # code of the folder, which answers for itself
            found = getattr(home, str(kind), None) if library == home.__name__ else None
            if not (isinstance(found, type) and issubclass(found, base)):
                raise ValueError(
                    f"{folder / cls.config_name}: {name} is {index.get(name)}; wanted {base} of "
                    f"{home.__name__} (code in the folder is run with trust_remote_code=True alone)"
                )
            classes[name] = found
        return classes


def _folder(source: str, download) -> Path:
    """The local folder `source`, or what `download()` fetches of this id of the Hub; errors name `source`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise FileNotFoundError(f"{source} is no local folder, and no id of the Hub (org/name)") from None
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
    names = f"{WEIGHTS}.{options.get('variant')}*", f"{TEXT_WEIGHTS}.{options.get('variant')}*"
    if (variant := options.get("variant")) and any(path for name in names for path in folder.glob(name)):
        chosen["variant"] = variant  # a network without it is read as it is
    return chosen | {"torch_dtype": dtype}


def load_strictly(kind: type, folder: Path, **options):
    """A network of stock class `kind`, of Diffusers or transformers, from a local folder.

    It has all weights of its class and no others.

    Raises:
        ValueError: for weights that are missing, unexpected or misshapen.
        OSError: for files that are missing or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    for path in folder.glob("*.index*.json"):  # the libraries would read other suffixes as pickles
        shards = read_json(path).get("weight_map", {}).values()
        if bad := sorted({str(n) for n in shards if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(n))}):
            raise ValueError(f"{path}: {bad[:3]} are no names of safetensors files in its folder")
    model, info = _load(kind, folder, **options)
    if faults := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in info.items()]:
        raise ValueError(f"{folder}: the weights are not those of its {kind.__name__}: {'; '.join(faults)}")
    return model


def _load(kind: type, folder: Path, **options) -> tuple[torch.nn.Module, dict[str, list[str]]]:
    """A network of a folder, quietly, and by kind of fault the weights that are not those of its class."""
    library = diffusers_logging
    if not issubclass(kind, ModelMixin):
        from transformers.utils import logging as library  # here, because only models with text need it

        options["dtype"] = options.pop("torch_dtype", None) or torch.float32
        options.pop("disable_mmap", None)
    level, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)  # what it would warn of is an error here
    library.disable_progress_bar()
    try:
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # not ignored, but told
        model, found = kind.from_pretrained(folder, use_safetensors=True, **told, **options)
    finally:
        library.set_verbosity(level)
        if bar:  # whoever has turned it off wants none
            library.enable_progress_bar()
    return model, {what: sorted(map(str, keys)) for what, keys in found.items() if keys}


def load_text_encoder(source: str | Path, max_length: int | None = None) -> tuple:
    """Tokenizer and text encoder of transformers, from a local folder or a Hub id, in float32.

    Of a model of texts and images (CLIP, SigLIP) it is the part for texts, of one that also writes texts (T5)
    the encoder, of a decoder (Qwen, Gemma) the whole network without its head.

    Args:
        max_length: tokens of a text, at most; by default as many as both can take, 77 if none has a limit.

    Raises:
        ValueError: if weights are missing or not finite, or it can take fewer tokens than `max_length`.
        OSError: if there is no such model, no tokenizer, or no safetensors.
    """
    import transformers  # here, because only models with text need it

    names = ["*.json", "*.txt", "*.model", "*.safetensors"]
    folder = _folder(str(source), lambda: snapshot_download(str(source), allow_patterns=names))
    read_json(folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        kind = _text_class(config)
        model, info = _load(kind, folder)
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{source}: no text encoder of transformers: {error}") from error
    missing = info.get("missing_keys", []) + info.get("mismatched_keys", [])
    if absent := [key for key in missing if "pooler" not in key]:
        raise ValueError(f"{source}: {len(absent)} weights of {kind.__name__} are missing ({absent[:3]})")
    for key in missing:  # one vector for a whole text, which nothing here reads
        torch.nn.init.zeros_(model.get_parameter(key))
    model.eval().requires_grad_(False)
    check_weights(model, str(source))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limits = tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9
    if max_length and max_length > min(limits):
        raise ValueError(f"{source} takes texts of {min(limits)} tokens, fewer than {max_length}")
    tokenizer.model_max_length = max_length or (min(limits) if min(limits) < 10**4 else 77)
    return tokenizer, model


def _text_class(config) -> type:
    """The class of transformers that encodes texts by the weights of such a configuration."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    name = type(config).__name__.removesuffix("Config").removesuffix("Text")
    if hasattr(transformers, f"{name}TextModel"):  # of CLIP, SigLIP, ...: some are in no mapping
        return getattr(transformers, f"{name}TextModel")
    found = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    return found or transformers.MODEL_MAPPING[type(config)]


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
