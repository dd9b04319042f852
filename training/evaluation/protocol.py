"""Protocol of the metrics, and their lines that are printed at the end of a run."""

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.model_card import metric
from training.evaluation.features import FeatureNetwork
from training.evaluation.settings import guidance_words
from training.runtime.accelerator import cpu_capabilities
from training.runtime.run import Run


def protocol_of(run: Run, network: FeatureNetwork) -> dict:
    """Everything that metrics of samples depend on beside the model and its settings."""
    config, split = run.config, run.data.train
    dataset = config.data.dataset
    dataset = Path(dataset).absolute().name if Path(dataset).exists() else dataset
    return {
        "n": config.evaluation.num_samples,
        "reference": f"{len(split):,} images of {dataset}, split {split.name}",
        "dataset": dataset,
        "train_images": len(split),
        "split": split.name,
        "resolution": config.data.resolution,
        "resize": network.resize,
        **({"task": f"{config.denoiser.task}, held-out images"} if config.denoiser.task else {}),
        "features": network.name,
        "features_sha256": network.sha256,
        "seed": config.seed,
        "dtype": precision(run),
        "versions": versions(),
    }


def circumstances(run: Run, pipeline: LDMPipeline) -> dict:
    """Time, size, hardware, date and versions."""
    stages = ("autoencoder", "latents", "denoiser")
    parts = {name: pipeline.components[name] for name in ("vae", "unet", "guide_unet")}
    return {
        "seconds": {stage: done["seconds"] for stage in stages if (done := run.done(stage))},
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part
        },
        "seed": run.config.seed,
        "hardware": hardware(run),
        "precision": precision(run),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The packages that metrics may depend on."""
    names = ("torch", "diffusers", "accelerate", "torchmetrics", "ldm-pipeline")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that is on the path, without an installation
        return "not installed"


def precision(run: Run) -> str:
    """The arithmetic of the networks: float32 or bf16."""
    return "float32" if run.accelerator.mixed_precision == "no" else run.accelerator.mixed_precision


def hardware(run: Run) -> str:
    """The devices in words."""
    processes = run.accelerator.num_processes
    if run.device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(run.device)}"
    name = cpu_capabilities().get("cpu_name") or platform.processor()
    return f"{name}, {processes} x {torch.get_num_threads()} threads"


def in_words(results: dict) -> str:
    """The metrics, one per line and beside those of real images, and how they were measured."""
    found = results["reconstruction"]
    lines = [f"reconstruction of {found['n']:,} held-out images"]
    lines += [f"  {name:<22}{value}" for name, value in _shown(found).items()]
    if "val_loss" in results:
        lines.append(f"validation loss         {results['val_loss']:.4g}")
    if "samples" not in results:
        return "\n".join(lines)
    protocol, real = results["samples"]["protocol"], results.get("real", {"n": 0, "figures": {}})
    beside = {metric(name): value for name, value in _shown(real["figures"]).items()}
    heads = f"{protocol['n']:,} samples", f"{real['n']:,} held-out images" if beside else ""
    lines.append(f"{'metrics of':<24}{heads[0]:<20}{heads[1]}".rstrip())
    for name, value in _shown(results["samples"]["figures"]).items():
        lines.append(f"  {name:<22}{value:<20}{beside.get(metric(name), '')}".rstrip())
    if copies := results.get("memorisation"):
        lines.append(
            f"nearer to a training image than all but {copies['quantile']:.0%} of held-out images: "
            f"{copies['share']:.1%} of samples"
        )
    lines.append(
        f"protocol: {protocol['scheduler']}, {protocol['num_inference_steps']} steps, "
        f"{guidance_words(protocol)}, seed {protocol['seed']}, {protocol['dtype']}; compared with "
        f"{protocol['reference']}, by features of {protocol['features']} (resize: {protocol['resize']})"
    )
    return "\n".join([*lines, f"hardware: {results['hardware']}"])


def _shown(metrics: dict) -> dict[str, str]:
    """Metrics as text, each with its standard deviation if it has one."""
    return {
        name: f"{value:.4g}"
        + (f" ± {metrics[f'{name} deviation']:.2g}" if f"{name} deviation" in metrics else "")
        for name, value in metrics.items()
        if isinstance(value, float) and not name.endswith(" deviation")
    }
