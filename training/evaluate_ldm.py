"""Stage 4: figures and pictures of a finished model, and how they were measured."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("evaluation")

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm_pipeline.pipeline import LDMPipeline, latent_shape, num_classes
from training.config import RunError
from training.data.latents import LatentDataset, encode
from training.evaluation.features import FeatureNetwork, load_network, real_features, sha256_of, short
from training.evaluation.memorization import memorisation
from training.evaluation.metrics import FEWEST, Reference, check_arithmetic, frechet_distance, label
from training.evaluation.plots import to_bytes
from training.evaluation.samples import (
    Setting,
    draw_features,
    export_samples,
    sample_labels,
    samples_folder,
    settings_of,
    weights_of,
)
from training.evaluation.stream import read_batches, stream
from training.evaluation.sweep import sweep
from training.evaluation.validation import (
    draw_grid,
    inference,
    lpips_alex,
    measure_reconstruction,
    validation_loss,
)
from training.runtime.accelerator import cpu_capabilities
from training.runtime.atomic import read_json, write_json
from training.runtime.run import Run


def evaluation_stands(run: Run) -> str | None:
    """Skip rule: metrics.json is of the present weights, images and settings."""
    path = run.folder / "metrics.json"
    if path.exists() and read_json(path).get("key") == evaluation_key(run, open_pipeline(run)):
        return f"{path} stands"
    return None


def evaluation_key(run: Run, pipeline: LDMPipeline) -> dict:
    """The cache key of an evaluation."""
    return {
        "weights": weights_of(pipeline),
        "data": run.data.fingerprint,
        "evaluation": asdict(run.config.evaluation),
        "settings": [setting.describe() for setting in settings_of(run, pipeline)],
    }


def evaluate(run: Run) -> None:
    """Leave `metrics.json` and the final grids in the run folder, and `sweep/` of several settings."""
    config, path = run.config.evaluation, run.folder / "metrics.json"
    pipeline = open_pipeline(run)
    key, settings = evaluation_key(run, pipeline), settings_of(run, pipeline)
    weights = key["weights"]
    network = load_network(config.features) if config.num_samples else None
    figures = {"reconstruction": reconstruction_figures(run, pipeline.vae, network)}
    if config.pipeline is None:
        held_out = LatentDataset(
            run.folder / "latents", "held_out", pipeline.vae, run.device, run.config.latents.resident
        )
        figures |= validation_loss(run, pipeline.unet, pipeline.objective, held_out, config.num_images)
    setting = settings[0]
    if network is None:
        run.print("evaluation: --evaluation.num_samples 0, so no figures of samples")
    else:
        setting, found = sample_figures(run, pipeline, settings, network, weights)
        figures |= found
    pipeline.scheduler = setting.scheduler
    draw_grid(run, pipeline, "samples.png", setting.num_inference_steps, setting.guidance_scale, rows=8)
    figures |= circumstances(run, pipeline) | {"key": key}
    if run.accelerator.is_main_process:
        write_json(path, figures)
    run.print(report(figures))
    run.accelerator.wait_for_everyone()


def open_pipeline(run: Run) -> LDMPipeline:
    """The pipeline to judge, on the device. RunError if it does not fit the data."""
    config, own = run.config.evaluation, run.folder / "pipeline"
    if config.pipeline and own.exists():
        raise RunError(
            f"--evaluation.pipeline {config.pipeline}: {run.folder} has a pipeline of its own, whose figures "
            "would be lost: choose another --output_dir"
        )
    source = config.pipeline or run.require(own, "train_denoiser.py")
    with run.accelerator.main_process_first():  # one downloads
        try:
            pipeline = LDMPipeline.from_pretrained(source).to(run.device)
        except (OSError, ValueError) as error:
            raise RunError(f"--evaluation.pipeline {source} cannot be loaded: {error}") from error
    classes, names = num_classes(pipeline.denoiser), run.data.id2label
    if classes and names and classes != len(names):
        raise RunError(
            f"{source} has {classes} classes, the data has {len(names)}: choose other data "
            "(--data.dataset, --data.label_column)"
        )
    image = torch.zeros(1, *latent_shape(pipeline.denoiser))
    shape = pipeline.vae.decode(image.to(run.device, pipeline.vae.dtype)).sample.shape[1:]
    wanted = (run.config.data.channels, run.config.data.resolution, run.config.data.resolution)
    if tuple(shape) != wanted:
        raise RunError(
            f"{source} draws images of {tuple(shape)} (channels, height, width), the data are {wanted}: set "
            "--data.channels and --data.resolution"
        )
    return pipeline


def reconstruction_figures(run: Run, autoencoder: nn.Module, network: FeatureNetwork | None) -> dict:
    """PSNR, SSIM and LPIPS of held-out reconstructions, and their Frechet distance to the originals."""
    limit = run.config.evaluation.num_images
    count = min(limit, len(run.data.held_out))
    found = {"n": count, "split": "held-out"}
    perceptual = lpips_alex().to(run.device) if run.config.evaluation.lpips else None
    measured = measure_reconstruction(run, autoencoder, limit, "reconstructions.png", perceptual)
    found |= {name.upper(): value for name, value in measured.items()}
    if network is None or count < FEWEST:
        return found
    key = {"weights": sha256_of(autoencoder), "data": run.data.fingerprint, "network": network.sha256}
    folder, size = (
        run.folder / "evaluation" / f"reconstructions-{short(key)}",
        run.config.evaluation.batch_size,
    )

    def compute(parts: list[range]) -> Iterator[dict]:
        loader = DataLoader(run.data.held_out, batch_sampler=[[(i, 0) for i in part] for part in parts])
        with inference(autoencoder), run.accelerator.autocast():
            for batch in loader:
                latents = encode(autoencoder, batch["images"].to(run.device))[0]
                yield network(to_bytes(autoencoder.decode(latents).sample))

    network.to(run.device)
    stream(run, folder, count, size, compute, "features of reconstructions")
    originals = real_features(run, network, "held_out", count)["features"]
    name = "rFID" if network.name == "inception" else "rFD"
    found[label(name, count)] = frechet_distance(originals, read_batches(folder, count, size)["features"])
    return found


def sample_figures(
    run: Run, pipeline: LDMPipeline, settings: list[Setting], network: FeatureNetwork, weights: str
) -> tuple[Setting, dict]:
    """The best of the settings, if there are several, and all that is measured of its samples."""
    count, labels = run.config.evaluation.num_samples, run.data.train.labels
    real = real_features(run, network, "train")
    reference = Reference(network.name, real, labels, run.device)
    checks = run.once(check_arithmetic, real["features"])
    protocol = protocol_of(run, network, count)
    setting = settings[0]
    if len(settings) > 1:
        setting = sweep(run, pipeline, settings, network, reference, weights, protocol)
    folder = samples_folder(run, weights, setting, network)
    samples, drawn = (
        draw_features(run, pipeline, setting, network, count, folder),
        sample_labels(run, pipeline, count),
    )
    if run.config.evaluation.save_samples and run.accelerator.is_main_process:
        run.print(f"samples: {export_samples(run, pipeline, setting, folder, count)}")
    protocol |= setting.describe() | {"samples_sha256": digest(samples["digests"])}
    figures = {"figures": run.once(reference.figures, samples, drawn), "protocol": protocol}
    if drawn is not None and labels is not None:
        figures["per_class"] = run.once(reference.by_class, samples["features"], drawn, run.data.id2label)
        protocol["agreement by"] = (
            "the network's classes" if reference.reads_classes else "linear discriminant"
        )
    found = {"samples": figures, "self_checks": checks}
    if min(count, len(run.data.held_out)) >= FEWEST:
        held_out = real_features(run, network, "held_out")
        number = min(count, len(run.data.held_out))
        first = {name: values[:number] for name, values in held_out.items()}
        read = None if run.data.held_out.labels is None else run.data.held_out.labels[:number]
        found["real"] = {"n": number, "figures": run.once(reference.figures, first, read)}
        found["memorisation"] = run.once(memorisation, run, pipeline, setting, real, held_out, samples)
    return setting, found


def digest(digests: torch.Tensor) -> str:
    """One hash of the hashes of all samples: equal, if and only if all pictures are."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()


