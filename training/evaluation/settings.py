"""Settings of sampling: scheduler, steps and guidance, and their cost in network evaluations."""

import copy
from dataclasses import dataclass
from functools import cached_property

from diffusers import SchedulerMixin

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.models import build_guider
from ldm_pipeline.pipeline import Objective, is_conditional, noise_levels, set_timesteps


@dataclass(frozen=True)
class SamplingSettings:
    """Scheduler, steps and guidance of samples; see `ldm_pipeline.pipeline.Guidance`.

    Args:
        objective: of the pipeline.
        guidance: "classifier_free", "autoguidance", or the name of a guider of Diffusers, which takes the
            scale alone.
    """

    objective: Objective
    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float
    guidance: str = "classifier_free"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    @classmethod
    def of_pipeline(cls, pipeline: LDMPipeline) -> "SamplingSettings":
        """The pipeline's own defaults."""
        defaults = pipeline.config.defaults or {}
        auto = defaults.get("autoguidance", False)
        return cls(
            pipeline.objective,
            pipeline.scheduler,
            defaults.get("num_inference_steps", 20),
            defaults.get("guidance_scale", 1.0) if auto or is_conditional(pipeline.denoiser) else 1.0,
            "autoguidance" if auto else "classifier_free",
            tuple(defaults.get("guidance_interval", (0.0, 1.0))),
            defaults.get("guidance_rescale", 0.0),
        )

    @property
    def name(self) -> str:
        """Class of the scheduler, without its suffix."""
        return type(self.scheduler).__name__.removesuffix("Scheduler")

    @cached_property
    def network_evaluations(self) -> int:
        """Evaluations of denoiser and guide per image: a guided noise level has two, and so has a step of a
        two-stage solver."""
        scheduler, (low, high) = copy.deepcopy(self.scheduler), self.guidance_interval
        set_timesteps(scheduler, self.num_inference_steps)
        count = len(scheduler.timesteps)
        if self.guidance_scale == 1:
            return count
        if (low, high) == (0, 1):
            return 2 * count
        return count + sum(low < level <= high for level in noise_levels(scheduler, self.objective))

    @cached_property
    def guider(self):
        """The guider of Diffusers, or None."""
        if self.guidance in ("classifier_free", "autoguidance"):
            return None
        return build_guider(self.guidance, self.guidance_scale)

    def guidance_arguments(self) -> dict:
        """The guidance of a pipeline's call."""
        own = {"autoguidance": self.guidance == "autoguidance"}
        if self.guider is not None:
            return own | {"guider": self.guider}
        names = ("guidance_scale", "guidance_interval", "guidance_rescale")
        return own | {name: getattr(self, name) for name in names}

    def describe(self) -> dict:
        """The entries of a table or a protocol."""
        return {
            "scheduler": self.name,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance": self.guidance,
            "guidance_interval": list(self.guidance_interval),
            "guidance_rescale": self.guidance_rescale,
            "network_evaluations": self.network_evaluations,
        }

    def __str__(self) -> str:
        return f"{self.name}, {self.num_inference_steps} steps, {guidance_words(self.describe())}"


def guidance_words(row: dict) -> str:
    """The guidance of a `SamplingSettings.describe()` in words; of what is missing there, nothing is said."""
    kind = row.get("guidance", "classifier_free").replace("classifier_free", "guidance")
    low, high = row.get("guidance_interval", (0, 1))
    words = [f"{kind} {row['guidance_scale']:g}" if "guidance_scale" in row else kind]
    words += [f"from {low:g} to {high:g}"] if (low, high) != (0, 1) else []
    words += [f"rescaled {row['guidance_rescale']:g}"] if row.get("guidance_rescale") else []
    return " ".join(words)
