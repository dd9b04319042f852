"""Every scheduler under every objective, with an exact denoiser, returns the data's mean and deviation.

Errors are in percent of the deviation of the worst of four channels, the narrowest of which has 0.15.
"""

import diffusers
import pytest
import torch

from benchmarks.oracle import (
    BETAS,
    CASES,
    COSINE,
    DEVIATION,
    MEAN,
    OBJECTIVES,
    STEPS,
    ZERO_SNR,
    all_schedulers,
    build,
    errors,
    exact_flow,
    oracle_pipeline,
    sample,
    uncorrelated,
)
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import (
    SCHEDULERS,
    Condition,
    Objective,
    Source,
    noise_levels,
    scheduler_family,
    set_timesteps,
)

FEW, MANY = 15, 50
FIRST_ORDER = {case for case, (_, _, steps) in CASES.items() if steps > STEPS}
# Diffusers' own arithmetic with NumPy; tens of thousands of lines.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def worst(pipe, steps):
    return max(map(abs, errors(sample(pipe, steps))))


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
@pytest.mark.parametrize("case", CASES)
def test_the_error_is_small_and_falls_with_the_steps(case, objective):
    pipe = oracle_pipeline(OBJECTIVES[objective], build(case))
    few, many = worst(pipe, FEW), worst(pipe, MANY)
    assert many < (28 if case in FIRST_ORDER else 17) and many < max(few, 3)


@pytest.mark.parametrize("objective", ["epsilon, cosine", "v, zero SNR"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_can_be_had_by_its_name_on_the_path_of_the_network(name, objective):
    """As sweeps have them. PNDM among them, whose steps from epsilon go astray under a cosine schedule."""
    scheduler = build_scheduler(OBJECTIVES[objective], name.removesuffix("Scheduler"))
    assert worst(oracle_pipeline(OBJECTIVES[objective], scheduler), 60) < 30


SOURCES = {  # a scheduler, the objective of its config, and the one of the model that it shall sample
    "UniPC": ("UniPCMultistep", "flow", "flow"),
    "FlowMatchEuler": ("FlowMatchEulerDiscrete", "flow", "v, zero SNR"),
    "DPM++": ("DPMSolverMultistep", "epsilon, cosine", "epsilon, cosine"),
    "DDIM": ("DDIM", "v, zero SNR", "flow"),
}


@pytest.mark.parametrize("target", sorted(SCHEDULERS))
@pytest.mark.parametrize("source", SOURCES)
def test_from_config_works_between_all_schedulers(source, target):
    """`X.from_config(pipe.scheduler.config)`; X keeps its options."""
    name, own, sampled = SOURCES[source]
    config = build_scheduler(OBJECTIVES[own], name).config
    scheduler = getattr(diffusers, target).from_config(config)
    said = dict(scheduler.config)
    assert worst(oracle_pipeline(OBJECTIVES[sampled], scheduler), MANY) < 50
    own_change = {"lower_order_final"} if target == "DPMSolverSinglestepScheduler" else set()
    assert {k for k, v in scheduler.config.items() if v != said[k]} <= own_change


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        diffusers.UniPCMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True),
        diffusers.UniPCMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True),
        diffusers.HeunDiscreteScheduler(prediction_type="sample"),
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **ZERO_SNR),
        diffusers.PNDMScheduler(skip_prk_steps=True, **COSINE),
        diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample", **COSINE),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_options_that_contradict_each_other_are_stepped_with_what_can_be_computed(scheduler):
    assert worst(oracle_pipeline(OBJECTIVES["flow"], scheduler), MANY) < 20


@pytest.mark.parametrize("case", CASES)
def test_from_the_middle_of_its_timesteps(case):
    """Noised latents of the data come back as latents of the data; without randomness, as the exact ones."""
    objective = OBJECTIVES["flow" if "flow" in case else "epsilon"]
    pipe = oracle_pipeline(objective, build(case), size=8)
    scheduler, condition = pipe.scheduler, Condition()
    clean, noise = uncorrelated(8)
    source = Source((MEAN + DEVIATION * clean).float(), noise)

    def draw(begin, seed=0):
        set_timesteps(scheduler, 60)
        generator = torch.Generator().manual_seed(seed)
        timesteps = scheduler.timesteps[begin:]
        return pipe.denoise_latents(noise, timesteps, condition, generator=generator, source=source)

    begin = 20 * scheduler.order
    if case.startswith("PNDM"):
        with pytest.raises(ValueError, match=r"PNDMScheduler cannot start at timesteps\[20:\]"):
            draw(begin)
        return
    latents = draw(begin)
    assert max(map(abs, errors(latents))) < 22
    if torch.equal(draw(begin, seed=1), latents):  # probability flow from one Gaussian to the other
        set_timesteps(scheduler, 60)
        tau = noise_levels(scheduler, pipe.objective)[begin]
        noisy = (1 - tau) * source.clean + tau * source.noise
        wrong = (latents - MEAN) / DEVIATION - exact_flow(noisy, tau)
        assert wrong.square().mean().sqrt() < 0.25
    if scheduler.order == 2:
        with pytest.raises(ValueError, match="cannot start at"):
            draw(begin + 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(),
        diffusers.DDIMInverseScheduler(),
        diffusers.MiniMaxH3Scheduler(),
        type("NewScheduler", (diffusers.UnCLIPScheduler,), {})(),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_others_are_refused_before_the_first_step(scheduler):
    with pytest.raises(ValueError, match="is not supported; (these are: .*UniPC|set it to False)"):
        oracle_pipeline(OBJECTIVES["flow"], scheduler)(output_type="latent")


def test_names_and_subclasses():
    class Known(diffusers.DDIMScheduler):
        pass

    assert scheduler_family(Known(), Objective(OBJECTIVES["flow"])) == "table"
    assert {f"{name}Scheduler" for name, _, _ in CASES.values()} == set(SCHEDULERS) <= set(all_schedulers())
    with pytest.raises(ValueError, match="no scheduler KarrasScheduler; wanted one of .*UniPCMultistep"):
        build_scheduler(OBJECTIVES["flow"], "Karras")


@pytest.mark.parametrize("claimed, predicted", [("epsilon", "v"), ("v", "epsilon"), ("flow", "epsilon")])
@pytest.mark.parametrize("case", ["DPM-Solver++ 2M", "UniPC order 3, flow", "Heun"])
def test_a_network_that_predicts_something_else_is_caught(case, claimed, predicted):
    pipe = oracle_pipeline(OBJECTIVES[claimed], build(case), predicts=OBJECTIVES[predicted])
    assert worst(pipe, STEPS) > 60


def test_clipping_and_thresholding_are_off_for_latents():
    for scheduler in (
        diffusers.DDIMScheduler(**BETAS),
        diffusers.DPMSolverMultistepScheduler(thresholding=True),
    ):
        said = dict(scheduler.config)
        assert worst(oracle_pipeline(OBJECTIVES["epsilon"], scheduler), MANY) < 20
        assert dict(scheduler.config) == said


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_few_steps_are_finite(case, steps):
    if case.startswith("PNDM") and steps < 5 or case == "KDPM2 ancestral" and steps < 3:
        pytest.skip("the scheduler itself cannot")
    assert sample(oracle_pipeline(OBJECTIVES["v"], build(case)), steps, images=1).isfinite().all()
