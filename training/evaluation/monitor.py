"""Figures of samples while the denoiser is trained: few samples, the real images' features computed once."""

import json

from ldm_pipeline.pipeline import LDMPipeline
from training.evaluation.features import load_network, real_features
from training.evaluation.metrics import Reference
from training.evaluation.plots import save_curve
from training.evaluation.samples import Setting, draw_features, sample_labels
from training.runtime.atomic import discard
from training.runtime.run import Run


class Monitor:
    """Measures a pipeline whose weights change, as `--evaluation.features` say; every process takes part."""

    def __init__(self, run: Run, pipeline: LDMPipeline):
        self.run, self.pipeline = run, pipeline
        self.network = load_network(run.config.evaluation.features)
        real = real_features(run, self.network, "train")
        self.reference = Reference(self.network.name, real, run.data.train.labels, run.device)

    def measure(self, step: int) -> dict[str, float]:
        """Figures of `--denoiser.evaluate_samples` samples, always of the same noise; redraws their curve."""
        run, config = self.run, self.run.config.denoiser
        defaults = self.pipeline.config.defaults
        setting = Setting(
            self.pipeline.scheduler, defaults["num_inference_steps"], defaults.get("guidance_scale", 1.0)
        )
        folder = run.folder / "evaluation" / f"step-{step}"
        if run.accelerator.is_main_process:
            discard(folder)  # of a run that was killed here, perhaps with other weights
        run.accelerator.wait_for_everyone()
        count = config.evaluate_samples
        samples = draw_features(run, self.pipeline, setting, self.network, count, folder)
        figures = run.once(self.reference.figures, samples, sample_labels(run, self.pipeline, count))
        if run.accelerator.is_main_process:
            discard(folder)
            path = run.folder / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            name = next(iter(figures))
            found = {
                line["step"]: line[name] for line in lines if line["stage"] == "denoiser" and name in line
            }
            save_curve(found | {step: figures[name]}, name, run.folder / "samples" / "curve.png")
        return figures
