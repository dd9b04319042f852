"""The record of a run folder for publication: nothing in it concerns the machine alone."""

import re
from pathlib import Path

import yaml
from safetensors import safe_open
from torch import Tensor

from ldm_pipeline.model_card import TrainingRecord, is_hub_id
from training.config import RunError, redact
from training.runtime.atomic import read_json

STAGES = ("autoencoder", "latents", "denoiser")
PICTURES = {
    "samples.png": "samples/samples.png",
    "reconstructions.png": "samples/reconstructions.png",
    "neighbours.png": "samples/neighbours.png",
    "sweep.png": "sweep/plot.png",
}
SHOWING_DATA = {"reconstructions.png", "neighbours.png"}

# What is published of config.yaml, of metrics.json and of the protocol in it. Everything else stays here.
CONFIG = ("seed", "mixed_precision", "data", "autoencoder", "latents", "denoiser", "evaluation")
METRICS = (
    *("prompts", "reconstruction", "val_loss", "val_loss_by_timestep", "samples", "real", "memorisation"),
    *("seconds", "parameters", "seed", "hardware", "precision", "date", "versions"),
)
PROTOCOL = (
    *("n", "dataset", "train_images", "split", "resolution", "resize", "features", "features_sha256"),
    *("task", "seed", "dtype", "versions", "scheduler", "num_inference_steps", "guidance_scale", "guidance"),
    *("guidance_interval", "guidance_rescale", "network_evaluations", "samples_sha256", "agreement by"),
)


def find_run(source: Path) -> Path | None:
    """`source` if it is a run folder with a pipeline, None if a pipeline folder; RunError if neither."""
    if (source / "pipeline" / "model_index.json").is_file():
        return source
    if (source / "model_index.json").is_file():
        return None
    found = (
        "has neither pipeline/model_index.json nor model_index.json" if source.is_dir() else "is no folder"
    )
    raise RunError(
        f"{source} {found}; wanted a run folder whose denoiser is trained, or the folder of a pipeline"
    )


def read_record(run: Path, dataset: str | None = None, show_data: bool = True) -> TrainingRecord:
    """Read what a run folder says of its training and evaluation.

    Args:
        dataset: a Hub id or name that replaces the configuration's own, often a folder, everywhere.
        show_data: False leaves out the pictures that show images of the dataset, as all of a task do.

    Raises:
        RunError: a JSON file of the run is damaged.
    """
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    config = {name: shareable(config[name]) for name in CONFIG if name in config}
    if dataset:
        config.setdefault("data", {})["dataset"] = dataset
    stages = {stage: _read(run / stage / "done.json") for stage in STAGES}
    hidden = set() if show_data else SHOWING_DATA
    if hidden and config.get("denoiser", {}).get("task"):
        hidden = hidden | {"samples.png"}
    pictures = {name: run / path for name, path in PICTURES.items() if name not in hidden}
    return TrainingRecord(
        config=config,
        metrics=_metrics(run / "metrics.json", config.get("data", {}).get("dataset")),
        stages={stage: done for stage, done in stages.items() if done},
        counts=_read(run / "data.json").get("scan", {}).get("counts", {}),
        sweep=_read(run / "sweep" / "sweep.json"),
        pictures={name: path for name, path in pictures.items() if path.is_file()},
        raw_weights=_raw_weights(run, stages["denoiser"].get("steps")),
    )


def shareable(value):
    """A tree of options without paths of this machine (of which the last part stays) and without tokens."""
    if isinstance(value, dict):
        return {name: shareable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value and Path(value).exists():
        value = Path(value).absolute().name
    elif not is_hub_id(value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return redact(value)


def _metrics(path: Path, dataset: str | None) -> dict:
    found = _read(path)
    metrics = {name: found[name] for name in METRICS if name in found}
    if protocol := metrics.get("samples", {}).get("protocol"):
        own = protocol | {"dataset": dataset, "features": shareable(protocol.get("features"))}
        own = {name: own[name] for name in PROTOCOL if own.get(name) is not None}
        metrics["samples"] = metrics["samples"] | {"protocol": own}
    return metrics


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _raw_weights(run: Path, steps: int | None) -> dict[str, Tensor] | None:
    """The denoiser's weights of the last step, without EMA; None if its checkpoint is gone."""
    path = run / "denoiser" / f"checkpoint-{steps}" / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if any(key.startswith("text_encoder.") for key in file.keys()):  # noqa: SIM118
            return None  # the raw denoiser and an averaged text encoder do not belong together
        keys = [key for key in file.keys() if key.startswith("unet.")]  # noqa: SIM118
        return {key.removeprefix("unet."): file.get_tensor(key) for key in keys}
