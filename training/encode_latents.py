"""Stage 2: encode every image and its mirror image, cache the posterior moments, measure their statistics."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("latents")

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm_pipeline.loading import load_autoencoder
from ldm_pipeline.pipeline import set_latent_statistics
from training.config import RunError
from training.data.captions import (
    SHARD_SIZE,
    caption_shards,
    captions_sha256,
    encode_captions,
    missing_shards,
    unique_captions,
)
from training.data.images import SPLITS
from training.data.latents import channel_statistics, encode, shard_problem
from training.data.tasks import TASK_CACHE, ShownImages, cached, task_of
from training.evaluation.features import weights_sha256
from training.runtime.atomic import discard, file_sha256, read_json, write_bytes, write_json, write_tensors
from training.runtime.run import Run
from training.runtime.signals import leave_signals_to_parent

Item = TypeVar("Item")


def latents_stand(run: Run) -> str | None:
    """Skip rule: every shard of the caches is whole and belongs to the present cache key."""
    run.require(run.folder / "autoencoder" / "done.json", "train_autoencoder.py")
    if not run.done("latents"):
        return None
    for cache in caches(run, load_autoencoder(run.folder / "autoencoder")):
        if not (cache.folder / "manifest.json").exists() or _stored_key(cache.folder) != cache.key:
            return None
        if any(shard_problem(cache.folder / shard.name, shard.shapes) for shard in cache.plan):
            return None
    folder = run.folder / "latents"
    return f"{folder} stands" if run.text is None or captions_stand(run, folder) else None


def encode_latents(run: Run) -> None:
    """Leave `latents/` in the run folder, and the latents' statistics in the autoencoder's config.

    Whole shards of the same cache key are kept.

    Raises:
        RunError: if a latent channel is constant or not finite.
    """
    autoencoder = load_autoencoder(run.folder / "autoencoder")
    images, *conditions = caches(run, autoencoder)
    begun = time.perf_counter()
    autoencoder.to(run.device).eval()
    for cache in (images, *conditions):
        prepare_cache(run, cache)
        encode_shards(run, autoencoder, cache)
    if run.text is not None:
        cache_captions(run, images.folder)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        mean, std = channel_statistics([images.folder / name for name in images.names("train")])
        run.print(f"latents: mean {_short(mean)}, deviation {_short(std)}")
        if not 1e-6 < std.min() <= std.max() < 1e4:
            raise RunError(
                f"a latent channel is dead or has exploded (deviations {_short(std)}): the autoencoder's "
                "training failed; see samples/ and metrics.jsonl, and do it again with --redo '[autoencoder]'"
            )
        set_latent_statistics(autoencoder, mean.tolist(), std.tolist())
        write_bytes(run.folder / "autoencoder" / CONFIG_NAME, autoencoder.to_json_string().encode())
        for cache in (images, *conditions):
            names = {split: cache.names(split) for split in SPLITS}
            manifest = {"key": cache.key, "shape": list(run.latent_shape), **names}
            write_json(cache.folder / "manifest.json", manifest)
    run.finish("latents", {"seconds": time.perf_counter() - begun})


def cache_key(run: Run) -> dict:
    """The cache key: latents with the same key are the same. Its names appear in the reason for a rebuild."""
    return {
        "autoencoder weights": file_sha256(run.folder / "autoencoder" / SAFETENSORS_WEIGHTS_NAME),
        "data and transform": run.data.fingerprint,
        "mirror images": run.config.data.horizontal_flip,
    }


def _stored_key(folder: Path) -> dict | None:
    path = folder / "key.json"
    return read_json(path) if path.exists() else None


@dataclass(frozen=True)
class Shard:
    """One file of the cache: consecutive images of a split, and the shape of every tensor in the file."""

    name: str
    split: str
    indices: range
    shapes: dict[str, list[int]]


@dataclass(frozen=True)
class Cache:
    """A folder of shards: of the images, or of the conditions of a task in which nothing is random.

    Args:
        images: by split, datasets whose items have "images".
    """

    folder: Path
    key: dict
    plan: list[Shard]
    images: dict[str, Dataset]

    def names(self, split: str) -> list[str]:
        """Names of the files of a split."""
        return [shard.name for shard in self.plan if shard.split == split]


def caches(run: Run, autoencoder: nn.Module) -> list[Cache]:
    """All caches, that of the images first."""
    folder, key = run.folder / "latents", cache_key(run)
    images = {split: getattr(run.data, split) for split in SPLITS}
    found = [Cache(folder, key, plan_shards(run, autoencoder), images)]
    task = task_of(run.config.denoiser, run.data)
    if cached(task):
        shards = [replace(shard, shapes={"mean": shard.shapes["mean"]}) for shard in found[0].plan]
        conditions = {split: ShownImages(task, run.data, split) for split in SPLITS}
        key = key | {"task": task.config, "pairs": run.data.pairs}
        found.append(Cache(folder / TASK_CACHE, key, shards, conditions))
    return found


def plan_shards(run: Run, autoencoder: nn.Module) -> list[Shard]:
    """All files of the cache, those of the training images first."""
    size, plan = run.config.latents.shard_size, []
    latents = [2 if run.config.data.horizontal_flip else 1, *run.latent_shape]
    for split in ("train", "held_out"):
        images = getattr(run.data, split)
        for number, first in enumerate(range(0, len(images), size)):
            indices = range(first, min(first + size, len(images)))
            shapes = {"mean": [len(indices), *latents]}
            if isinstance(autoencoder, AutoencoderKL):
                shapes["std"] = shapes["mean"]
            if images.labels is not None:
                shapes["class_labels"] = [len(indices)]
            plan.append(Shard(f"{split}-{number:05d}.safetensors", split, indices, shapes))
    return plan


def prepare_cache(run: Run, cache: Cache) -> None:
    """Make the folder one of the cache's key: drop shards of another and damaged shards, saying why.

    Raises:
        RunError: a denoiser was trained on the latents that would be dropped.
    """
    folder, key = cache.folder, cache.key
    stored = (_stored_key(folder) or {}) if folder.exists() else key
    changed = ", ".join(name for name in key if stored.get(name) != key[name])
    if changed and (denoiser := run.folder / "denoiser").exists():
        raise RunError(
            f"{denoiser} was trained on the latents in {folder}, and these changed since: {changed}. Images "
            "are known by their bytes, with --data.scan sample their files by name, size and time (cp -a and "
            "rsync -a keep it). --redo '[latents]' encodes and trains again"
        )
    run.accelerator.wait_for_everyone()  # every process has looked before one changes anything
    if run.accelerator.is_main_process:
        if changed:
            run.print(f"{folder.name}: encoded again, because these changed: {changed}")
            discard(folder)
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
        (folder / "manifest.json").unlink(missing_ok=True)
        for shard in cache.plan:
            path = folder / shard.name
            if path.exists() and (problem := shard_problem(path, shard.shapes)):
                run.print(f"{folder.name}: {shard.name} is encoded again: {problem}")
                discard(path)
    run.accelerator.wait_for_everyone()


def encode_shards(run: Run, autoencoder: nn.Module, cache: Cache) -> None:
    """Write the missing shards, in rounds of one shard per process."""
    folder = cache.folder
    missing = [shard for shard in cache.plan if not (folder / shard.name).exists()]
    for shard in _own_share(run, missing, folder.name):
        encoded = _encode_images(run, autoencoder, cache.images[shard.split], shard.indices)
        write_tensors(folder / shard.name, {name: encoded[name] for name in shard.shapes})


def _own_share(run: Run, missing: list[Item], title: str) -> Iterator[Item]:
    """Missing shards that this process writes, one per round; all processes call this."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()  # all processes have the same list before the first shard is written
    rounds = range(0, len(missing), accelerator.num_processes)
    for first in tqdm(rounds, desc=title, unit="shard", disable=not accelerator.is_main_process):
        yield from missing[first : first + accelerator.num_processes][accelerator.process_index :][:1]
        run.interruption.check()


