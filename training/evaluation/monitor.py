"""Metrics of samples while the denoiser is trained."""

from training.evaluation.features import load_network, real_features, why_unavailable
from training.evaluation.metrics import Reference
from training.evaluation.samples import SampleMetrics, Sampler
from training.evaluation.settings import SamplingSettings
from training.evaluation.store import BatchStore
from training.runtime.atomic import discard
from training.runtime.run import Run


def start_monitor(run: Run, sampler: Sampler) -> "Monitor | None":
    """The monitor of `--denoiser.evaluate_every`; None without that option or without a feature network."""
    spec = run.config.evaluation.features
    if not run.config.denoiser.evaluate_every or why_unavailable(run.accelerator, spec):
        return None
    return Monitor(run, sampler)


class Monitor:
    """Metrics of few samples while the denoiser is trained, always from the same noise."""

    def __init__(self, run: Run, sampler: Sampler):
        self.run, self.count = run, run.config.denoiser.evaluate_samples
        network = load_network(run.config.evaluation.features)
        store = BatchStore(run.accelerator, run.folder / "evaluation", sampler.batch_size, run.interruption)
        real = real_features(store, network, run.data, "train", run.config.data.num_workers)
        reference = Reference(network.name, real, run.data.train.labels, run.device)
        self.metrics = SampleMetrics(sampler, network, reference, store)

    def measure(self, step: int) -> dict[str, float]:
        """Metrics by name at a training step; every process calls this."""
        folder, main = self.run.folder / "evaluation" / f"step-{step}", self.run.accelerator.is_main_process
        if main:
            discard(folder)  # a killed run may have left it, with other weights
        self.run.accelerator.wait_for_everyone()
        settings = SamplingSettings.of_pipeline(self.metrics.sampler.pipeline)
        metrics = self.metrics.measure(settings, self.count, folder.name)
        if main:
            discard(folder)
        return metrics
