"""Promises of docs/reliability.md that `make chaos` does not prove, mostly by real processes and files."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captioned import captioned_digits
from chaos import contents, differences
from conftest import ROOT, command, environment, launch, start
from PIL import Image
from safetensors.torch import load_file, save_file

from training.config import AutoencoderConfig, DenoiserConfig
from training.runtime.atomic import clean_up, replacing
from training.runtime.checkpoints import Checkpoints
from training.runtime.log import RunLog
from training.runtime.signals import EXIT_CODE

WEIGHTS = "diffusion_pytorch_model.safetensors"
SINGLE = SimpleNamespace(
    is_main_process=True,
    wait_for_everyone=lambda: None,
    reduce=lambda values, kind: values,
    init_trackers=lambda name: None,
    log=lambda values, step: None,
)


def train(run: Path, *options, **more):
    """The main job in one process, to its end; `more` as for `launch`."""
    return launch("train_ldm.py", "--output_dir", run, *options, **more)


def code(text: str) -> Callable[[], None]:
    """Code that a child runs before its script."""
    return partial(exec, text, {})


def assert_close(a: Path, b: Path, part: str) -> None:
    """Weights of two runs' pipelines differ by less than 1e-5 of their norm.

    Biases are not compared: one in front of a normalisation, or of the keys of an attention, has no effect
    and no gradient but rounding errors, and Adam makes whole steps of these.
    """
    paths = [next((run / "pipeline" / part).glob("*.safetensors")) for run in (a, b)]
    one, two = map(load_file, paths)
    names = [name for name in one if name.endswith(".weight")]
    difference = max(((one[name] - two[name]).norm() / one[name].norm()).item() for name in names)
    print(f"{part} of {b.name}: largest relative difference {difference:.1e}")
    assert difference < 1e-5


def lines(run: Path, stage: str) -> list[dict]:
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in parsed if line["stage"] == stage]


def logged(run: Path, text: str) -> bool:
    """Whether `text` stands in the log of a run."""
    log = run / "metrics.jsonl"
    return log.exists() and text in log.read_text()


def stop_two_processes(script: str | Path, run: Path, stage: str, options: list[str]) -> None:
    """Begin with two processes, and send SIGTERM to their launcher in the middle of a stage."""
    process = subprocess.Popen(
        command(script, "--output_dir", run, *options, processes=2),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not logged(run, f'"stage": "{stage}", "step": 14'):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.terminate()
    assert f"stopped in stage {stage}" in process.communicate(timeout=120)[0]


@pytest.mark.slow
def test_one_process_is_two_and_two_resumed_as_one(tmp_path):
    """50 steps of each network, with dropout and accumulation: only the order of sums differs.

    With the squared error: the absolute one has a kink at 0, where a rounding error can turn a gradient.
    """
    options = [
        "--autoencoder.reconstruction_loss=l2",
        "--autoencoder.max_steps=50",
        "--denoiser.max_steps=50",
    ]
    options += ["--denoiser.sample_every=50", "--denoiser.log_every=1"]
    options += [f"--data.dataset={captioned_digits(tmp_path / 'data')}", "--denoiser.text_encoder=words"]
    options += ["--denoiser.task=inpaint"]
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    train(one, *options)
    train(two, *options, processes=2)
    stop_two_processes("train_ldm.py", both, "autoencoder", options)
    train(both, *options)
    for run in (two, both):
        assert_close(one, run, "vae")
    # Every process drew its share; the grids are those of one.
    for name in ("samples.png", "reconstructions.png"):
        a, b = (torch.tensor(list(Image.open(run / "samples" / name).tobytes())) for run in (one, two))
        assert (a - b).abs().max() <= 2

    again = [*options, "--redo=[denoiser]", "--denoiser.gradient_accumulation_steps=2"]
    for run in (two, both):  # from the same latents, as these are rounded to float16
        shutil.rmtree(run)
        shutil.copytree(one, run)
        (run / "metrics.jsonl").unlink()
    train(two, *again, processes=2)
    stop_two_processes("train_ldm.py", both, "denoiser", again)
    train(both, *again)
    for run in (two, both):
        for part in ("unet", "text_encoder"):
            assert_close(one, run, part)
        for a, b in zip(lines(one, "denoiser"), lines(run, "denoiser"), strict=True):
            assert a["step"] == b["step"] and a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)


# Accelerate shards on accelerators only, and decides that here; the rest works on CPUs too.
SHARDED = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

plain = AcceleratorState.__init__
def init(self, *arguments, **options):
    fresh = not AcceleratorState._shared_state
    plain(self, *arguments, **options)
    if fresh:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = options["fsdp_plugin"]
AcceleratorState.__init__ = init

import training.train_denoiser as module
save = module.save_pipeline
def saved(run, pipeline, ema):
    own, all = (sum(map(size, pipeline.unet.parameters())) for size in (lambda p: p.to_local().numel(),
                                                                       lambda p: p.numel()))
    assert own < 0.6 * all, (own, all)
    save(run, pipeline, ema)
module.save_pipeline = saved

if __name__ == "__main__":
    sys.argv = ["train_ldm.py", *sys.argv[1:]]
    runpy.run_path({str(ROOT / "training" / "train_ldm.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_sharded_denoiser_is_the_whole_one(tiny_run, tmp_path, monkeypatch):
    """FSDP2 on two processes, with images as conditions: the same weights, and a checkpoint that one plain
    process continues."""
    plain, sharded, both = (tmp_path / name for name in ("plain", "sharded", "both"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused = train(tmp_path / "ddp", processes=2, check=False)
    assert refused.returncode != 0 and "leave out --use_fsdp" in refused.stderr
    monkeypatch.setenv("FSDP_VERSION", "2")
    (tmp_path / "job.py").write_text(SHARDED)
    options = ["--denoiser.max_steps=20", "--redo=[denoiser]", "--denoiser.checkpoint_every=10"]
    options += ["--denoiser.task=inpaint"]
    for run in (plain, sharded, both):
        shutil.copytree(tiny_run, run)
    launch(tmp_path / "job.py", "--output_dir", sharded, *options, processes=2)
    stop_two_processes(tmp_path / "job.py", both, "denoiser", options)
    monkeypatch.undo()
    train(both, *options)
    train(plain, *options)
    for run in (sharded, both):
        assert_close(plain, run, "unet")
        kind = json.loads((run / "pipeline" / "unet" / "config.json").read_text())["_class_name"]
        assert kind == "UNet2DModel"


def test_a_signal_saves_first_and_a_second_one_ends_at_once(tmp_path):
    run = tmp_path / "run"
    options = ["--output_dir", run, "--autoencoder.max_steps=100000", "--autoencoder.checkpoint_every=100000"]
    options += ["--autoencoder.validate_every=100000"]
    options += ["--data.num_workers=2"]  # which a terminal's Ctrl-C reaches too
    with start("train_ldm.py", *options, own_group=True) as process:
        process.wait_until(lambda: logged(run, '"step": 6,'))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == EXIT_CODE
    saved = int(re.search(r"stopped in stage autoencoder.*checkpoint-(\d+)", process.stdout)[1])
    assert saved >= 6 and (run / "autoencoder" / f"checkpoint-{saved}" / "state.json").exists()
    assert lines(run, "autoencoder")[-1]["step"] == saved
    # Held by a step that does not end, a second signal does what it would without this package.
    stuck = "import time, training.train_autoencoder as t\n"
    stuck += "t.optimizer_step = lambda *a: print('stuck', flush=True) or time.sleep(100)"
    with start("train_ldm.py", *options, prepare=code(stuck)) as process:
        process.wait_until(lambda: "stuck\n" in process.stdout)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    with start("train_ldm.py", "--output_dir", run, "--autoencoder.max_steps=100000") as first:
        first.wait_until((run / "metrics.jsonl").exists)
        second = train(run, "--autoencoder.max_steps=100000", check=False)
        assert second.returncode == 2 and "another process is at work" in second.stderr
        assert first.poll() is None


def test_workers_that_are_spawned_change_nothing(tiny_run, tmp_path):
    """As on Windows and macOS: whatever a worker process receives is pickled."""
    # Forked from the server that the run was forked from: spawned ones would import for seconds, each.
    pickled = "import multiprocessing, multiprocessing.forkserver as server\n"
    pickled += "multiprocessing.set_start_method('forkserver', force=True)\n"
    pickled += "server._forkserver.ensure_running = lambda: None"
    train(tmp_path / "run", "--data.num_workers=1", prepare=code(pickled))
    assert [name for name in differences(tiny_run, tmp_path / "run") if name != "config.yaml"] == []


def test_a_log_that_is_continued_has_the_lines_of_a_straight_one(tmp_path):
    """A checkpoint at every third step, a line at every second: no line is missing, twice or different."""
    config = AutoencoderConfig(max_steps=12, log_every=2)

    def steps(folder: Path, first: int, last: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        run = SimpleNamespace(accelerator=SINGLE, folder=tmp_path / folder, device=torch.device("cpu"))
        log = RunLog(run, "autoencoder", config, {"step": first, "seconds": 1.0, "sums": {"old": [1.0]}})
        for step in range(first, last):
            log.add({"loss": torch.tensor(step + 1.0).sqrt()})
            log.step_done(step + 1, skipped=torch.tensor(step == 4))
            if (step + 1) % 3 == 0:
                log.flush()

    def untimed(folder: str) -> list[dict]:
        timed = ("seconds", "images_per_second", "data_wait")
        parsed = lines(tmp_path / folder, "autoencoder")
        return [{key: value for key, value in line.items() if key not in timed} for line in parsed]

    steps("straight", 0, 12)
    steps("killed", 0, 8)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "autoenc')
    steps("killed", 6, 12)
    assert untimed("killed") == untimed("straight")
    assert [line["step"] for line in untimed("straight")] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert untimed("straight")[3]["skipped"] == 1 and untimed("straight")[3]["loss"] == pytest.approx(6**0.5)


def test_a_step_that_is_not_finite_is_not_applied(tiny_run, tmp_path):
    """Noise that is NaN in two steps: they are counted and skipped; and in all steps: the run stops."""
    prepare = """
