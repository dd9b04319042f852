"""Guidance in every form: what it computes, how often, and what is refused."""

import csv
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import launch
from diffusers import guiders
from safetensors.torch import load_file, save_file

from benchmarks.oracle import CASES, DEVIATION, MEAN, OBJECTIVES, GaussianOracle, build, oracle_pipeline
from benchmarks.oracle import sample as sample_oracle
from ldm_pipeline import LDMPipeline, TrainingRecord, export_for_hub
from ldm_pipeline.hub import COMPONENT_FILE, check_target
from ldm_pipeline.models import build_guider, build_scheduler
from ldm_pipeline.pipeline import Condition, Guidance, Objective, guided, noise_levels, set_timesteps
from tests.test_loading import HOSTED, run
from tests.test_pipeline import FLOW, NAMES, VP, generators, sample, tiny_pipe, tiny_unet
from training.config import EvaluationConfig
from training.evaluation.settings import SamplingSettings
from training.evaluation.sweep import configured_settings

VP_OBJECTIVES = [{"prediction_type": p, **VP} for p in ("epsilon", "v_prediction")]
EULER = diffusers.FlowMatchEulerDiscreteScheduler  # four steps are at the noise levels 1, 0.75, 0.5, 0.25
CFG, APG = guiders.ClassifierFreeGuidance, guiders.AdaptiveProjectedGuidance


def guide_unet(**options):
    """Another network than that of `tiny_pipe`, of the same inputs."""
    unet = tiny_unet(**options)
    with torch.no_grad():
        for weight in unet.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generators(9)[0])
    return unet


def pipe_with_guide(defaults=None, guide=None, **options):
    pipe = tiny_pipe(**options)
    parts = pipe.components | {"guide_unet": guide or guide_unet()}
    names = {"objective": dict(pipe.config.objective), "id2label": NAMES, "defaults": defaults}
    pipe = LDMPipeline(**parts, **names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **options):
    return sample(
        pipe, **{"class_labels": [1, 2], "output_type": "latent", "generator": generators(3, 4)} | options
    )


def rows(*networks):
    """Lists that get the number of rows at every call of the networks."""
    counts = [[] for _ in networks]
    for network, count in zip(networks, counts, strict=True):
        network.register_forward_pre_hook(lambda module, args, count=count: count.append(len(args[0])))
    return counts


@pytest.mark.parametrize("objective", [FLOW, *VP_OBJECTIVES], ids=lambda o: o["prediction_type"])
def test_classifier_free_guidance_of_diffusers_is_the_own(objective):
    pipe = tiny_pipe(objective, None if objective is FLOW else diffusers.DDIMScheduler(**objective))
    for own, theirs in (
        ({"guidance_scale": 3.0}, CFG(3.0)),
        ({"guidance_scale": 3.0, "guidance_rescale": 0.7}, CFG(3.0, guidance_rescale=0.7)),
        ({"guidance_scale": 1.0}, CFG(1.0)),
    ):
        torch.testing.assert_close(latents(pipe, guider=theirs), latents(pipe, **own), rtol=1e-5, atol=5e-6)


def test_outside_the_interval_the_network_is_evaluated_once():
    pipe = tiny_pipe(scheduler=EULER())
    plain, always = latents(pipe), latents(pipe, guidance_scale=3.0)
    (count,) = rows(pipe.unet)

    def draw(*interval, **options):
        count.clear()
        return latents(pipe, guidance_scale=3.0, guidance_interval=interval, **options), count

    assert torch.equal(draw(0, 1)[0], always) and count == [4, 4, 4, 4]
    assert not torch.allclose(draw(0.3, 0.75)[0], always, atol=1e-3) and count == [2, 4, 4, 2]
    assert draw(0.25, 0.5)[1] == [2, 2, 4, 2]  # low is outside, high within
    assert torch.equal(draw(0.8, 0.9)[0], plain) and count == [2, 2, 2, 2]
    two_stages = tiny_pipe(scheduler=diffusers.HeunDiscreteScheduler())
    (count,) = rows(two_stages.unet)
    latents(two_stages, guidance_scale=3.0, guidance_interval=(0.2, 0.7))
    set_timesteps(two_stages.scheduler, 4)
    levels = noise_levels(two_stages.scheduler, two_stages.objective)
    assert count == [4 if 0.2 < level <= 0.7 else 2 for level in levels] and {2, 4} == set(count)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "KDPM2Discrete", "EDMEuler", "DDIM"])
