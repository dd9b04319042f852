"""The model card, README.md of a Hub repository, rendered from a pipeline and a record of its training."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import ChainableUndefined, Environment
from torch import Tensor

from ldm_pipeline.pipeline import (
    LDMPipeline,
    downsampling,
    is_conditional,
    latent_shape,
    num_classes,
    text_width,
)

SWEEP_ROWS = 12
MEANINGS = {  # of metrics, by `metric`
    "FID": "Frechet distance of Inception features, lower is better",
    "KID": "kernel distance of Inception features, lower is better",
    "IS": "Inception score, higher is better",
    "FD": "Frechet distance of the features below, lower is better",
    "KD": "kernel distance of the features below, lower is better",
    "precision": "share of samples that lie among the real images",
    "recall": "share of real images that lie among the samples",
    "density": "how densely real images surround a sample",
    "coverage": "share of real images with a sample near them",
    "CLIP score": "100 times the cosine of a sample's and its prompt's features in a model of images and "
    "texts, higher is better",
    "agreement": "share recognised as the class that was asked for",
    "classifier score": "like the Inception score, with the classes of the features below, higher is better",
    "PSNR": "dB, mean over the images, higher is better",
    "SSIM": "structural similarity, higher is better",
    "LPIPS": "perceptual distance, lower is better",
    "hole PSNR": "dB, in the hole alone, mean over the images, higher is better",
    "hole MAE": "mean absolute error in the hole, of pixels from 0 to 1, lower is better",
    "consistency PSNR": "dB, samples at the low resolution that they were made from, higher is better",
    "rFID": "Frechet distance to the originals, Inception features, lower is better",
    "rFD": "Frechet distance to the originals, lower is better",
}


@dataclass(frozen=True)
class TrainingRecord:
    """Facts about a model's training and evaluation. Every part may be empty.

    Attributes:
        config: the configuration, published as training_config.yaml.
        metrics: the evaluation's result, published as metrics.json.
        stages: "autoencoder", "latents" and "denoiser", each with some of `steps`, `images` and `seconds`.
        counts: number of images by split, "train" and "held_out".
        sweep: the evaluation's `settings`, a list, and their `protocol`.
        pictures: image files by their name in the repository; see `ldm_pipeline.hub.PICTURES`.
        raw_weights: the denoiser's weights at the last step, without EMA.
    """

    config: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    stages: dict[str, dict] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sweep: dict = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    raw_weights: dict[str, Tensor] | None = None


def render_card(
    pipe: LDMPipeline,
    repo_id: str,
    license: str,
    *,
    record: TrainingRecord | None = None,
    title: str | None = None,
    dataset: str | None = None,
    source_url: str | None = None,
    pictures: tuple[str, ...] = (),
) -> str:
    """The text of the card. What is not known or was not measured is left out.

    Args:
        repo_id: "org/model", which the snippets load.
        license: the Hub's identifier of the licence of the weights, such as "apache-2.0".
        title: default: "Latent diffusion on" and the dataset.
        dataset: its Hub id or name; default: that of the record's configuration.
        source_url: https address of a git repository from which pip installs this package.
        pictures: the images beside the card that it may show; see `ldm_pipeline.hub.PICTURES`.
    """
    record = record or TrainingRecord()
    dataset = dataset or record.config.get("data", {}).get("dataset")
    title = " ".join(title.split()) if title else f"Latent diffusion on {dataset or 'images'}"
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=ChainableUndefined)
    environment.filters |= {f.__name__: f for f in (number, cell, duration, measured, metric, meaning)}
    names = list((pipe.config.id2label or {}).values())
    text = environment.from_string(template_path().read_text(encoding="utf-8")).render(
        title=title,
        repo_id=repo_id,
        license=license,
        dataset=dataset,
        is_hub_id=is_hub_id(dataset),
        source_url=source_url,
        pictures=pictures,
        record=record,
        pipe=pipe,
        classes=num_classes(pipe.denoiser),
        condition=" and ".join(_conditions(pipe)),
        latents=latent_shape(pipe.denoiser),
        image_size=image_size(pipe),
        call=_call(pipe, names, record.metrics),
        loads=image_snippet(pipe.config.get("task"))[0],
        class_names=names,
        real=by_metric(record.metrics.get("real", {})),
        sweep=sweep_table(record.sweep, SWEEP_ROWS),
        citation=_citation(title, repo_id, record.metrics.get("date")),
    )
    front = _front_matter(pipe, repo_id, license, dataset, record.metrics)
    card = f"---\n{yaml_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{text.strip()}\n"
    ModelCard(card)  # raises where huggingface_hub could not read it
    return card


def is_hub_id(dataset: str | None) -> bool:
    """Whether the name has the form of an id on the Hub: org/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset or ""))