import training.train_denoiser as module
random_batch = module.random_batch
def damaged(run, latents, captions, step):
    batch = random_batch(run, latents, captions, step)
    if step in {steps}:
        batch["noise"][3] = float("nan")
    return batch
module.random_batch = damaged"""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    train = partial(launch, "train_ldm.py", "--output_dir", run, "--evaluation.num_samples=0")
    train("--redo=[denoiser]", prepare=code(prepare.format(steps=[1, 6])))
    skipped = {line["step"]: line["skipped"] for line in lines(run, "denoiser") if "skipped" in line}
    assert skipped == {2: 1, 8: 1}
    for path in run.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    optimizer = load_file(run / "denoiser" / "checkpoint-12" / "optimizer.safetensors")
    assert {value.item() for name, value in optimizer.items() if name.endswith(".step")} == {10.0}

    longer = "--denoiser.max_steps=24"
    stopped = train(longer, check=False, prepare=code(prepare.format(steps="range(14, 24)")))
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    for part in ("from step 14 on", "mixed_precision no", "checkpoint-16", "images of step 14: ["):
        assert part in stopped.stderr, stopped.stderr
    good = load_file(run / "denoiser" / "checkpoint-16" / "ema.safetensors")
    assert all(value.isfinite().all() for value in good.values())
    train(longer)  # and from there it goes on
    assert lines(run, "denoiser")[-1]["step"] == 24 and (run / "pipeline" / "model_index.json").exists()


def test_an_error_of_one_process_ends_all_with_its_message(tmp_path):
    """An image that is damaged after the scan: one process meets it first."""
    images, script = tmp_path / "images", "train_autoencoder.py"
    images.mkdir()
    for number in range(64):
        Image.new("L", (16, 16), number).save(images / f"{number:02d}.png")
    options = ["--output_dir", tmp_path / "run", "--data.dataset", images, "--autoencoder.batch_size=8"]
    options += ["--denoiser.batch_size=8", "--denoiser.class_conditional=false"]
    launch(script, *options, "--autoencoder.max_steps=5")
    for number in (7, 20, 33, 41, 50):
        path = images / f"{number:02d}.png"
        stat = path.stat()
        path.write_bytes(b"\0" * stat.st_size)  # bit rot: neither size nor time tell
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    begun = time.monotonic()
    ended = launch(script, *options, "--autoencoder.max_steps=500", processes=2, check=False)
    assert ended.returncode != 0 and time.monotonic() - begun < 60
    assert re.search(r"\[rank [01]\] error: .*\d\d\.png", ended.stderr), ended.stderr
    assert re.search(r"last good state is .*checkpoint-\d+", ended.stderr)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tiny_run, tmp_path):
    run = tmp_path / "run"
    options = ["--autoencoder.keep_checkpoints=2", "--autoencoder.max_steps=12"]
    launch("train_autoencoder.py", "--output_dir", run, *options)
    (run / "autoencoder" / "done.json").unlink()
    newest = run / "autoencoder" / "checkpoint-12"
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    refused = train(run, *options, check=False)
    assert refused.returncode == 2 and str(damaged) in refused.stderr and "checkpoint-8" in refused.stderr
    shutil.rmtree(newest)
    train(run, *options)
    kept, straight = contents(run), contents(tiny_run)
    different = [name for name in kept if kept[name] != straight.get(name)]
    assert [name for name in different if "checkpoint-8" not in name and name != "config.yaml"] == []


def test_the_newest_every_mth_and_the_guides_checkpoint_are_kept_and_none_that_is_not_finite(tmp_path):
    module = torch.nn.Linear(2, 2)
    config = DenoiserConfig(keep_checkpoints=2, keep_every=4, guide_step=2)
    checkpoints = Checkpoints(tmp_path / "denoiser", {"module": module}, config)
    for step in range(2, 12, 2):
        checkpoints.save(SINGLE, step, {"seconds": 0.0})
    module.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="module is not finite after step 12 .*--denoiser.learning_rate"):
        checkpoints.save(SINGLE, 12, {})
    assert {path.name for path in (tmp_path / "denoiser").iterdir()} == {
        *("checkpoint-2", "checkpoint-4", "checkpoint-8", "checkpoint-10")
    }


def test_a_run_goes_on_with_a_copy_of_its_images_and_not_with_others(tmp_path):
    run, here, there = (tmp_path / name for name in ("run", "here", "there"))
    options = ["--evaluation.num_samples=0", "--denoiser.decay_fraction=0", "--data.dataset"]
    train(run, *options, captioned_digits(here))
    latents = {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*.safetensors")}
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # as downloaded again, to a new machine
    shutil.rmtree(here)
    train(run, *options, there, "--denoiser.max_steps=16")
    assert latents and {path: path.stat().st_mtime_ns for path in latents} == latents
    others = captioned_digits(tmp_path / "others", 290)
    refused = train(run, *options, others, "--denoiser.max_steps=20", check=False)
    assert refused.returncode == 2 and "data.dataset changed" in refused.stderr


def test_torn_foreign_and_outside_latents(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shard, manifest = run / "latents" / "train-00001.safetensors", run / "latents" / "manifest.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])  # torn
    encoded = launch("encode_latents.py", "--output_dir", run)
    assert "train-00001.safetensors is encoded again" in encoded.stdout and shard.read_bytes() == whole
    save_file({"mean": torch.zeros(707, 1, 4, 4, 4)}, shard)  # foreign
    encoded = launch("encode_latents.py", "--output_dir", run)
    assert "is encoded again: it holds" in encoded.stdout and shard.read_bytes() == whole
    key = run / "latents" / "key.json"
    stored = json.loads(key.read_text())
    key.write_text(json.dumps(stored | {"data and transform": "of other files"}))
    refused = launch("encode_latents.py", "--output_dir", run, check=False)
    assert "these changed since: data and transform" in refused.stderr and shard.read_bytes() == whole
    key.write_text(json.dumps(stored))
    (run / "denoiser" / "done.json").unlink()
    text = manifest.read_text()
    for damage, message in (
        (text.replace("train-00000", "../../elsewhere"), "names files outside"),
        ("{", ""),
    ):
        manifest.write_text(damage)
        refused = launch("train_denoiser.py", "--output_dir", run, check=False)
        assert refused.returncode == 2 and f"{manifest}" in refused.stderr and message in refused.stderr


def test_latents_of_another_scale_are_not_trained_on(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "denoiser")
    config = run / "autoencoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"latents_std": [2 * value for value in values["latents_std"]]}))
    refused = train(run, check=False)
    assert refused.returncode == 2 and "wanted 0.8 to 1.25" in refused.stderr


def test_tokens_stay_out_of_everything(tmp_path):
    secret = "hf_" + "Zx9" * 12
    run, bad, env = tmp_path / "run", tmp_path / "bad", {**environment(), "HF_TOKEN": secret}
    short = [f"--{stage}.max_steps=2" for stage in ("autoencoder", "denoiser")]
    short += [f"--{stage}.warmup_steps=0" for stage in ("autoencoder", "denoiser")]
    good = train(run, *short, env=env)
    address = f"https://me:{secret}@example.org/images"
    refused = train(bad, "--data.dataset", address, check=False, env=env)
    assert refused.returncode == 2 and "example.org" in refused.stderr
    for text in (good.stdout, good.stderr, refused.stdout, refused.stderr):
        assert secret not in text
    for path in [*run.rglob("*"), *bad.rglob("*")]:
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_a_disk_that_is_too_small_is_found_before_the_first_step(tmp_path):
    options = ["--autoencoder.max_steps", 2 * 10**9, "--autoencoder.keep_every=1"]
    refused = train(tmp_path / "run", *options, check=False)
    assert refused.returncode == 2 and "GiB" in refused.stderr and "keep_every" in refused.stderr
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_what_a_killed_write_left_is_cleaned_up_and_never_read(tmp_path):
    (tmp_path / ".a.json.tmp").write_text("{")
    (tmp_path / ".pipeline.old").mkdir()
    (tmp_path / ".pipeline.old" / "x").write_text("whole")
    (tmp_path / "b" / ".checkpoint-4.tmp").mkdir(parents=True)
    clean_up(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"b", "pipeline", "pipeline/x"}
    with pytest.raises(KeyError), replacing(tmp_path / "c", 1) as aside:
        aside.write_text("half")
        raise KeyError
    assert not (tmp_path / "c").exists()


def test_no_configuration_reads_a_pickle():
    """Neither torch.load nor pickle stands anywhere in the package or the training."""
    for path in [*(ROOT / "ldm_pipeline").rglob("*.py"), *(ROOT / "training").rglob("*.py")]:
        assert not re.search(r"torch\.load\(|pickle\.loads?\(|^import pickle", path.read_text(), re.M), path
