"""What must hold for every picture, with tiny networks of the real classes."""

import contextlib
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DModel

from ldm_pipeline import LDMPipeline, set_latent_statistics
from ldm_pipeline.pipeline import (
    Condition,
    Objective,
    denoise,
    denormalize_latents,
    normalize_latents,
)

FLOW = {"prediction_type": "flow_prediction"}
VP = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
STATISTICS = {"mean": [0.5, -0.5, 0.1, 0.0], "std": [0.5, 1.0, 2.0, 3.0]}
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def tiny_vae(kind=AutoencoderKL, channels=3):
    torch.manual_seed(0)
    if kind is AutoencoderDC:
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
        types = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
        scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
        vae = AutoencoderDC(in_channels=channels, latent_channels=4, **widths, **blocks, **types, **scales)
    else:
        types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        numbers = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
        vae = AutoencoderKL(in_channels=channels, out_channels=channels, **types, **numbers)
    set_latent_statistics(vae, **STATISTICS)
    return vae.eval()


def tiny_unet(classes=3, size=8):
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        num_class_embeds=None if classes is None else classes + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
    ).eval()


def tiny_pipe(objective=FLOW, scheduler=None, vae=None, **unet):
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, **FLOW)
    pipe = LDMPipeline(vae or tiny_vae(), tiny_unet(**unet), scheduler, objective=objective, id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, **options):
    options = {"num_inference_steps": 4, "output_type": "pt", "generator": generators(0)} | options
    return pipe(**options).images


