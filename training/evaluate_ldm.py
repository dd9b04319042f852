"""Stage 4: metrics and sample grids of a finished model, and how they were measured."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("evaluation")

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.model_card import image_snippet
from ldm_pipeline.pipeline import is_conditional, latent_shape, num_classes, text_width
from training.config import RunError
from training.data.captions import cached_captions
from training.data.conditions import Conditions
from training.data.latents import LatentDataset, encode
from training.data.tasks import image_conditions, task_of
from training.evaluation.checks import measured_before
from training.evaluation.features import (
    FeatureNetwork,
    load_clip,
    load_network,
    real_features,
    weights_sha256,
    why_unavailable,
)
from training.evaluation.memorization import memorization
from training.evaluation.metrics import MIN_SAMPLES, FrechetDistance, Reference, metric_name
from training.evaluation.plots import to_uint8
from training.evaluation.protocol import circumstances, in_words, protocol_of
from training.evaluation.samples import SampleMetrics, Sampler, new_sampler, pipeline_sha256
from training.evaluation.settings import SamplingSettings
from training.evaluation.store import BatchStore, cache_key
from training.evaluation.sweep import configured_settings, save_defaults, sweep
from training.evaluation.validation import inference, lpips_alex, reconstruction_metrics, validation_loss
from training.runtime.atomic import read_json, write_json
from training.runtime.run import Run


def evaluation_stands(run: Run) -> str | None:
    """Skip rule: metrics.json is of the present weights, images and settings."""
    path = run.folder / "metrics.json"
    if not measured_before(run) or read_json(path)["key"] != evaluation_key(run, open_pipeline(run)):
        return None
    return f"{path} stands"


def evaluation_key(run: Run, pipeline: LDMPipeline) -> dict:
    """The cache key of an evaluation."""
    return {
        "weights": pipeline_sha256(pipeline),
        "data": run.data.fingerprint,
        "evaluation": asdict(run.config.evaluation),
        "settings": [settings.describe() for settings in settings_of(run, pipeline)],
    }


def settings_of(run: Run, pipeline: LDMPipeline) -> list[SamplingSettings]:
    """The settings to measure, the pipeline's own where the options say nothing else."""
    own, has_guide = SamplingSettings.of_pipeline(pipeline), pipeline.components["guide_unet"] is not None
    return configured_settings(run.config.evaluation, own, is_conditional(pipeline.denoiser), has_guide)


def evaluate(run: Run) -> None:
    """Leave `metrics.json` and the final grids in the run folder, and `sweep/` of several settings.

    Without its feature network it leaves everything else, and prints the command that measures later.
    """
    config, pipeline, folder = run.config.evaluation, open_pipeline(run), run.folder / "latents"
    if config.pipeline is None:
        run.require(folder / "manifest.json", "encode_latents.py")
    key, settings = evaluation_key(run, pipeline), settings_of(run, pipeline)
    sampler = new_sampler(run, pipeline)
    store = BatchStore(run.accelerator, run.folder / "evaluation", config.batch_size, run.interruption)
    missing = why_unavailable(run.accelerator, config.features) if config.num_samples else None
    network = load_network(config.features) if config.num_samples and not missing else None

    results = {"reconstruction": measure_reconstruction(run, pipeline.vae, network, store)}
    if config.pipeline is None:
        resident = run.config.latents.resident
        held_out = LatentDataset(folder, "held_out", pipeline.vae, run.device, resident)
        text = pipeline.components["text_encoder"]
        captions = text and cached_captions(run.data, "held_out", folder, run.device, resident)
        images = image_conditions(pipeline.task, run.data, "held_out", pipeline.vae, folder, resident)
        conditions = Conditions(held_out, pipeline.denoiser, captions, text, images)
        results |= validation_loss(
            run.accelerator, pipeline.objective, conditions,
            limit=config.num_images, batch_size=config.batch_size, seed=run.config.seed,
        )  # fmt: skip
    best = settings[0]
    if network is not None:
        best, measured = measure_samples(run, sampler, settings, network, store)
        results |= measured
    sampler.save_grid(best, run.folder / "samples" / "samples.png", rows=8)
    results |= {"prompts": sampler.prompts(range(8))} if sampler.captions else {}
    key |= {"unavailable": config.features} if missing else {}
    results |= circumstances(run, pipeline) | {"key": key}
    if run.accelerator.is_main_process:
        write_json(run.folder / "metrics.json", results)
    run.print(in_words(results))
    if missing:
        command = f"python training/evaluate_ldm.py --config {run.folder / 'config.yaml'}"
        run.print(
            f"\nno metrics of samples, for want of {config.features}; this measures them later:\n  {command}"
        )
    run.accelerator.wait_for_everyone()


