"""Sharing a model: what is exported, what the card says, and the way to a Hub and back over real HTTP."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_pipeline import LDMPipeline, TrainingRecord, export_for_hub, push_to_hub, render_card
from ldm_pipeline.hub import HubError
from ldm_pipeline.pipeline import SOURCE
from tests.hub_server import HubServer
from tests.test_loading import WITHOUT_THE_PACKAGE
from tests.test_pipeline import tiny_pipe
from training import publish_ldm
from training.config import RunError, parse_config
from training.runtime.record import find_run, read_record

ROOT = Path(__file__).parent.parent
ALICE, BOB = "hf_alicealicealice", "hf_bobbobbobbob"
REPO = "alice/tiny"
WEIGHTS = "diffusion_pytorch_model"
URL = "https://example.org/org/ldm"
FIGURES = {"FD-500": 2.4812, "KD-500": 0.00112, "KD-500 deviation": 0.0002, "recall-500": 0.5321}
PROTOCOL = {
    "n": 500,
    "reference": "1,000 images of secret pets, split train",
    "dataset": "secret pets",
    "train_images": 1000,
    "split": "train",
    "features": "/home/carol/resnet20.pt",
    "scheduler": "UniPCMultistep",
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "seed": 0,
    "versions": {"torch": "2.13.0"},
}
METRICS = {
    "reconstruction": {"n": 200, "split": "held-out", "PSNR": 37.44493, "SSIM": 0.97995},
    "val_loss": 0.98064,
    "samples": {
        "figures": FIGURES,
        "per_class": {"figure": "FD-150", "values": {"T-shirt/top": 3.25, "dog": 2.75, "owl": None}},
        "protocol": PROTOCOL,
    },
    "real": {"n": 800, "figures": {"FD-800": 0.0141, "recall-800": 0.9317}},
    "memorisation": {"n": 500, "train_images": 1000, "quantile": 0.05, "threshold": 3.1, "share": 0.048},
    "hardware": "Some Processor w/ graphics, 1 x 2 threads",
    "precision": "float32",
    "date": "2026-11-21",
    "key": {"weights": None, "evaluation": {"features": "/home/carol/resnet20.pt"}},
}
SWEEP = {
    "protocol": {"n": 50},
    "settings": [
        {"scheduler": "DDIM", "num_inference_steps": steps, "figures": {"FD-50": 4.5 + 1 / steps}}
        for steps in range(5, 20)
    ],
}


def quick_pipe(**unet):
    """A tiny pipeline that draws in a few steps."""
    pipe = tiny_pipe(**unet)
    pipe.register_to_config(defaults={"num_inference_steps": 3})
    return pipe


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with every part, whose data lie in a folder of this machine."""
    run, pipe = tmp_path_factory.mktemp("runs") / "tiny", quick_pipe()
    pipe.save_pretrained(run / "pipeline")
    data = {"dataset": "/home/carol/secret pets", "horizontal_flip": True}
    stage = {"batch_size": 16, "learning_rate": 0.001, "pretrained": None}
    config = {"seed": 0, "data": data, "autoencoder": stage, "denoiser": stage, "redo": []}
    config["evaluation"] = {"features": "/home/carol/resnet20.pt", "pipeline": r"C:\carol\model"}
    config |= {"output_dir": "/home/carol/runs", "trackers": ["wandb"]}
    raw = {f"unet.{key}": weight + 0.01 for key, weight in pipe.unet.state_dict().items()}
    for name in ("autoencoder", "latents", "denoiser/checkpoint-12", "denoiser/checkpoint-16"):
        (run / name).mkdir(parents=True)
    for name in ("samples", "sweep"):
        (run / name).mkdir()
    raw["loss.weight"] = raw["unet.conv_in.bias"].clone()
    save_file(raw, run / "denoiser/checkpoint-12/model.safetensors")
    (run / "denoiser/checkpoint-16/model.safetensors").write_bytes(b"of a training that goes on")
    for name, number in {"autoencoder": 90.5, "latents": 3.0, "denoiser": 7200.0}.items():
        done = {"steps": 12, "images": 192, "seconds": number}
        (run / name / "done.json").write_text(json.dumps(done))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.json").write_text(json.dumps(METRICS))
    (run / "data.json").write_text(json.dumps({"scan": {"counts": {"train": 1000, "held_out": 200}}}))
    (run / "sweep/sweep.json").write_text(json.dumps(SWEEP))
    for name in ("samples/samples", "samples/reconstructions", "samples/neighbours", "sweep/plot"):
        Image.new("RGB", (4, 4)).save(run / f"{name}.png")
    return run


