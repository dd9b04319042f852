"""Several settings of one pipeline: their metrics in a table and a plot, and the best of them."""

import csv
import io
import json
import os
import shutil
from itertools import product
from pathlib import Path

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Objective, scheduler_family
from training.config import EvaluationConfig, RunError
from training.evaluation.metrics import ranking_metric
from training.evaluation.plots import save_sweep
from training.evaluation.samples import SampleMetrics, SamplingSettings
from training.runtime.atomic import read_json, replacing, write_bytes, write_json


def configured_settings(
    config: EvaluationConfig, objective: dict, own: SamplingSettings, conditional: bool
) -> list[SamplingSettings]:
    """All combinations of `--evaluation.schedulers`, `num_inference_steps` and `guidance_scales`.

    Args:
        own: the pipeline's own settings, for what the options leave out.
        conditional: whether the pipeline has classes.

    Raises:
        RunError: one of the settings cannot sample.
    """
    scales = config.guidance_scales or [own.guidance_scale]
    if not conditional and set(scales) != {1.0}:
        raise RunError(
            f"--evaluation.guidance_scales {scales}: this model has no classes to guide to; 1 is off"
        )
    settings = []
    names, steps = config.schedulers or [None], config.num_inference_steps or [own.num_inference_steps]
    for name, number, scale in product(names, steps, scales):
        try:
            scheduler = build_scheduler(objective, name) if name else own.scheduler
            scheduler_family(scheduler, Objective(objective))
            settings.append(SamplingSettings(scheduler, number, float(scale)))
            settings[-1].describe()  # some schedulers refuse some numbers of steps
        except ValueError as error:
            options = f"--evaluation.schedulers {name}" if name else "--evaluation.num_inference_steps"
            raise RunError(f"{options} with {number} steps: {error}") from error
    return settings


def sweep(
    metrics: SampleMetrics, settings: list[SamplingSettings], count: int, protocol: dict, folder: Path
) -> SamplingSettings:
    """Measure `count` samples with each of the settings; returns the best of them.

    Every process calls this. All settings start from the same noise and classes.

    Args:
        folder: gets `sweep.json`, the same as `table.csv` and `table.md`, and `plot.png`.
    """
    accelerator, rows = metrics.sampler.accelerator, []
    for each in settings:
        rows.append(each.describe() | {"figures": metrics.measure(each, count)})
        name = ranking_metric(rows[-1]["figures"])
        accelerator.print(
            f"{each.name}, {each.num_inference_steps} steps, guidance {each.guidance_scale:g}: "
            f"{name} {rows[-1]['figures'][name]:.4g}",
            flush=True,
        )
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
    index["defaults"] = {"num_inference_steps": settings.num_inference_steps}
    if conditional:
        index["defaults"]["guidance_scale"] = settings.guidance_scale
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
