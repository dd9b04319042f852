"""The run folder: opened for one configuration only."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from training.checkpoint import atomic_write
from training.config import Config

# The stages in order, and what each leaves in the run folder.
STAGES = {
    "autoencoder": ["autoencoder"],
    "latents": ["latents"],
    "denoiser": ["denoiser", "pipeline"],
    "evaluation": ["metrics.json"],
}
# What may differ between a run and its continuation: how long and how fast, not what.
FREE = {
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "decay_fraction",
    "max_grad_norm",
    "compile",
    "num_workers",
}
FREE |= {"gradient_accumulation_steps", "log_every", "validate_every", "sample_every", "checkpoint_every"}
FREE |= {"keep_checkpoints", "sample_steps", "guidance_scale", "resident"}


def check_folder(config: Config) -> None:
    """Whether the run folder may be used for `config`; prints what differs from the stored configuration.

    Raises:
        ValueError: if it is not a run folder, or holds results of another configuration.
    """
    run = Path(config.output_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output_dir {run} is a file: choose a folder")
    ours = (run / "config.yaml").exists() or (run / "data.json").exists()
    if run.is_dir() and any(run.iterdir()) and not ours:
        raise ValueError(f"{run} is not empty and not a run folder: choose another --output_dir")
    kept = [stage for stage in list(STAGES)[: _first_redone(config)] if (run / STAGES[stage][0]).exists()]
    fatal = {}
    for key, (old, new) in _differences(_read(run), _remembered(config)):
        print(f"configuration changed: {key}: {old} -> {new}")
        if stage := _bound_stage(key, kept):
            fatal[key] = stage
    if fatal:
        first = min(fatal.values(), key=list(STAGES).index)
        raise ValueError(
            f"{run} holds results of another configuration ({', '.join(fatal)} changed): choose another "
            f"--output_dir, set them back, or do it again from there: --redo '[{first}]'"
        )


def open_folder(config: Config) -> Path:
    """Create the run folder, drop the stages to redo, store the configuration; call `check_folder` before.

    `--redo` is remembered until the run has ended, so the same command continues what it has begun.
    """
    run = Path(config.output_dir)
    if config.redo and config.redo != _read(run).get("redo"):
        for result in [
            run / name for stage in list(STAGES)[_first_redone(config) :] for name in STAGES[stage]
        ]:
            if result.is_dir():
                shutil.rmtree(result)
            else:
                result.unlink(missing_ok=True)
    (run / "samples").mkdir(parents=True, exist_ok=True)
    _write(run, _remembered(config) | {"redo": config.redo})
    return run


def close_folder(run: Path) -> None:
    """Forget a finished `--redo`: the next one starts anew."""
    _write(run, _read(run) | {"redo": []})


def _first_redone(config: Config) -> int:
    return min((list(STAGES).index(stage) for stage in config.redo), default=len(STAGES))


def _read(run: Path) -> dict:
    stored = run / "config.yaml"
    return yaml.safe_load(stored.read_text()) if stored.exists() else {}


def _write(run: Path, tree: dict) -> None:
    atomic_write(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False).encode())


def _remembered(config: Config) -> dict:
    """All but what concerns a single call, with tuples as the lists that YAML knows."""
    tree = json.loads(json.dumps(asdict(config)))
    return {key: value for key, value in tree.items() if key not in ("redo", "dry_run", "output_dir")}


def _differences(old: dict, new: dict, prefix: str = ""):
    for key in new if old else ():
        a, b = old.get(key), new[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, (a, b)


def _bound_stage(key: str, kept: list[str]) -> str | None:
    """The first of the stages `kept`, which have results, that a change of `key` would make obsolete."""
    section, _, option = key.partition(".")
    if section in ("data", "seed"):
        return None if option in FREE or not kept else kept[0]
    if section == "autoencoder" and "denoiser" in kept:
        return "autoencoder"  # even a longer training: the denoiser has learnt this autoencoder's latents
    return section if option and section in kept and section != "evaluation" and option not in FREE else None
