"""The tables and texts of a model card; what was not measured is None, and its row absent."""

import json
import math
import re

from ldm_pipeline.pipeline import latent_shape, num_classes
from ldm_pipeline.run_files import STAGES, RunFiles

ROWS = 12  # of a sweep's table
OBJECTIVES = {
    "flow_prediction": "flow matching (arXiv:2209.03003)",
    "epsilon": "prediction of the noise (arXiv:2006.11239)",
    "v_prediction": "prediction of the velocity (arXiv:2202.00512)",
}
# By a figure's name without the number of samples.
MEANINGS = {
    "FID": "Frechet distance in Inception's features, lower is better",
    "KID": "kernel distance in Inception's features, lower is better",
    "IS": "Inception score, higher is better",
    "FD": "Frechet distance in the features below, lower is better",
    "KD": "kernel distance in the features below, lower is better",
    "precision": "share of samples among the real images",
    "recall": "share of real images among the samples",
    "density": "how densely real images surround a sample",
    "coverage": "share of real images with a sample near them",
    "agreement": "share read as the class that was asked for",
    "classifier score": "as the Inception score, by the classes of the features below, higher is better",
    "PSNR": "dB, mean over the images, higher is better",
    "SSIM": "structural similarity, higher is better",
    "LPIPS": "perceptual distance, lower is better",
    "rFID": "Frechet distance to the originals in Inception's features, lower is better",
    "rFD": "Frechet distance to the originals, lower is better",
}


def image_size(pipe) -> tuple[int, int]:
    """Height and width of the pictures that `pipe` draws, in pixels."""
    config = pipe.vae.config
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    _, height, width = latent_shape(pipe.denoiser)
    return height * 2 ** (len(widths) - 1), width * 2 ** (len(widths) - 1)


def sampling_settings(pipe, protocol: dict) -> dict:
    """What to draw with: the pipeline's defaults, else what was measured, else 20 steps without guidance."""
    defaults = pipe.config.get("defaults") or {}
    steps = defaults.get("num_inference_steps") or protocol.get("num_inference_steps") or 20
    scale = defaults.get("guidance_scale") or protocol.get("guidance_scale") or 1.0
    return {"num_inference_steps": steps} | ({"guidance_scale": scale} if num_classes(pipe.denoiser) else {})


# ----------------------------------------------------------------------------------------------- the pipeline
def of_pipeline(pipe, run: RunFiles) -> dict:
    """What the template says of the pipeline itself."""
    protocol = run.metrics.get("samples", {}).get("protocol", {})
    own, used = type(pipe.scheduler).__name__.removesuffix("Scheduler"), protocol.get("scheduler")
    names = list((pipe.config.id2label or {}).values())
    shown = names if len(names) <= 100 else [*names[:20], f"... ({len(names):,} in all)"]
    return {
        "summary": _summary(pipe, run),
        "call": _call(pipe, names, protocol),
        "classes": ", ".join(map(_cell, shown)),
        "model": _table(_model_rows(pipe, run)),
        "other_scheduler": used if used and used.removesuffix("Scheduler") != own else None,
    }


def _summary(pipe, run: RunFiles) -> str:
    kind = "A class-conditional" if num_classes(pipe.denoiser) else "An unconditional"
    height, width = image_size(pipe)
    grey = " grey" if pipe.vae.config.in_channels == 1 else ""
    text = f"{kind} latent diffusion model of {width}x{height}{grey} images"
    if "denoiser" not in run.done:
        return f"{text}."
    if run.section("autoencoder").get("pretrained"):
        return f"{text}. The denoiser was trained from scratch, on the latents of an existing autoencoder."
    return f"{text}, trained from scratch: autoencoder and denoiser."