STOCHASTIC = {
    "DDPM": diffusers.DDPMScheduler(clip_sample=False),
    "DDIM": diffusers.DDIMScheduler(clip_sample=False),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "KDPM2 ancestral": diffusers.KDPM2AncestralDiscreteScheduler(),
    "SA-Solver": diffusers.SASolverScheduler(),
    "SDE-DPM++": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "EDM SDE": diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "SDE single": diffusers.DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1),
    "LTX": diffusers.LTXEulerAncestralRFScheduler(),
    "TCD": diffusers.TCDScheduler(),
    "UniPC": None,
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_picture_does_not_depend_on_its_batch(name):
    pipe = tiny_pipe(scheduler=STOCHASTIC[name])
    eta = 0.7 if name in ("DDIM", "TCD") else 0.0
    options = {"guidance_scale": 2.0, "eta": eta, "output_type": "latent", "num_inference_steps": 6}
    together = sample(pipe, class_labels=["cat", 2, "dog"], generator=generators(3, 4, 5), **options)
    for i, (label, seed) in enumerate([(0, 3), ("owl", 4), (1, 5)]):
        alone = sample(pipe, class_labels=label, generator=generators(seed), **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    again = sample(pipe, class_labels=["cat", 2, "dog"], generator=generators(3, 4, 5), **options)
    assert torch.equal(together, again)


def test_one_generator_gives_one_picture_and_another_seed_another():
    pipe = tiny_pipe()
    first = sample(pipe, generator=generators(0)[0], batch_size=2)
    assert torch.equal(first, sample(pipe, generator=generators(0)[0], batch_size=2))
    assert not torch.equal(first, sample(pipe, generator=generators(1)[0], batch_size=2))


def test_guidance():
    pipe = tiny_pipe()
    plain, at_0, at_1, near_1, at_5 = (
        sample(pipe, class_labels=1, **options)
        for options in ({}, *({"guidance_scale": scale} for scale in (0.0, 1.0, 1 + 1e-6, 5.0)))
    )
    assert torch.equal(plain, at_1) and not torch.allclose(at_5, plain, atol=1e-3)
    torch.testing.assert_close(near_1, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(at_0, sample(pipe), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs class_labels"):
        pipe(guidance_scale=2.0)


def test_a_call_that_says_nothing_uses_the_models_own_defaults(tmp_path):
    pipe = tiny_pipe()
    parts = {**pipe.components, "objective": FLOW, "id2label": NAMES}
    LDMPipeline(**parts, defaults={"num_inference_steps": 3, "guidance_scale": 2.0}).save_pretrained(tmp_path)
    loaded = LDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    given = {"generator": generators(5), "output_type": "np"}
    own = loaded(class_labels="dog", **given).images
    said = {"num_inference_steps": 3, "guidance_scale": 2.0}
    assert np.array_equal(
        own, pipe(class_labels="dog", **given | {"generator": generators(5)}, **said).images
    )
    assert loaded(batch_size=1, **given).images.shape == own.shape  # no labels: nothing to guide to
    with pytest.raises(ValueError, match="defaults has"):
        LDMPipeline(**parts, defaults={"steps": 3})


def test_labels_by_name_and_by_number():
    pipe = tiny_pipe()
    by_name = sample(pipe, class_labels=["dog", "cat"], generator=generators(0, 1))
    for labels in ([1, 0], torch.tensor([1, 0]), np.array([1, 0]), (1, "cat")):
        assert torch.equal(by_name, sample(pipe, class_labels=labels, generator=generators(0, 1)))
    assert len(sample(pipe, class_labels="owl", batch_size=3, generator=None)) == 3
    assert not torch.allclose(sample(pipe), sample(pipe, class_labels=0), atol=1e-5)


@pytest.mark.parametrize("label", [3, -1, "bird", 1.5])
def test_a_label_out_of_range_is_answered_with_the_names(label):
    with pytest.raises(ValueError, match="from 0 to 2 or one of the names {0: cat, 1: dog, 2: owl}"):
        tiny_pipe()(class_labels=[0, label])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_labels": [0, 1], "batch_size": 3}, "one positive number of images"),
        ({"generator": generators(0, 1), "latents": torch.randn(3, 4, 8, 8)}, "one positive number"),
        ({"batch_size": 0}, "one positive number of images"),
        ({"latents": torch.randn(1, 3, 8, 8)}, "latents has shape"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"eta": 0.5}, "eta=0.5"),
        ({"timesteps": [900, 500]}, "cannot take timesteps"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe()(**options)


def test_a_model_without_classes():
    pipe = tiny_pipe(classes=None)
    assert sample(pipe).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="no classes"):
        pipe(class_labels=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderDC])
def test_dtypes(kind, dtype):
    pipe = tiny_pipe(vae=tiny_vae(kind)).to(dtype)
    seen = []

    def watch(pipe, i, t, kwargs):
        seen.append(kwargs["latents"].dtype)
        return kwargs

    options = {"class_labels": [0, 1], "generator": None, "guidance_scale": 2.0}
    images = sample(pipe, callback_on_step_end=watch, **options)
    assert images.dtype == torch.float32 and images.isfinite().all() and set(seen) == {torch.float32}
    assert pipe.unet.dtype == pipe.vae.dtype == dtype


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderDC])
def test_non_square_and_sliced(kind):
    pipe = tiny_pipe(vae=tiny_vae(kind), size=(8, 12))
    images = sample(pipe, batch_size=2, generator=generators(0, 1))
    assert images.shape == (2, 3, 16, 24)
    pipe.enable_vae_slicing()
    sliced = sample(pipe, batch_size=2, generator=generators(0, 1))
    torch.testing.assert_close(sliced, images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = tiny_pipe(vae=tiny_vae(channels=channels))
    tensors, arrays = sample(pipe), sample(pipe, output_type="np")
    assert tensors.shape == (1, channels, 16, 16) and arrays.shape == (1, 16, 16, channels)
    assert 0 <= arrays.min() < arrays.max() <= 1
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    picture = sample(pipe, output_type="pil")[0]
    assert picture.mode == mode and picture.size == (16, 16)
    assert np.array_equal(np.asarray(picture).reshape(arrays[0].shape), (arrays[0] * 255).round())
    assert isinstance(pipe(num_inference_steps=2, return_dict=False), tuple)
    latents = sample(pipe, output_type="latent")
    decoded = pipe.vae.decode(denormalize_latents(pipe.vae, latents)).sample / 2 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1), tensors)


def test_a_callback_can_change_the_latents_and_sees_every_step():
    pipe, steps = tiny_pipe(), []

    def zero(pipe, i, t, kwargs):
        steps.append((i, float(t)))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    assert not sample(pipe, callback_on_step_end=zero, output_type="latent").any()
    assert [i for i, _ in steps] == [0, 1, 2, 3] and steps[0][1] > steps[-1][1]
    assert torch.equal(sample(pipe, callback_on_step_end=lambda *_: None), sample(pipe))


def test_given_latents_are_the_noise():
    pipe = tiny_pipe(scheduler=diffusers.EulerDiscreteScheduler())
    noise = torch.randn(1, 4, 8, 8, generator=generators(0)[0])
    assert torch.equal(sample(pipe, latents=noise), sample(pipe))


