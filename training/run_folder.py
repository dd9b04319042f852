"""The run folder: opened for one configuration only."""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import yaml

from training.checkpoint import atomic_write
from training.config import Config, OptimizationConfig

# The stages in order, and what each leaves in the run folder.
STAGES = {
    "autoencoder": ["autoencoder"],
    "latents": ["latents"],
    "denoiser": ["denoiser", "pipeline"],
    "evaluation": ["metrics.json"],
}


def open_run(config: Config) -> Path:
    """Create or reopen the run folder of `config`, forget the stages to redo, and store the configuration.

    A continued run may change how long and how fast it trains; what else differs from the stored configuration is
    refused where a stage already has results, since they would not be those of its configuration.

    Raises:
        ValueError: if the folder is not a run folder, or is one of another configuration.
    """
    run = Path(config.output_dir)
    stored = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output_dir {run} is a file: choose a folder")
    if run.is_dir() and any(run.iterdir()) and not stored.exists():
        raise ValueError(f"{run} is not empty and not a run folder: choose another --output_dir")
    stages = list(STAGES)
    first_redone = min((stages.index(stage) for stage in config.redo), default=len(stages))
    now = _stored(config)
    if stored.exists():
        kept = [stage for stage in stages[:first_redone] if (run / stage).exists()]
        changes = dict(_differences(yaml.safe_load(stored.read_text()), now))
        for key, (old, new) in changes.items():
            print(f"configuration changed: {key}: {old} -> {new}")
        if fatal := [key for key in changes if not _may_change(key, kept)]:
            raise ValueError(
                f"{run} holds results of another configuration ({', '.join(fatal)} changed): choose another "
                f"--output_dir, set them back, or do these stages again: --redo '[{kept[0]}]'"
            )
    for result in [run / name for stage in stages[first_redone:] for name in STAGES[stage]]:
        if result.is_dir():
            shutil.rmtree(result)
        else:
            result.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    atomic_write(stored, yaml.safe_dump(now, sort_keys=False).encode())
    return run


def _stored(config: Config) -> dict:
    """What a run remembers: all but what concerns a single call, with tuples as the lists that YAML knows."""
    tree = json.loads(json.dumps(asdict(config)))
    return {key: value for key, value in tree.items() if key not in ("redo", "dry_run", "output_dir")}


def _differences(old: dict, new: dict, prefix: str = ""):
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, (a, b)


def _may_change(key: str, kept: list[str]) -> bool:
    """Whether `key` may differ from the stored configuration when the stages `kept` have results."""
    section, _, option = key.partition(".")
    free = {f.name for f in fields(OptimizationConfig)} | {"num_workers", "resident"}
    if section in ("data", "seed"):
        return not kept or option in free
    return not option or section not in kept or option in free