def _call(pipe, names: list[str], protocol: dict) -> str:
    """The arguments of the snippet's call, as Python."""
    arguments = {}
    if num_classes(pipe.denoiser):
        own = [name for name in names if names.count(name) == 1]
        arguments["class_labels"] = json.dumps(own[0], ensure_ascii=False) if own else 0
    arguments |= sampling_settings(pipe, protocol)
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _model_rows(pipe, run: RunFiles) -> dict:
    vae, unet, classes = pipe.vae, pipe.unet, num_classes(pipe.denoiser)
    height, width = image_size(pipe)
    latents = "x".join(map(str, latent_shape(unet)))
    weights = [weight for model in (vae, unet) for weight in model.state_dict().values()]
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    types = {str(weight.dtype).removeprefix("torch.") for weight in weights if weight.is_floating_point()}
    given = run.section("autoencoder").get("pretrained")
    return {
        "autoencoder": f"`{type(vae).__name__}`{f' ({given})' if given else ''}, {_millions(vae)} M "
        f"parameters, {vae.config.in_channels}x{height}x{width} to {latents} latents",
        "denoiser": f"`{type(unet).__name__}`, {_millions(unet)} M parameters, widths "
        f"{', '.join(map(str, unet.config.block_out_channels))}"
        f"{f', {classes:,} classes and the null class' if classes else ''}",
        "objective": OBJECTIVES[pipe.config.objective["prediction_type"]],
        "scheduler": f"`{type(pipe.scheduler).__name__}`; any other of Diffusers with an ordinary step fits",
        "weights": f"{size:,.1f} MB of safetensors, {', '.join(sorted(types))}",
    }


def _millions(model) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.3g}"


# ---------------------------------------------------------------------------------------------------- the run
def of_run(run: RunFiles) -> dict:
    """What the template says of the training and of what was measured."""
    samples = run.metrics.get("samples", {})
    return {
        "training": _table(_training_rows(run)),
        "reconstruction": _reconstruction(run.metrics.get("reconstruction", {})),
        "samples": _samples(samples, run.metrics.get("real", {})),
        "per_class": _per_class(samples.get("per_class", {})),
        "protocol": _table(_protocol_rows(samples.get("protocol", {}))),
        "other_features": samples.get("protocol", {}).get("features", "inception") != "inception",
        "sweep": _sweep(run.sweep),
        "memorisation": _memorisation(run.metrics.get("memorisation", {})),
    }


def _training_rows(run: RunFiles) -> dict:
    metrics = run.metrics
    if not (run.done or run.config or metrics):
        return {}
    splits = {"train": "for training", "held_out": "held out"}
    counts = [f"{run.counts[key]:,} {text}" for key, text in splits.items() if run.counts.get(key)]
    flip = ["mirrored at random"] if run.section("data").get("horizontal_flip") else []
    rows = {"images": ", ".join([*counts, *flip])}
    rows |= {stage: _stage(run, stage) for stage in ("autoencoder", "denoiser")}
    seconds = {stage: done.get("seconds") for stage, done in run.done.items()} or metrics.get("seconds", {})
    if seconds := measured({stage: seconds.get(stage) for stage in STAGES}):
        parts = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
        rows["time"] = f"{_duration(sum(seconds.values()))} ({parts})"
    rows["hardware"] = re.sub(r", no$", ", float32", metrics.get("hardware", ""))
    rows["seed"] = run.config.get("seed", metrics.get("seed"))
    rows["held-out loss of the denoiser"] = _number(metrics.get("val_loss"))
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())
    rows["evaluated on"] = metrics.get("date")
    return rows


def _stage(run: RunFiles, stage: str) -> str | None:
    done, config = run.done.get(stage, {}), run.section(stage)
    if not done.get("steps"):
        return None
    texts = [f"{done['steps']:,} steps" + (f" of {config['batch_size']:,}" if "batch_size" in config else "")]
    texts += [f"{done['images']:,} images in all"] if "images" in done else []
    texts += [f"AdamW, peak rate {config['learning_rate']:g}"] if "learning_rate" in config else []
    if "reconstruction_loss" in config:
        extras = {"LPIPS": config.get("lpips_weight"), "PatchGAN": config.get("gan_weight")}
        extras = [f"{weight:g} {name}" for name, weight in extras.items() if weight]
        texts.append(" + ".join([f"{config['reconstruction_loss'].upper()} loss", *extras]))
    return ", ".join(texts)


def _reconstruction(found: dict) -> dict | None:
    figures = measured({name: value for name, value in found.items() if name != "n"})
    if not figures:
        return None
    count = f"{found['n']:,} " if "n" in found else ""
    split = f"{found['split']} " if "split" in found else ""
    rows = [[name, _number(value), _meaning(name)] for name, value in figures.items()]
    return {"images": f"{count}{split}images", "table": _lines([["figure", "", ""], *rows])}


