"""Several settings of one pipeline: their metrics in a table and a plot, and the best of them."""

import csv
import io
import json
import os
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Guidance, prepare_guider, scheduler_family
from training.config import EvaluationConfig, RunError
from training.evaluation.metrics import ranking_metric
from training.evaluation.plots import save_sweep
from training.evaluation.samples import SampleMetrics
from training.evaluation.settings import SamplingSettings
from training.runtime.atomic import read_json, replacing, write_bytes, write_json


def configured_settings(
    config: EvaluationConfig, own: SamplingSettings, conditional: bool, has_guide: bool
) -> list[SamplingSettings]:
    """All combinations of schedulers, steps, and scales, kinds, intervals and rescaling of guidance.

    Settings that differ only in a guidance which scale 1 switches off are one.

    Args:
        own: the pipeline's own settings, for what the options leave out.
        conditional: whether the pipeline has something to guide to, classes or text.
        has_guide: whether it has a network for autoguidance.

    Raises:
        RunError: one of the settings cannot sample.
    """
    scales, kinds = config.guidance_scales or [own.guidance_scale], config.guidance_kinds or [own.guidance]
    if "autoguidance" in kinds and not has_guide:
        raise RunError(
            "--evaluation.guidance_kinds autoguidance: this model has no guide_unet; --denoiser.guide_step "
            "makes an early checkpoint one"
        )
    if not conditional and set(kinds) != {"autoguidance"} and set(scales) != {1.0}:
        raise RunError(
            f"--evaluation.guidance_scales {scales}: this model has no classes to guide to; 1 is off"
        )
    objective = own.objective.config
    names, steps = config.schedulers or [None], config.num_inference_steps or [own.num_inference_steps]
    intervals = config.guidance_intervals or [own.guidance_interval]
    found = {}
    for name, number in product(names, steps):
        scheduler = own.scheduler
        try:
            if name:
                scheduler = build_scheduler(objective, name)
            scheduler_family(scheduler, own.objective)
            SamplingSettings(own.objective, scheduler, number, 1.0).describe()  # some refuse some numbers
        except ValueError as error:
            options = f"--evaluation.schedulers {name}" if name else "--evaluation.num_inference_steps"
            raise RunError(f"{options} with {number} steps: {error}") from error
        guidance = kinds, intervals, config.guidance_rescales or [own.guidance_rescale], scales
        for kind, interval, rescale, scale in product(*guidance):
            numbers = number, float(scale), kind, tuple(map(float, interval)), float(rescale)
            each = _checked(SamplingSettings(own.objective, scheduler, *numbers))
            found[json.dumps(each.describe())] = each
    return list(found.values())


def _checked(settings: SamplingSettings) -> SamplingSettings:
    """The settings, where what has no effect is as by default. RunError if a call would refuse them."""
    plain = {"guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0}
    option = f"guidance_intervals {list(settings.guidance_interval)}"
    try:
        Guidance(interval=settings.guidance_interval)
        option = f"guidance_kinds {settings.guidance}"
        if settings.guider is not None:
            prepare_guider(settings.guider, torch.zeros(1, 1), settings.num_inference_steps)
            settings = replace(settings, **plain)
    except ValueError as error:
        raise RunError(f"--evaluation.{option}: {error}") from error
    off = settings.guidance_scale == 1
    return replace(settings, guidance="classifier_free", **plain) if off else settings


def sweep(
    metrics: SampleMetrics, settings: list[SamplingSettings], count: int, protocol: dict, folder: Path
) -> SamplingSettings:
    """Measure `count` samples with each of the settings; returns the best of them.

    Every process calls this. All settings start from the same noise and classes.

    Args:
        folder: gets `sweep.json`, the same as `table.csv` and `table.md`, and `plot.png`.
    """
    accelerator, rows = metrics.sampler.accelerator, [each.describe() for each in settings]
    for key in ("guidance", "guidance_interval", "guidance_rescale"):
        if all(row[key] == rows[0][key] for row in rows):  # no column then
            protocol = protocol | {key: [row.pop(key) for row in rows][0]}
    for each, row in zip(settings, rows, strict=True):
        row["figures"] = metrics.measure(each, count)
        name = ranking_metric(row["figures"])
        accelerator.print(f"{each}: {name} {row['figures'][name]:.4g}", flush=True)
    if accelerator.is_main_process:
        _write_tables(folder, rows, name, protocol)
        save_sweep(rows, name, folder / "plot.png")
        write_json(folder / "sweep.json", {"protocol": protocol, "rank_by": name, "settings": rows})
    return min(zip(rows, settings, strict=True), key=lambda pair: pair[0]["figures"][name])[1]


def _write_tables(folder: Path, rows: list[dict], name: str, protocol: dict) -> None:
    folder.mkdir(exist_ok=True)
    flat = [{key: value for key, value in row.items() if key != "figures"} | row["figures"] for row in rows]
    text = io.StringIO()
    csv.writer(text).writerows([flat[0], *(row.values() for row in flat)])
    write_bytes(folder / "table.csv", text.getvalue().encode())
    lines = ["| " + " | ".join(flat[0]) + " |", "|" + "---|" * len(flat[0])]
    for row in sorted(flat, key=lambda row: row[name]):
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    note = ", ".join(f"{key} {value}" for key, value in protocol.items() if isinstance(value, str | int))
    write_bytes(folder / "table.md", ("\n".join([*lines, "", note]) + "\n").encode())


def save_defaults(folder: Path, settings: SamplingSettings, conditional: bool) -> None:
    """Make settings the defaults of a pipeline folder, which is replaced as a whole.

    Its other files are not copied but linked, where the file system can.
    """
    index = read_json(folder / "model_index.json")
    index["scheduler"] = ["diffusers", type(settings.scheduler).__name__]
    guidance, off = settings.guidance_arguments(), {"guidance_interval": (0, 1), "guidance_rescale": 0}
    if not (conditional or guidance["autoguidance"]):
        guidance = {}
    own = {name: value for name, value in guidance.items() if value != off.get(name, False)}
    index["defaults"] = {"num_inference_steps": settings.num_inference_steps} | own
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    with replacing(folder, size) as aside:
        shutil.copytree(
            folder,
            aside,
            copy_function=_link,
            ignore=shutil.ignore_patterns("scheduler", "model_index.json"),
        )
        settings.scheduler.save_pretrained(aside / "scheduler")
        (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
