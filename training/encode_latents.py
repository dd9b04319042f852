"""Stage 2: encode every image and its mirror image into posterior moments on disk; measure statistics."""

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm_pipeline.models import load_autoencoder
from ldm_pipeline.pipeline import set_latent_statistics
from training.checkpoint import atomic_write, file_sha256, save_tensors, write_json
from training.latents import encode
from training.run import Run
from training.script import main

WEIGHTS = "diffusion_pytorch_model.safetensors"


def encode_latents(run: Run) -> None:
    """Leave `latents/` in the run folder, and the statistics of the latents in the autoencoder's config."""
    folder = run.folder / "latents"
    run.require(run.folder / "autoencoder" / "done.json", "train_autoencoder.py")
    key = cache_key(run)
    if not _open_cache(run, folder, key):
        return
    begun = time.perf_counter()
    autoencoder = load_autoencoder(run.folder / "autoencoder").to(run.device).eval()
    shards = {split: _encode_split(run, autoencoder, folder, split) for split in ("train", "held_out")}
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        mean, std = channel_statistics([folder / name for name in shards["train"]])
        run.print(f"latents: mean {_short(mean)}, deviation {_short(std)}")
        if not 1e-6 < std.min() <= std.max() < 1e4:
            raise ValueError(
                f"a latent channel is dead or has exploded (deviations {_short(std)}): the autoencoder's "
                "training failed; see samples/ and metrics.jsonl, and do it again with --redo '[autoencoder]'"
            )
        set_latent_statistics(autoencoder, mean.tolist(), std.tolist())
        atomic_write(run.folder / "autoencoder" / "config.json", autoencoder.to_json_string().encode())
        shape = load_file(folder / shards["train"][0])["mean"].shape[2:]
        write_json(folder / "manifest.json", {"key": key, "shape": list(shape), **shards})
    run.finish("latents", {"seconds": time.perf_counter() - begun})


def cache_key(run: Run) -> dict:
    """What the latents are a function of; the names are those that a rebuild gives as its reason."""
    return {
        "autoencoder weights": file_sha256(run.folder / "autoencoder" / WEIGHTS),
        "data and transform": run.data.fingerprint,
        "mirror images": run.config.data.horizontal_flip,
    }


def _open_cache(run: Run, folder: Path, key: dict) -> bool:
    """Whether there is anything to encode; drops shards that belong to another key."""
    stored = folder / "key.json"
    before = json.loads(stored.read_text()) if stored.exists() else None
    if before == key and (folder / "manifest.json").exists():
        run.print(f"latents: {folder} stands")
        return False
    run.accelerator.wait_for_everyone()  # every process has read the key before one replaces it
    if run.accelerator.is_main_process:
        if before is not None and before != key:
            changed = ", ".join(name for name in key if before.get(name) != key[name])
            run.print(f"latents: encoded again, because these changed: {changed}")
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        write_json(stored, key)
    run.accelerator.wait_for_everyone()
    return True


def _encode_split(run: Run, autoencoder: torch.nn.Module, folder: Path, split: str) -> list[str]:
    """Write the shards of one split that are missing, each process its share; names of all."""
    images, size = getattr(run.data, split), run.config.latents.shard_size
    firsts = range(0, len(images), size)
    names = [f"{split}-{first // size:05d}.safetensors" for first in firsts]
    mine = list(zip(firsts, names, strict=True))[
        run.accelerator.process_index :: run.accelerator.num_processes
    ]
    for first, name in tqdm(
        mine, desc=f"latents {split}", unit="shard", disable=not run.accelerator.is_main_process
    ):
        if not (folder / name).exists():
            indices = range(first, min(first + size, len(images)))
            save_tensors(folder / name, _encode_images(run, autoencoder, images, indices))
    return names


@torch.no_grad()
def _encode_images(run: Run, autoencoder: torch.nn.Module, images, indices: range) -> dict[str, Tensor]:
    """Moments `(n, 2 or 1, c, h, w)` in float16 (image, mirror image) and labels `(n,)` of some images."""
    config, flips = run.config, (0, 1) if run.config.data.horizontal_flip else (0,)
    moments: dict[str, list[Tensor]] = {"mean": [], "std": [], "class_labels": []}
    pairs = [(index, 0) for index in indices]
    loader = DataLoader(
        images, sampler=pairs, batch_size=config.latents.batch_size, num_workers=config.data.num_workers
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
    main(latents=encode_latents)
