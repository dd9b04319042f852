"""Many settings of one pipeline: a table, a picture, and the best of them."""

import csv
import io
import json
from pathlib import Path

from ldm_pipeline.pipeline import LDMPipeline, num_classes
from training.evaluation.features import FeatureNetwork
from training.evaluation.metrics import Reference
from training.evaluation.plots import save_sweep
from training.evaluation.samples import Setting, draw_features, sample_labels, samples_folder
from training.runtime.atomic import read_json, replacing, write_bytes, write_json
from training.runtime.run import Run


def sweep(
    run: Run,
    pipeline: LDMPipeline,
    settings: list[Setting],
    network: FeatureNetwork,
    reference: Reference,
    weights: str,
    protocol: dict,
) -> Setting:
    """Leave `sweep/` in the run folder; returns the setting with the smallest Frechet distance.

    All processes draw, and the same samples of every setting as far as labels and noise go.
    """
    count, rows = run.config.evaluation.num_samples, []
    labels = sample_labels(run, pipeline, count)
    for setting in settings:
        folder = samples_folder(run, weights, setting, network)
        samples = draw_features(run, pipeline, setting, network, count, folder)
        rows.append(setting.describe() | {"figures": run.once(reference.figures, samples, labels)})
        name, value = next(iter(rows[-1]["figures"].items()))
        run.print(f"{setting.name}, {setting.num_inference_steps} steps, guidance "
                  f"{setting.guidance_scale:g}: {name} {value:.4g}")  # fmt: skip
    if run.accelerator.is_main_process:
        write_sweep(run.folder / "sweep", rows, protocol)
    best = min(range(len(rows)), key=lambda row: next(iter(rows[row]["figures"].values())))
    if run.config.evaluation.save_best:
        save_defaults(run, pipeline, settings[best])
    run.accelerator.wait_for_everyone()
    return settings[best]


def write_sweep(folder: Path, rows: list[dict], protocol: dict) -> None:
    """`sweep.json`, the same as `table.csv` and `table.md`, and `plot.png`."""
    folder.mkdir(exist_ok=True)
    flat = [{key: value for key, value in row.items() if key != "figures"} | row["figures"] for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, flat[0])
    writer.writeheader()
    writer.writerows(flat)
    write_bytes(folder / "table.csv", text.getvalue().encode())
    first = next(iter(rows[0]["figures"]))
    order = sorted(flat, key=lambda row: row[first])
    lines = ["| " + " | ".join(flat[0]) + " |", "|" + "---|" * len(flat[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in order]
    note = ", ".join(f"{key} {value}" for key, value in protocol.items() if isinstance(value, (str, int)))
    write_bytes(folder / "table.md", ("\n".join([*lines, "", note]) + "\n").encode())
    save_sweep(rows, folder / "plot.png")
    write_json(folder / "sweep.json", {"protocol": protocol, "settings": rows})


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save_defaults(run: Run, pipeline: LDMPipeline, setting: Setting) -> None:
    """Make a setting what the run's pipeline draws with by itself."""
    folder = run.folder / "pipeline"
    if run.accelerator.is_main_process:
        with replacing(folder / "scheduler", 10_000) as aside:
            setting.scheduler.save_pretrained(aside)
        index = read_json(folder / "model_index.json")
        index["scheduler"] = ["diffusers", type(setting.scheduler).__name__]
        index["defaults"] = {"num_inference_steps": setting.num_inference_steps}
        if num_classes(pipeline.denoiser):
            index["defaults"]["guidance_scale"] = setting.guidance_scale
        write_json(folder / "model_index.json", index)
    run.print(f"{folder} now draws with {json.dumps(setting.describe())}")