@pytest.mark.parametrize("guidance", ["classifier_free", "autoguidance", "AdaptiveProjected"])
def test_the_evaluations_of_settings_are_those_of_the_call(name, guidance):
    pipe = pipe_with_guide()
    scheduler = pipe.scheduler = build_scheduler(FLOW, name)
    interval = (0.0, 1.0) if guidance == "AdaptiveProjected" else (0.35, 0.8)
    settings = SamplingSettings(pipe.objective, scheduler, 7, 2.0, guidance, interval, 0.5)
    counts = rows(pipe.unet, pipe.guide_unet)
    latents(pipe, num_inference_steps=7, **settings.guidance_arguments())
    assert 2 * settings.network_evaluations == sum(map(sum, counts))
    assert (len(counts[1]) > 0) == (guidance == "autoguidance")


def test_settings_that_differ_in_nothing_are_one():
    own = SamplingSettings(Objective(FLOW), build_scheduler(FLOW), 9, 1.0)
    kinds = ["classifier_free", "autoguidance", "AdaptiveProjected"]
    options = {"guidance_scales": [1.0, 2.0], "guidance_kinds": kinds, "guidance_rescales": [0.0, 0.7]}
    config = EvaluationConfig(guidance_intervals=[[0, 1], [0.2, 0.8]], **options)
    settings = configured_settings(config, own, conditional=True, has_guide=True)
    assert len({str(each) for each in settings}) == len(settings) == 1 + 4 + 4 + 1
    assert str(settings[0]) == "UniPCMultistep, 9 steps, guidance 1"
    assert "autoguidance 2 from 0.2 to 0.8 rescaled 0.7" in str(settings[-2])


def test_adaptive_projected_guidance_by_its_name_projects():
    """Diffusers' defaults do not: below the threshold that guider is classifier-free guidance."""
    guider = build_guider("AdaptiveProjected", 3.0)
    prediction, null = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, -1.0]])
    guider.set_state(0, 9, 0)
    states = guider.prepare_inputs({"x": (prediction, null)})
    for state, value in zip(states, (prediction, null), strict=True):
        guider.prepare_models(None)
        state.noise_pred = value
    # The part of the difference (1, 1) along the prediction is left out.
    assert torch.allclose(guider(states).pred, null + 3.0 * torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("case", CASES)
def test_noise_levels_are_those_that_the_network_sees(case):
    pipe, seen = oracle_pipeline(OBJECTIVES["flow"], build(case)), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1][0].item() / 1000))
    sample_oracle(pipe, 12, images=1)
    handle.remove()
    set_timesteps(pipe.scheduler, 12)
    state = torch.get_rng_state()
    levels = noise_levels(pipe.scheduler, pipe.objective)
    assert levels == pytest.approx(seen, abs=1e-6) and torch.equal(state, torch.get_rng_state())
    assert 1 >= levels[0] > levels[-1] >= 0


