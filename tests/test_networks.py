"""Networks that cannot be built, or do not fit the data or each other, are refused at the start."""

import shutil

import pytest
import torch
from conftest import TINY

from ldm_pipeline.models import build_autoencoder
from ldm_pipeline.pipeline import denoise
from training.config import Config, DataConfig, RunError, parse_config
from training.data.images import load_images
from training.networks import blank_condition, check_data, check_networks, new_denoiser

DC = "--autoencoder.kind=AutoencoderDC"


def tiny(*argv: str) -> Config:
    return parse_config(["--config", str(TINY), *argv])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--autoencoder.gradient_accumulation_steps=3"], "--autoencoder.gradient_accumulation_steps 3"),
        (["--autoencoder.blocks=[1]"], "--autoencoder.widths .*--autoencoder.blocks"),
        (["--autoencoder.blocks=[0, 0]"], "--autoencoder.widths .*--autoencoder.blocks"),
        ([DC, "--autoencoder.widths=[8, 10]", "--autoencoder.blocks=[0, 1]"], "--autoencoder.widths"),
        ([DC, "--autoencoder.blocks=[0, 2]", "--autoencoder.latent_channels=5"], "latent_channels 5"),
        (["--denoiser.attention=[true]"], "--denoiser.widths .*--denoiser.attention"),
        (["--denoiser.norm_groups=5"], "--denoiser.norm_groups 5"),
        (["--denoiser.attention_head_dim=5"], "--denoiser.attention_head_dim 5"),
        (["--data.resolution=18"], "--data.resolution 18"),
        (["--data.resolution=8", "--autoencoder.equivariance=0"], None),
        (["--data.resolution=4", "--autoencoder.equivariance=0", "--denoiser.widths=[16, 16]"], "resolution"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_its_options(argv, message):
    if message is None:
        check_networks(tiny(*argv), 1)
        return
    with pytest.raises(RunError, match=message):
        check_networks(tiny(*argv), 1)


def test_the_batch_must_be_cut_among_the_processes():
    with pytest.raises(RunError, match="--autoencoder.batch_size 16 .*3 processes"):
        check_networks(tiny(), 3)


def test_labels_and_batches_that_are_asked_for_must_exist():
    data = load_images(DataConfig(dataset="digits", resolution=16, channels=1))
    check_data(tiny("--denoiser.class_conditional=true"), data)
    assert new_denoiser(tiny(), data, (4, 8, 8)).config.num_class_embeds == 11
    with pytest.raises(RunError, match="--denoiser.batch_size 1798 is more than the 1707"):
        check_data(tiny("--denoiser.batch_size=1798"), data)
    data.id2label = None
    assert new_denoiser(tiny(), data, (4, 8, 8)).config.num_class_embeds is None
    with pytest.raises(RunError, match="--denoiser.class_conditional"):
        check_data(tiny("--denoiser.class_conditional=true"), data)


@pytest.mark.parametrize("text_width", [None, 8])
def test_a_new_denoiser_predicts_zero_and_all_of_it_learns(text_width):
    """Layers of zeros behind each other pass no gradient: it needs a few steps to reach all parameters."""
    unet = new_denoiser(tiny("--denoiser.dropout=0"), None, (4, 8, 8), text_width)
    optimizer, noisy = torch.optim.SGD(unet.parameters(), lr=0.1), torch.randn(2, 4, 8, 8)
    condition = blank_condition(unet, 2)
    if text_width:
        condition.encoder_hidden_states.normal_()
    assert not denoise(unet, noisy, torch.full((2,), 500.0), condition).any()
    for _ in range(4):
        optimizer.zero_grad()
        (denoise(unet, noisy, torch.full((2,), 500.0), condition) - noisy).square().mean().backward()
        optimizer.step()
    assert not [name for name, parameter in unet.named_parameters() if not parameter.grad.any()]


@pytest.fixture
def existing(tmp_path):
    """A folder with an autoencoder of grey images."""
    build_autoencoder("AutoencoderKL", [8, 16], [1, 1], 4, 1, 16).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_an_existing_autoencoder_is_planned_from_its_config_alone(existing):
    (existing / "diffusion_pytorch_model.safetensors").unlink()
    autoencoder, denoiser = check_networks(tiny(f"--autoencoder.pretrained={existing}"), 1)
    assert autoencoder.device.type == denoiser.device.type == "meta"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{oops"),
        lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}'),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_an_existing_autoencoder_that_is_none_is_refused_with_its_option(damage, existing, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage(existing)
    with pytest.raises(RunError, match="--autoencoder.pretrained"):
        check_networks(tiny(f"--autoencoder.pretrained={existing}"), 1)