def test_grids():
    pipe = tiny_pipe(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert torch.equal(sample(pipe, sigmas=[1, 0.75, 0.5, 0.25]), sample(pipe))
    assert pipe.scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert not torch.equal(sample(pipe, sigmas=[1, 0.9, 0.8, 0.1]), sample(pipe))
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    sample(pipe, timesteps=[900, 500, 10])
    assert pipe.scheduler.timesteps.tolist() == [900, 500, 10]
    with pytest.raises(ValueError, match="cannot take sigmas"):
        pipe(sigmas=[1, 0.5])


def test_nothing_that_is_not_finite_becomes_a_picture():
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match="1 of 2 latents after UniPC.* are not finite"):
        pipe(latents=torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), torch.nan)]))
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="images after the decoder are not finite"):
        pipe(num_inference_steps=2)


def test_a_callback_can_change_the_guidance_in_the_middle_of_a_call():
    pipe, sizes = tiny_pipe(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def scales(*values):
        def change(pipe, i, t, kwargs):
            told = (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps)
            assert told == (pipe._guidance_scale, pipe._guidance_scale != 1, 4)
            pipe._guidance_scale = values[i]

        return {"callback_on_step_end": change, "class_labels": 1}

    constant = sample(pipe, class_labels=1, guidance_scale=3.0)
    plain = sample(pipe, class_labels=1)
    sizes.clear()
    assert torch.equal(sample(pipe, guidance_scale=3.0, **scales(3.0, 3.0, 3.0, 1.0)), constant)
    assert sizes == [2, 2, 2, 2] and pipe.guidance_scale == 1
    sizes.clear()
    off = sample(pipe, guidance_scale=3.0, **scales(1.0, 1.0, 1.0, 1.0))
    on = sample(pipe, guidance_scale=1.0, **scales(3.0, 3.0, 3.0, 3.0))
    assert sizes == [2, 1, 1, 1, 1, 2, 2, 2]
    assert not any(torch.allclose(*pair, atol=1e-4) for pair in ((off, plain), (off, constant), (on, off)))


def test_hooks_are_freed_whatever_happens(monkeypatch):
    pipe, freed = tiny_pipe(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    for options, error in (({"callback_on_step_end": interrupt}, KeyboardInterrupt), ({}, None)):
        with pytest.raises(error) if error else contextlib.nullcontext():
            sample(pipe, **options)
    with pytest.raises(ValueError, match="not finite"):
        sample(pipe, latents=torch.full((1, 4, 8, 8), torch.nan))
    assert len(freed) == 3


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderDC])
def test_images_to_latents_and_back(kind):
    pipe = tiny_pipe(vae=tiny_vae(kind))
    images = torch.rand(2, 3, 16, 16, generator=generators(0)[0])
    latents = pipe.encode(images)
    encoded = pipe.vae.encode(images * 2 - 1)
    mode = encoded.latent if kind is AutoencoderDC else encoded.latent_dist.mode()
    torch.testing.assert_close(latents, normalize_latents(pipe.vae, mode))
    decoded = pipe.decode(latents)
    assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1
    assert not latents.requires_grad and not decoded.requires_grad
    pipe.scheduler.set_timesteps(4)
    noise, condition = torch.randn(2, 4, 8, 8, generator=generators(1)[0]), Condition.null(pipe.denoiser, 2)
    denoised = pipe.denoise_latents(noise, pipe.scheduler.timesteps, condition)
    options = {"latents": noise, "generator": None}
    assert torch.equal(denoised, sample(pipe, output_type="latent", **options))
    assert torch.equal(pipe.decode(denoised), sample(pipe, **options))


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderDC])
def test_normalisation_is_inverted_and_survives_saving(kind, tmp_path, caplog, monkeypatch):
    vae, latents = tiny_vae(kind), torch.randn(2, 4, 3, 5)
    normal = normalize_latents(vae, latents)
    torch.testing.assert_close(denormalize_latents(vae, normal), latents)
    torch.testing.assert_close(normal[:, 2], (latents[:, 2] - 0.1) / 2.0)
    vae.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    caplog.set_level(logging.WARNING, "diffusers")
    assert torch.equal(normalize_latents(kind.from_pretrained(tmp_path), latents), normal)
    assert f"were passed to {kind.__name__}" not in caplog.text
    without = kind.from_config({key: v for key, v in vae.config.items() if "latents_" not in key})
    set_latent_statistics(vae, [0.0] * 3, [1.0] * 3)
    for wrong in (without, vae):
        with pytest.raises(ValueError, match="set_latent_statistics"):
            normalize_latents(wrong, latents)


