"""Damaged and hostile model folders are refused with one clear error, and nothing of them is run."""

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
from tests.test_loading import HOSTED, run
from tests.test_pipeline import FLOW, tiny_pipe, tiny_unet, tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


class Trap:
    """What a pickle can do when it is read: here, leave a file."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def set_trap(path: Path, witness: Path) -> None:
    """A pickle at `path` which creates `witness` if anybody reads it."""
    path.write_bytes(pickle.dumps({"conv_in.weight": Trap(witness)}))


def change_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_weights(folder: Path, change) -> None:
    """Save the weights of a component as `change` leaves them."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    tiny_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def first(part) -> str:
    return next(iter(load_file(part / WEIGHTS)))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, key: w.pop(key), "1 missing_keys ({key})"),
        (lambda w, key: w.update(more=torch.zeros(2)), "1 unexpected_keys (more)"),
        (lambda w, key: w.update({f"_orig_mod.{key}": w.pop(key)}), "1 unexpected_keys (_orig_mod.{key})"),
        (lambda w, key: w.update({key: torch.zeros(2, 3)}), "1 mismatched_keys"),
        (lambda w, key: w[key].view(-1)[-1:].fill_(torch.nan), "not finite in torch.float32 ({key})"),
        (lambda w, key: w[key].view(-1)[:1].fill_(torch.inf), "not finite in torch.float32 ({key})"),
    ],
)
def test_weights_must_be_those_of_the_model(folder, capfd, name, change, message):
    key = first(folder / name)
    change_weights(folder / name, lambda weights: change(weights, key))
    loads = [(LDMPipeline.from_pretrained, folder), (load_autoencoder, folder / "vae")]
    for load, path in loads if name == "vae" else loads[:1]:
        with pytest.raises(ValueError) as caught:
            load(path)
        assert message.format(key=key) in str(caught.value) and str(path) in str(caught.value)
    assert "Some weights" not in capfd.readouterr().err  # Diffusers' warning of the same


def test_half_precision_that_overflows_is_refused(folder):
    change_weights(folder / "unet", lambda weights: weights[first(folder / "unet")].fill_(1e6))
    LDMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="unet: 1 weights are not finite in torch.float16"):
        LDMPipeline.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", {"unet": ["my_unet", "Evil"]}, "trust_remote_code=True alone"),
        ("model_index.json", {"vae": ["os", "system"]}, "trust_remote_code=True alone"),
        ("model_index.json", {"vae": ["diffusers", "UNet2DModel"]}, "wanted .*AutoencoderKL"),
        ("model_index.json", {"scheduler": ...}, "scheduler is None"),
        ("model_index.json", {"id2label": {"0": "cat", "3": "fox"}}, "from 0 to 2"),
        ("model_index.json", {"objective": "epsilon"}, "objective='epsilon'; wanted"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "wanted 'LDMPipeline'"),
        ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "deviations above 0"),
        ("vae/config.json", {"latents_mean": ...}, "latents_mean=None"),
    ],
)
def test_what_is_wrong_in_a_config_is_named_with_its_folder(folder, file, changes, message):
    change_json(folder / file, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        LDMPipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
@pytest.mark.parametrize(
    "name", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "unet/config.json", "model_index.json"]
)
def test_missing_and_cut_files_are_named(folder, name, damage):
    damage(folder / name)
    with pytest.raises((OSError, ValueError)) as caught:
        LDMPipeline.from_pretrained(folder)
    assert str((folder / name).parent) in str(caught.value)


def test_what_is_built_in_python_is_checked_too():
    scheduler, broken = diffusers.DDIMScheduler(), tiny_unet()
    with torch.no_grad():
        broken.conv_in.bias[0] = torch.nan
    with pytest.raises(ValueError, match="unet: 1 weights are not finite"):
        LDMPipeline(tiny_vae(), broken, scheduler, FLOW)
    with torch.device("meta"):
        empty = tiny_unet()
    with pytest.raises(ValueError, match="weights are in no file"):
        LDMPipeline(tiny_vae(), empty, scheduler, FLOW)
    for names in (["cat"], {"0": "cat", "7": "fox"}, {"cat": 0}, {0: 1}):
        with pytest.raises(ValueError, match="from 0 to 2"):
            LDMPipeline(tiny_vae(), tiny_unet(), scheduler, FLOW, names)