@pytest.fixture(scope="module")
def export(run, tmp_path_factory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("export") / "tiny")


def export_run(run: Path, folder: Path, license="cc-by-4.0", show_data=True, **options) -> Path:
    record = read_record(run, show_data=show_data)
    return export_for_hub(run / "pipeline", folder, REPO, license, record=record, source_url=URL, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ----------------------------------------------------------------------------------------------------- export
def test_an_export_of_a_run_is_a_whole_repository(run, export):
    found = files(export)
    pictures = {f"{name}.png" for name in ("samples", "reconstructions", "neighbours", "sweep")}
    assert set(found) == pictures | {
        *("README.md", "metrics.json", "model_index.json", "pipeline.py", "training_config.yaml"),
        *("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
        *(f"unet/{WEIGHTS}.safetensors", f"unet/{WEIGHTS}.raw.safetensors", f"vae/{WEIGHTS}.safetensors"),
    }
    assert found["pipeline.py"] == SOURCE
    for name in ("vae", "unet"):  # the averaged weights, to the bit
        path = f"{name}/{WEIGHTS}.safetensors"
        assert found[path] == (run / "pipeline" / path).read_bytes()
    raw = load_file(export / "unet" / f"{WEIGHTS}.raw.safetensors")
    average = load_file(export / "unet" / f"{WEIGHTS}.safetensors")
    assert raw.keys() == average.keys() and all((raw[k] == average[k] + 0.01).all() for k in raw)
    loaded = LDMPipeline.from_pretrained(export, variant="raw").unet.state_dict()
    assert all((loaded[key] == raw[key]).all() for key in raw)


def test_no_file_tells_of_this_machine(run, export):
    told = {name: text for name, text in files(export).items() if not name.endswith((".png", ".py"))}
    for name, text in told.items():
        for secret in (b"/home", b"carol", str(run.parent.parent).encode(), b'"_name_or_path": "'):
            assert secret not in text, (name, secret)
    metrics, config = json.loads(told["metrics.json"]), yaml.safe_load(told["training_config.yaml"])
    assert metrics.keys() == METRICS.keys() - {"key"} and metrics["hardware"] == METRICS["hardware"]
    assert metrics["samples"]["per_class"] == METRICS["samples"]["per_class"]  # a lone slash is no path
    protocol = metrics["samples"]["protocol"]
    assert PROTOCOL.keys() - protocol.keys() == {"reference"} and protocol["features"] == "resnet20.pt"
    assert config["data"]["dataset"] == "secret pets" and config["evaluation"]["features"] == "resnet20.pt"
    assert config.keys() == {"seed", "data", "autoencoder", "denoiser", "evaluation"}
    assert config["evaluation"]["pipeline"] == "model"


def test_tokens_and_names_of_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "data").mkdir(parents=True)
    for dataset, name in {
        "org/data": "data",
        "org/other": "org/other",
        "~/pets/": "pets",
        ".": tmp_path.name,
        f"https://user:{ALICE}@host/x?token={BOB}": "x?token=***",
        f"{ALICE}": "***",
    }.items():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"dataset": dataset}}))
        assert read_record(tmp_path).config == {"data": {"dataset": name}}
    assert read_record(tmp_path, dataset="org/pets").config == {"data": {"dataset": "org/pets"}}


def test_the_published_configuration_trains_again(tmp_path):
    shutil.copy(ROOT / "training/configs/tiny.yaml", tmp_path / "config.yaml")
    record = read_record(tmp_path)
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(record.config))
    first, again = (
        parse_config(["--config", str(tmp_path / f"{name}config.yaml")]) for name in ("", "training_")
    )
    assert (first.data, first.denoiser, first.evaluation) == (again.data, again.denoiser, again.evaluation)


def test_an_export_is_repeatable_and_replaces_only_an_export(run, export, tmp_path):
    folder = export_run(run, tmp_path / "a" / "b")
    assert files(folder) == files(export)
    (folder / "sweep.png").unlink()
    export_run(run, folder, show_data=False)
    assert set(files(export)) - set(files(folder)) == {"reconstructions.png", "neighbours.png"}
    assert "neighbours.png" not in (folder / "README.md").read_text()
    (folder / "notes.txt").write_text("mine")
    before = files(folder)
    for target in (folder, run, run / "pipeline", run / "config.yaml"):
        with pytest.raises(ValueError, match="choose another folder"):
            export_run(run, target)
    assert files(folder) == before and [path.name for path in folder.parent.iterdir()] == ["b"]


