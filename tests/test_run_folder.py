"""What may happen to a run folder, and what is refused before anything is touched."""

import contextlib
import shutil

import pytest
import yaml
from conftest import TINY
from torch import nn

from ldm_pipeline.models import build_unet
from training.config import RunError, parse_config
from training.runtime.folder import check_folder, check_guide, check_space, close_folder, open_folder


def configure(folder, *options):
    return parse_config(["--config", str(TINY), "--output_dir", str(folder), *options])


@pytest.fixture
def finished(tmp_path):
    """A run folder that has results of every stage."""
    run = open_folder(configure(tmp_path / "run"))
    for name in ("autoencoder", "latents", "denoiser", "pipeline"):
        (run / name).mkdir()
    for name in ("metrics.json", "samples/autoencoder-0000012.png", "samples/denoiser-0000012-ema.png"):
        (run / name).write_text("{}")
    return run


def results(run):
    return {path.name for path in run.iterdir()} & {
        "autoencoder",
        "latents",
        "denoiser",
        "pipeline",
        "metrics.json",
    }


def test_redo_drops_the_stage_and_what_depends_on_it_once(finished):
    again = configure(finished, "--redo", "[denoiser]")
    open_folder(again)
    assert results(finished) == {"autoencoder", "latents"}
    assert [path.name for path in (finished / "samples").iterdir()] == ["autoencoder-0000012.png"]
    (finished / "denoiser").mkdir()
    open_folder(again)  # the same command, after a crash
    assert results(finished) == {"autoencoder", "latents", "denoiser"}
    close_folder(finished)
    open_folder(again)  # the same command, after the end
    assert results(finished) == {"autoencoder", "latents"}


@pytest.mark.parametrize(
    "option, stage",
    [
        ("--denoiser.widths=[16, 64]", "denoiser"),
        ("--autoencoder.latent_channels=2", "autoencoder"),
        ("--autoencoder.max_steps=20", "autoencoder"),  # the denoiser has learnt this autoencoder's latents
        ("--data.resolution=32", "autoencoder"),
        ("--seed=1", "autoencoder"),
        ("--denoiser.adam_betas=[0.5, 0.9]", "denoiser"),
        ("--latents.shard_size=500", "latents"),
    ],
)
def test_another_run_is_refused_with_the_first_stage_to_redo(finished, option, stage):
    with pytest.raises(RunError, match=rf"--redo '\[{stage}\]'"):
        check_folder(configure(finished, option))
    check_folder(configure(finished, option, "--redo", f"[{stage}]"))
    assert len(results(finished)) == 5


@pytest.mark.parametrize(
    "option",
    [
        "--denoiser.max_steps=50",
        "--denoiser.learning_rate=0.1",
        "--data.num_workers=2",
        "--latents.batch_size=8",  # the advice when memory runs out
        "--evaluation.batch_size=8",
        "--autoencoder.log_every=1",
        "--autoencoder.keep_checkpoints=3",
        "--autoencoder.compile=true",
        "--autoencoder.gradient_accumulation_steps=2",
    ],
)
def test_an_option_that_changes_no_result_may_change(finished, option):
    check_folder(configure(finished, option))


def test_an_autoencoder_may_train_longer_until_a_denoiser_has_learnt_its_latents(finished):
    (finished / "denoiser").rmdir()
    check_folder(configure(finished, "--autoencoder.max_steps=20"))


def test_a_stored_configuration_may_know_more_or_fewer_options(finished):
    """Those of an older version: an option that it did not know had its default."""
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    del stored["denoiser"]["prediction_type"], stored["data"]["held_out"]
    stored["denoiser"]["forgotten"] = stored["forgotten"] = 3
    (finished / "config.yaml").write_text(yaml.safe_dump(stored))
    said = []
    check_folder(configure(finished), said.append)
    assert said == []
    with pytest.raises(RunError, match="data.held_out changed"):
        check_folder(configure(finished, "--data.held_out=0.1"))


def test_a_token_is_not_stored_and_is_no_change(tmp_path):
    configured = configure(tmp_path / "run", "--data.dataset=https://me:secret@host/x.parquet")
    run = open_folder(configured)
    (run / "autoencoder").mkdir()
    check_folder(configured)
    assert "secret" not in (run / "config.yaml").read_text()


def test_the_disk_needs_no_room_for_checkpoints_of_a_pretrained_autoencoder(tmp_path, monkeypatch):
    networks = nn.Linear(1000, 1000), build_unet(8, 4, [16, 32], norm_groups=8, attention_head_dim=8)
    free = shutil.disk_usage(tmp_path)._replace(free=25 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match="needs up to"):
        check_space(configure(tmp_path, "--autoencoder.keep_checkpoints=5"), networks, 1)
    given = configure(tmp_path, "--autoencoder.pretrained=vae")
    given.autoencoder.keep_checkpoints = 5
    check_space(given, networks, 1)


@pytest.mark.parametrize(
    "step, there, redo, message",
    [
        (4, [], [], None),
        (4, [8], ["denoiser"], None),  # trained again from the start
        (6, [6, 12], [], None),  # kept, whatever the options are now
        (4, [8, 12], [], r"kept the checkpoints \[8, 12\]"),
        (5, [], [], "a multiple of --denoiser.checkpoint_every 2 below --denoiser.max_steps 12"),
        (12, [], [], "below --denoiser.max_steps 12"),
    ],
)
def test_the_checkpoint_of_a_guide_is_there_or_will_be(tmp_path, step, there, redo, message):
    options = ("--denoiser.guide_step", str(step), "--denoiser.checkpoint_every=2")
    config = configure(tmp_path / "run", *options, "--redo", str(redo))
    for each in there:
        (tmp_path / "run" / "denoiser" / f"checkpoint-{each}").mkdir(parents=True)
    with pytest.raises(RunError, match=message) if message else contextlib.nullcontext():
        check_guide(config)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(RunError, match="not a run folder"):
        check_folder(configure(tmp_path))
    with pytest.raises(RunError, match="is a file"):
        check_folder(configure(tmp_path / "thesis.tex"))
