"""Stage 2: encode every image and its mirror image into posterior moments on disk; measure statistics."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("latents")

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm_pipeline.models import load_autoencoder
from ldm_pipeline.pipeline import set_latent_statistics
from training.config import RunError
from training.data.latents import encode, shard_problem
from training.runtime.atomic import discard, file_sha256, read_json, write_bytes, write_json, write_tensors
from training.runtime.run import Run
from training.runtime.signals import leave_signals_to_parent


def latents_stand(run: Run) -> str | None:
    """Skip rule: every shard of the cache is whole and belongs to the present cache key."""
    run.require(run.folder / "autoencoder" / "done.json", "train_autoencoder.py")
    folder = run.folder / "latents"
    if not run.done("latents") or not (folder / "manifest.json").exists():
        return None
    if _stored_key(folder) != cache_key(run):
        return None
    shards = _plan_shards(run, load_autoencoder(run.folder / "autoencoder"))
    if any(shard_problem(folder / name, shapes) for name, shapes in shards.items()):
        return None
    return f"{folder} stands"


def encode_latents(run: Run) -> None:
    """Leave `latents/` in the run folder, and the statistics of the latents in the autoencoder's config."""
    folder = run.folder / "latents"
    key = cache_key(run)
    autoencoder = load_autoencoder(run.folder / "autoencoder")
    plan = {split: _plan_split(run, autoencoder, split) for split in ("train", "held_out")}
    _open_cache(run, folder, key, _plan_shards(run, autoencoder))
    begun = time.perf_counter()
    autoencoder.to(run.device).eval()
    for split, shards in plan.items():
        _encode_split(run, autoencoder, folder, split, shards)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        mean, std = channel_statistics([folder / name for name in plan["train"]])
        run.print(f"latents: mean {_short(mean)}, deviation {_short(std)}")
        if not 1e-6 < std.min() <= std.max() < 1e4:
            raise RunError(
                f"a latent channel is dead or has exploded (deviations {_short(std)}): the autoencoder's "
                "training failed; see samples/ and metrics.jsonl, and do it again with --redo '[autoencoder]'"
            )
        set_latent_statistics(autoencoder, mean.tolist(), std.tolist())
        write_bytes(run.folder / "autoencoder" / CONFIG_NAME, autoencoder.to_json_string().encode())
        shape = run.latent_shape
        shards = {split: list(each) for split, each in plan.items()}
        write_json(folder / "manifest.json", {"key": key, "shape": list(shape), **shards})
    run.finish("latents", {"seconds": time.perf_counter() - begun})


def cache_key(run: Run) -> dict:
    """What the latents are a function of; the names are those that a rebuild gives as its reason."""
    return {
        "autoencoder weights": file_sha256(run.folder / "autoencoder" / SAFETENSORS_WEIGHTS_NAME),
        "data and transform": run.data.fingerprint,
        "mirror images": run.config.data.horizontal_flip,
    }


def _stored_key(folder: Path) -> dict | None:
    path = folder / "key.json"
    return read_json(path) if path.exists() else None


def _plan_shards(run: Run, autoencoder: nn.Module) -> dict[str, dict[str, list[int]]]:
    """All shards of the cache by file name: the shape of every tensor in them."""
    return _plan_split(run, autoencoder, "train") | _plan_split(run, autoencoder, "held_out")


def _plan_split(run: Run, autoencoder: nn.Module, split: str) -> dict[str, dict[str, list[int]]]:
    """The shards of a split by file name: the shape of every tensor in it."""
    images, size = getattr(run.data, split), run.config.latents.shard_size
    latents = [2 if run.config.data.horizontal_flip else 1, *run.latent_shape]
    plan = {}
    for number, first in enumerate(range(0, len(images), size)):
        count = min(size, len(images) - first)
        shapes = {"mean": [count, *latents]}
        if isinstance(autoencoder, AutoencoderKL):
            shapes["std"] = shapes["mean"]
        if images.labels is not None:
            shapes["class_labels"] = [count]
        plan[f"{split}-{number:05d}.safetensors"] = shapes
    return plan


def _open_cache(run: Run, folder: Path, key: dict, shards: dict[str, dict[str, list[int]]]) -> None:
    """Make room for the shards: drop a cache of another key, and damaged shards of this one."""
    before = _stored_key(folder)
    run.accelerator.wait_for_everyone()  # every process has looked before one changes anything
    if run.accelerator.is_main_process:
        if before != key and folder.exists():
            changed = [name for name in key if (before or {}).get(name) != key[name]]
            run.print(f"latents: encoded again, because these changed: {', '.join(changed)}")
            discard(folder)
        folder.mkdir(exist_ok=True)
        write_json(folder / "key.json", key)
        (folder / "manifest.json").unlink(missing_ok=True)
        for name, shapes in shards.items():
            if (folder / name).exists() and (problem := shard_problem(folder / name, shapes)):
                run.print(f"latents: {name} is encoded again: {problem}")
                discard(folder / name)
    run.accelerator.wait_for_everyone()


def _encode_split(run: Run, autoencoder: nn.Module, folder: Path, split: str, shards: dict) -> None:
    """Write the shards of one split that are missing, in rounds of one a process."""
    images, size, accelerator = getattr(run.data, split), run.config.latents.shard_size, run.accelerator
    missing = [number for number, name in enumerate(shards) if not (folder / name).exists()]
    accelerator.wait_for_everyone()  # all processes have the same list before the first shard is written
    rounds = range(0, len(missing), accelerator.num_processes)
    for first in tqdm(rounds, desc=f"latents {split}", unit="shard", disable=not accelerator.is_main_process):
        if first + accelerator.process_index < len(missing):
            number = missing[first + accelerator.process_index]
            indices = range(number * size, min((number + 1) * size, len(images)))
            tensors = _encode_images(run, autoencoder, images, indices)
            write_tensors(folder / list(shards)[number], tensors)
        run.interruption.check()


@torch.no_grad()
def _encode_images(run: Run, autoencoder: nn.Module, images, indices: range) -> dict[str, Tensor]:
    """Moments `(n, 2 or 1, c, h, w)` in float16 (image, mirror image) and labels `(n,)` of some images."""
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
        encoded = [encode(autoencoder, pixels.flip(3) if flip else pixels) for flip in flips]
        for name, values in zip(("mean", "std"), zip(*encoded, strict=True), strict=True):
            if values[0] is not None:
                moments[name].append(torch.stack(values, 1).half().cpu())
        if "class_labels" in batch:
            moments["class_labels"].append(batch["class_labels"])
    return {name: torch.cat(values) for name, values in moments.items() if values}


def channel_statistics(shards: list[Path]) -> tuple[Tensor, Tensor]:
    """Mean and deviation `(c,)`, float64, of posterior samples over all images, from moments in `shards`."""
    count, total, squares = 0, 0.0, 0.0
    for shard in shards:
        moments = {key: value.double() for key, value in load_file(shard).items() if key != "class_labels"}
        mean = moments["mean"]
        count += mean.numel() // mean.shape[2]
        total = total + mean.sum((0, 1, 3, 4))
        squares = squares + mean.square().sum((0, 1, 3, 4))
        if "std" in moments:
            squares = squares + moments["std"].square().sum((0, 1, 3, 4))
    mean = total / count
    return mean, (squares / count - mean**2).sqrt()


def _short(values: Tensor) -> str:
    return "[" + " ".join(f"{value:.3g}" for value in values.tolist()) + "]"


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("latents", encode_latents, latents_stand))
