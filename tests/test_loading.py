"""All ways to load a model give the picture of the process that saved it; no file tells where it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, DDIMScheduler
from safetensors.torch import load_file, save_file

from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
from ldm_pipeline.pipeline import SOURCE
from tests.test_pipeline import NAMES, generators, tiny_pipe, tiny_vae

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Neither the checkout nor an installed copy: the package cannot be imported here.
WITHOUT_THE_PACKAGE = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ldm_pipeline":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
try:
    import ldm_pipeline
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")
import numpy, torch
from diffusers import DiffusionPipeline
"""
HOSTED = WITHOUT_THE_PACKAGE + "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)\n"
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
def draw(pipe, name):
    options = dict(class_labels="dog", guidance_scale=2.0, num_inference_steps=3, output_type="np")
    numpy.save(name, pipe(generator=[torch.Generator().manual_seed(5)], **options).images)
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("code ran without trust")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
draw(pipe, "hosted.npy")
pipe.save_pretrained("again")
draw(DiffusionPipeline.from_pretrained("again", trust_remote_code=True), "again.npy")

from diffusers import AutoencoderKL, UNet2DModel, UniPCMultistepScheduler
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps(3)
latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
label, null = torch.tensor([1]), torch.tensor([unet.config.num_class_embeds - 1])
with torch.no_grad():
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        own, nothing = (unet(latents, 1000 * sigma, class_labels=c).sample for c in (label, null))
        latents = scheduler.step(nothing + 2.0 * (own - nothing), t, latents).prev_sample
    mean, std = (torch.tensor(vae.config[k]).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
    images = vae.decode(latents * std + mean).sample
numpy.save("stock.npy", (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
"""
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline folder and the picture of the pipeline that wrote it."""
    folder, pipe = tmp_path_factory.mktemp("model"), tiny_pipe()
    pipe.save_pretrained(folder)
    return folder, draw(pipe)


def draw(pipe):
    """The picture that `STRANGER` draws in another process."""
    options = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
    return pipe(class_labels="dog", generator=generators(5), **options).images


def run(script, folder, tmp_path, installed):
    """Run a script outside the checkout with caches of its own; returns the finished process."""
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if installed else ""}
    # As many threads as here, or sums have another order and pictures other last digits.
    threads = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
    script = f"folder = {str(folder)!r}\n{threads}{script}"
    command = [sys.executable, *([] if installed else ["-I"]), "-c", script]
    environment = {**os.environ, **caches, **own}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def check_folder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LDMPipeline"]
    assert index["id2label"] == {str(number): name for number, name in NAMES.items()}
    assert (folder / "pipeline.py").read_bytes() == SOURCE
    assert (ROOT / "ldm_pipeline" / "pipeline.py").read_bytes() == SOURCE
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".py", ".json", ".safetensors"}
    no_folder_is_told(folder)


def no_folder_is_told(saved):
    """No file says where on this machine the model was loaded from."""
    files = list(saved.rglob("*.json"))
    assert files and not any(json.loads(path.read_text()).get("_name_or_path") for path in files)


def test_what_is_saved(saved, tmp_path):
    check_folder(saved[0])
    with pytest.raises(ValueError, match="pickle"):
        tiny_pipe().save_pretrained(tmp_path, safe_serialization=False)


def test_with_the_package_and_without_trust(saved):
    folder, expected = saved
    pipe = LDMPipeline.from_pretrained(folder)
    assert type(pipe) is LDMPipeline and np.array_equal(draw(pipe), expected)


def test_without_the_package(saved, tmp_path):
    """With trust, saved again by the hosted code, and by stock components alone; refused without trust."""
    folder, expected = saved
    finished = run(STRANGER, folder, tmp_path, installed=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for name in ("hosted", "again"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    np.testing.assert_allclose(np.load(tmp_path / "stock.npy"), expected, atol=1e-4)
    check_folder(tmp_path / "again")
    assert np.array_equal(draw(LDMPipeline.from_pretrained(tmp_path / "again")), expected)


def test_code_in_the_folder_is_not_run_by_the_installed_class(saved, tmp_path):
    folder, harm = tmp_path / "tampered", tmp_path / "harm"
    shutil.copytree(saved[0], folder)
    (folder / "pipeline.py").write_text(f"open({str(harm)!r}, 'w').close()\n" + SOURCE.decode())
    assert np.array_equal(draw(LDMPipeline.from_pretrained(folder)), saved[1]) and not harm.exists()
    assert run(HOSTED, folder, tmp_path, installed=False).returncode == 0
    assert harm.exists()  # with trust it is run: the trap itself works


def test_what_was_loaded_tells_no_folder_when_it_is_saved(saved, tmp_path):
    folder = saved[0]
    LDMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "pipeline")
    check_folder(tmp_path / "pipeline")
    load_autoencoder(folder / "vae").save_pretrained(tmp_path / "vae")
    LDMPipeline.from_pretrained(folder).unet.save_pretrained(tmp_path / "unet")
    no_folder_is_told(tmp_path)


def hub_cache(root, repository, folder):
    """What huggingface_hub keeps of a repository: files by content, and snapshots of links to them."""
    root, commit = root / f"models--{repository.replace('/', '--')}", "a" * 40
    for directory in ("blobs", "refs"):
        (root / directory).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        link = root / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "blobs" / str(number))
        link.symlink_to(os.path.relpath(root / "blobs" / str(number), link.parent))


def test_from_the_cache_of_the_hub(saved, tmp_path, monkeypatch):
    folder, expected = saved
    hub_cache(tmp_path / "hub", "org/model", folder)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    pipe = LDMPipeline.from_pretrained("org/model", **options)
    assert np.array_equal(draw(pipe), expected) and pipe.name_or_path == "org/model"
    pipe.save_pretrained(tmp_path / "saved")
    check_folder(tmp_path / "saved")
    passed = LDMPipeline.from_pretrained("org/model", revision="a" * 40, unet=pipe.unet, **options)
    assert passed.unet is pipe.unet and np.array_equal(draw(passed), expected)
    hub_cache(tmp_path / "hub", "org/vae", folder / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_autoencoder("org/vae").config._name_or_path == "org/vae"


@pytest.mark.parametrize("source", ["/no/such/model", "./model", "runs/cats/pipeline"])
@pytest.mark.parametrize("load", [LDMPipeline.from_pretrained, load_autoencoder])
def test_a_missing_folder_is_not_asked_of_the_hub(load, source):
    with pytest.raises(FileNotFoundError, match=f"^{source} is no local folder, and no id") as error:
        load(source)
    assert error.value.__cause__ is None and "\n" not in str(error.value)


def pictures_equal(pipe, expected):
    return np.array_equal(draw(pipe), expected)


def test_options_of_diffusers_pass_through(saved, tmp_path):
    folder, expected = saved
    load, state = LDMPipeline.from_pretrained, torch.get_rng_state()
    assert pictures_equal(load(folder, device_map="cpu", low_cpu_mem_usage=True), expected)
    assert pictures_equal(load(folder, device_map="balanced"), expected)
    half = load(folder, torch_dtype=torch.float16)
    assert half.unet.dtype == half.vae.dtype == torch.float16
    mixed = load(folder, dtype={"unet": torch.bfloat16, "default": torch.float32})
    assert mixed.unet.dtype == torch.bfloat16 and mixed.vae.dtype == torch.float32
    scheduler = DDIMScheduler()
    given = load(folder, unet=mixed.unet, scheduler=scheduler, id2label={"0": "fox"})
    assert given.unet is mixed.unet and given.scheduler is scheduler and given.config.id2label == {"0": "fox"}
    # A variant that one component alone has.
    shutil.copytree(folder, tmp_path / "model")
    other = tiny_pipe().unet
    with torch.no_grad():
        other.conv_in.bias += 1
    other.save_pretrained(tmp_path / "model" / "unet", variant="raw")
    assert pictures_equal(load(tmp_path / "model"), expected)
    raw = load(tmp_path / "model", variant="raw")
    assert torch.equal(raw.unet.conv_in.bias, other.conv_in.bias)
    with pytest.raises(ValueError, match="variant=raw"):
        load(folder, variant="raw")
    assert torch.equal(state, torch.get_rng_state())


def test_shards_and_autoencoders_of_old_give_the_same_weights(saved, tmp_path):
    wanted = load_autoencoder(saved[0] / "vae").state_dict()
    old, shards = tmp_path / "old", tmp_path / "shards"
    shutil.copytree(saved[0] / "vae", old)
    weights = load_file(old / WEIGHTS)
    for key in [key for key in weights if ".attentions." in key]:
        former = key
        for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            former = former.replace(new, name)
        weights[former] = weights.pop(key)
    assert any("query" in key for key in weights)
    save_file(weights, old / WEIGHTS, {"format": "pt"})
    load_autoencoder(saved[0] / "vae").save_pretrained(shards, max_shard_size="5KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    for path in (old, shards):
        found = load_autoencoder(path).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    index = json.loads((shards / f"{WEIGHTS}.index.json").read_text())
    (shards / index["weight_map"]["encoder.conv_in.weight"]).unlink()
    with pytest.raises(OSError, match="00001-of"):
        load_autoencoder(shards)
    tiny_vae(AutoencoderDC).save_pretrained(tmp_path / "dc")
    assert isinstance(load_autoencoder(tmp_path / "dc"), AutoencoderDC)