def test_a_guide_that_is_the_network_itself_guides_nowhere():
    pipe = tiny_pipe()
    pipe.register_modules(guide_unet=pipe.unet)
    assert torch.equal(latents(pipe, guidance_scale=3.0, autoguidance=True), latents(pipe))
    unconditional = {"class_labels": None, "batch_size": 2}
    both = [
        latents(pipe, **unconditional, **more) for more in ({}, {"guidance_scale": 3.0, "autoguidance": True})
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("objective", ["epsilon", "v", "flow", "epsilon, cosine"])
def test_autoguidance_moves_the_mean_of_an_exact_denoiser(objective):
    """Between Gaussians of equal deviations guidance moves along the line through their means."""
    pipe = oracle_pipeline(OBJECTIVES[objective], build("UniPC order 3, flow"))
    pipe.register_modules(guide_unet=GaussianOracle(OBJECTIVES[objective], 4, MEAN + 0.4 * DEVIATION))
    guidance = {"autoguidance": True, "guidance_scale": 2.5}
    deviation, mean = torch.std_mean(sample_oracle(pipe, 50, **guidance).double(), (0, 2, 3))
    wanted = (MEAN - 0.6 * DEVIATION).flatten()
    assert ((mean - wanted).abs() < 0.02 * deviation).all()
    torch.testing.assert_close(deviation, DEVIATION.flatten(), rtol=0.02, atol=0)


EVERY_GUIDER = {
    "projected": APG(3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.5),
    "mixed": guiders.AdaptiveProjectedMixGuidance(2.0),
    "zero-star": guiders.ClassifierFreeZeroStarGuidance(2.0),
    "tangential": guiders.TangentialClassifierFreeGuidance(2.0),
    "magnitude": guiders.MagnitudeAwareGuidance(2.0),
    "late": CFG(2.0, start=0.3),
}


@pytest.mark.parametrize("name", EVERY_GUIDER)
def test_a_guider_means_the_same_under_every_objective(name):
    """The same exact denoiser, in three kinds of prediction. Nothing is left of a call for the next."""
    found = []
    for objective in ("flow", "v", "epsilon", "flow"):
        pipe = oracle_pipeline(OBJECTIVES[objective], build("DPM-Solver++ 2M, flow"))
        pipe.register_modules(guide_unet=GaussianOracle(OBJECTIVES[objective], 4, MEAN + 0.4 * DEVIATION))
        found.append(sample_oracle(pipe, 12, autoguidance=True, guider=EVERY_GUIDER[name]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=2e-3)
    assert torch.equal(found[0], found[3]) and not torch.allclose(
        found[0], sample_oracle(pipe, 12), atol=0.05
    )


@pytest.mark.parametrize("name", EVERY_GUIDER)
def test_a_picture_under_a_guider_does_not_depend_on_its_batch(name):
    options = {"guider": EVERY_GUIDER[name], "num_inference_steps": 9}
    together = latents(tiny_pipe(), **options)
    alone = latents(tiny_pipe(), class_labels=2, generator=generators(4), **options)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_zero_of_zero_star_leaves_the_noise_of_a_flow():
    pipe, seen = tiny_pipe(scheduler=EULER()), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:2]))
    latents(pipe, guider=guiders.ClassifierFreeZeroStarGuidance(2.0), num_inference_steps=9)
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


