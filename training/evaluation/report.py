"""The report of a run: `report.html` in its folder, one file without outside references.

`python -m training.evaluation.report runs/mine` writes it anew, also for the run of an earlier version.
"""

import argparse
import base64
import io
import json
import shlex
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Template
from PIL import Image

from ldm_pipeline.model_card import by_metric, duration, meaning, measured, metric, number, plain, sweep_table
from training.config import RunError, fail, redact
from training.evaluation import curves
from training.evaluation.settings import guidance_words
from training.runtime.atomic import read_json, write_bytes
from training.runtime.folder import STAGES, read_stored
from training.runtime.run import Run

MOMENTS = 12  # pictures of a slider, at most
MAX_WIDTH = 1040  # pixels of a picture; a wider one is reduced


def renew_report(run: Run) -> None:
    """Write the report of the run so far, on the main process. A failure is printed, and ends nothing."""
    if not run.accelerator.is_main_process:
        return
    try:
        save_report(run.folder)
    except Exception as error:  # of whatever kind: a run is worth more than its report
        run.print(f"no new report.html ({redact(str(error))}); the run goes on without it")


def save_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from what lies there; returns its path.

    Raises:
        RunError: it is no run folder, one of its files is damaged, or the report cannot be written.
    """
    path = run / "report.html"
    write_bytes(path, _template().render(content(run), frame=curves).encode())
    return path


@cache
def _template() -> Template:
    """The page, of report.html, report.css and report.js."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    used = (number, plain, duration, measured, metric, meaning, guidance_words)
    environment.filters |= {function.__name__: function for function in used}
    return environment.get_template("report.html")


def content(run: Path) -> dict:
    """All that the template shows, by name; empty where the run has left nothing yet.

    Figures and pictures of an evaluation count only while its networks are those of the run.
    """
    config, log = read_stored(run), read_log(run / "metrics.jsonl")
    if not config:
        raise RunError(f"{run / 'config.yaml'} is missing: want a run folder")
    given, samples = config["evaluation"].get("pipeline"), run / "samples"
    trained = [] if given else [stage for stage in STAGES if stage != "evaluation"]
    stages = [_progress(run, stage, config[stage], log.get(stage, [])) for stage in trained]
    metrics, times = _read(run / "metrics.json"), {stage["name"]: stage["seconds"] for stage in stages}
    metrics = metrics if metrics.get("seconds", {}).items() <= times.items() else {}
    sweep = _read(run / "sweep" / "sweep.json") if metrics else {}
    ends = {name: samples / f"{name}.png" for name in ("samples", "reconstructions", "neighbours")}
    ends["sweep"] = run / "sweep" / "plot.png"
    script = "evaluate_ldm.py" if given else "train_ldm.py"
    return {
        "name": run.absolute().name,
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "config": config,
        "stored": (run / "config.yaml").read_text(encoding="utf-8"),
        "command": f"python training/{script} --config {shlex.quote(str(run / 'config.yaml'))}",
        "stages": [*stages, {"name": "evaluation", "finished": bool(metrics)}],
        "scan": _read(run / "data.json").get("scan", {}),
        "metrics": metrics,
        "real": by_metric(metrics.get("real", {})),
        "sweep": sweep_table(sweep),
        "sweep_protocol": sweep.get("protocol", {}),
        "charts": {stage: curves.draw_charts(records) for stage, records in log.items()},
        "films": {
            "autoencoder": _film(samples.glob("autoencoder-*.png")),
            "denoiser": _film(samples.glob("denoiser-*-ema.png")),
        },
        "pictures": {name: picture(path) for name, path in ends.items() if metrics and path.exists()},
    }


def read_log(path: Path) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl by stage. Those of a stage before one that was done again are left out."""
    log, order = {}, list(STAGES)
    for record in _records(path):
        stage = record.pop("stage")
        for later in order[order.index(stage) + 1 :]:
            log.pop(later, None)
        log.setdefault(stage, []).append(record)
    return log


def _records(path: Path) -> Iterator[dict]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:  # torn by a crash; the next start drops it
            continue


def _progress(run: Path, stage: str, options: dict, records: list[dict]) -> dict:
    """The state of a stage: finished or not, steps done and wanted if it counts them, images, seconds."""
    done, taken = _read(run / stage / "done.json"), bool(options.get("pretrained"))
    wanted = 0 if taken else options.get("max_steps", 0)
    step = max((record["step"] for record in records), default=done.get("steps", 0))
    finished = bool(done) and step >= wanted
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return {
        "name": stage,
        "step": step,
        "wanted": wanted,
        "images": step * options["batch_size"] if wanted else 0,
        "seconds": done["seconds"] if finished else (seconds or [None])[-1],
        "finished": finished,
    }


def _film(paths: Iterable[Path]) -> list[dict]:
    """Pictures over the steps in their names, `MOMENTS` at most, evenly, with the first and the last one."""
    found = sorted((int(path.stem.split("-")[1]), path) for path in paths)
    if len(found) > MOMENTS:
        found = [found[round(i * (len(found) - 1) / (MOMENTS - 1))] for i in range(MOMENTS)]
    return [picture(path) | {"step": step} for step, path in found]


def picture(path: Path) -> dict:
    """A picture as a data URI, "src", with its "width" and "height" in pixels."""
    return _encoded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _encoded(path: Path, changed: int) -> dict:
    """Encoded once as long as the file stays: as the PNG that it is, or as WebP where that is smaller."""
    original, image, buffer = path.read_bytes(), Image.open(path), io.BytesIO()
    if wide := image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.BOX)
    image.save(buffer, "WEBP", quality=90, method=2)
    kind, data = "webp", buffer.getvalue()
    if not wide and len(original) <= len(data):
        kind, data = "png", original
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "width": image.width, "height": image.height}


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def main() -> None:
    """Write the report of the run folder of the command line, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    try:
        print(save_report(parser.parse_args().run))
    except RunError as error:
        fail(error)


if __name__ == "__main__":
    main()
