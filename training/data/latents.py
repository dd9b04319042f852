"""The latents of every image and its mirror image: a cache on disk, its statistics, and its reader."""

from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_pipeline.pipeline import normalize_latents
from training.config import RunError
from training.runtime.atomic import read_json


def encode(autoencoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Posterior mean and deviation `(N, c, h, w)` of images `(N, C, H, W)`; no deviation: AutoencoderDC."""
    encoded = autoencoder.encode(images)
    if hasattr(encoded, "latent"):
        return encoded.latent, None
    return encoded.latent_dist.mean, encoded.latent_dist.std


def shard_problem(path: Path, shapes: dict[str, list[int]]) -> str | None:
    """Why a file is not the shard with tensors of these shapes, or None; reads its header only."""
    try:
        with safe_open(path, "pt") as shard:
            found = {name: shard.get_slice(name).get_shape() for name in shard.keys()}
    except (OSError, SafetensorError) as error:
        return f"it is damaged ({error})"
    return None if found == shapes else f"it holds {found}, wanted {shapes}"


class LatentDataset:
    """One split of the cache, ready to be drawn from.

    Args:
        folder: the run's latents folder, written by `encode_latents.py`.
        split: "train" or "held_out".
        autoencoder: its config holds the statistics that normalise.
        device: where batches are wanted.
        resident: "device" holds everything there, "disk" maps the files into memory, "auto" takes the device
            if a quarter of its memory suffices.
    """

    def __init__(self, folder: Path, split: str, autoencoder: nn.Module, device: torch.device, resident: str):
        manifest = read_json(folder / "manifest.json")
        self.autoencoder = autoencoder
        self.device = device
        self.shape = tuple(manifest["shape"])
        if any(Path(name).name != name for name in manifest[split]):
            raise RunError(f"{folder / 'manifest.json'} names files outside {folder}: --redo '[latents]'")
        shards = [load_file(folder / name) for name in manifest[split]]
        self.shard_size = len(shards[0]["mean"])
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        if resident == "auto":
            resident = "device" if size < _device_memory(device) / 4 else "disk"
        self.resident = resident == "device"
        if self.resident:
            shards = [{key: torch.cat([s[key] for s in shards]).to(device) for key in shards[0]}]
            self.shard_size = len(shards[0]["mean"])
        self.shards = shards

    def __len__(self) -> int:
        return sum(len(shard["mean"]) for shard in self.shards)

    def _gather(self, key: str, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        if self.resident:
            tensor, indices = self.shards[0][key], indices.to(self.device)
            return tensor[indices] if flips is None else tensor[indices, flips.to(self.device)]
        places = [(self.shards[i // self.shard_size][key], i % self.shard_size) for i in indices.tolist()]
        if flips is None:
            rows = [tensor[row] for tensor, row in places]
        else:
            rows = [tensor[row, flip] for (tensor, row), flip in zip(places, flips.tolist(), strict=True)]
        return torch.stack(rows).to(self.device)

    def batch(self, indices: Tensor, flips: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents `(N, c, h, w)`, float32, drawn from their posteriors with `noise`.

        Args:
            indices: `(N,)` images.
            flips: `(N,)` 1 for the mirror image; taken modulo the number of images cached of each.
        """
        flips = flips % self.shards[0]["mean"].shape[1]
        latents = self._gather("mean", indices, flips).float()
        if "std" in self.shards[0]:
            latents = latents + self._gather("std", indices, flips).float() * noise
        return normalize_latents(self.autoencoder, latents)

    def class_labels(self, indices: Tensor) -> Tensor | None:
        """Labels `(N,)`, or None if the data has none."""
        return self._gather("class_labels", indices) if "class_labels" in self.shards[0] else None


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