@pytest.mark.parametrize("objective", [FLOW, *VP_OBJECTIVES], ids=lambda o: o["prediction_type"])
def test_rescaled_clean_latents_have_the_deviation_of_the_conditional_ones(objective):
    objective, unet = Objective(objective), tiny_unet()
    noisy, point = torch.randn(2, 4, 8, 8, generator=generators(0)[0]), objective.network_point(0.6, 0.8)
    condition, null = Condition(torch.tensor([0, 1])), Condition.null(unet, 2)

    def clean(*guidance):
        guidance = Guidance(guidance[0], rescale=guidance[1])
        with torch.no_grad():
            found = guided(objective, unet, noisy, point, condition, null, guidance, torch.float32)
        return objective.clean_and_noise(found, noisy, *point[1:])[0]

    conditional, plain, half, whole = clean(1.0, 0.0), clean(9.0, 0.0), clean(9.0, 0.5), clean(9.0, 1.0)
    deviations = [each.flatten(1).std(1) for each in (conditional, plain, half, whole)]
    assert not torch.allclose(deviations[0], deviations[1], rtol=0.05)
    torch.testing.assert_close(deviations[3], deviations[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(half, (plain + whole) / 2, rtol=1e-4, atol=1e-4)


def test_a_default_threshold_suits_the_size_of_the_latents():
    pipe, seen = tiny_pipe(), []

    class Watched(APG):
        def forward(self, *args, **kwargs):
            seen.append(self.adaptive_projected_guidance_rescale)
            return super().forward(*args, **kwargs)

    for guider in (
        Watched(2.0),
        Watched(2.0, adaptive_projected_guidance_rescale=15.0),
        Watched(2.0, None, 3.0),
    ):
        latents(pipe, guider=guider, num_inference_steps=1)
    assert seen == [8.0, 15.0, 3.0]  # of 4x8x8 latents


def test_the_scale_of_autoguidance_can_change_in_the_middle_of_a_call():
    pipe = pipe_with_guide()
    own, guide = rows(pipe.unet, pipe.guide_unet)

    def change(pipe, i, t, kwargs):
        pipe._guidance_scale = [1.0, 1.0, 3.0, 3.0][i]

    latents(pipe, guidance_scale=3.0, autoguidance=True, callback_on_step_end=change)
    assert own == [2, 2, 2, 2] and guide == [2, 2]


STRANGER = (
    HOSTED
    + """
options = dict(num_inference_steps=3, output_type="np", generator=[torch.Generator().manual_seed(5)])
numpy.save("conditional.npy", pipe(class_labels="dog", guidance_scale=3.0, **options).images)
options["generator"] = [torch.Generator().manual_seed(5)]
numpy.save("unconditional.npy", pipe(**options).images)
"""
)


def test_a_model_with_its_guide_and_its_defaults_in_every_way_of_loading(tmp_path):
    defaults = {
        "guidance_scale": 2.0,
        "guidance_interval": [0.3, 0.9],
        "guidance_rescale": 0.5,
        "autoguidance": True,
    }
    pipe, folder = pipe_with_guide(defaults), tmp_path / "model"
    pipe.save_pretrained(folder)
    loaded = LDMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert json.loads((folder / "model_index.json").read_text())["guide_unet"] == ["diffusers", "UNet2DModel"]
    for each in (pipe, loaded):
        own, said = latents(each), {**defaults, "autoguidance": False}
        assert torch.equal(own, latents(pipe, **defaults))
        assert not torch.allclose(own, latents(each, **said), atol=1e-3)
    finished = run(STRANGER, folder, tmp_path, installed=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    options = {"num_inference_steps": 3, "output_type": "np"}
    for name, more in {
        "conditional": {"class_labels": "dog", "guidance_scale": 3.0},
        "unconditional": {},
    }.items():
        here = loaded(**options, **more, generator=generators(5)).images
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), here, atol=1e-5)
    without = LDMPipeline.from_pretrained(folder, guide_unet=None)
    assert torch.equal(latents(without, autoguidance=False), latents(pipe, autoguidance=False))
    with pytest.raises(ValueError, match="guide_unet is None"):
        without()
    weights = folder / "guide_unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: w for name, w in load_file(weights).items() if name != "conv_in.bias"}, weights)
    with pytest.raises(ValueError, match="guide_unet: .*1 missing_keys .conv_in.bias"):
        LDMPipeline.from_pretrained(folder)


def test_the_card_and_the_export_have_the_guide(tmp_path):
    pipe = pipe_with_guide({"autoguidance": True, "guidance_scale": 2.0})
    record = TrainingRecord(config={"denoiser": {"guide_step": 400}})
    export_for_hub(pipe, tmp_path / "export", "org/model", "mit", record=record)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "a weaker denoiser after 400 steps of the same training: `autoguidance=True`" in card
    assert LDMPipeline.from_pretrained(tmp_path / "export").guide_unet is not None
    check_target(tmp_path / "export")  # it may be replaced
    assert COMPONENT_FILE.fullmatch("guide_unet/diffusion_pytorch_model.safetensors")


def test_an_early_checkpoint_of_a_run_becomes_its_guide(tiny_run, tmp_path):
    """Also for a run that is finished: then nothing is trained again."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    options = ["--redo", "[denoiser]", "--denoiser.keep_every", "4", "--denoiser.guide_step"]
    interval = ["--denoiser.guidance_interval", "[0.2, 0.9]"]
    launch("train_denoiser.py", *options, "4", *interval, config=run / "config.yaml")
    assert LDMPipeline.from_pretrained(run / "pipeline").config.defaults["guidance_interval"] == [0.2, 0.9]
    unet = (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for step in (4, 8):
        if step == 8:
            launch("train_denoiser.py", "--denoiser.guide_step", "8", config=run / "config.yaml")
        pipe = LDMPipeline.from_pretrained(run / "pipeline")
        weights = load_file(run / "denoiser" / f"checkpoint-{step}" / "ema.safetensors")
        assert all(torch.equal(weights[name], weight) for name, weight in pipe.guide_unet.named_parameters())
        assert (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == unet
    sweeps = ["--evaluation.num_inference_steps", "[4]", "--evaluation.num_samples", "20"]
    sweeps += ["--evaluation.guidance_scales", "[1, 2, 3]", "--evaluation.guidance_rescales", "[0.5]"]
    sweeps += ["--evaluation.guidance_intervals", "[[0, 1], [0.3, 0.9]]", "--evaluation.save_best"]
    sweeps += ["--evaluation.guidance_kinds", "[classifier_free, autoguidance]"]
    launch("evaluate_ldm.py", *sweeps, config=run / "config.yaml")
    rows = list(csv.DictReader(open(run / "sweep" / "table.csv")))
    assert len(rows) == 9 and {row["network_evaluations"] for row in rows} == {"4", "6", "8"}
    best = min(rows, key=lambda row: float(row["FD-20"]))
    defaults = LDMPipeline.from_pretrained(run / "pipeline").config.defaults
    assert defaults.get("autoguidance", False) == (best["guidance"] == "autoguidance")
    assert defaults.get("guidance_interval", [0.0, 1.0]) == json.loads(best["guidance_interval"])
    assert defaults.get("guidance_rescale", 0.0) == float(best["guidance_rescale"])
    protocol = json.loads((run / "metrics.json").read_text())["samples"]["protocol"]
    assert protocol["guidance"] == best["guidance"]
    refused = launch(
        "train_denoiser.py", "--denoiser.guide_step", "5", config=run / "config.yaml", check=False
    )
    assert refused.returncode == 2 and "kept the checkpoints [4, 8, 12]" in refused.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval=\(0.5, 0.2\); wanted two rising"),
        ({"guidance_interval": (0.5,)}, "wanted two rising noise levels"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5; wanted a number from 0 to 1"),
        ({"autoguidance": True}, "guide_unet is None"),
        ({"guider": 2.0}, "guider is float; wanted one of diffusers.guiders"),
        ({"guider": CFG(2.0), "guidance_scale": 3.0}, "has its own guidance_scale"),
        ({"guider": CFG(2.0), "class_labels": None}, "ClassifierFreeGuidance needs class_labels"),
        ({"guider": guiders.AutoGuidance(auto_guidance_layers=[1], dropout=0.5)}, "AutoGuidance changes"),
        ({"guider": guiders.SkipLayerGuidance(skip_layer_guidance_layers=[1])}, "SkipLayerGuidance changes"),
        ({"guider": guiders.ClassifierFreeZeroStarGuidance(2.0)}, "loses one of 4 steps; wanted zero"),
    ],
)  # fmt: skip
def test_what_cannot_guide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        latents(tiny_pipe(), **options)


def test_a_guide_of_other_inputs_is_refused():
    with pytest.raises(ValueError, match="guide_unet has .*'num_class_embeds': 3.*wanted two of the same"):
        pipe_with_guide(guide=guide_unet(classes=2))
    with pytest.raises(ValueError, match=r"needs class_labels \(or autoguidance=True\)"):
        pipe_with_guide()(guidance_scale=2.0)
