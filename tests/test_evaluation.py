"""The evaluation as its users run it: the same metrics however it is run, from every kind of network."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, launch, start
from diffusers import DDIMScheduler
from PIL import Image

from ldm_pipeline import LDMPipeline
from training.config import RunError, parse_config
from training.data.images import load_images
from training.evaluation.checks import check_evaluation
from training.evaluation.features import FeaturesUnavailable, load_network
from training.evaluation.samples import Sampler
from training.evaluation.settings import SamplingSettings
from training.evaluation.sweep import save_defaults

SAMPLES = 320


def evaluate(pipeline, folder, *options, **more):
    """Evaluate a pipeline in a folder of its own; returns metrics.json and the output."""
    options = ["--evaluation.pipeline", pipeline, "--output_dir", folder, *options]
    finished = launch("evaluate_ldm.py", "--evaluation.num_samples", SAMPLES, *options, **more)
    return json.loads((folder / "metrics.json").read_text()), finished.stdout


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
    """The metrics of one process, never interrupted, and its samples."""
    folder = tmp_path_factory.mktemp("straight")
    results, printed = evaluate(tiny_run / "pipeline", folder, "--evaluation.save_samples", "npz")
    with np.load(kept(printed)) as archive:
        return results, archive["arr_0"], archive["labels"]


def kept(printed):
    """Where the samples are."""
    return re.search("^samples: (.*)$", printed, re.MULTILINE)[1]


def comparable(results):
    return {name: results[name] for name in ("reconstruction", "samples", "real", "memorisation")}


def flat(tree, name=""):
    """The numbers in a tree by their path."""
    if not isinstance(tree, dict):
        return {name: tree} if isinstance(tree, (int, float)) else {}
    return {path: value for key, each in tree.items() for path, value in flat(each, f"{name}/{key}").items()}


def test_metrics_come_with_their_protocol(straight):
    results, images, labels = straight
    metrics, protocol = results["samples"]["figures"], results["samples"]["protocol"]
    assert {
        f"{name}-320" for name in ("FD", "KD", "precision", "recall", "density", "coverage", "agreement")
    } <= metrics.keys()
    assert metrics["FD-320"] > results["real"]["figures"]["FD-90"] > 0  # a net of 12 steps, and real digits
    assert results["real"]["figures"]["agreement-90"] > 0.95 > metrics["agreement-320"]
    assert results["precision"] == "float32"
    assert {name: protocol[name] for name in ("dataset", "train_images", "split")} == {
        "dataset": "digits", "train_images": 1707, "split": "train",
    }  # fmt: skip
    wanted = "n reference resolution resize features features_sha256 scheduler num_inference_steps "
    wanted += "guidance_scale network_evaluations seed dtype versions samples_sha256"
    assert set(wanted.split()) <= protocol.keys()
    assert (protocol["num_inference_steps"], protocol["guidance_scale"]) == (2, 1.5)  # the pipeline's own
    assert protocol["network_evaluations"] == 4
    assert "rFD-64" in results["reconstruction"] and 0 <= results["memorisation"]["share"] <= 1
    assert images.shape == (320, 16, 16, 1) and images.dtype == np.uint8
    share = np.bincount(labels, minlength=10) / 320
    assert np.allclose(share, 0.1, atol=0.02)  # as in the data


def test_two_processes_generate_the_samples_of_one(straight, tiny_run, tmp_path):
    results, _ = evaluate(tiny_run / "pipeline", tmp_path, "--evaluation.save_samples", "npz", ranks=2)
    # With the hash of all samples.
    assert results["samples"]["protocol"] == straight[0]["samples"]["protocol"]
    # The features are float32 sums, whose order depends on threads and on how memory is aligned.
    one, two = flat(comparable(straight[0])), flat(comparable(results))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-6)


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

    def measure(option, value):
        printed = launch("evaluate_ldm.py", *options, option, value, config=run / "config.yaml").stdout
        assert "stands" not in printed
        files = run.glob("evaluation/*-1.5-*/*.safetensors")
        return printed, {path: path.stat().st_mtime_ns for path in files}

    printed, kept_files = measure("--evaluation.batch_size", 7)
    assert measure("--evaluation.num_images", 63)[1] == kept_files  # not generated again
    rows = list(csv.DictReader(open(run / "sweep" / "table.csv")))
    assert len(rows) == 8 and len((run / "sweep" / "table.md").read_text().splitlines()) == 12
    assert {row["network_evaluations"] for row in rows} == {"1", "2", "4"}
    assert Image.open(run / "sweep" / "plot.png").size[0] > 600
    assert json.loads((run / "sweep" / "sweep.json").read_text())["rank_by"] == "FD-20"
    best = min(rows, key=lambda row: float(row["FD-20"]))
    pipe = LDMPipeline.from_pretrained(run / "pipeline")
    assert type(pipe.scheduler).__name__ == f"{best['scheduler']}Scheduler"
    assert pipe.config.defaults["num_inference_steps"] == int(best["num_inference_steps"])
    assert pipe.config.defaults["guidance_scale"] == float(best["guidance_scale"])
    results = json.loads((run / "metrics.json").read_text())
    assert results["samples"]["figures"]["FD-20"] == pytest.approx(float(best["FD-20"]))

    folder = kept(printed)
    pictures = [Image.open(f"{folder}/{index:06d}.png") for index in range(20)]
    parameters = json.loads(pictures[3].text["parameters"])
    assert parameters["index"] == 3 and parameters["scheduler"] == best["scheduler"]
    if [best[key] for key in ("scheduler", "num_inference_steps", "guidance_scale")] == [
        "UniPCMultistep",
        "2",
        "1.5",
    ]:
        drawn = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
        assert np.abs(drawn - straight[1][:20, ..., 0]).max() <= 1  # the batch changes nothing but rounding


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no/such/network", "gives no network"),
        ("os:getcwd", "gives no network"),
        ("tests.test_evaluation:Whole", "returns .*features.*2, 3, 32, 32"),
    ],
)
def test_no_feature_network_is_refused_with_the_choices(spec, message):
    with pytest.raises(RunError, match=message) as error:
        load_network(spec)
    assert "--evaluation.features" in str(error.value) and "facebook/dinov2-base" in str(error.value)


@pytest.mark.parametrize("spec, message", [("inception", r"pip install -e '.\[fid\]'"), ("org/net", "Hub")])
def test_an_unavailable_network_is_told_from_a_wrong_one(spec, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FeaturesUnavailable, match=message) as error:
        load_network(spec)
    assert "\n" not in str(error.value) and "--evaluation.num_samples 0" in str(error.value)


def test_a_run_without_its_feature_network_ends_with_everything_else(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    printed = launch("train_ldm.py", "--output_dir", run, "--evaluation.features", "org/net").stdout
    assert printed.count("warning: no metrics of samples") == 1
    results = json.loads((run / "metrics.json").read_text())
    assert "samples" not in results and {"PSNR", "SSIM"} < results["reconstruction"].keys()
    assert (
        "val_loss" in results and f"  python training/evaluate_ldm.py --config {run}/config.yaml" in printed
    )
    alone = launch("evaluate_ldm.py", config=run / "config.yaml", check=False)  # it does not stand
    assert alone.returncode == 2 and "--evaluation.features org/net" in alone.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ("schedulers=[DDIM, DDMI]", "--evaluation.schedulers DDMI"),
        ("schedulers=[PNDM] num_inference_steps=[2]", "PNDM with 2 steps"),
        ("guidance_scales=[2] --denoiser.class_conditional=false", "no classes"),
        ("save_best=true", "only one setting"),
        ("save_best=true guidance_kinds=[classifier_free, Tangential]", "leave Tangential out"),
        ("guidance_kinds=[Adaptive]", "no guider Adaptive that takes a scale; .*AdaptiveProjected, "),
        ("guidance_kinds=[autoguidance]", "no guide_unet; --denoiser.guide_step"),
        ("guidance_intervals=[[0.5, 0.2]]", r"intervals \[0.5, 0.2\]: .*wanted two rising noise levels"),
        ("guidance_intervals=[[0.5]]", "wanted two rising noise levels"),
        ("pipeline=org/model", "a pipeline of its own"),
    ],
)
def test_options_are_checked_before_the_first_step(options, message):
    options = re.sub(r"(?:^| )(?=\w+=)", " --evaluation.", options)
    config = parse_config(["--config", str(TINY), *re.split(" (?=--)", options)[1:]])
    run = SimpleNamespace(config=config, data=load_images(config.data))
    with pytest.raises(RunError, match=message):
        check_evaluation(run, ["autoencoder", "latents", "denoiser", "evaluation"])


def test_the_sampler_leaves_the_pipeline_as_it_was(tiny_run):
    pipe = LDMPipeline.from_pretrained(tiny_run / "pipeline")
    own, settings = pipe.scheduler, SamplingSettings(pipe.objective, DDIMScheduler(clip_sample=False), 1, 1.0)
    assert Sampler(pipe, Accelerator(cpu=True), 0, 4, None).sample(settings, range(2)).shape == (2, 1, 16, 16)
    assert pipe.scheduler is own


def test_new_defaults_are_written_as_a_whole_or_not_at_all(tiny_run, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    settings = SamplingSettings(LDMPipeline.from_pretrained(folder).objective, scheduler, 3, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "save_pretrained", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_defaults(folder, settings, conditional=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    save_defaults(folder, settings, conditional=True)
    pipe = LDMPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.config.defaults == {"num_inference_steps": 3, "guidance_scale": 2.0}


def test_a_damaged_own_pipeline_is_not_blamed_on_an_option(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    damaged = launch("evaluate_ldm.py", config=run / "config.yaml", check=False).stderr
    assert f"{run / 'pipeline'} cannot be loaded" in damaged and "--evaluation.pipeline" not in damaged


def test_a_pipeline_of_other_data_is_refused(tiny_run, tmp_path):
    given = ["--evaluation.pipeline", tiny_run / "pipeline", "--output_dir"]
    larger = launch("evaluate_ldm.py", *given, tmp_path, "--data.resolution", "32", check=False)
    assert "generates images of (1, 16, 16)" in larger.stderr and "--data.resolution" in larger.stderr
    run = shutil.copytree(tiny_run, tmp_path / "run")
    lost = launch("evaluate_ldm.py", *given, run, check=False)
    assert "has a pipeline of its own" in lost.stderr and "--output_dir" in lost.stderr


def test_metrics_while_training(tmp_path):
    options = ["--denoiser.evaluate_every", "6", "--denoiser.evaluate_samples", "20"]
    launch("train_ldm.py", "--output_dir", tmp_path / "run", "--evaluation.num_samples", "0", *options)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found if "FD-20" in line] == [6, 12]
    assert "FD-20 from " in (tmp_path / "run" / "report.html").read_text()  # a curve in words
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
        grey = network(images[:, :1])["features"]  # three equal channels
        assert torch.allclose(grey, expected[:, :1], atol=1e-6)
        hashes.add(network.sha256)
    assert len(hashes) == 2


def test_image_models_of_transformers(tmp_path):
    """The features are those of the model's own preprocessing, for images of its own size."""
    import transformers

    small = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    small |= {"hidden_size": 32, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**small)).eval()
    model.save_pretrained(tmp_path)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    settings["size"] = {"height": 28, "width": 28}
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
