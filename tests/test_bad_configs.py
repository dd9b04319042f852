"""Configurations that cannot work are refused at once, naming what to change; the others build."""

import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT, TINY, environment
from fuzz_configs import options, outcomes

from training.config import Config, check_config, parse_config


def refusal(*argv: str, capsys=None) -> str:
    """The text with which the parser refuses a command line."""
    with pytest.raises(SystemExit) as stop:
        parse_config(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


def tiny(*argv: str) -> Config:
    return parse_config(["--config", str(TINY), *argv])


def test_hundreds_of_configurations_build_or_are_refused_in_words():
    counts = outcomes()
    assert sum(counts.values()) >= 200
    for kind in ("text", "option", "networks"):
        assert counts[kind, "accepted"] >= 10 and counts[kind, "refused"] >= 10, counts


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no options"),
        (b"# later\n", "holds no options"),
        (b"null", "holds no options"),
        (b"[1, 2]", "holds no options"),
        (b"hello", "holds no options"),
        (b"data: {resolution: 16\nseed: ]", "not read as YAML"),
        (b"data:\n\tresolution: 16\n", "not read as YAML"),
        (b"seed: 1\n---\nseed: 2\n", "not read as YAML"),
        (b"seed: 1\nseed: 2\n", "line 2: 'seed' is given twice"),
        (b"data: {resolution: 16}\nseed: 1\ndata: {channels: 1}\n", "line 3: 'data' is given twice"),
        (b"denoiser:\n  dropout: 0.1\n  dropout: 0.2\n", "'dropout' is given twice"),
        (b"autoencoder: {widths: &w [8, 16]}\ndenoiser: {widths: *w}\n", "line 2: aliases are not read"),
        (b"data: &d {subset: *d}\n", "aliases are not read"),
        (b"seed: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"seed: " + b"9" * 5000, "digits"),
        (bytes(range(256)), "UTF-8"),
        ("seed: 1".encode("utf-16"), "UTF-8"),
        ("output_dir: café".encode("latin-1"), "UTF-8"),
        (b"seed: 1\0", "not read as YAML"),
        (b"seed: 1.5\n", "seed"),
        (b"seed: {a: 1}\n", "seed"),
        (b"1: 2\n", "Key must be a string"),
        (b"data: {class_path: training.config.DataConfig}\n", "class_path is no option"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_file(content, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    text = refusal("--config", str(file), capsys=capsys)
    assert "mine.yaml" in text and message in text and len(text) < 3000


@pytest.mark.parametrize(
    "content, message",
    [
        ("sed: 1\n", "did you mean seed"),
        ("denoiser: {max_stps: 3}\n", "did you mean denoiser.max_steps"),
        ("seed: 1\ndata:\n", "data: want a mapping of options, not None"),
        ("data: [1]\n", "data: want a mapping of options, not [1]"),
        ("denoiser: 3\n", "denoiser: want a mapping of options, not 3"),
    ],
)
def test_what_is_no_option_is_refused_with_its_name(content, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert message in refusal("--config", str(file), capsys=capsys)


@pytest.mark.parametrize("missing", ["", "-", "no.yaml", "{seed: 3}", "seed: 3", "."])
def test_config_wants_a_file(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "config" in refusal("--config", missing, capsys=capsys).split("\n")[0]


@pytest.mark.parametrize("place", ["{}", "seed: {}", "output_dir: {}", "data: {{dataset: {}}}"])
@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{path}]",
        "!!python/object/new:os.system ['touch {path}']",
        "!!python/object/apply:os.system ['touch {path}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!mine 3",
    ],
)
def test_tags_that_would_make_objects_are_refused_and_do_nothing(tag, place, tmp_path, capsys):
    trap, file = tmp_path / "trap", tmp_path / "mine.yaml"
    file.write_text(place.format(tag.format(path=trap)))
    assert "not read as YAML" in refusal("--config", str(file), capsys=capsys)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content", ["data: {{class_path: {name}.X}}", "data: {name}.X", "class_path: {name}.X"]
)
def test_no_module_is_imported(content, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap_module.py").write_text("class X: pass\n")
    (tmp_path / "mine.yaml").write_text(content.format(name="trap_module"))
    refusal("--config", str(tmp_path / "mine.yaml"), capsys=capsys)
    assert "trap_module" not in sys.modules, sys.modules.pop("trap_module")


def test_a_bomb_of_aliases_is_refused_before_it_grows(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    began = time.monotonic()
    assert "aliases" in refusal("--config", str(file), capsys=capsys)
    assert time.monotonic() - began < 10


def test_a_value_that_is_left_out_by_mistake_is_not_none(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("denoiser:\n  max_steps:\n")
    with pytest.raises(ValueError, match="--denoiser.max_steps has no value"):
        parse_config(["--config", str(file)])


def test_other_alphabets_are_welcome(tmp_path):
    file = tmp_path / "画像.yaml"
    file.write_text("output_dir: läufe/画像\ndata: {dataset: фото}\n", encoding="utf-8")
    config = parse_config(["--config", str(file)])
    assert config.output_dir == "läufe/画像" and config.data.dataset == "фото"


def test_every_number_has_a_range():
    """No number may be NaN, infinite below, immense or immensely negative, whatever option is added."""
    config, numbers = tiny(), 0
    for name, value in options(config).items():
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, bool) or not isinstance(first, (int, float)) or name == "data.channels":
            continue
        numbers += 1
        for bad in (math.nan, -1e30, -math.inf) if isinstance(first, float) else (-(10**30), 10**30):
            wrong = copy.deepcopy(config)
            section, _, option = name.rpartition(".")
            owner = getattr(wrong, section) if section else wrong
            setattr(owner, option, bad if first is value else [bad] * len(value))
            with pytest.raises(ValueError, match=f"--{name} .* want "):
                check_config(wrong)
    assert numbers > 40


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("seed", "-1", "from 0 to 4294967295"),
        ("seed", "4294967296", "from 0 to 4294967295"),
        ("output_dir", "", "the path of a folder"),
        ("data.resolution", "0", "from 8"),
        ("data.held_out", "1", "from 0 to below 1"),
        ("data.num_workers", "-1", "from 0"),
        ("autoencoder.widths", "[]", "from 1"),
        ("autoencoder.widths", "[0, 16]", "from 1"),
        ("autoencoder.blocks", "[-1, 1]", "from 0"),
        ("autoencoder.latent_channels", "0", "from 1"),
        ("autoencoder.kl_weight", "-1", "from 0"),
        ("autoencoder.kl_weight", ".inf", "from 0"),
        ("autoencoder.equivariance", "1.1", "from 0 to 1"),
        ("autoencoder.keep_every", "-1", "from 0"),
        ("latents.shard_size", "0", "from 1"),
        ("evaluation.num_images", "0", "from 1"),
        ("evaluation.batch_size", "0", "from 1"),
        ("denoiser.adam_betas", "[0.9, 1]", "from 0 to below 1"),
        ("denoiser.adam_betas", "[-0.1, 0.9]", "from 0 to below 1"),
        ("denoiser.decay_fraction", "1.1", "from 0 to 1"),
        ("denoiser.ema_fraction", "0", "above 0"),
        ("denoiser.learning_rate", "0", "above 0"),
        ("denoiser.learning_rate", ".inf", "above 0"),
        ("denoiser.max_grad_norm", "0", "above 0"),
        ("denoiser.dropout", "1", "from 0 to below 1"),
        ("denoiser.label_dropout", "1.1", "from 0 to 1"),
        ("denoiser.logit_std", "0", "above 0"),
        ("denoiser.min_snr_gamma", "0", "above 0"),
        ("denoiser.guidance_scale", ".inf", "from -100 to 100"),
        ("denoiser.sample_steps", "0", "from 1 to 1000"),
        ("denoiser.layers_per_block", "0", "from 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_range(option, value, wanted):
    with pytest.raises(ValueError) as refused:
        tiny(f"--{option}={value}")
    text = str(refused.value)
    assert (
        text.startswith(f"--{option} ")
        and f"want {'the' if 'path' in wanted else ''}" in text
        and wanted in text
    )


def test_the_printed_configuration_is_plain_and_can_be_read_again(tmp_path, capsys):
    config = tiny("--denoiser.adam_betas=[0.8, 0.95]", "--denoiser.max_grad_norm=.inf", "--output_dir=x")
    with pytest.raises(SystemExit) as stop:
        tiny(
            *("--denoiser.adam_betas=[0.8, 0.95]", "--denoiser.max_grad_norm=.inf"),
            *("--output_dir=x", "--print_config"),
        )
    printed = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert yaml.safe_load(printed)["denoiser"]["widths"] == [16, 32]
    (tmp_path / "again.yaml").write_text(printed)
    again = parse_config(["--config", str(tmp_path / "again.yaml")])
    assert json.dumps(asdict(again)) == json.dumps(asdict(config))


def test_the_main_job_ends_with_code_2_and_leaves_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {resolution: 16\n")
    command = [sys.executable, str(ROOT / "training" / "train_ldm.py"), "--config", "mine.yaml"]
    refused = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=120
    )
    assert refused.returncode == 2 and "mine.yaml: not read as YAML" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