@torch.no_grad()
def _encode_images(run: Run, autoencoder: nn.Module, images: Dataset, indices: range) -> dict:
    """Posterior moments `(n, 2 or 1, c, ...)`, float16, of images and their mirror images; labels `(n,)`."""
    config, flips = run.config, (0, 1) if run.config.data.horizontal_flip else (0,)
    moments: dict[str, list[Tensor]] = {"mean": [], "std": [], "class_labels": []}
    pairs = [(index, 0) for index in indices]
    loader = DataLoader(
        images,
        sampler=pairs,
        batch_size=config.latents.batch_size,
        num_workers=config.data.num_workers,
        worker_init_fn=leave_signals_to_parent,
    )
    for batch in loader:
        pixels = batch["images"].to(run.device)
        with run.accelerator.autocast():
            encoded = [encode(autoencoder, pixels.flip(-1) if flip else pixels) for flip in flips]
        for name, values in zip(("mean", "std"), zip(*encoded, strict=True), strict=True):
            if values[0] is not None:
                moments[name].append(torch.stack(values, 1).half().cpu())
        if "class_labels" in batch:
            moments["class_labels"].append(batch["class_labels"])
    return {name: torch.cat(values) for name, values in moments.items() if values}


def captions_key(run: Run, unique: list[str]) -> dict:
    """The cache key of encoded captions."""
    tokenizer, encoder = run.text
    words = run.config.denoiser.trains_text_encoder
    return {
        "text encoder": "words" if words else weights_sha256(encoder),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "longest caption": tokenizer.model_max_length,
        "captions": captions_sha256(unique),
    }


def captions_stand(run: Run, folder: Path) -> bool:
    """Whether the captions are encoded, by the present text encoder."""
    unique, path = unique_captions(run.data), folder / "captions.json"
    whole = not missing_shards(folder, unique)
    return whole and path.exists() and read_json(path) == captions_key(run, unique)


def cache_captions(run: Run, folder: Path) -> None:
    """Encode every caption once, or turn it into token numbers for an encoder that is still to be trained."""
    unique, words = unique_captions(run.data), run.config.denoiser.trains_text_encoder
    key, path, shards = captions_key(run, unique), folder / "captions.json", caption_shards(folder, unique)
    if run.accelerator.is_main_process and (not path.exists() or read_json(path) != key):
        for stale in folder.glob("captions-*"):
            discard(stale)
        write_json(path, key)
    run.accelerator.wait_for_everyone()
    tokenizer, encoder = run.text
    encoder.to(run.device)
    for number in _own_share(run, missing_shards(folder, unique), "captions"):
        texts, size = unique[number * SHARD_SIZE :][:SHARD_SIZE], run.config.latents.batch_size
        write_tensors(shards[number], encode_captions(texts, tokenizer, encoder, size, ids_only=words))
    run.print(f"captions: {len(unique) - 1:,} different ones, encoded once each")


def _short(values: Tensor) -> str:
    return "[" + " ".join(f"{value:.3g}" for value in values.tolist()) + "]"


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("latents", encode_latents, latents_stand))