def test_the_hosted_class_refuses_broken_weights(folder, tmp_path):
    change_weights(folder / "unet", lambda weights: weights[first(folder / "unet")].fill_(torch.nan))
    finished = run(HOSTED, folder, tmp_path, installed=False)
    assert finished.returncode != 0 and "ValueError: unet: 1 weights are not finite" in finished.stderr


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", ["unet", "vae"])
def test_no_pickle_is_read(tmp_path, name, variant):
    folder, witness, infix = tmp_path / "model", tmp_path / "harm", f".{variant}" if variant else ""
    tiny_pipe().save_pretrained(folder, variant=variant)
    weights, bait = (
        folder / name / f"diffusion_pytorch_model{infix}.{end}" for end in ("safetensors", "bin")
    )
    keys = load_file(weights)
    set_trap(bait, witness)
    LDMPipeline.from_pretrained(folder, variant=variant)  # beside safetensors it is passed over
    with pytest.raises(ValueError, match="never a pickle"):
        LDMPipeline.from_pretrained(folder, variant=variant, use_safetensors=False)
    loads = [lambda: LDMPipeline.from_pretrained(folder, variant=variant)]
    loads += [lambda: load_autoencoder(folder / name)] if name == "vae" and not variant else []
    index = folder / name / f"{WEIGHTS}.index{infix}.json"  # Diffusers reads whatever an index names
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, bait.name)}))
    for load in loads:
        with pytest.raises(ValueError, match="no names of safetensors files"):
            load()
    index.unlink()
    weights.unlink()
    for load in loads:  # the pickle alone
        with pytest.raises(OSError, match="safetensors"):
            load()
    set_trap(weights, witness)  # under the name of safetensors
    for load in loads:
        with pytest.raises(OSError, match="safetensors"):
            load()
    assert not witness.exists()
    pickle.loads(bait.read_bytes())  # the trap itself works
    assert witness.exists()


@pytest.mark.parametrize("library, kind", [("my_unet", "Evil"), ("diffusers", "UNet2DModel")])
def test_code_of_a_component_is_not_run_without_trust(folder, tmp_path, library, kind):
    harm = tmp_path / "harm"
    code = f"open({str(harm)!r}, 'w').close()\nfrom diffusers import UNet2DModel\nEvil = UNet2DModel\n"
    (folder / "unet" / f"{library}.py").write_text(code)
    change_json(folder / "model_index.json", unet=[library, kind])
    if library == "diffusers":
        LDMPipeline.from_pretrained(folder)  # a stock class, whatever lies beside its weights
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            LDMPipeline.from_pretrained(folder)
        script = "from ldm_pipeline import LDMPipeline\nload = LDMPipeline.from_pretrained\n"
        run(script + "load(folder, trust_remote_code=True)", folder, tmp_path, installed=True)
        assert harm.exists()  # the trap itself works
        harm.unlink()
    assert not harm.exists()


class Refusing(BaseHTTPRequestHandler):
    """A Hub that shows nothing to anybody, with the status that the name of the repository asks for."""

    def do_GET(self):
        self.server.seen.append(self.headers.get("Authorization"))
        self.send_response(401 if "401" in self.path else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_no_token_is_in_an_error(tmp_path):
    token = "hf_" + "secret" * 6
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        hub |= {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        script = f"""
import os, traceback
os.environ |= {hub}
from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
for load in (lambda x: LDMPipeline.from_pretrained(x, token=os.environ["HF_TOKEN"]), load_autoencoder):
    for status in (401, 404):
        try:
            load(f"someone/model{{status}}")
        except (ValueError, OSError):
            traceback.print_exc()
            print("refused")
"""
        finished = run(script, tmp_path, tmp_path, installed=True)
        server.shutdown()
    assert finished.stdout.count("refused") == 4, finished.stderr[-4000:]
    assert f"Bearer {token}" in server.seen and "someone/model404" in finished.stderr
    assert "secret" not in finished.stdout + finished.stderr