def _samples(samples: dict, real: dict) -> dict | None:
    """The table of the samples' figures, beside those of real images in their place."""
    figures, count = measured(samples.get("figures", {})), samples.get("protocol", {}).get("n")
    if not figures:
        return None
    floor = {_stem(name): (name, value) for name, value in measured(real.get("figures", {})).items()}
    rows = [["figure", f"{count:,} samples" if count else "samples"]]
    rows += [[name, _number(value)] for name, value in figures.items()]
    if floor:
        rows[0].append(f"{real['n']:,} held-out images" if "n" in real else "held-out images")
        for row in rows[1:]:
            name, value = floor.get(_stem(row[0]), (None, None))
            # Of another number of images it is another figure, with a name of its own.
            row.append(f"{_number(value) or ''}{f' ({name})' if name not in (None, row[0]) else ''}")
    rows[0].append("")
    for row in rows[1:]:
        row.append(_meaning(row[0]))
    return {"table": _lines(rows), "has_real": bool(floor)}


def _stem(name: str) -> str:
    """A figure's name without the number of samples: "FD" of "FD-5k" and of "FD-500"."""
    return re.sub(r"-\d+(\.\d+)?k?\b", "", name)


def _meaning(name: str) -> str:
    return "its standard deviation" if name.endswith(" deviation") else MEANINGS.get(_stem(name), "")


def _per_class(found: dict) -> dict | None:
    values = sorted(measured(found.get("values", {})).items(), key=lambda item: item[1])
    if not values:
        return None
    rows = [["class", found["figure"]], *([name, _number(value)] for name, value in values)]
    return {"name": found["figure"], "table": _lines(rows)}


def _protocol_rows(protocol: dict) -> dict:
    def text(value) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {entry}" for name, entry in value.items())
        return f"{value:,}" if type(value) is int else str(value)

    names = {"n": "samples", "reference": "compared with"}
    return {names.get(key, _words(key)): text(value) for key, value in protocol.items()}


def _words(key: str) -> str:
    return key.removeprefix("num_").replace("_", " ")


def _sweep(sweep: dict) -> dict | None:
    """The best settings by their first figure."""
    rows = [row | {"figures": measured(row.get("figures", {}))} for row in sweep.get("settings", [])]
    rows = [row for row in rows if row["figures"]]
    if not rows:
        return None
    names = [name for name in rows[0]["figures"] if not name.endswith(" deviation")]  # the table is wide
    own = [key for key in rows[0] if key != "figures"]
    rows.sort(key=lambda row: row["figures"].get(names[0], math.inf))
    cells = [[*map(row.get, own), *map(row["figures"].get, names)] for row in rows[:ROWS]]
    table = _lines([[*map(_words, own), *names], *([_number(c) or c or "" for c in row] for row in cells)])
    many = f"The best {ROWS} of the {len(rows)} settings" if len(rows) > ROWS else f"All {len(rows)} settings"
    count = sweep.get("protocol", {}).get("n")
    each = f", {count:,} samples each" if count else ""
    return {"table": table, "intro": f"{many} that were tried, by {names[0]}{each}", "figure": names[0]}


def _memorisation(found: dict) -> dict | None:
    if not {"n", "train_images", "quantile", "share"} <= measured(found).keys():
        return None
    counts = {name: f"{found[name]:,}" for name in ("n", "train_images")}
    return counts | {name: f"{100 * found[name]:.3g} %" for name in ("quantile", "share")}


def citation(title: str, repo_id: str, metrics: dict) -> str:
    """A BibTeX entry of the model."""
    owner, name = repo_id.split("/")
    title = re.sub(r"([&%$#_{}])", r"\\\1", title)
    entries = {"title": title, "author": owner, "year": str(metrics.get("date", ""))[:4]}
    entries["howpublished"] = rf"\url{{https://huggingface.co/{repo_id}}}"
    lines = [f"  {key} = {{{value}}}," for key, value in entries.items() if value]
    return "\n".join(["@misc{" + re.sub(r"\W", "_", name) + ",", *lines, "}"])


# -------------------------------------------------------------------------------------------- numbers, tables
def measured(values: dict) -> dict:
    """The finite numbers among the values."""
    return {name: value for name, value in values.items() if _number(value) is not None}


def _number(value) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    sizes = {"h": 3600, "min": 60, "s": 1}
    unit = next((unit for unit, size in sizes.items() if seconds >= size), "s")
    return f"{seconds / sizes[unit]:.1f} {unit}"


def _cell(text) -> str:
    """Text that stays within its cell of a Markdown table, and is no HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _lines(rows: list) -> str:
    """A Markdown table, its head first."""
    rows = [[_cell(cell) for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _table(rows: dict) -> str | None:
    known = [[name, value] for name, value in rows.items() if value not in (None, "")]
    return _lines([["", ""], *known]) if known else None