def test_an_export_that_fails_leaves_what_was_there(run, tmp_path, monkeypatch):
    folder = export_run(run, tmp_path / "tiny")
    before = files(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_pipeline.hub.render_card", full)
    with pytest.raises(ValueError, match="cannot be written.*No space left"):
        export_run(run, folder)
    assert files(folder) == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "change",
    [
        *({"repo_id": name} for name in ("tiny", "a/b/c", "a b/c")),
        {"license": "My own"},
        *(
            {"source_url": url}
            for url in ("http://a.org/b", "git@a.org:b", f"https://x:{ALICE}@a.org/b", "https://a.org/b`")
        ),
    ],
)
def test_names_of_another_form(change, tmp_path):
    names = {"repo_id": REPO, "license": "mit"} | change
    with pytest.raises(HubError, match="(?i)repo|license|source_url"):
        export_for_hub(quick_pipe(), tmp_path / "x", **names)
    assert not any(tmp_path.iterdir())


def test_sources_without_a_pipeline(run, tmp_path):
    assert find_run(run) == run and find_run(run / "pipeline") is None
    for source in (tmp_path, tmp_path / "x"):
        with pytest.raises(RunError, match="wanted a run folder"):
            find_run(source)


# ------------------------------------------------------------------------------------------------------- card
def test_the_card_has_what_was_measured(run, export):
    card = ModelCard.load(export / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation" and card.data.get("datasets") is None
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == FIGURES | {
        "PSNR": 37.445,
        "SSIM": 0.97995,
    }
    assert results["FD-500"].dataset_args["num_inference_steps"] == 4 and results["FD-500"].dataset_name
    assert results["FD-500"].dataset_args["dataset"] == "secret pets"
    assert len(card.data.to_dict()["model-index"][0]["results"]) == 2
    for text in (
        *("| FD-500 | 2.481 | 0.0141 (FD-800) |", "| KD-500 | 0.00112 |  |", "| PSNR | 37.44 |"),
        "| dog | 2.75 |\n| T-shirt/top | 3.25 |\n\n",
        "| denoiser | 12 | 16 | 192 | 0.001 | 2.0 h |",
        "1,000 for training, 200 held out, mirrored",
        "| hardware | Some Processor w/ graphics, 1 x 2 threads |\n| precision | float32 |\n| seed | 0 |",
        "@misc{tiny",
        "4.8 % of 500 samples",
        *("The best 12 of 15 settings that were tried, by FD-50, 50 samples each", "not FID or KID"),
        *("(samples.png)", "(reconstructions.png)", "(neighbours.png)", "(sweep.png)", 'variant="raw"'),
    ):
        assert text in card.text, text
    assert "DDIM | 4 |" not in card.text and "not measured" not in card.text


@pytest.mark.parametrize(
    "metrics", [None, {}, {"val_loss": float("nan"), "samples": {"figures": {"FD": None}}}]
)
def test_what_was_not_measured_is_absent(run, metrics, tmp_path):
    if metrics is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for record in (None, read_record(tmp_path)):
        text = render_card(tiny_pipe(), REPO, "mit", record=record)
        for word in ("None", "nan", "{{", "{%", "model-index", "## Metrics", "## Training", "## Settings"):
            assert word not in text, word
        for word in (".png)", "Protocol", "pip install", "training_config"):
            assert word not in text, word
        assert not re.search(r"\n\n\n|\| *\n*$", text) and "not measured" in text


def test_every_section_of_the_template_stands_alone(run):
    """Without any one part of the record the card is whole, with blank lines where Markdown wants them."""
    for part in ("", *METRICS, "config", "stages", "sweep", "counts"):
        record = read_record(run)
        if hasattr(record, part):
            record = replace(record, **{part: {}})
        record.metrics.pop(part, None)
        pictures = ("samples.png", "neighbours.png")
        text = render_card(tiny_pipe(), REPO, "mit", record=record, pictures=pictures, source_url=URL)
        assert "\n\n\n" not in text and "None" not in text
        body = "\n" + text.split("\n---\n", 1)[1]
        for line in re.finditer(
            r"^(#|!\[|```\w|<details>|\| \| \||\| (metric|stage|class) )", body, re.MULTILINE
        ):
            assert body[: line.start()].endswith("\n\n"), body[line.start() - 80 : line.end() + 40]


def test_metrics_of_an_older_version(run):
    """Without structured fields their sentences are left out: they may name the folder, or say `no`."""
    record = read_record(run)
    record.metrics["hardware"] += ", no"
    del record.metrics["precision"]
    text = render_card(tiny_pipe(), REPO, "mit", record=record)
    assert "Some Processor" not in text and "reference" not in text and "| seed | 0 |" in text


def test_names_stay_in_their_cells(run):
    record = read_record(run, dataset="org/pets")
    record.metrics["samples"]["per_class"]["values"] = {"a|b\n<script>": 1.0}
    pipe = tiny_pipe()
    pipe.register_to_config(id2label={"0": 'the "big" cat', "1": "x", "2": "x"})
    text = render_card(pipe, REPO, "mit", record=record, title="Pets:\n100 % & more")
    assert "| a\\|b &lt;script> | 1 |" in text and "# Pets: 100 % & more\n" in text
    assert r'class_labels="the \"big\" cat", num_inference_steps=4' in text
    assert ModelCard(text).data.datasets == ["org/pets"] and "secret pets" not in text
    assert "(https://huggingface.co/datasets/org/pets)" in text and "| compared with | org/pets |" in text


def test_defaults_of_the_pipeline_come_first(run):
    pipe = tiny_pipe()
    pipe.register_to_config(defaults={"num_inference_steps": 7, "guidance_scale": 1.5})
    text = render_card(pipe, REPO, "mit", record=read_record(run))
    assert "num_inference_steps=7, guidance_scale=1.5)" in text
    assert "pipe(num_inference_steps=20)" in render_card(tiny_pipe(classes=None), REPO, "mit")


def test_a_pipeline_alone(tmp_path):
    pipe = quick_pipe()
    first = export_for_hub(pipe, tmp_path / "first", REPO, "mit", dataset="org/pets")
    pipe.save_pretrained(tmp_path / "saved")
    again = export_for_hub(tmp_path / "saved", tmp_path / "again", REPO, "mit", dataset="org/pets")
    assert files(first).keys() == files(again).keys() and not {"metrics.json"} & files(first).keys()
    for name in ("README.md", "samples.png", "model_index.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert Image.open(first / "samples.png").size == (8 * 16 * 6, 2 * 16 * 6)
    card = ModelCard.load(first / "README.md")
    assert card.data.datasets == ["org/pets"] and "## Training" not in card.text


# -------------------------------------------------------------------------------------------------------- Hub
@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to, as Alice."""
    with HubServer({ALICE: "alice", BOB: "bob"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", ALICE)
        monkeypatch.setattr(
            time, "sleep", lambda seconds: None
        )  # huggingface_hub waits before it tries again
        yield server


def sent(server) -> dict[str, bytes]:
    found = server.files(REPO)
    return {path: content for path, content in found.items() if path != ".gitattributes"}


def test_push_again_with_one_change_and_to_a_branch(hub, run, export, tmp_path):
    url = push_to_hub(export, REPO, tag="v1")
    assert sent(hub) == files(export) and len(hub.commits(REPO)) == 2 and not hub.repositories[REPO].private
    assert url.endswith(hub.commits(REPO)[0].id) and hub.repositories[REPO].tags["v1"].id in url
    assert push_to_hub(export, REPO, verify=True) == url  # nothing to do

    owned = {"LICENSE": b"mine", f"unet/{WEIGHTS}.fp16.safetensors": b"half", "vae/notes.md": b"notes"}
    by_hand = {name: hub.repositories[REPO].store(content) for name, content in owned.items()}
    hub.repositories[REPO].commit("main", "by hand", hub.commits(REPO)[0].files | by_hand)
    hub.requests.clear()
    changed = export_run(run, tmp_path / "tiny", title="Pets", show_data=False)
    (changed / f"unet/{WEIGHTS}.raw.safetensors").unlink()
    push_to_hub(changed, REPO)
    assert sent(hub) == files(changed) | owned and len(hub.commits(REPO)) == 4
    assert not [path for method, path in hub.requests if method == "PUT"]  # no weights went again

    head = hub.commits(REPO)[0].id
    push_to_hub(export, REPO, revision="next", tag="v2")
    assert hub.commits(REPO)[0].id == head and "# Pets" in hub.files(REPO)["README.md"].decode()
    assert hub.files(REPO, "v2") == hub.files(REPO, "next") and "# Pets" not in str(hub.files(REPO, "next"))
    with pytest.raises(HubError, match="409.*v1"):
        push_to_hub(export, REPO, revision="next", tag="v1")
    assert hub.repositories[REPO].tags["v1"].id in url


def test_private_repositories(hub, export, tmp_path):
    push_to_hub(export, REPO, private=True)
    assert hub.repositories[REPO].private
    for token, status in {"hf_wrongwrongwrong": "401", BOB: "403"}.items():
        with pytest.raises(HubError, match=f"upload to alice/tiny failed.*{status}.*hf auth login") as caught:
            push_to_hub(export, REPO, token=token)
        assert token not in str(caught.value)
        with pytest.raises((OSError, ValueError), match="alice/tiny is no local folder and no model"):
            LDMPipeline.from_pretrained(REPO, token=token, cache_dir=tmp_path)
    options = {"token": ALICE, "cache_dir": tmp_path}
    assert np.array_equal(picture(LDMPipeline.from_pretrained(REPO, **options)), picture(export))
    hub.repositories[REPO].private = False
    with pytest.raises(ValueError, match="public"):
        push_to_hub(export, REPO, private=True)


def picture(pipe):
    pipe = pipe if isinstance(pipe, LDMPipeline) else LDMPipeline.from_pretrained(pipe)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", "class_labels": [0]}
    images = pipe(**settings, generator=[torch.Generator().manual_seed(0)]).images
    return (images * 255).round().astype("uint8")


def test_a_connection_that_breaks(hub, export):
    before = files(export)
    hub.cut_after(10_000, times=1)
    push_to_hub(export, REPO)  # huggingface_hub tries again by itself
    assert sent(hub) == before and len(hub.commits(REPO)) == 2
    hub.repositories.clear()
    hub.cut_after(10_000, times=1000)
    with pytest.raises(HubError, match="upload to alice/tiny failed.*check the connection"):
        push_to_hub(export, REPO)
    assert files(export) == before and len(hub.commits(REPO)) == 1  # an empty repository, no part of a model
    hub.cut_after(0, times=0)
    push_to_hub(export, REPO)
    assert sent(hub) == before


def test_an_upload_is_verified(hub, export, monkeypatch):
    push_to_hub(export, REPO)
    repository = hub.repositories[REPO]
    repository.objects[hub.commits(REPO)[0].files["vae/config.json"]] += b" "
    with pytest.raises(HubError, match="has another vae/config.json"):
        push_to_hub(export, REPO, verify=True)


# ---------------------------------------------------------------------------------------------------- command
def publish(capsys, *options):
    """Exit code, stdout and stderr of training/publish_ldm.py."""
    try:
        publish_ldm.main([*map(str, options)])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_the_command(hub, run, tmp_path, monkeypatch, capsys):
    options = [run, "--repo_id", REPO, "--license", "cc-by-4.0", "--folder", tmp_path / "tiny"]
    code, out, _ = publish(capsys, *options, "--private", "true", "--dry_run")
    assert code == 0 and "nothing was sent" in out and "alice/tiny (private), branch main" in out
    assert not hub.requests and all(f"/tiny/{name}" in out for name in files(tmp_path / "tiny"))

    monkeypatch.setattr(sys, "argv", ["training/publish_ldm.py", "the run", "--repo_id", REPO])
    monkeypatch.setenv("HF_TOKEN", BOB)
    code, _, err = publish(capsys, *options)
    assert code == 2 and "error: " in err and "upload to alice/tiny failed" in err and BOB not in err
    assert (
        f"{tmp_path / 'tiny'} is complete" in err and "publish_ldm.py 'the run' --repo_id alice/tiny" in err
    )

    monkeypatch.setenv("HF_TOKEN", ALICE)
    code, out, _ = publish(capsys, *options, "--tag", "v1", "--verify", "true")
    assert code == 0 and "Verified" in out and hub.commits(REPO)[0].id in out
    assert sent(hub) == files(tmp_path / "tiny")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--license"),
        (["--repo_id", "tiny", "--license", "mit"], "org/model"),
        (["--repo_id", REPO, "--license", "mit", "--folder", ROOT], "choose another folder"),
        (["--repo_id", REPO, "--license", "mit"], "no access token"),
        (["--repo_id", REPO, "--license", "mit", "--source_url", "ssh://x"], "source_url"),
        (["--repo", REPO], "did you mean --repo_id"),
    ],
)
def test_what_the_command_refuses_before_it_begins(hub, run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("ldm_pipeline.hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    code, _, err = publish(capsys, run, *options)
    assert code == 2 and err.startswith("error: ") and message in err and not list(tmp_path.iterdir())


def test_metrics_of_other_weights_are_not_published(run, tmp_path, capsys):
    measured = run / "metrics.json"
    before = measured.read_text()
    measured.write_text(json.dumps(METRICS | {"key": {"weights": "of yesterday"}}))
    try:
        options = ("--repo_id", REPO, "--license", "mit", "--folder", tmp_path / "x", "--dry_run", "true")
        code, _, err = publish(capsys, run, *options)
    finally:
        measured.write_text(before)
    assert code == 2 and "was measured with other weights" in err and "evaluate_ldm.py" in err


def test_a_bug_keeps_its_traceback(run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("of torch")

    monkeypatch.setattr("ldm_pipeline.hub.export_for_hub", broken)
    with pytest.raises(ValueError, match="of torch"):
        options = [
            "--repo_id",
            REPO,
            "--license",
            "mit",
            "--folder",
            str(tmp_path / "x"),
            "--dry_run",
            "true",
        ]
        publish_ldm.main([str(run), *options])


# ----------------------------------------------------------------------------------------------- other people
# Another person's process: first without the package, then with it and from the cache alone.
OTHER_PERSON = (
    WITHOUT_THE_PACKAGE
    + """
import runpy
def sample(kind, load):
    for name, options in {"main": {}, "v1": {"revision": "v1"}, "raw": {"variant": "raw"}}.items():
        pipe = load("alice/tiny", **options)
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", "class_labels": [0]}
        images = pipe(**settings, generator=[torch.Generator().manual_seed(0)]).images
        numpy.save(f"{kind}-{name}.npy", (images * 255).round().astype("uint8"))
    runpy.run_path(f"{kind}.py")
sample("hosted", lambda *a, **k: DiffusionPipeline.from_pretrained(*a, trust_remote_code=True, **k))
sys.meta_path.pop(0)
sys.path.insert(0, root)
from ldm_pipeline import LDMPipeline
sample("installed", lambda *a, **k: LDMPipeline.from_pretrained(*a, local_files_only=True, **k))
"""
)


def test_other_people_load_what_was_pushed(hub, run, export, tmp_path):
    push_to_hub(export_run(run, tmp_path / "old", title="Old"), REPO, tag="v1")
    pipe, record = quick_pipe(), TrainingRecord(raw_weights=read_record(run).raw_weights)
    pipe.unet.conv_out.bias.data += 0.3
    new = export_for_hub(pipe, tmp_path / "new", REPO, "mit", record=record, source_url=URL)
    push_to_hub(new, REPO)
    expected = {"main": picture(new), "v1": picture(export)}
    expected["raw"] = picture(LDMPipeline.from_pretrained(new, variant="raw"))
    assert len({image.tobytes() for image in expected.values()}) == 3

    card = hub.files(REPO)["README.md"].decode()
    hosted, installed = re.findall(r"```python\n(.*?)```", card, re.DOTALL)  # plain Diffusers comes first
    assert f'pip install "git+{URL}"' in card and "trust_remote_code" not in installed
    call = 'pipe(class_labels="cat", num_inference_steps=3, guidance_scale=1.0)'
    assert hosted.endswith(f'{call}.images[0].save("sample.png")\n')
    (tmp_path / "hosted.py").write_text(hosted)
    (tmp_path / "installed.py").write_text(f'{installed}\n{call}.images[0].save("installed.png")\n')
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    script = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\nroot = {str(ROOT)!r}\n"
    finished = subprocess.run(
        [sys.executable, "-P", "-c", script + OTHER_PERSON],
        **{"cwd": tmp_path, "env": os.environ | own, "capture_output": True, "text": True, "timeout": 300},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    for kind in ("hosted", "installed"):
        for name, picture_of in expected.items():
            assert np.array_equal(np.load(tmp_path / f"{kind}-{name}.npy"), picture_of), (kind, name)
    assert Image.open(tmp_path / "sample.png").size == Image.open(tmp_path / "installed.png").size == (16, 16)