def protocol_of(run: Run, network: FeatureNetwork, count: int) -> dict:
    """How figures of samples are measured: all that they depend on beside the model and the setting."""
    config, data = run.config, run.data
    source = Path(config.data.dataset).name if Path(config.data.dataset).exists() else config.data.dataset
    return {
        "n": count,
        "reference": f"{len(data.train):,} images of {source}, split {data.train.name}",
        "resolution": config.data.resolution,
        "resize": network.resize,
        "features": network.name,
        "features_sha256": network.sha256,
        "seed": config.seed,
        "dtype": "float32" if run.accelerator.mixed_precision == "no" else run.accelerator.mixed_precision,
        "versions": versions(),
    }


def circumstances(run: Run, pipeline: LDMPipeline) -> dict:
    """What else a reader of figures wants to know."""
    stages = ("autoencoder", "latents", "denoiser")
    return {
        "seconds": {stage: done["seconds"] for stage in stages if (done := run.done(stage))},
        "parameters": {name: count_parameters(getattr(pipeline, name)) for name in ("vae", "unet")},
        "seed": run.config.seed,
        "hardware": hardware(run),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that figures may depend on."""
    names = ("torch", "diffusers", "accelerate", "torchmetrics", "ldm-pipeline")
    return {name: version(name) for name in names}


def report(figures: dict) -> str:
    """The figures and their protocol in words."""
    lines = {"reconstruction": figures["reconstruction"]}
    if "samples" in figures:
        lines["samples"] = figures["samples"]["figures"]
    if "real" in figures:
        lines["held-out images in their place"] = figures["real"]["figures"]
        lines["copies of training images"] = figures["memorisation"]
    lines["protocol"] = figures.get("samples", {}).get("protocol", {}) | {"hardware": figures["hardware"]}
    return "\n".join(f"{name}: {listed(values)}" for name, values in lines.items())


def listed(values: dict) -> str:
    """Names and values on one line."""

    def shown(value) -> str:
        if isinstance(value, dict):
            return f"({listed(value)})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def hardware(run: Run) -> str:
    """The device in words, for every figure measured on it."""
    processes = run.accelerator.num_processes
    if run.device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(run.device)}, {run.accelerator.mixed_precision}"
    name = cpu_capabilities().get("cpu_name") or platform.processor()
    return f"{name}, {processes} x {torch.get_num_threads()} threads, {run.accelerator.mixed_precision}"


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def summary(run: Run) -> str:
    """Where the results are, and how to use them."""
    names = LDMPipeline.load_config(run.folder / "pipeline")["id2label"]
    label = f"class_labels={json.dumps(names[str(min(7, len(names) - 1))])}" if names else ""
    return "\n".join([
        f"grid:     {run.folder / 'samples' / 'samples.png'}",
        f"figures:  {run.folder / 'metrics.json'}",
        f"pipeline: {run.folder / 'pipeline'}",
        "",
        "from ldm_pipeline import LDMPipeline",
        f'pipe = LDMPipeline.from_pretrained("{(run.folder / "pipeline").as_posix()}")',
        f'pipe({label}).images[0].save("picture.png")',
    ])  # fmt: skip


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("evaluation", evaluate, evaluation_stands))