def template_path() -> Path:
    """The card's template: beside this file in a wheel, at the top level in a checkout."""
    installed = Path(__file__).with_name("model_card.md")
    return installed if installed.exists() else installed.parent.parent / "model_card.md"


def sampling_settings(pipe: LDMPipeline, protocol: dict) -> dict:
    """Arguments of a call: the pipeline's defaults, else the evaluation's, else 20 steps without guidance."""
    names = {"num_inference_steps": 20, "guidance_scale": 1.0}
    if not is_conditional(pipe.denoiser):
        del names["guidance_scale"]
    known = protocol | (pipe.config.get("defaults") or {})
    return {name: known.get(name) or value for name, value in names.items()}


# ----------------------------------------------------------------------------------------------- the pipeline
def image_size(pipe: LDMPipeline) -> list[int]:
    """Height and width of the images in pixels."""
    return [side * downsampling(pipe.vae) for side in latent_shape(pipe.denoiser)[1:]]


def _conditions(pipe: LDMPipeline) -> list[str]:
    """The kind of model, as tags and in the words of its card."""
    kinds = {"class": num_classes(pipe.denoiser), "text": text_width(pipe.denoiser), "image": pipe.task}
    return [f"{kind}-conditional" for kind in kinds if kinds[kind]] or ["unconditional"]


def image_snippet(task: dict | None) -> tuple[list[str], list[str]]:
    """Lines of Python that load the images of a task's call, and the arguments of the call."""
    names = {} if task is None else {"image": "image"}
    names |= {"mask_image": "mask"} if task and task["kind"] == "inpaint" else {}
    lines = [f'{name} = load_image("{name}.png")' for name in names.values()]
    lines = ["from diffusers.utils import load_image", *lines] if lines else []
    return lines, [f"{argument}={name}" for argument, name in names.items()]


def _call(pipe: LDMPipeline, names: list[str], metrics: dict) -> str:
    """The arguments of the snippet's call, as Python."""
    protocol = metrics.get("samples", {}).get("protocol", {})
    arguments = [f"{name}={value}" for name, value in sampling_settings(pipe, protocol).items()]
    if num_classes(pipe.denoiser):
        unique = [name for name in names if names.count(name) == 1]
        arguments.insert(0, f"class_labels={json.dumps(unique[0], ensure_ascii=False) if unique else 0}")
    arguments = image_snippet(pipe.config.get("task"))[1] + arguments
    if text_width(pipe.denoiser):
        prompt = metrics.get("prompts", ["a picture"])[0]
        arguments.insert(0, json.dumps(prompt, ensure_ascii=False))
    return ", ".join(arguments)


# ------------------------------------------------------------------------------------------------ the metrics
def by_metric(real: dict) -> dict[str, tuple[str, float]]:
    """Name and value of the metrics of held-out images, by `metric`: the number of images may differ."""
    return {metric(name): (name, value) for name, value in measured(real.get("figures")).items()}


