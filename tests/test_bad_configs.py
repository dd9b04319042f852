"""Configurations that cannot work are refused at once, naming the option that changes it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, environment

from training.config import LOCK, Config, RunError, parse_config
from training.publish_ldm import Publication, parse


def tiny(*argv: str) -> Config:
    return parse_config(["--config", str(TINY), *argv])


def refusal(*argv: str) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(RunError) as refused:
        parse_config(list(argv))
    return str(refused.value)


def written(folder: Path, content: str | bytes) -> str:
    """The name of a configuration file with this content."""
    file = folder / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no options"),
        (b"[1, 2]", "holds no options"),
        (b"data: {resolution: 16\nseed: ]", "cannot be read"),
        (b"data:\n\tresolution: 16\n", "cannot be read"),
        (b"seed: 1\n---\nseed: 2\n", "cannot be read"),
        (b"seed: 1\nseed: 2\n", "line 2: 'seed' is given twice"),
        (b"data: {channels: 1}\nseed: 1\ndata: {resolution: 16}\n", "line 3: 'data' is given twice"),
        (b"denoiser:\n  dropout: 0.1\n  dropout: 0.2\n", "line 3: 'dropout' is given twice"),
        ("output_dir: café".encode("latin-1"), "cannot be read"),
        (b"seed: 1\ndata:\n", "line 2: data: want a mapping of options"),
        (b"denoiser: 3\n", "line 1: denoiser: want a mapping of options"),
        (b"seed: {a: 1}\n", "--seed {'a': 1}: want a whole number"),
        (b"denoiser: {compile: maybe}\n", "--denoiser.compile maybe: want true or false"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name(content, message, tmp_path):
    text = refusal("--config", written(tmp_path, content))
    assert "mine.yaml: " in text and message in text


@pytest.mark.parametrize(
    "content, message",
    [
        ("sed: 1", "--sed is unknown; did you mean --seed?"),
        ("denoiser: {max_stps: 3}", "--denoiser.max_stps is unknown; did you mean --denoiser.max_steps?"),
        ("denoiser:\n  max_steps:\n", "--denoiser.max_steps has no value"),
    ],
)
def test_a_wrong_option_of_a_file_is_named(content, message, tmp_path):
    assert message in refusal("--config", written(tmp_path, content))


@pytest.mark.parametrize("missing", ["", "no.yaml", "seed: 3", "."])
def test_config_wants_a_file(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("--config", missing).startswith("--config wants a file")


@pytest.mark.parametrize(
    "content",
    [
        "seed: !!python/object/apply:pathlib.Path.touch [trap]",
        "seed: !!python/name:os.system",
        "data: {class_path: trap_module.X}",
        "data: trap_module.X",
        "class_path: trap_module.X",
        "evaluation: {features: 'trap_module:X'}",
    ],
)
def test_a_file_runs_no_code(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("trap_module.py").write_text("class X: pass\n")
    refusal("--config", written(tmp_path, content))
    assert not Path("trap").exists() and "trap_module" not in sys.modules


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("seed", "4294967296", "a whole number from 0 to 4294967295"),
        ("output_dir", "", "text that is not empty"),
        ("data.dataset", "", "text that is not empty"),
        ("data.resolution", "0", "a whole number, 8 or more"),
        ("data.channels", "2", "one of 1, 3"),
        ("data.held_out", "1", "a number from 0 to below 1"),
        ("autoencoder.widths", "[]", "a list in brackets, each a whole number above 0"),
        ("autoencoder.widths", "[0, 16]", "a list in brackets, each a whole number above 0"),
        ("autoencoder.kl_weight", ".inf", "a number, 0 or more"),
        ("denoiser.adam_betas", "[0.9]", "2 values in brackets, each a number from 0 to below 1"),
        ("denoiser.learning_rate", ".nan", "a number above 0"),
        ("denoiser.max_steps", "many", "a whole number above 0"),
        ("denoiser.max_steps", "1.5", "a whole number above 0"),
        ("denoiser.class_conditional", "cats", "true or false"),
        ("denoiser.guidance_interval", "[0.8, 0.2]", "two rising noise levels"),
        ("evaluation.save_samples", "jpg", "one of png, npz"),
        ("redo", "denoiser", "a list in brackets, each one of autoencoder, latents, denoiser, evaluation"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_wanted(option, value, wanted):
    text = refusal("--config", str(TINY), f"--{option}={value}")
    assert text.startswith(f"--{option} ") and text.split("\n")[0].endswith(f": want {wanted}")


@pytest.mark.parametrize(
    "given, reason",
    [
        (["--denoiser.zero_terminal_snr"], "denoiser.prediction_type is flow_prediction"),
        (["--denoiser.beta_schedule=scaled_linear"], "denoiser.prediction_type is flow_prediction"),
        (["--denoiser.timestep_density=uniform", "--denoiser.logit_std=2"], "timestep_density is uniform"),
        (["--denoiser.min_snr_gamma=4"], "denoiser.loss_weight is uncertainty"),
        (
            ["--denoiser.class_conditional=false", "--denoiser.label_dropout=0.2"],
            "class_conditional is false",
        ),
        (["--denoiser.evaluate_samples=20"], "denoiser.evaluate_every is 0"),
        (["--autoencoder.gan_start=3"], "autoencoder.gan_weight is 0.0"),
        (["--autoencoder.pretrained=vae", "--autoencoder.batch_size=8"], "autoencoder.pretrained is vae"),
        (["--evaluation.num_samples=0", "--evaluation.schedulers=[DDIM]"], "evaluation.num_samples is 0"),
        (["--data.label_column=label"], "data.dataset is digits"),
    ],
)
def test_an_option_without_effect_is_refused(given, reason):
    text = refusal("--config", str(TINY), *given)
    assert text.startswith(given[-1].partition("=")[0]) and "would have no effect" in text and reason in text


def test_the_command_line_may_turn_options_of_the_file_off(tmp_path):
    """So may the configuration that a run has stored, which lists every option."""
    config = tiny("--autoencoder.pretrained=vae", "--denoiser.loss_weight=none")
    assert config.autoencoder.widths == [8, 16]
    stored = written(tmp_path, json.dumps(asdict(config)))
    assert "would have no effect" in refusal("--config", stored)
    (tmp_path / LOCK).touch()
    assert parse_config(["--config", stored]) == config


def test_flags_need_no_value():
    assert tiny("--dry_run").dry_run and tiny("--dry_run", "true").dry_run and tiny("--dry_run=true").dry_run
    assert not tiny("--dry_run", "false", "--seed=1").dry_run
    config = tiny("--data.horizontal_flip", "--seed", "1", "--denoiser.class_conditional")
    assert config.data.horizontal_flip and config.denoiser.class_conditional and config.seed == 1
    source, options = parse(["--private", "runs/mine", "--repo_id", "org/mine", "--license", "mit"])
    assert source == "runs/mine" and options == Publication("org/mine", "mit", private=True)


def test_a_script_redoes_its_own_stages_only():
    argv = ["--config", str(TINY), "--redo", "[denoiser]"]
    assert parse_config(argv, ["denoiser"]).redo == ["denoiser"]
    with pytest.raises(RunError, match="this script does autoencoder"):
        parse_config(argv, ["autoencoder"])


def test_the_printed_configuration_is_plain_and_can_be_read_again(tmp_path, capsys):
    argv = ("--denoiser.adam_betas=[0.8, 0.95]", "--denoiser.max_grad_norm=.inf", "--output_dir=läufe/画像")
    with pytest.raises(SystemExit) as stop:
        tiny(*argv, "--print_config")
    printed = capsys.readouterr().out
    assert stop.value.code in (0, None) and yaml.safe_load(printed)["denoiser"]["widths"] == [16, 32]
    assert parse_config(["--config", written(tmp_path, printed)]) == tiny(*argv)


def test_help_is_one_screen_and_help_all_names_every_option(capsys):
    helps = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            tiny(flag)
        helps[flag] = capsys.readouterr().out
        assert max(map(len, helps[flag].splitlines())) <= 100
    assert len(helps["--help"].splitlines()) <= 45 and "--data.dataset" in helps["--help"]
    for section, options in asdict(Config()).items():
        for name in options if isinstance(options, dict) else ():
            assert f"  --{section}.{name} " in helps["--help_all"]


def test_a_wrong_option_is_answered_before_heavy_imports():
    code = (
        "import sys; from training.config import RunError, parse_config\n"
        "try: parse_config(['--denoiser.max_stps=3'])\n"
        "except RunError as error: print(error)\n"
        "print({'torch', 'diffusers', 'datasets', 'accelerate'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60)
    assert "did you mean --denoiser.max_steps?" in answer.stdout and "set()" in answer.stdout


def test_the_main_job_ends_with_code_2_and_leaves_nothing(tmp_path):
    written(tmp_path, "data: {resolution: 16\n")
    command = [sys.executable, str(ROOT / "training" / "train_ldm.py"), "--config", "mine.yaml"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert refused.returncode == 2 and "mine.yaml: cannot be read" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
