"""The evaluation as its users run it: the same figures however it is run, from every kind of network."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import launch, start
from PIL import Image

from ldm_pipeline import LDMPipeline
from training.evaluation.features import load_network

SAMPLES = 320


def judge(pipeline, folder, *options, **more):
    """Evaluate a pipeline in a folder of its own; the figures."""
    options = ["--evaluation.pipeline", pipeline, "--output_dir", folder, *options]
    finished = launch("evaluate_ldm.py", "--evaluation.num_samples", SAMPLES, *options, **more)
    return json.loads((folder / "metrics.json").read_text()), finished.stdout


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
    """The figures of one process, never interrupted, and its samples."""
    folder = tmp_path_factory.mktemp("straight")
    found, printed = judge(tiny_run / "pipeline", folder, "--evaluation.save_samples", "npz")
    with np.load(kept(printed)) as archive:
        return found, archive["arr_0"], archive["labels"]


def kept(printed):
    """Where the samples are."""
    return re.search("^samples: (.*)$", printed, re.MULTILINE)[1]


def comparable(figures):
    return {
        name: figures[name] for name in ("reconstruction", "samples", "real", "memorisation", "self_checks")
    }


def flat(tree, name=""):
    """The numbers in a tree by their path."""
    if not isinstance(tree, dict):
        return {name: tree} if isinstance(tree, (int, float)) else {}
    return {path: value for key, each in tree.items() for path, value in flat(each, f"{name}/{key}").items()}


def test_figures_come_with_their_protocol(straight):
    found, images, labels = straight
    figures, protocol = found["samples"]["figures"], found["samples"]["protocol"]
    assert {
        f"{name}-320" for name in ("FD", "KD", "precision", "recall", "density", "coverage", "agreement")
    } <= (figures.keys())
    assert figures["FD-320"] > found["real"]["figures"]["FD-90"] > 0  # a net of 12 steps, and real digits
    assert found["real"]["figures"]["agreement-90"] > 0.95 > figures["agreement-320"]
    wanted = "n reference resolution resize features features_sha256 scheduler num_inference_steps "
    wanted += "guidance_scale network_evaluations seed dtype versions samples_sha256"
    assert set(wanted.split()) <= protocol.keys()
    assert (protocol["num_inference_steps"], protocol["guidance_scale"]) == (2, 1.5)  # the pipeline's own
    assert protocol["network_evaluations"] == 4
    assert "rFD-64" in found["reconstruction"] and 0 <= found["memorisation"]["share"] <= 1
    assert images.shape == (320, 16, 16, 1) and images.dtype == np.uint8
    share = np.bincount(labels, minlength=10) / 320
    assert np.allclose(share, 0.1, atol=0.02)  # as in the data


def test_two_processes_draw_the_samples_of_one(straight, tiny_run, tmp_path):
    found, _ = judge(tiny_run / "pipeline", tmp_path, "--evaluation.save_samples", "npz", processes=2)
    assert found["samples"]["protocol"] == straight[0]["samples"]["protocol"]  # with the hash of all samples
    # A process of two has half the threads, and so sums eigenvalues in another order.
    one, two = flat(comparable(straight[0])), flat(comparable(found))
    assert two == pytest.approx(one, rel=1e-9, abs=1e-9)


def test_killed_and_restarted_it_measures_the_same(straight, tiny_run, tmp_path):
    options = ["--evaluation.pipeline", tiny_run / "pipeline", "--output_dir", tmp_path]
    options += ["--evaluation.num_samples", SAMPLES, "--evaluation.save_samples", "npz"]
    with start("evaluate_ldm.py", *options) as process:
        process.wait_until(lambda: len(list(tmp_path.glob("evaluation/UniPC*/*.safetensors"))) >= 3)
    done = list(tmp_path.glob("evaluation/UniPC*/*.safetensors"))
    assert len(done) < SAMPLES // 16 and not (tmp_path / "metrics.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    launch("evaluate_ldm.py", *options)
    assert {path: path.stat().st_mtime_ns for path in done} == times  # not drawn again
    assert comparable(json.loads((tmp_path / "metrics.json").read_text())) == comparable(straight[0])


def test_a_sweep_in_another_batch_size_and_the_best_of_it(straight, tiny_run, tmp_path):
    """Also: PNG files with their parameters, a stored configuration as the argument, what cannot be meant."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    options = [
        "--evaluation.schedulers",
        "[UniPCMultistep, DDIM]",
        "--evaluation.num_inference_steps",
        "[1, 2]",
    ]
    options += ["--evaluation.guidance_scales", "[1, 1.5]", "--evaluation.save_best", "true"]
    options += ["--evaluation.num_samples", "20", "--evaluation.save_samples", "png"]
    printed = launch(
        "evaluate_ldm.py", *options, "--evaluation.batch_size", "7", config=run / "config.yaml"
    ).stdout
    drawn = {path: path.stat().st_mtime_ns for path in run.glob("evaluation/*-1.5-*/*.safetensors")}
    assert (
        "stands"
        not in launch(
            "evaluate_ldm.py", *options, "--evaluation.num_images=63", config=run / "config.yaml"
        ).stdout
    )
    assert {path: path.stat().st_mtime_ns for path in run.glob("evaluation/*-1.5-*/*.safetensors")} == drawn
    rows = list(csv.DictReader(open(run / "sweep" / "table.csv")))
    assert len(rows) == 8 and len((run / "sweep" / "table.md").read_text().splitlines()) == 12
    assert {row["network_evaluations"] for row in rows} == {"1", "2", "4"}
    assert Image.open(run / "sweep" / "plot.png").size[0] > 600
    best = min(rows, key=lambda row: float(row["FD-20"]))
    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    assert type(pipe.scheduler).__name__ == f"{best['scheduler']}Scheduler"
    assert pipe.config.defaults["num_inference_steps"] == int(best["num_inference_steps"])
    assert pipe.config.defaults["guidance_scale"] == float(best["guidance_scale"])
    figures = json.loads((run / "metrics.json").read_text())["samples"]
    assert figures["figures"]["FD-20"] == pytest.approx(float(best["FD-20"]))

    folder = kept(printed)
    pictures = [Image.open(f"{folder}/{index:06d}.png") for index in range(20)]
    parameters = json.loads(pictures[3].text["parameters"])
    assert parameters["index"] == 3 and parameters["scheduler"] == best["scheduler"]
    if (best["scheduler"], best["num_inference_steps"], best["guidance_scale"]) == (
        "UniPCMultistep",
        "2",
        "1.5",
    ):
        drawn = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
        assert np.abs(drawn - straight[1][:20, ..., 0]).max() <= 1  # the batch changes nothing but rounding


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no/such/network", "gives no network"),
        ("os:getcwd", "gives no network"),
        ("tests.test_evaluation:Whole", "returns .*features.*2, 3, 32, 32"),
        ("inception", r"pip install -e '.\[fid\]'"),
    ],
)
def test_what_is_no_network_is_refused_with_what_is(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_network(spec)
    assert "--evaluation.features" in str(error.value) and "facebook/dinov2-base" in str(error.value)


def test_a_pipeline_of_other_data_is_refused(tiny_run, tmp_path):
    given = ["--evaluation.pipeline", tiny_run / "pipeline", "--output_dir"]
    larger = launch("evaluate_ldm.py", *given, tmp_path, "--data.resolution", "32", check=False)
    assert "draws images of (1, 16, 16)" in larger.stderr and "--data.resolution" in larger.stderr
    lost = launch("evaluate_ldm.py", *given, tiny_run, check=False)
    assert "has a pipeline of its own" in lost.stderr and "--output_dir" in lost.stderr


def test_figures_while_training(tmp_path):
    options = ["--denoiser.evaluate_every", "6", "--denoiser.evaluate_samples", "20"]
    launch("train_ldm.py", "--output_dir", tmp_path / "run", "--evaluation.num_samples", "0", *options)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found if "FD-20" in line] == [6, 12]
    assert Image.open(tmp_path / "run" / "samples" / "curve.png").size[0] > 600
    assert [path.name[:10] for path in (tmp_path / "run" / "evaluation").iterdir()] == ["real-train"]
    assert "samples" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


