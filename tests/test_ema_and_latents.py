"""The weight average and the latent cache against what they stand for."""

import json

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch import nn

from ldm_pipeline.loading import load_autoencoder
from ldm_pipeline.pipeline import denormalize_latents
from training.config import parse_config
from training.data.images import load_images
from training.data.latents import LatentDataset, channel_statistics, encode
from training.runtime.ema import EMA


def test_the_average_forgets_half_of_a_step_in_its_half_life():
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    ema = EMA(module, fraction=1e9, half_life=1000)
    nn.init.ones_(module.weight)
    for step in range(10):
        ema.update(100 * (step + 1), 100)
    assert ema.state_dict()["weight"].item() == pytest.approx(0.5, abs=1e-4)


def test_the_average_moves_under_bf16_weights_and_swaps_in_a_scope():
    module = nn.Linear(4, 4).to(torch.bfloat16)
    ema = EMA(module, fraction=1e9, half_life=1_000_000)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    trained = {name: (p.data.add_(1.0)).clone() for name, p in module.named_parameters()}
    ema.update(100, 100)
    assert all(
        (ema.state_dict()[name] > before[name]).all() for name in before
    )  # a bf16 average would stand still
    with ema.swapped():
        assert not torch.equal(module.weight, trained["weight"])
    assert all(torch.equal(p, trained[name]) for name, p in module.named_parameters())


def test_early_averages_forget_the_initial_weights():
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, 1000.0)
    ema = EMA(module, fraction=0.05, half_life=500_000)
    nn.init.zeros_(module.weight)
    for step in range(50):
        ema.update(64 * (step + 1), 64)
    assert abs(ema.state_dict()["weight"].item()) < 1


@pytest.fixture(scope="module")
def cache(tiny_run):
    autoencoder = load_autoencoder(tiny_run / "autoencoder").eval()
    images = load_images(parse_config(["--config", str(TINY)]).data).train
    return tiny_run / "latents", autoencoder, images


def test_cached_latents_equal_live_ones(cache):
    folder, autoencoder, images = cache
    latents = LatentDataset(folder, "train", autoencoder, torch.device("cpu"), "device")
    indices = torch.tensor([0, 999, 1000, len(images) - 1])  # both sides of a shard's border
    cached = latents.batch(indices, torch.zeros(4, dtype=torch.long), torch.zeros(4, *latents.shape))
    with torch.no_grad():
        live = encode(autoencoder, torch.stack([images[i, False]["images"] for i in indices.tolist()]))[0]
    assert torch.allclose(
        denormalize_latents(autoencoder, cached), live, rtol=2e-3, atol=2e-3
    )  # float16 on disk
    assert torch.equal(latents.class_labels(indices), images.labels[indices])


def test_mapped_latents_equal_resident_ones(cache):
    folder, autoencoder, images = cache
    sets = [
        LatentDataset(folder, "train", autoencoder, torch.device("cpu"), where)
        for where in ("device", "disk")
    ]
    assert len(sets[0]) == len(sets[1]) == len(images)
    indices, noise = torch.randperm(len(images))[:32], torch.randn(32, *sets[0].shape)
    for bf16 in (False, True):  # validation reads them where the networks compute in bf16
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            a, b = (latents.batch(indices, torch.ones(32, dtype=torch.long), noise) for latents in sets)
        assert torch.equal(a, b)
    assert torch.equal(sets[0].class_labels(indices), sets[1].class_labels(indices))


def test_statistics_are_those_of_posterior_samples_and_normalise(cache):
    folder, autoencoder, images = cache
    shards = [folder / name for name in json.loads((folder / "manifest.json").read_text())["train"]]
    mean, std = channel_statistics(shards)
    moments = [load_file(shard) for shard in shards]
    samples = torch.cat(
        [m["mean"].float() + m["std"].float() * torch.randn(m["mean"].shape) for m in moments]
    )
    assert torch.allclose(samples.mean((0, 1, 3, 4)), mean.float(), atol=0.02 * std.max().item())
    assert torch.allclose(samples.std((0, 1, 3, 4)), std.float(), rtol=0.02)
    assert autoencoder.config.latents_mean == mean.tolist() and autoencoder.config.latents_std == std.tolist()
