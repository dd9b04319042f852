"""Damaged and hostile model folders: each works or is refused with one clear error, and nothing is run."""

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file

from benchmarks.oracle import CASES
from ldm_pipeline import LDMPipeline
from ldm_pipeline.loading import load_autoencoder
from tests.fuzz_models import (
    PICKLE,
    WEIGHTS,
    build,
    change_json,
    change_weights,
    draw,
    outcomes,
    set_trap,
)
from tests.test_loading import HOSTED, run
from tests.test_pipeline import FLOW, NAMES, tiny_pipe, tiny_unet, tiny_vae

HARMLESS = {"nothing", "a pickle beside", "an unknown file beside", "a link that leaves the folder", "shards"}
HARMLESS |= {f"weights in {dtype}" for dtype in (torch.float64, torch.float16, torch.bfloat16)} | {
    "few names"
}


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "model")


@pytest.fixture(autouse=True)
def _quiet():
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.enable_progress_bar()


def test_every_damaged_folder_works_or_is_refused(tmp_path):
    counts = outcomes(tmp_path)
    loaded = {kind: (counts[kind, "works"], counts[kind, "refused"]) for kind, _ in counts}
    assert sum(map(sum, loaded.values())) >= 100
    unsure = {kind for kind in loaded if kind.startswith("wrong values")}
    for kind, (works, refused) in loaded.items():
        if kind in HARMLESS:
            assert works and not refused and not counts[kind, "autoencoder refused"], kind
        elif kind not in unsure:
            assert refused and not works, kind


def first(part) -> str:
    return next(iter(load_file(part / WEIGHTS)))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, key: w.pop(key), "1 missing ({key})"),
        (lambda w, key: w.update(more=torch.zeros(2)), "1 unknown (more)"),
        (lambda w, key: w.update({f"_orig_mod.{key}": w.pop(key)}), "1 unknown (_orig_mod.{key})"),
        (lambda w, key: w.update({key: torch.zeros(2, 3)}), "1 of another shape or type ({key})"),
        (lambda w, key: w.update({key: w[key].long()}), "1 of another shape or type ({key})"),
        (
            lambda w, key: w[key].view(-1)[-1:].fill_(torch.nan),
            "1 weights are not finite in torch.float32 ({key})",
        ),
        (
            lambda w, key: w[key].view(-1)[:1].fill_(torch.inf),
            "1 weights are not finite in torch.float32 ({key})",
        ),
    ],
)
def test_weights_must_be_those_of_the_model(folder, name, change, message):
    key = first(folder / name)
    change_weights(folder / name, lambda weights: change(weights, key))
    for load, path in ((LDMPipeline.from_pretrained, folder), (load_autoencoder, folder / name)):
        if load is LDMPipeline.from_pretrained or name == "vae":
            with pytest.raises(ValueError) as caught:
                load(path)
            assert message.format(key=key) in str(caught.value) and str(path) in str(caught.value)


def test_half_precision_that_overflows_is_refused(folder):
    change_weights(folder / "unet", lambda weights: weights[first(folder / "unet")].fill_(1e6))
    LDMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="unet: 1 weights are not finite in torch.float16"):
        LDMPipeline.from_pretrained(folder, torch_dtype=torch.float16)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("model_index.json", {"unet": ["my_unet", "Evil"]}, "trust_remote_code=True alone"),
        ("model_index.json", {"../x": ["diffusers", "UNet2DModel"]}, r"\['../x'\] unknown"),
        ("model_index.json", {"vae": ["diffusers", "UNet2DModel"]}, "wanted .*AutoencoderKL"),
        ("model_index.json", {"scheduler": ...}, "scheduler is None"),
        ("model_index.json", {"id2label": {"0": "cat", "3": "fox"}}, "from 0 to 2"),
        ("model_index.json", {"id2label": ["cat"]}, "wanted a dict of names by number"),
        ("model_index.json", {"objective": "epsilon"}, "objective='epsilon'; wanted a dict"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "wanted 'LDMPipeline'"),
        ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "deviations above 0"),
        ("vae/config.json", {"latents_mean": ...}, "latents_mean=None"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size"),
        ("unet/config.json", {"norm_eps": "small"}, "wanted a number"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "wanted a UNet2DModel"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": "false"}, "wanted a number, true or false"),
        ("scheduler/scheduler_config.json", {"prediction_type": "velocity"}, "velocity"),
    ],
)
def test_what_is_wrong_in_a_config_is_named_with_its_file(folder, file, changes, message):
    change_json(folder / file, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        LDMPipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_what_is_built_in_python_is_checked_too():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    broken = tiny_unet()
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
    for changes in ({"beta_start": "x"}, {"num_train_timesteps": 0}, {"beta_end": float("nan")}):
        with pytest.raises(ValueError, match="objective"):
            LDMPipeline(tiny_vae(), tiny_unet(), scheduler, {"prediction_type": "epsilon"} | changes)


def test_the_hosted_class_refuses_broken_weights(folder, tmp_path):
    change_weights(folder / "unet", lambda weights: weights[first(folder / "unet")].fill_(torch.nan))
    finished = run(HOSTED, folder, tmp_path, installed=False)
    assert finished.returncode != 0 and "ValueError: unet: 1 weights are not finite" in finished.stderr


# ---- pickles, code and tokens
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", ["unet", "vae"])
def test_no_pickle_is_read(tmp_path, name, variant):
    folder, witness, infix = tmp_path / "model", tmp_path / "harm", f".{variant}" if variant else ""
    tiny_pipe().save_pretrained(folder, variant=variant)
    bait = folder / name / f"diffusion_pytorch_model{infix}.bin"
    set_trap(bait, witness)
    LDMPipeline.from_pretrained(folder, variant=variant)  # beside safetensors it is passed over
    with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
        LDMPipeline.from_pretrained(folder, variant=variant, use_safetensors=False)
    (folder / name / f"diffusion_pytorch_model{infix}.safetensors").unlink()
    with pytest.raises(OSError, match=r"safetensors is missing; pickles .* are never read"):
        LDMPipeline.from_pretrained(folder, variant=variant)
    if name == "vae":
        with pytest.raises(OSError, match=r"safetensors is missing; pickles .* are never read"):
            load_autoencoder(folder / name)
    assert not witness.exists()
    pickle.loads(bait.read_bytes())  # the trap itself works
    assert witness.exists()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_no_pickle_under_another_name_is_read(tmp_path, variant):
    folder, witness, infix = tmp_path / "model", tmp_path / "harm", f".{variant}" if variant else ""
    tiny_pipe().save_pretrained(folder, variant=variant)
    weights = folder / "vae" / f"diffusion_pytorch_model{infix}.safetensors"
    loads = [lambda: LDMPipeline.from_pretrained(folder, variant=variant)]
    loads += [] if variant else [lambda: load_autoencoder(folder / "vae")]
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), PICKLE)}
    set_trap(folder / "vae" / PICKLE, witness)
    (folder / "vae" / f"{WEIGHTS}.index{infix}.json").write_text(json.dumps(index))
    for load in loads:  # Diffusers reads the files that an index names, whatever they are
        with pytest.raises(ValueError, match="no names of .safetensors files"):
            load()
    (folder / "vae" / f"{WEIGHTS}.index{infix}.json").unlink()
    set_trap(weights, witness)
    for load in loads:
        with pytest.raises(ValueError, match="no whole safetensors file"):
            load()
    assert not witness.exists()
    pickle.loads(weights.read_bytes())  # the trap itself works
    assert witness.exists()