class Whole(torch.nn.Identity):
    """No features: images."""


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_every_kind_of_network(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    expected = images.float().mean((2, 3)) / 255
    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    (tmp_path / "own_network.py").write_text("from tests.test_evaluation import Mean as build\n")
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for spec in (str(tmp_path / "mean.pt"), "own_network:build"):
        network = load_network(spec)
        assert torch.allclose(network(images)["features"], expected, atol=1e-6)
        assert torch.allclose(
            network(images[:, :1])["features"], expected[:, :1], atol=1e-6
        )  # grey: three equal
        hashes.add(network.sha256)
    assert len(hashes) == 2


def test_image_models_of_transformers(tmp_path):
    """The features are those of the model's own preprocessing, for images of its own size."""
    import transformers

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**small)).eval()
    model.save_pretrained(tmp_path)
    settings = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "size": {"height": 28, "width": 28},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    network = load_network(str(tmp_path))
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    mean, std = (torch.tensor(settings[f"image_{key}"]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).pooler_output
    assert torch.allclose(network(images)["features"], expected, atol=1e-5)
    assert network(images[..., :16, :16])["features"].shape == (3, 32)
    before = network.sha256
    model.encoder.layer[0].norm1.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path)
    load_network.cache_clear()
    assert load_network(str(tmp_path)).sha256 != before
