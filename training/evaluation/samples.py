"""Samples for figures: one seed an image, drawn by all processes, turned into features and forgotten."""

import copy
import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import LDMPipeline, num_classes, scheduler_family
from training.config import RunError
from training.data.order import seeded_generator
from training.evaluation.features import FeatureNetwork, sha256_of, short
from training.evaluation.plots import to_bytes
from training.evaluation.stream import batches, read_batch, read_batches, stream
from training.evaluation.validation import inference
from training.runtime.run import Run

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Setting:
    """How samples are drawn."""

    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float

    @property
    def name(self) -> str:
        """Class of the scheduler, without its suffix."""
        return type(self.scheduler).__name__.removesuffix("Scheduler")

    @property
    def network_evaluations(self) -> int:
        """Evaluations of the denoiser a picture: guidance doubles them, and so do solvers of two stages."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps)
        return len(scheduler.timesteps) * (1 if self.guidance_scale == 1 else 2)

    def describe(self) -> dict:
        """What a table says of it."""
        return {
            "scheduler": self.name,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "network_evaluations": self.network_evaluations,
        }


def settings_of(run: Run, pipeline: LDMPipeline) -> list[Setting]:
    """All combinations of `--evaluation.schedulers`, `num_inference_steps` and `guidance_scales`, each by
    default the pipeline's own.

    Raises:
        RunError: if one of them cannot draw.
    """
    config, defaults = run.config.evaluation, pipeline.config.defaults or {}
    classes = num_classes(pipeline.denoiser)
    scales = config.guidance_scales or [defaults.get("guidance_scale", 1.0) if classes else 1.0]
    if not classes and set(scales) != {1.0}:
        raise RunError(
            f"--evaluation.guidance_scales {scales}: this pipeline has no classes to guide to; 1 is off"
        )
    settings = []
    for name, steps, scale in product(
        config.schedulers or [None],
        config.num_inference_steps or [defaults.get("num_inference_steps", 20)],
        scales,
    ):
        try:
            scheduler = build_scheduler(pipeline.config.objective, name) if name else pipeline.scheduler
            scheduler_family(scheduler)
            setting = Setting(scheduler, steps, float(scale))
            setting.network_evaluations  # noqa: B018  some schedulers refuse some numbers of steps
        except Exception as error:  # of Diffusers, which says little
            raise RunError(f"--evaluation.schedulers {name} with {steps} steps: {error}") from error
        settings.append(setting)
    return settings


def sample_labels(run: Run, pipeline: LDMPipeline, count: int) -> Tensor | None:
    """Classes `(count,)` in the proportions of the training images, or None for a pipeline without classes.

    Image i has the same class whatever the count: places of the golden ratio's sequence, which fills evenly.
    """
    classes = num_classes(pipeline.denoiser)
    if not classes:
        return None
    labels = run.data.train.labels
    labels = torch.arange(classes) if labels is None else labels.sort().values
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * GOLDEN) % 1
    return labels[(places * len(labels)).long()]


def draw(run: Run, pipeline: LDMPipeline, setting: Setting, indices, labels: Tensor | None) -> Tensor:
    """The samples of some indices, uint8 `(N, 1 or 3, H, W)`; each has a generator of its own."""
    pipeline.scheduler = setting.scheduler
    pipeline.set_progress_bar_config(disable=True)
    with inference(pipeline.unet), run.accelerator.autocast():
        images = pipeline(
            class_labels=None if labels is None else labels[list(indices)].tolist(),
            batch_size=len(indices),
            num_inference_steps=setting.num_inference_steps,
            guidance_scale=setting.guidance_scale,
            generator=[seeded_generator(run.device, run.config.seed, "sample", index) for index in indices],
            output_type="pt",
        ).images
    return to_bytes(images * 2 - 1)


def draw_features(
    run: Run, pipeline: LDMPipeline, setting: Setting, network: FeatureNetwork, count: int, folder: Path
) -> dict[str, Tensor]:
    """Of `count` samples "features", of classifiers "logits", and "digests"; `folder` keeps them by batch."""
    labels, network = sample_labels(run, pipeline, count), network.to(run.device)
    keep = run.config.evaluation.save_samples is not None

    def compute(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        for part in parts:
            images = draw(run, pipeline, setting, part, labels)
            digests = [hashlib.sha256(image.cpu().numpy().tobytes()).digest()[:8] for image in images]
            digests = torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())
            yield network(images) | {"digests": digests} | ({"images": images} if keep else {})

    size = run.config.evaluation.batch_size
    name = f"{setting.name} {setting.num_inference_steps} x{setting.guidance_scale:g}"
    stream(run, folder, count, size, compute, name)
    return read_batches(folder, count, size, without="images")


def samples_folder(run: Run, weights: str, setting: Setting, network: FeatureNetwork) -> Path:
    """Where the features of these samples are kept: named by all that they depend on."""
    # What Diffusers notes for itself under an underscore changes by saving, and its order by process.
    scheduler = {name: value for name, value in setting.scheduler.config.items() if name[0] != "_"}
    key = {
        "weights": weights,
        "scheduler": f"{setting.name} {json.dumps(scheduler, default=str, sort_keys=True)}",
        "steps": setting.num_inference_steps,
        "guidance": setting.guidance_scale,
        "seed": run.config.seed,
        "labels": run.data.fingerprint,
        "arithmetic": f"{run.accelerator.mixed_precision} {run.device.type}",
        "network": network.sha256,
        "images": run.config.evaluation.save_samples is not None,
    }
    name = f"{setting.name}-{setting.num_inference_steps}-{setting.guidance_scale:g}-{short(key)}"
    return run.folder / "evaluation" / name


def weights_of(pipeline: LDMPipeline) -> str:
    """A hash of the networks of a pipeline."""
    return sha256_of(pipeline.unet, sha256_of(pipeline.vae).encode())


def export_samples(run: Run, pipeline: LDMPipeline, setting: Setting, folder: Path, count: int) -> Path:
    """Write the samples kept in `folder` as PNG files, each with its parameters, or as one npz of uint8
    "arr_0" `(N, H, W, C)` and "labels" `(N,)`; returns where. Batch by batch: memory may not hold all."""
    kind, labels = run.config.evaluation.save_samples, sample_labels(run, pipeline, count)
    target = run.folder / "evaluation" / f"{folder.name}-{count}"
    pictures = (
        (part, read_batch(folder, part)["images"].permute(0, 2, 3, 1).numpy())
        for part in batches(count, run.config.evaluation.batch_size)
    )
    if kind == "png":
        target.mkdir(exist_ok=True)
        for part, images in pictures:
            for index, image in zip(part, images, strict=True):
                label = {} if labels is None else {"class_label": int(labels[index])}
                text = json.dumps(setting.describe() | label | {"seed": run.config.seed, "index": index})
                info = PngInfo()
                info.add_text("parameters", text)
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                    target / f"{index:06d}.png", pnginfo=info
                )
        return target
    target = target.with_suffix(".npz")
    with zipfile.ZipFile(target, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for part, images in pictures:
                if part.start == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
    return target