@pytest.mark.parametrize("library, kind", [("my_unet", "Evil"), ("diffusers", "UNet2DModel")])
def test_code_of_a_component_is_not_run_without_trust(folder, tmp_path, library, kind):
    harm = tmp_path / "harm"
    code = f"open({str(harm)!r}, 'w').close()\nfrom diffusers import UNet2DModel\nEvil = UNet2DModel\n"
    (folder / "unet" / f"{library}.py").write_text(code)
    change_json(folder / "model_index.json", unet=[library, kind])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        LDMPipeline.from_pretrained(folder)
    assert not harm.exists()
    script = (
        "from ldm_pipeline import LDMPipeline\nLDMPipeline.from_pretrained(folder, trust_remote_code=True)"
    )
    run(script, folder, tmp_path, installed=True)
    assert harm.exists()  # the trap itself works


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


@pytest.mark.parametrize("status", [401, 404])
def test_no_token_is_in_an_error(tmp_path, status):
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
    try:
        load("someone/model{status}")
    except (ValueError, OSError):
        traceback.print_exc()
"""
        finished = run(script, tmp_path, tmp_path, installed=True)
        server.shutdown()
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert f"Bearer {token}" in server.seen
    assert finished.stderr.count(f"Error: someone/model{status} is no local folder") == 2
    assert "secret" not in finished.stdout + finished.stderr


# ---- what must go on working
def test_variants_given_components_and_the_state_of_the_generator(folder, tmp_path):
    expected, other = draw(LDMPipeline.from_pretrained(folder)), tmp_path / "variant"
    tiny_pipe().save_pretrained(other, variant="fp16")
    state = torch.get_rng_state()
    pipe = LDMPipeline.from_pretrained(other, variant="fp16")
    assert torch.equal(state, torch.get_rng_state()) and (draw(pipe) == expected).all()
    assert pipe.config._name_or_path == str(other)
    with pytest.raises(OSError, match="missing"):
        LDMPipeline.from_pretrained(other)
    (folder / "unet" / WEIGHTS).unlink()
    unet, scheduler = tiny_unet(), diffusers.DDIMScheduler(clip_sample=False)
    given = LDMPipeline.from_pretrained(folder, unet=unet, scheduler=scheduler, id2label=NAMES)
    assert given.unet is unet and given.scheduler is scheduler


def test_shards_and_autoencoders_of_old_give_the_same_weights(folder, tmp_path):
    wanted = load_autoencoder(folder / "vae").state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for key in [key for key in weights if ".attentions." in key]:
            old = key
            for new, former in names.items():
                old = old.replace(new, former)
            weights[old] = weights.pop(key)

    change_weights(folder / "vae", rename)
    assert any("query" in key for key in load_file(folder / "vae" / WEIGHTS))
    vae = tmp_path / "shards"
    tiny_vae().save_pretrained(vae, max_shard_size="5KB")
    assert len(list(vae.glob("*.safetensors"))) > 1
    tiny_vae(AutoencoderDC).save_pretrained(tmp_path / "dc")
    assert isinstance(load_autoencoder(tmp_path / "dc"), AutoencoderDC)
    for path in (folder / "vae", vae):
        found = load_autoencoder(path).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("case", CASES)
def test_every_scheduler_that_can_sample_can_be_loaded(folder, case):
    name, options, _ = CASES[case]
    kind = getattr(diffusers, f"{name}Scheduler")
    kind(**options).save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", kind.__name__])
    for name in ("unet", "vae"):  # given, for speed
        (folder / name / WEIGHTS).unlink()
    pipe = LDMPipeline.from_pretrained(folder, unet=tiny_unet(), vae=tiny_vae())
    assert type(pipe.scheduler) is kind
