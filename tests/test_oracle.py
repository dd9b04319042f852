"""Every scheduler under every objective, with an exact denoiser, returns the data's mean and deviation."""

import diffusers
import pytest
import torch

from benchmarks.oracle import (
    BETAS,
    CASES,
    OBJECTIVES,
    STEPS,
    all_schedulers,
    build,
    errors,
    oracle_pipeline,
    refusal,
)
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import SCHEDULERS, scheduler_family

TOLERANCE = 3  # percent
# Diffusers' own arithmetic with NumPy; tens of thousands of lines.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def worst(pipe, steps):
    return max(abs(error) for error in errors(pipe, steps))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [case for case, (_, _, steps) in CASES.items() if steps == STEPS])
def test_higher_order_solvers_are_right_at_50_steps(case, objective):
    assert worst(oracle_pipeline(OBJECTIVES[objective], build(case), size=16), STEPS) < TOLERANCE


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [case for case, (_, _, steps) in CASES.items() if steps > STEPS])
def test_the_error_of_first_order_and_ancestral_solvers_falls_with_the_steps(case, objective):
    pipe = oracle_pipeline(OBJECTIVES[objective], build(case), size=16)
    few, many = worst(pipe, STEPS), worst(pipe, CASES[case][2])
    assert many < TOLERANCE and many < few


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_can_be_had_by_its_name(name, objective):
    """As sweeps have them; the first-order ones are still off by some percent."""
    scheduler = build_scheduler(OBJECTIVES[objective], name.removesuffix("Scheduler"))
    assert worst(oracle_pipeline(OBJECTIVES[objective], scheduler, size=16), 100) < 8


def test_a_name_that_is_no_scheduler_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="no scheduler KarrasScheduler; wanted one of .*UniPCMultistep"):
        build_scheduler(OBJECTIVES["flow"], "Karras")


def test_every_accepted_scheduler_is_measured():
    assert {f"{name}Scheduler" for name, _, _ in CASES.values()} == set(SCHEDULERS)
    assert set(SCHEDULERS) <= set(all_schedulers())


@pytest.mark.parametrize("name", sorted(set(all_schedulers()) - set(SCHEDULERS)))
def test_every_other_scheduler_is_refused_with_its_reason(name):
    assert refusal(name).startswith(f"{name} cannot sample this model: ") and "unknown" not in refusal(name)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(),
        diffusers.DDIMInverseScheduler(),
        diffusers.UnCLIPScheduler(),
        diffusers.MiniMaxH3Scheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        diffusers.UniPCMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_refusal_comes_before_the_first_step_and_lists_what_can(scheduler):
    with pytest.raises(ValueError) as error:
        oracle_pipeline(OBJECTIVES["flow"], scheduler)(output_type="latent")
    assert all(name in str(error.value) for name in SCHEDULERS)


def test_an_unknown_class_is_refused_and_a_subclass_is_not():
    class Known(diffusers.DDIMScheduler):
        pass

    assert scheduler_family(Known()) == "table"
    with pytest.raises(ValueError, match="unknown"):
        scheduler_family(type("NewScheduler", (), {"config": {}})())


@pytest.mark.parametrize(
    "claimed, predicted", [("epsilon", "v_prediction"), ("v", "epsilon"), ("flow", "epsilon")]
)
@pytest.mark.parametrize("case", ["DPM-Solver++ 2M", "UniPC order 3, flow", "Heun"])
def test_a_network_that_predicts_something_else_is_caught(case, claimed, predicted):
    assert worst(oracle_pipeline(OBJECTIVES[claimed], build(case), predicts=predicted), STEPS) > 5 * TOLERANCE


def test_clipping_is_caught_and_warned_about():
    pipe = oracle_pipeline(OBJECTIVES["epsilon"], diffusers.DDIMScheduler(**BETAS))
    with pytest.warns(UserWarning, match="clip_sample=True"):
        assert worst(pipe, 200) > 5 * TOLERANCE


def test_crossing_the_flow_boundary_with_from_config_is_right():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(flow.config)  # becomes epsilon, in silence
    assert worst(oracle_pipeline(OBJECTIVES["flow"], scheduler), STEPS) < TOLERANCE
    back = diffusers.FlowMatchHeunDiscreteScheduler.from_config(scheduler.config)
    assert worst(oracle_pipeline(OBJECTIVES["epsilon"], back), STEPS) < TOLERANCE


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("options", [{"beta_schedule": "squaredcos_cap_v2"}, ZERO_SNR])
def test_a_scheduler_with_other_betas_than_the_network(options):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)
    assert worst(oracle_pipeline(OBJECTIVES["v"], scheduler), 200) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_few_steps_are_finite(case, steps):
    if case.startswith("PNDM") and steps < 5 or case == "KDPM2 ancestral" and steps < 3:
        pytest.skip("the scheduler itself cannot")
    latents = oracle_pipeline(OBJECTIVES["v"], build(case), size=8)(
        num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    assert latents.isfinite().all()
