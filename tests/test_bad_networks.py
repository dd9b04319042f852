"""Networks that cannot be built, or do not fit the data or each other, are refused in the user's words."""

import shutil

import pytest
from conftest import TINY
from fuzz_configs import digits

from ldm_pipeline.models import build_autoencoder, build_unet
from training.config import Config, parse_config
from training.networks import check_networks, check_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(*argv: str) -> Config:
    return parse_config(["--config", str(TINY), *argv])


def built(config: Config, data):
    """Both networks, after all checks."""
    return check_networks(config, data, *check_shapes(config, 1))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--denoiser.warmup_steps=20"], "--denoiser.warmup_steps 20 .*--denoiser.max_steps 12"),
        (["--denoiser.decay_fraction=1"], "--denoiser.decay_fraction"),
        (["--denoiser.batch_size=1798"], "--denoiser.batch_size 1798 is more than the 1707"),
        (["--autoencoder.gradient_accumulation_steps=3"], "--autoencoder.gradient_accumulation_steps 3"),
        (["--autoencoder.blocks=[1]"], "autoencoder.blocks .*autoencoder.widths"),
        (["--autoencoder.blocks=[1, 2]"], "autoencoder.blocks .*AutoencoderKL wants one number"),
        (["--autoencoder.blocks=[0, 0]"], "autoencoder.blocks .*AutoencoderKL wants one number"),
        (["--denoiser.attention=[true]"], "denoiser.attention .*denoiser.widths"),
        (["--denoiser.norm_groups=5"], "denoiser.widths .*denoiser.norm_groups 5"),
        (["--denoiser.attention_head_dim=5"], "denoiser.widths .*denoiser.attention_head_dim 5"),
        (
            ["--data.resolution=20", "--denoiser.widths=[16, 16, 16]"],
            "--data.resolution 20 is no multiple of 8",
        ),
        (
            ["--data.resolution=8", "--autoencoder.widths=[8, 8, 8]", "--autoencoder.blocks=[1, 1, 1]"],
            "too few",
        ),
        (
            ["--denoiser.widths=[16, 16, 16, 16]", "--denoiser.attention=[false, false, false, false]"]
            + ["--denoiser.norm_groups=16"],
            "denoiser.norm_groups 16 .*1x1",
        ),
        (
            ["--data.resolution=18", "--autoencoder.equivariance=0.5", "--denoiser.widths=[16]"],
            "equivariance",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_its_options(argv, message):
    if "--denoiser.widths=[16]" in argv:
        argv = [*argv, "--denoiser.attention=[true]"]
    with pytest.raises(ValueError, match=message):
        built(tiny(*argv), digits(True))


@pytest.mark.parametrize(
    "widths, blocks, latent_channels, message",
    [
        ([8], [0], 4, "autoencoder.blocks"),
        ([8, 8, 8], [1, 0, 1], 4, "autoencoder.blocks"),
        ([8, 10], [0, 1], 2, "autoencoder.widths"),
        ([8, 12], [1, 1], 4, "autoencoder.widths"),
        ([8, 64], [1, 1], 4, "autoencoder.widths"),
        ([8, 16], [0, 2], 5, "autoencoder.latent_channels 5"),
        ([8, 16], [0, 2], 32, "autoencoder.latent_channels 32"),
    ],
)
def test_what_autoencoder_dc_cannot_compute_is_refused(widths, blocks, latent_channels, message):
    with pytest.raises(ValueError, match=message):
        build_autoencoder("AutoencoderDC", widths, blocks, latent_channels)


def test_networks_without_levels_are_refused():
    with pytest.raises(ValueError, match="autoencoder.widths"):
        build_autoencoder("AutoencoderKL", [], [], 4)
    with pytest.raises(ValueError, match="denoiser.widths"):
        build_unet(8, 4, [])


def test_labels_that_are_asked_for_must_exist():
    config = tiny("--denoiser.class_conditional=true")
    assert built(config, digits(True))[1].config.num_class_embeds == 11
    with pytest.raises(ValueError, match="--denoiser.class_conditional"):
        built(config, digits(False))


@pytest.fixture
def existing(tmp_path):
    """A folder with an autoencoder of grey images."""
    build_autoencoder("AutoencoderKL", [8, 16], [1, 1], 4, 1, 16).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_an_existing_autoencoder_needs_no_training_options(existing):
    impossible = (
        "--autoencoder.batch_size=5000",
        "--autoencoder.warmup_steps=5000",
        "--autoencoder.blocks=[0, 1]",
    )
    config = tiny(f"--autoencoder.pretrained={existing}", *impossible)
    assert built(config, digits(True))[0].config.latent_channels == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{oops"),
        lambda folder: (folder / "config.json").write_text("[1]"),
        lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}'),
        lambda folder: (folder / "config.json").write_text('{"_class_name": ["AutoencoderKL"]}'),
        lambda folder: (folder / "config.json").write_text(
            '{"_class_name": "AutoencoderKL", "block_out_channels": "x"}'
        ),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000]),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_a_damaged_autoencoder_is_refused_with_its_option(damage, existing, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage(existing)
    with pytest.raises(ValueError, match="--autoencoder.pretrained"):
        built(tiny(f"--autoencoder.pretrained={existing}"), digits(True))