def open_pipeline(run: Run) -> LDMPipeline:
    """The pipeline to evaluate, on the device. RunError if it does not fit the data."""
    given, own = run.config.evaluation.pipeline, run.folder / "pipeline"
    if given and own.exists():
        raise RunError(
            f"--evaluation.pipeline {given}: {run.folder} has a pipeline of its own, whose metrics would be "
            "lost: choose another --output_dir"
        )
    source = given or run.require(own, "train_denoiser.py")
    with run.accelerator.main_process_first():  # one downloads
        try:
            pipeline = LDMPipeline.from_pretrained(source).to(run.device)
        except (OSError, ValueError) as error:
            advice = "Delete it, and training/train_ldm.py writes it again from the last checkpoint"
            what, advice = (f"--evaluation.pipeline {given}", "") if given else (own, f"\n{advice}")
            raise RunError(f"{what} cannot be loaded: {error}{advice}") from error
    own = task_of(run.config.denoiser, run.data)
    if pipeline.config.task != (None if own is None else own.config):
        raise RunError(
            f"{source} is of the task {pipeline.config.task}, the configuration of "
            f"{run.config.denoiser.task}: set --denoiser.task"
        )
    if text_width(pipeline.denoiser) and run.data.held_out.captions is None:
        raise RunError(f"{source} takes text, but no captions are known: name them by --data.caption_column")
    classes, names = num_classes(pipeline.denoiser), run.data.id2label
    if classes and names and classes != len(names):
        raise RunError(
            f"{source} has {classes} classes, the data has {len(names)}: choose other data "
            "(--data.dataset, --data.label_column)"
        )
    latents = torch.zeros(1, *latent_shape(pipeline.denoiser), device=run.device, dtype=pipeline.vae.dtype)
    with inference(pipeline.vae):
        shape = tuple(pipeline.vae.decode(latents).sample.shape[1:])
    wanted = (run.config.data.channels, run.config.data.resolution, run.config.data.resolution)
    if shape != wanted:
        raise RunError(
            f"{source} generates images of {shape} (channels, height, width), the data are {wanted}: set "
            "--data.channels and --data.resolution"
        )
    return pipeline


def measure_reconstruction(
    run: Run, autoencoder: nn.Module, network: FeatureNetwork | None, store: BatchStore
) -> dict:
    """PSNR, SSIM and LPIPS of held-out reconstructions, and their Frechet distance to the originals."""
    config, data, images = run.config, run.data, run.data.held_out
    count = min(config.evaluation.num_images, len(images))
    size = config.data.channels, config.data.resolution
    perceptual = lpips_alex(*size).to(run.device) if config.evaluation.lpips else None
    grid = run.folder / "samples" / "reconstructions.png"
    metrics = reconstruction_metrics(
        run.accelerator, autoencoder, images, count, store.batch_size, grid, perceptual
    )
    results = {"n": count, "split": "held-out"} | {name.upper(): value for name, value in metrics.items()}
    if network is None or count < MIN_SAMPLES:
        return results

    def compute(batches: list[range]) -> Iterator[dict]:
        loader = DataLoader(images, batch_sampler=[[(index, 0) for index in batch] for batch in batches])
        for batch in loader:
            with inference(autoencoder), run.accelerator.autocast():
                latents = encode(autoencoder, batch["images"].to(run.device))[0]
                reconstructions = autoencoder.decode(latents).sample
            yield network(to_uint8(reconstructions))  # in float32, like the features of the originals

    network.to(run.device)
    key = cache_key(weights=weights_sha256(autoencoder), data=data.fingerprint, network=network.sha256)
    decoded = store.compute(f"reconstructions-{key}", count, compute, "features of reconstructions")
    originals = real_features(store, network, data, "held_out", config.data.num_workers, count)
    name = metric_name("rFID" if network.name == "inception" else "rFD", count)
    return results | {name: FrechetDistance(originals["features"])(decoded["features"])}