def sweep_table(sweep: dict, limit: int | None = None) -> dict | None:
    """The best settings by the metric to rank by, which is the first one if none is named; None: no sweep."""
    rows = [row | {"figures": measured(row.get("figures"))} for row in sweep.get("settings", [])]
    rows = [row for row in rows if row["figures"]]
    if not rows:
        return None
    metrics = [name for name in rows[0]["figures"] if not name.endswith(" deviation")]  # the table is wide
    settings = [name for name in rows[0] if name != "figures"]
    rank_by = sweep.get("rank_by", metrics[0])
    rows.sort(key=lambda row: row["figures"].get(rank_by, math.inf))
    return {
        "count": len(rows),
        "samples": sweep.get("protocol", {}).get("n"),
        "metric": rank_by,
        "head": [name.removeprefix("num_").replace("_", " ") for name in settings] + metrics,
        "rows": [[*map(row.get, settings), *map(row["figures"].get, metrics)] for row in rows[:limit]],
    }


def _front_matter(pipe: LDMPipeline, repo_id: str, license: str, dataset: str | None, metrics: dict) -> dict:
    samples, reconstruction = metrics.get("samples", {}), metrics.get("reconstruction", {})
    tag = "text-to-image" if text_width(pipe.denoiser) else "unconditional-image-generation"
    tag = "image-to-image" if pipe.task else tag
    results = []
    if dataset:
        for task, title, found, protocol in (
            ("image-to-image", "Reconstruction by the autoencoder", reconstruction, {}),
            (tag, "Samples", samples.get("figures"), samples.get("protocol")),
        ):
            results += [
                EvalResult(
                    task_type=task,
                    task_name=title,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_args=protocol or {name: found[name] for name in ("n", "split") if name in found},
                    metric_type=name,
                    metric_name=name,
                    metric_value=float(f"{value:.5g}"),
                )
                for name, value in measured(found).items()
                if name != "n"
            ]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=tag,
        datasets=[dataset] if is_hub_id(dataset) else None,
        tags=["ldm-pipeline", "latent-diffusion", *_conditions(pipe)],
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    ).to_dict()


def _citation(title: str, repo_id: str, date: str | None) -> str:
    """A BibTeX entry of the model."""
    owner, name = repo_id.split("/")
    entries = {"title": re.sub(r"([&%$#_{}])", r"\\\1", title), "author": owner, "year": (date or "")[:4]}
    entries["howpublished"] = rf"\url{{https://huggingface.co/{repo_id}}}"
    lines = [f"  {key} = {{{value}}}," for key, value in entries.items() if value]
    return "\n".join(["@misc{" + re.sub(r"\W", "_", name) + ",", *lines, "}"])


# ------------------------------------------------------------------------------------- the template's filters
def measured(values: dict | None) -> dict:
    """The finite numbers among the values."""
    return {name: value for name, value in (values or {}).items() if number(value)}


def metric(name: str) -> str:
    """A metric's name without the number of samples: "FD" of "FD-5k" and of "FD-500"."""
    return re.sub(r"-\d+(\.\d+)?k?\b", "", name)


def number(value) -> str:
    """A finite number as text; "" for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds) -> str:
    """Seconds, minutes or hours as text; "" if there is no number."""
    if not number(seconds):
        return ""
    unit, size = next((u, s) for u, s in {"h": 3600, "min": 60, "s": 0}.items() if seconds >= s)
    return f"{seconds / (size or 1):.1f} {unit}"


def meaning(name: str) -> str:
    """Meaning of a metric, and which values are good."""
    return "standard deviation" if name.endswith(" deviation") else MEANINGS.get(metric(name), "")


def plain(value) -> str:
    """A value as text in one line."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {number(entry) or entry}" for name, entry in value.items())
    return " ".join((number(value) or ("" if value is None else str(value))).split())


def cell(value) -> str:
    """Text for a cell of a Markdown table, without line breaks, column borders or HTML."""
    return plain(value).replace("|", "\\|").replace("<", "&lt;")
