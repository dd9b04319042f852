"""Samples of a pipeline: settings, generation with one seed per image, grids, metrics and files."""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import default_collate

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.pipeline import num_classes, text_width
from training.data.order import seeded_generator
from training.data.tasks import TaskImages, shown
from training.evaluation.features import ClipScore, FeatureNetwork, weights_sha256
from training.evaluation.metrics import Reference
from training.evaluation.plots import save_grid, to_uint8
from training.evaluation.settings import SamplingSettings
from training.evaluation.store import BatchStore, cache_key
from training.evaluation.validation import inference, task_errors
from training.runtime.accelerator import on_main_process
from training.runtime.run import Run

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Sampler:
    """Generates numbered images, each from a seed of its own.

    So neither the batch size nor the number of processes changes an image.

    Args:
        labels: classes `(N,)` of the images whose proportions samples have; None: all classes equally.
        captions: of the same images, for a pipeline that takes text.
        examples: inputs of the model of a task, made of the same images.
    """

    pipeline: LDMPipeline
    accelerator: Accelerator
    seed: int
    batch_size: int
    labels: Tensor | None
    captions: list[str] | None = None
    examples: TaskImages | None = None

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    def class_labels(self, indices) -> Tensor | None:
        """Classes `(n,)` of images by number, or None where they are neither asked for nor known."""
        classes = num_classes(self.pipeline.denoiser)
        if not classes and (self.labels is None or self.captions is None and self.examples is None):
            return None
        labels = torch.arange(classes) if self.labels is None else self.labels
        return labels[self._rows(indices, len(labels))]

    def prompts(self, indices) -> list[str] | None:
        """Captions of images by number, or None for a pipeline that takes no text."""
        if self.captions is None:
            return None
        return [self.captions[row] for row in self._rows(indices, len(self.captions)).tolist()]

    def given(self, indices) -> dict[str, Tensor]:
        """Arguments of a call for images by number: "image", perhaps "mask_image"; empty without a task."""
        if self.examples is None:
            return {}
        rows = zip(self._originals(indices), indices, strict=True)
        return default_collate([self.examples[row, False, self.seed, "example", i] for row, i in rows])

    def originals(self, indices) -> Tensor:
        """The images `(n, C, H, W)` in [-1, 1] that `given` is made of."""
        images = self.examples.originals
        return torch.stack([images[row, False]["images"] for row in self._originals(indices)])

    def _originals(self, indices) -> list[int]:
        return self._rows(indices, len(self.examples.originals)).tolist()

    def errors(self, samples: Tensor, indices) -> dict[str, Tensor]:
        """The errors `(n,)` of a task's samples, uint8 `(n, C, H, W)`, by name; see `task_errors`."""
        if self.examples is None:
            return {}
        task = self.pipeline.task
        given = self.given(indices) if task.kind == "inpaint" else {}  # the originals and their holes
        originals = given["image"] * 2 - 1 if given else self.originals(indices)
        return task_errors(task, samples.cpu().float() / 127.5 - 1, originals, given.get("mask_image"))

    def _rows(self, indices, count: int) -> Tensor:
        """Images `(n,)`, of `count`, whose conditions some samples have, in the proportions of the labels.

        The numbers take places of the golden ratio's sequence, which fills [0, 1) evenly.
        """
        places = ((torch.tensor(list(indices), dtype=torch.float64) + 0.5) * GOLDEN) % 1
        order = torch.arange(count) if self.labels is None else self.labels.argsort(stable=True)
        return order[(places * count).long()]

    def sample(self, settings: SamplingSettings, indices) -> Tensor:
        """The images of some numbers, uint8 `(n, 1 or 3, H, W)`."""
        conditions = self.class_labels(indices), self.prompts(indices)
        return to_uint8(self._generate(settings, *conditions, "sample", indices) * 2 - 1)

    def save_grid(self, settings: SamplingSettings, path: Path, rows: int = 4) -> None:
        """Write a grid of images that other settings or weights can be compared with.

        One class per column, or below each image its caption; for a task rows of what is shown to the model,
        of its images and of the originals, in turn. Every process calls this and generates its share.
        """
        classes, processes = num_classes(self.pipeline.denoiser), self.accelerator.num_processes
        classes = classes if self.captions is None and self.examples is None else 0
        columns = min(classes, 10) or 8
        share = -(-rows * columns // processes)
        own = [(self.accelerator.process_index * share + i) % (rows * columns) for i in range(share)]
        images = []
        for start in range(0, share, self.batch_size):
            indices = own[start : start + self.batch_size]
            labels, prompts = self.class_labels(indices), self.prompts(indices)
            if classes:
                labels = torch.tensor([index % columns * classes // columns for index in indices])
            images.append(self._generate(settings, labels, prompts, "grid", indices))
        images = self.accelerator.gather(torch.cat(images))[: rows * columns]
        if not self.accelerator.is_main_process:
            return
        images, captions = images.cpu() * 2 - 1, self.prompts(range(rows * columns))
        if self.examples is not None:
            every = range(len(images))
            conditions = shown(self.pipeline.task, self.given(every)) * 2 - 1
            kinds = torch.stack([conditions, images, self.originals(every)])
            images, captions = kinds.unflatten(1, (rows, columns)).transpose(0, 1).flatten(0, 2), None
        save_grid(images, path, columns, captions)

    def _generate(
        self, settings: SamplingSettings, labels: Tensor | None, prompts, purpose: str, indices
    ) -> Tensor:
        """Images in [0, 1]; the pipeline keeps its own scheduler."""
        classes = num_classes(self.pipeline.denoiser)
        own_scheduler = self.pipeline.scheduler
        self.pipeline.scheduler = settings.scheduler
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            with inference(self.pipeline.denoiser), self.accelerator.autocast():
                return self.pipeline(
                    prompts,
                    class_labels=labels.tolist() if classes and labels is not None else None,
                    **self.given(indices),
                    batch_size=len(indices),
                    num_inference_steps=settings.num_inference_steps,
                    **settings.guidance_arguments(),
                    generator=[seeded_generator(self.device, self.seed, purpose, i) for i in indices],
                    output_type="pt",
                ).images
        finally:
            self.pipeline.scheduler = own_scheduler


def new_sampler(run: Run, pipeline: LDMPipeline) -> Sampler:
    """A sampler with the classes of the training images; where it takes captions or images, with the held-out
    ones and their classes."""
    text, size = text_width(pipeline.denoiser) > 0, run.config.evaluation.batch_size
    split = run.data.held_out if text or pipeline.task else run.data.train
    captions = [texts[0] for texts in split.captions] if text else None
    examples = TaskImages(pipeline.task, run.data, "held_out") if pipeline.task else None
    return Sampler(pipeline, run.accelerator, run.config.seed, size, split.labels, captions, examples)


def pipeline_sha256(pipeline: LDMPipeline) -> str:
    """Hexadecimal SHA-256 of the weights of all networks."""
    digest = weights_sha256(pipeline.denoiser, weights_sha256(pipeline.vae).encode())
    for name in ("text_encoder", "guide_unet"):
        if (network := pipeline.components[name]) is not None:
            digest = weights_sha256(network, digest.encode())
    return digest


@dataclass(frozen=True)
class SampleMetrics:
    """Metrics of a sampler's images; every process generates its share.

    Args:
        reference: the real images that samples are compared with.
        store: keeps the features of samples.
        keep_images: whether `store` keeps the images too.
        clip: judges samples by their captions.
    """

    sampler: Sampler
    network: FeatureNetwork
    reference: Reference
    store: BatchStore
    keep_images: bool = False
    clip: ClipScore | None = None

    def measure(self, settings: SamplingSettings, count: int, name: str | None = None) -> dict[str, float]:
        """All metrics of `count` samples by name."""
        samples, labels = self.features(settings, count, name), self.sampler.class_labels(range(count))
        return on_main_process(self.store.accelerator, self.reference.metrics, samples, labels)

    def features(self, settings: SamplingSettings, count: int, name: str | None = None) -> dict[str, Tensor]:
        """ "features", of a classifier "logits", and "digests" int64 `(count,)`, a hash per image.

        Args:
            name: in the store; by default one for the settings and the weights.
        """
        self.network.to(self.sampler.device)

        def compute(batches: list[range]) -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                images = self.sampler.sample(settings, batch)
                digests = [hashlib.sha256(image.cpu().numpy().tobytes()).digest()[:8] for image in images]
                digests = torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())
                kept = {"images": images} if self.keep_images else {}
                kept |= self.sampler.errors(images, batch)
                if self.clip is not None:
                    kept["clip"] = self.clip(images, self.sampler.prompts(batch))
                yield self.network(images) | {"digests": digests} | kept

        name = name or self.store_name(settings)
        return self.store.compute(name, count, compute, str(settings), without="images")

    def store_name(self, settings: SamplingSettings) -> str:
        """The name in the store, with a hash of everything that the samples and their features depend on."""
        # Entries under an underscore are Diffusers' own: saving changes them.
        scheduler = {key: value for key, value in settings.scheduler.config.items() if key[0] != "_"}
        guidance = settings.guidance, settings.guidance_interval, settings.guidance_rescale
        plain = settings.guidance_scale == 1 or guidance == ("classifier_free", (0, 1), 0)
        key = cache_key(
            weights=self._weights,
            scheduler=f"{settings.name} {json.dumps(scheduler, default=str, sort_keys=True)}",
            steps=settings.num_inference_steps,
            guidance=settings.guidance_scale,
            seed=self.sampler.seed,
            labels=None if self.sampler.labels is None else self.sampler.labels.bincount().tolist(),
            **({} if plain else {"kind": guidance}),
            **({"clip": self.clip.sha256} if self.clip else {}),
            **({"captions": self.sampler.captions} if self.sampler.captions else {}),
            **({"examples": self.sampler.examples.key} if self.sampler.examples else {}),
            arithmetic=f"{self.sampler.accelerator.mixed_precision} {self.sampler.device.type}",
            network=self.network.sha256,
            images=self.keep_images,
        )
        return f"{settings.name}-{settings.num_inference_steps}-{settings.guidance_scale:g}-{key}"

    @cached_property
    def _weights(self) -> str:
        return pipeline_sha256(self.sampler.pipeline)

    def export(self, settings: SamplingSettings, count: int, kind: str) -> Path:
        """Write the images that the store keeps, one batch in memory at once; returns where.

        Args:
            kind: "png", a folder of files with their parameters; or "npz", uint8 "arr_0" `(N, H, W, C)` and
                "labels" `(N,)`.
        """
        name, labels = self.store_name(settings), self.sampler.class_labels(range(count))
        target = self.store.folder / f"{name}-{count}"
        batches = (
            (batch, tensors["images"].permute(0, 2, 3, 1).numpy())
            for batch, tensors in self.store.batches(name, count)
        )
        if kind == "npz":
            return _write_npz(target.with_suffix(".npz"), batches, count, labels)
        target.mkdir(exist_ok=True)
        for batch, images in batches:
            for index, image in zip(batch, images, strict=True):
                label = {} if labels is None else {"class_label": int(labels[index])}
                parameters = settings.describe() | label | {"seed": self.sampler.seed, "index": index}
                info = PngInfo()
                info.add_text("parameters", json.dumps(parameters))
                picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                picture.save(target / f"{index:06d}.png", pnginfo=info)
        return target


def _write_npz(path: Path, batches: Iterable, count: int, labels: Tensor | None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for batch, images in batches:
                if batch.start == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())
    return path