@pytest.mark.parametrize(
    "objective", [FLOW, *({"prediction_type": p, **VP} for p in ("epsilon", "v_prediction"))]
)
def test_a_prediction_implies_what_it_was_made_of(objective):
    clean, noise = torch.randn(2, 3, 4, 2, 2, 2, generator=generators(0)[0])  # a video's, for example
    objective = Objective(objective)
    alpha, sigma = objective.alpha_sigma(torch.tensor([10, 500, 990]))
    noisy = alpha.view(3, 1, 1, 1, 1) * clean + sigma.view(3, 1, 1, 1, 1) * noise
    implied = objective.clean_and_noise(objective.target(clean, noise, alpha, sigma), noisy, alpha, sigma)
    torch.testing.assert_close(implied, (clean, noise), rtol=1e-3, atol=1e-3)
    if objective.prediction_type != "epsilon":
        for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)):
            assert all(
                half.isfinite().all() for half in objective.clean_and_noise(clean, clean, alpha, sigma)
            )


def test_zero_terminal_snr():
    objective = {"prediction_type": "v_prediction", **VP, "rescale_betas_zero_snr": True}
    alpha, sigma = Objective(objective).alpha_sigma(torch.tensor([999]))
    assert alpha.item() == 0 and sigma.item() == 1 and Objective(objective).network_point(0.0, 1.0)[0] == 999
    scheduler = diffusers.DDIMScheduler(**objective, clip_sample=False, timestep_spacing="trailing")
    assert sample(tiny_pipe(objective, scheduler)).isfinite().all()
    with pytest.raises(ValueError, match="use prediction_type='v_prediction'"):
        tiny_pipe(objective | {"prediction_type": "epsilon"})


@pytest.mark.parametrize(
    "objective", [None, {}, {"prediction_type": "score"}, FLOW | VP, {"prediction_type": "epsilon", "x": 1}]
)
def test_what_is_no_objective(objective):
    with pytest.raises(ValueError, match="objective"):
        tiny_pipe(objective)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "PNDM", "HeunDiscrete", "LMSDiscrete"]
)
def test_on_its_own_path_a_network_meets_the_stock_loop(name, prediction_type):
    objective = {"prediction_type": prediction_type, **VP}
    options = {"clip_sample": False} if name == "DDIM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**objective, **options)
    pipe = tiny_pipe(objective, scheduler)
    latents = torch.randn(2, 4, 8, 8, generator=generators(7)[0])
    options = {"latents": latents, "class_labels": [0, 1], "generator": None, "num_inference_steps": 8}
    ours = sample(pipe, output_type="latent", **options)
    scheduler.set_timesteps(8)
    theirs, labels = latents * scheduler.init_noise_sigma, Condition(class_labels=torch.tensor([0, 1]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(theirs, t)
            theirs = scheduler.step(denoise(pipe.unet, noisy, t, labels), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_on_its_own_path_a_flow_network_meets_the_stock_loop():
    pipe = tiny_pipe(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), classes=None)
    latents = torch.randn(2, 4, 8, 8, generator=generators(7)[0])
    ours = sample(pipe, latents=latents, generator=None, output_type="latent")
    with torch.no_grad():
        for tau in (1.0, 0.75, 0.5, 0.25):
            latents = latents - 0.25 * denoise(pipe.unet, latents, torch.tensor(1000 * tau), Condition())
    torch.testing.assert_close(ours, latents, rtol=1e-5, atol=1e-5)


def test_dropping_conditions():
    unet = tiny_unet()
    condition, null = Condition(class_labels=torch.tensor([0, 1, 2])), Condition.null(unet, 3)
    dropped = condition.drop(torch.tensor([True, False, True]), null)
    assert dropped.class_labels.tolist() == [3, 1, 3] and condition.class_labels.tolist() == [0, 1, 2]
    assert Condition().drop(torch.tensor([True]), Condition()).class_labels is None
    assert Condition.null(tiny_unet(None), 3) == Condition()


def test_components_must_fit():
    unet = tiny_unet()
    unet.register_to_config(out_channels=3)
    with pytest.raises(ValueError, match="latent_channels=4, but the denoiser has out_channels=3"):
        LDMPipeline(tiny_vae(), unet, diffusers.DDIMScheduler(), objective=FLOW)