def measure_samples(
    run: Run,
    sampler: Sampler,
    all_settings: list[SamplingSettings],
    network: FeatureNetwork,
    store: BatchStore,
) -> tuple[SamplingSettings, dict]:
    """The best of the settings, and all metrics of its samples with their protocol."""
    config, data, workers = run.config.evaluation, run.data, run.config.data.num_workers
    count, settings = config.num_samples, all_settings[0]
    train = real_features(store, network, data, "train", workers)
    reference = Reference(network.name, train, data.train.labels, run.device)
    clip = load_clip(config.clip) if config.clip else None
    metrics = SampleMetrics(sampler, network, reference, store, config.save_samples is not None, clip)
    protocol = protocol_of(run, network)
    if len(all_settings) > 1:
        settings = sweep(metrics, all_settings, count, protocol, run.folder / "sweep")
        if config.save_best:
            folder = run.folder / "pipeline"
            run.once(save_defaults, folder, settings, is_conditional(sampler.pipeline.denoiser))
            run.print(f"{folder} now samples with {json.dumps(settings.describe())}")
    samples, labels = metrics.features(settings, count), sampler.class_labels(range(count))
    if config.save_samples and run.accelerator.is_main_process:
        run.print(f"samples: {metrics.export(settings, count, config.save_samples)}")
    digest = hashlib.sha256(samples["digests"].numpy().tobytes()).hexdigest()  # equal only if all images are
    protocol |= settings.describe() | {"samples_sha256": digest}
    measured = {"figures": run.once(reference.metrics, samples, labels), "protocol": protocol}
    if labels is not None and data.train.labels is not None:
        measured["per_class"] = run.once(reference.by_class, samples["features"], labels, data.id2label)
    if labels is not None and reference.agreement_by:
        protocol["agreement by"] = reference.agreement_by
    results = {"samples": measured}
    number = min(count, len(data.held_out))
    if number >= MIN_SAMPLES:
        held_out = real_features(store, network, data, "held_out", workers)
        first = {name: values[:number] for name, values in held_out.items()}
        own = None if data.held_out.labels is None else data.held_out.labels[:number]
        results["real"] = {"n": number, "figures": run.once(reference.metrics, first, own)}
        features = {"train": train, "held_out": held_out, "samples": samples}
        features = {name: values["features"] for name, values in features.items()}
        grid = run.folder / "samples" / "neighbours.png"
        results["memorisation"] = run.once(memorization, sampler, settings, data.train, features, grid)
    return settings, results


def summary(run: Run) -> str:
    """Where the results are, and how to use them."""
    index = LDMPipeline.load_config(run.folder / "pipeline")
    names, (images, arguments) = index["id2label"], image_snippet(index.get("task"))
    if run.text:
        arguments.insert(0, json.dumps(run.data.held_out.captions[0][0], ensure_ascii=False))
    elif names:
        arguments.append(f"class_labels={json.dumps(next(iter(names.values())))}")
    return "\n".join([
        f"grid:     {run.folder / 'samples' / 'samples.png'}",
        f"metrics:  {run.folder / 'metrics.json'}",
        f"report:   {run.folder / 'report.html'}",
        f"pipeline: {run.folder / 'pipeline'}",
        "",
        "from ldm_pipeline import LDMPipeline",
        f'pipe = LDMPipeline.from_pretrained("{(run.folder / "pipeline").as_posix()}")',
        *images,
        f'pipe({", ".join(arguments)}).images[0].save("picture.png")',
    ])  # fmt: skip


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("evaluation", evaluate, evaluation_stands))
