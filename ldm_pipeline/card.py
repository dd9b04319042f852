"""The model card, rendered from the pipeline and from what a run measured."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id, yaml_dump
from jinja2 import Environment, StrictUndefined

from ldm_pipeline import card_parts
from ldm_pipeline.pipeline import LDMPipeline, num_classes
from ldm_pipeline.run_files import RunFiles


def render_card(
    pipe: LDMPipeline,
    repo_id: str,
    license: str,
    *,
    run: RunFiles | None = None,
    title: str | None = None,
    pictures: tuple[str, ...] = (),
    raw: bool = False,
) -> str:
    """The model card, README.md of a Hub repository, of what is known: what was not measured is absent.

    Args:
        repo_id: "org/model", which the snippet loads.
        license: the Hub's identifier of the licence of the weights, such as "apache-2.0".
        run: what `read_run` found; None: the pipeline is all that is known.
        title: default: "Latent diffusion on" and the name of the data.
        pictures: files beside the card that it may show: samples.png, reconstructions.png, neighbours.png,
            sweep.png.
        raw: whether the denoiser's weights without averaging are there too.

    Raises:
        ValueError: `repo_id` or `license` has another form.
    """
    check_names(repo_id, license)
    run = run or RunFiles()
    title = " ".join(title.split()) if title else f"Latent diffusion on {run.dataset or 'images'}"
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    text = environment.from_string(template_path().read_text(encoding="utf-8")).render(
        title=title,
        repo_id=repo_id,
        license=license,
        pictures=pictures,
        raw=raw,
        run=run,
        citation=card_parts.citation(title, repo_id, run.metrics),
        **card_parts.of_pipeline(pipe, run),
        **card_parts.of_run(run),
    )
    front = yaml_dump(_front_matter(pipe, run, repo_id, license), sort_keys=False, allow_unicode=True)
    card = f"---\n{front}---\n\n{text.strip()}\n"
    ModelCard(card)  # raises where huggingface_hub could not read it
    return card


def check_names(repo_id: str, license: str) -> None:
    """ValueError unless both have the form that the Hub wants."""
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id {repo_id!r}; wanted a user or organisation and a name, such as org/model")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license {license!r}; wanted an identifier of the Hub such as apache-2.0 or mit")


def template_path() -> Path:
    """The card's template: beside this file in a wheel, at the top level in a checkout."""
    installed = Path(__file__).with_name("model_card.md")
    return installed if installed.exists() else installed.parent.parent / "model_card.md"


def _front_matter(pipe: LDMPipeline, run: RunFiles, repo_id: str, license: str) -> dict:
    classes = num_classes(pipe.denoiser)
    results = [*_results(run, "reconstruction"), *_results(run, "samples")] if run.dataset else []
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        datasets=[run.dataset] if run.is_hub_id else None,
        tags=["ldm-pipeline", "latent-diffusion", "class-conditional" if classes else "unconditional"],
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    ).to_dict()


def _results(run: RunFiles, part: str) -> list[EvalResult]:
    """The measured figures of a part, with their protocol as the data set's arguments."""
    found, sampling = run.metrics.get(part, {}), part == "samples"
    figures = found.get("figures", {}) if sampling else {k: v for k, v in found.items() if k != "n"}
    return [
        EvalResult(
            task_type="unconditional-image-generation" if sampling else "image-to-image",
            task_name="Samples" if sampling else "Reconstruction by the autoencoder",
            dataset_type=run.dataset,
            dataset_name=run.dataset,
            dataset_split=None if sampling else found.get("split"),
            dataset_args=found.get("protocol") if sampling else {"n": found.get("n")},
            metric_type=name,
            metric_name=name,
            metric_value=float(f"{value:.5g}"),
        )
        for name, value in card_parts.measured(figures).items()
    ]
