"""Everything that the evaluation would refuse after hours of training, checked before the first step."""

from dataclasses import asdict

from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import Objective
from training.config import RunError, objective_of
from training.evaluation.features import load_clip, why_unavailable
from training.evaluation.metrics import MIN_SAMPLES
from training.evaluation.settings import SamplingSettings
from training.evaluation.sweep import configured_settings
from training.evaluation.validation import lpips_alex
from training.networks import has_classes
from training.runtime.atomic import read_json
from training.runtime.run import Run


def check_evaluation(run: Run, stages: list[str]) -> None:
    """Check the options of the evaluation, and unless `--dry_run` that its networks can be loaded.

    A training run whose feature network is not available says so in one line and goes on: it ends without the
    metrics of samples. For the evaluation alone that is an error.

    Args:
        stages: names of the stages of this script.

    Raises:
        RunError: an option cannot work, or would be ignored.
    """
    config = run.config
    if "evaluation" in stages:
        _check_options(run, trains="denoiser" in stages)
    samples = "evaluation" in stages and config.evaluation.num_samples
    if config.dry_run or measured_before(run):
        return
    if samples and config.evaluation.clip:
        if run.data.held_out.captions is None:
            raise RunError(f"--evaluation.clip {config.evaluation.clip}: no captions to compare samples with")
        with run.accelerator.main_process_first():  # one downloads
            load_clip(config.evaluation.clip)
    if config.evaluation.lpips and "evaluation" in stages:
        lpips_alex(config.data.channels, config.data.resolution)
    if not samples and not ("denoiser" in stages and config.denoiser.evaluate_every):
        return
    if reason := why_unavailable(run.accelerator, config.evaluation.features):
        if stages == ["evaluation"]:
            raise RunError(reason)
        run.print(f"warning: no metrics of samples will be measured, because {reason}")


def measured_before(run: Run) -> bool:
    """Whether metrics.json is whole and has the present options and images; its weights may be others."""
    path = run.folder / "metrics.json"
    key = read_json(path).get("key", {}) if path.exists() else {}
    options = key.get("evaluation") == asdict(run.config.evaluation)
    return options and key.get("data") == run.data.fingerprint and "unavailable" not in key


def _check_options(run: Run, trains: bool) -> None:
    config, evaluation = run.config, run.config.evaluation
    if evaluation.num_samples and len(run.data.train) < MIN_SAMPLES:
        raise RunError(
            f"--evaluation.num_samples {evaluation.num_samples}: metrics need {MIN_SAMPLES} training images, "
            f"there are {len(run.data.train)}; set it to 0"
        )
    guidance = [
        getattr(evaluation, f"guidance_{name}") for name in ("scales", "kinds", "intervals", "rescales")
    ]
    tried = [evaluation.schedulers, evaluation.num_inference_steps, *guidance]
    if evaluation.save_best and all(len(values) < 2 for values in tried):
        raise RunError(
            "--evaluation.save_best: there is only one setting; give several of --evaluation.schedulers, "
            "--evaluation.num_inference_steps or --evaluation.guidance_scales"
        )
    guiders = set(evaluation.guidance_kinds) - {"classifier_free", "autoguidance"}
    if evaluation.save_best and guiders:
        raise RunError(
            f"--evaluation.save_best: a guider of Diffusers cannot be a pipeline's default; leave "
            f"{min(guiders)} out of --evaluation.guidance_kinds, or measure without save_best"
        )
    if not trains:
        return  # the pipeline is there, and is checked next
    if evaluation.pipeline:
        raise RunError(
            f"--evaluation.pipeline {evaluation.pipeline}: this run trains a pipeline of its own; use "
            "training/evaluate_ldm.py"
        )
    conditional = has_classes(config, run.data) or config.denoiser.text_encoder is not None
    objective = objective_of(config.denoiser)
    scale = config.denoiser.guidance_scale if conditional else 1.0
    scheduler, steps = build_scheduler(objective), config.denoiser.sample_steps
    interval = config.denoiser.guidance_interval
    own = SamplingSettings(Objective(objective), scheduler, steps, scale, guidance_interval=interval)
    configured_settings(evaluation, own, conditional, config.denoiser.guide_step > 0)
