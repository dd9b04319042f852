"""What may happen to a run folder, and what is refused before anything is touched."""

import pytest
from conftest import TINY

from training.config import parse_config
from training.runtime.folder import check_folder, close_folder, open_folder


def configure(folder, *options):
    return parse_config(["--config", str(TINY), "--output_dir", str(folder), *options])


@pytest.fixture
def finished(tmp_path):
    """A run folder that has results of every stage."""
    run = open_folder(configure(tmp_path / "run"))
    for name in ("autoencoder", "latents", "denoiser", "pipeline"):
        (run / name).mkdir()
    (run / "metrics.json").write_text("{}")
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
    ],
)
def test_another_run_is_refused_with_the_first_stage_to_redo(finished, option, stage):
    with pytest.raises(ValueError, match=rf"--redo '\[{stage}\]'"):
        check_folder(configure(finished, option))
    check_folder(configure(finished, option, "--redo", f"[{stage}]"))
    assert len(results(finished)) == 5


@pytest.mark.parametrize(
    "option", ["--denoiser.max_steps=50", "--denoiser.learning_rate=0.1", "--data.num_workers=2"]
)
def test_a_run_may_go_on_for_longer_or_faster(finished, option):
    check_folder(configure(finished, option))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(ValueError, match="not a run folder"):
        check_folder(configure(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        check_folder(configure(tmp_path / "thesis.tex"))
