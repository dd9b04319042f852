"""The run folder: opened for one configuration only."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout
from torch import nn

from ldm_pipeline.pipeline import latent_shape
from training.config import LOCK, Config, RunError, redact
from training.data.tasks import cached, task_of
from training.options import options
from training.runtime.atomic import clean_up, discard, write_bytes
from training.runtime.checkpoints import found_checkpoints

# The stages in order, and what each leaves in the run folder: patterns, the first one a name.
STAGES = {
    "autoencoder": ["autoencoder", "samples/autoencoder-*.png"],
    "latents": ["latents"],
    "denoiser": ["denoiser", "pipeline", "samples/denoiser-*.png"],
    "evaluation": [
        *("metrics.json", "evaluation", "sweep"),
        *("samples/samples.png", "samples/reconstructions.png", "samples/neighbours.png"),
    ],
}


def check_folder(config: Config, say: Callable[[str], None] = print) -> None:
    """Whether the run folder may be used for `config`; says what differs from the stored configuration.

    Another --data.dataset may hold the same images: `check_dataset` decides when they are known.

    Raises:
        RunError: if it is not a run folder, or holds results of another configuration.
    """
    run = Path(config.output_dir)
    if run.exists() and not run.is_dir():
        raise RunError(f"--output_dir {run} is a file: choose a folder")
    ours = any((run / name).exists() for name in (LOCK, "config.yaml", "data.json"))
    if run.is_dir() and any(run.iterdir()) and not ours:
        raise RunError(f"{run} is not empty and not a run folder: choose another --output_dir")
    kept, fatal = _kept(config), {}
    for key, (old, new) in _differences(read_stored(run), _remembered(config)):
        say(f"configuration changed: {key}: {old} -> {new}")
        if stage := _bound_stage(key, kept):
            fatal[key] = stage
    if fatal:
        raise _refusal(run, list(fatal), min(fatal.values(), key=list(STAGES).index))


def check_dataset(config: Config) -> None:
    """Whether the run folder may go on with other images than its own: not if --data.dataset names others.

    Raises:
        RunError: if it does, and the folder holds results.
    """
    run, kept = Path(config.output_dir), _kept(config)
    stored = read_stored(run)
    if kept and stored and config.data.dataset != stored["data"]["dataset"]:
        raise _refusal(run, ["data.dataset"], kept[0])


def _kept(config: Config) -> list[str]:
    """The stages with results in the run folder that will not be done again, in order."""
    stages = list(STAGES)[: _first_redone(config)]
    return [stage for stage in stages if (Path(config.output_dir) / STAGES[stage][0]).exists()]


def _refusal(run: Path, changed: list[str], stage: str) -> RunError:
    return RunError(
        f"{run} holds results of another configuration ({', '.join(changed)} changed): choose another "
        f"--output_dir, set them back, or do it again from there: --redo '[{stage}]'"
    )


def check_guide(config: Config) -> None:
    """Whether the checkpoint of `--denoiser.guide_step`, which stays, is there or will be.

    Raises:
        RunError: with the checkpoints that there are, or the steps that will have one.
    """
    stage, run = config.denoiser, Path(config.output_dir)
    redone = config.redo and config.redo != read_stored(run).get("redo")
    starts = redone and _first_redone(config) <= list(STAGES).index("denoiser")
    found = [] if starts else [int(path.name.split("-")[-1]) for path in found_checkpoints(run / "denoiser")]
    step, name = stage.guide_step, f"--denoiser.guide_step {stage.guide_step}"
    if not step or step in found:
        return
    if found and found[-1] > step:
        raise RunError(
            f"{name}: {run / 'denoiser'} has gone further, and kept the checkpoints {found}; choose one of "
            "these, or train again with --redo '[denoiser]'"
        )
    if step >= stage.max_steps or step % stage.checkpoint_every:
        raise RunError(
            f"{name}: want a multiple of --denoiser.checkpoint_every {stage.checkpoint_every} below "
            f"--denoiser.max_steps {stage.max_steps}"
        )


def lock_folder(run: Path) -> BaseFileLock:
    """Claim the run folder, creating it, for as long as this process lives; clean up after a killed one.

    Raises:
        RunError: if another process is at work there, or the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"another process is at work in {run}: wait until it has ended, or choose another --output_dir"
        ) from error
    except OSError as error:
        raise RunError(f"--output_dir {run} cannot be written: {error}") from error
    clean_up(run)
    return lock


def check_space(
    config: Config, networks: tuple[nn.Module, nn.Module], images: int, text_encoder: nn.Module | None = None
) -> None:
    """Whether the disk has room for all that the run will leave, but for the encoded captions.

    Raises:
        RunError: with what is needed, what is free and the options that change it.
    """
    run, data = Path(config.output_dir), config.data
    need = 0
    for name, network in zip(("autoencoder", "denoiser"), networks, strict=True):
        stage = getattr(config, name)
        weights = 4 * sum(parameter.numel() for parameter in network.parameters())
        kept = stage.keep_checkpoints + (stage.max_steps // stage.keep_every if stage.keep_every else 0)
        trained = not getattr(stage, "pretrained", None)
        # A checkpoint has weights, EMA weights and two moments; one is written before one is deleted. The
        # result is stored for its stage and in the pipeline.
        guide = bool(getattr(stage, "guide_step", 0))
        need += weights * (4 * (kept + guide + 1) * trained + 2 + guide)
        if name == "denoiser" and text_encoder is not None:
            encoder = sum(parameter.nbytes for parameter in text_encoder.parameters())
            need += encoder * (4 * (kept + 1) * (config.denoiser.trains_text_encoder) + 1)
    numbers = math.prod(latent_shape(networks[1])) * (2 if data.horizontal_flip else 1)
    need += images * numbers * 2 * (3 if cached(task_of(config.denoiser)) else 2)  # float16: mean, deviation
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    if need > free + used:
        raise RunError(
            f"--output_dir {run} needs up to {need / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} GiB "
            "free: make room, choose another folder, or lower keep_checkpoints or raise keep_every of "
            "--autoencoder and --denoiser"
        )


def open_folder(config: Config) -> Path:
    """Create the run folder, drop the stages to redo, store the configuration; call `check_folder` before.

    `--redo` is remembered until the run has ended, so the same command continues what it has begun.
    """
    run = Path(config.output_dir)
    if config.redo and config.redo != read_stored(run).get("redo"):
        patterns = [pattern for stage in list(STAGES)[_first_redone(config) :] for pattern in STAGES[stage]]
        for result in [path for pattern in patterns for path in run.glob(pattern)]:
            discard(result)
    (run / "samples").mkdir(parents=True, exist_ok=True)
    _write(run, _remembered(config) | {"redo": config.redo})
    return run


def continued(config: Config) -> dict:
    """The options, by their dotted names, of the run that `config` continues; empty for a new one.

    A run is new if all is to be done again, or if nothing is done yet and `--minutes` is another number.
    """
    run = Path(config.output_dir)
    stored = read_stored(run)
    redone = _first_redone(config) == 0 and config.redo != stored.get("redo")
    begun = any((run / names[0]).exists() for names in STAGES.values())
    resized = "minutes" in config.given and config.minutes != stored.get("minutes") and not begun
    if redone or resized:
        return {}
    # The number of threads is known to `build_accelerator`, which warns where it cannot be had again.
    names = {name for name in options(Config) if _resume_rule(name) != "unrecorded"} - {"num_threads"}
    return {name: value for name, value in _flat(stored) if name in names}


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def close_folder(run: Path) -> None:
    """Forget a finished `--redo`: the next one starts anew."""
    _write(run, read_stored(run) | {"redo": []})


def _first_redone(config: Config) -> int:
    return min((list(STAGES).index(stage) for stage in config.redo), default=len(STAGES))


def read_stored(run: Path) -> dict:
    """The configuration that a run folder keeps; empty if there is none. RunError if it is damaged."""
    stored = run / "config.yaml"
    if not stored.exists():
        return {}
    try:
        tree = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{stored} is damaged ({error}): restore or delete it") from error
    if not isinstance(tree, dict):
        raise RunError(f"{stored} is damaged (it holds no mapping): restore or delete it")
    return tree


def _write(run: Path, tree: dict) -> None:
    write_bytes(run / "config.yaml", redact(yaml.safe_dump(tree, sort_keys=False)).encode())


def _remembered(config: Config) -> dict:
    """The options that are stored, without tokens, as YAML and JSON know them."""
    tree = json.loads(redact(json.dumps(asdict(config), ensure_ascii=False)))
    return {key: value for key, value in tree.items() if _resume_rule(key) != "unrecorded"}


def _resume_rule(name: str) -> str:
    """Whether a run may continue with another value of an option; see `option`."""
    entry = options(Config).get(name)
    return entry.metadata.get("resume", "fixed") if entry else "fixed"


def _differences(old: dict, new: dict, defaults: dict | None = None, prefix: str = ""):
    """The options that differ, with both values. An option that `old` does not know had its default."""
    defaults = _remembered(Config()) if defaults is None else defaults
    for key in new if old else ():
        if key not in old and _resume_rule(prefix + key) == "free":
            continue  # it came with a later version, such as the number of threads that a run now chooses
        a, b = old.get(key, defaults[key]), new[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, defaults[key], f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, (a, b)


def _bound_stage(name: str, kept: list[str]) -> str | None:
    """The first of the stages `kept`, which have results, that a change of an option would make obsolete."""
    rule, section = _resume_rule(name), name.partition(".")[0]
    used = section == "autoencoder" and "denoiser" in kept  # the denoiser has learnt its latents
    if not kept or rule == "free" or (rule == "while_unused" and not used):
        return None
    if section not in STAGES:
        return kept[0]  # the data and the seed concern every stage
    return section if section in kept else None
