"""Prints what every Diffusers scheduler makes of a Gaussian whose best denoiser is known in closed form.

With --operations also of the ways to edit that go by the scheduler, all for a flow network.
"""

import argparse
import functools
import json
import warnings

import diffusers
import diffusers.schedulers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DModel

from ldm_pipeline.loading import LDMPipeline
from ldm_pipeline.pipeline import (
    SCHEDULERS,
    Condition,
    Observation,
    Source,
    first_latents,
    noise_levels,
    set_timesteps,
)

# Of a latent element by channel: neither centred nor of unit variance, so that clipping and scaling show.
MEAN, DEVIATION = torch.tensor([[-1.1, 0.9, 0.2, -0.5], [0.3, 1.0, 0.8, 0.15]]).double().view(2, 4, 1, 1)
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE, ZERO_SNR = {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}
OBJECTIVES = {
    "epsilon": {"prediction_type": "epsilon", **BETAS},
    "v": {"prediction_type": "v_prediction", **BETAS},
    "flow": {"prediction_type": "flow_prediction"},
    "epsilon, cosine": {"prediction_type": "epsilon", **BETAS, **COSINE},
    "v, cosine": {"prediction_type": "v_prediction", **BETAS, **COSINE},
    "v, zero SNR": {"prediction_type": "v_prediction", **BETAS, **ZERO_SNR},
}
STEPS = 50
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
V = BETAS | {"prediction_type": "v_prediction"}
UNCLIPPED = BETAS | {"clip_sample": False}
# name -> (scheduler class without its suffix, its options, the number of steps at which it must be right):
# STEPS for higher-order solvers, more for first-order and ancestral ones, whose error is of order 1 / steps.
CASES = {
    "DPM-Solver++ 2M": ("DPMSolverMultistep", BETAS, STEPS),
    "DPM-Solver++ 2M, flow": ("DPMSolverMultistep", FLOW, STEPS),
    "DPM-Solver++ 2M, v": ("DPMSolverMultistep", V, STEPS),
    "DPM-Solver++ 2M, sample": ("DPMSolverMultistep", BETAS | {"prediction_type": "sample"}, STEPS),
    "DPM-Solver++ 3M": ("DPMSolverMultistep", BETAS | {"solver_order": 3}, STEPS),
    "DPM-Solver++ 2M SDE": ("DPMSolverMultistep", BETAS | {"algorithm_type": "sde-dpmsolver++"}, STEPS),
    "DPM-Solver++ single": ("DPMSolverSinglestep", BETAS | {"lower_order_final": True}, STEPS),
    "DPM-Solver++ single, flow": ("DPMSolverSinglestep", FLOW | {"lower_order_final": True}, STEPS),
    "DEIS": ("DEISMultistep", BETAS, STEPS),
    "DEIS, flow": ("DEISMultistep", FLOW, STEPS),
    "UniPC": ("UniPCMultistep", BETAS, STEPS),
    "UniPC order 3, flow": ("UniPCMultistep", FLOW | {"solver_order": 3}, STEPS),
    "SA-Solver": ("SASolver", BETAS, STEPS),
    "SA-Solver, flow": ("SASolver", FLOW, STEPS),
    "PNDM": ("PNDM", BETAS, STEPS),
    "PNDM, PLMS only": ("PNDM", BETAS | {"skip_prk_steps": True}, STEPS),
    "IPNDM": ("IPNDM", {}, STEPS),
    "LMS": ("LMSDiscrete", BETAS, STEPS),
    "Heun": ("HeunDiscrete", BETAS, STEPS),
    "KDPM2": ("KDPM2Discrete", BETAS, STEPS),
    "FlowMatchHeun": ("FlowMatchHeunDiscrete", {}, STEPS),
    "EDM DPM-Solver++ 2M": ("EDMDPMSolverMultistep", {}, STEPS),
    "FlowMatchEuler": ("FlowMatchEulerDiscrete", {}, 150),
    "FlowMatchEuler, shift 3": ("FlowMatchEulerDiscrete", {"shift": 3.0}, 150),
    "FlowMapEuler": ("FlowMapEulerDiscrete", {}, 150),
    "LTXEulerAncestralRF": ("LTXEulerAncestralRF", {}, 400),
    "Euler": ("EulerDiscrete", BETAS, 150),
    "Euler, v": ("EulerDiscrete", V, 150),
    "Euler, Karras": ("EulerDiscrete", BETAS | {"use_karras_sigmas": True}, 150),
    "EDMEuler": ("EDMEuler", {}, 150),
    "DDIM": ("DDIM", UNCLIPPED, 150),
    "DDIM, trailing": ("DDIM", UNCLIPPED | {"timestep_spacing": "trailing"}, 200),
    "DDIMParallel": ("DDIMParallel", UNCLIPPED, 150),
    "CogVideoXDDIM": ("CogVideoXDDIM", UNCLIPPED | {"snr_shift_scale": 1.0}, 150),
    "TCD": ("TCD", UNCLIPPED | {"original_inference_steps": 1000}, 150),
    "Euler ancestral": ("EulerAncestralDiscrete", BETAS, 400),
    "KDPM2 ancestral": ("KDPM2AncestralDiscrete", BETAS, 400),
    "DDPM": ("DDPM", UNCLIPPED, 400),
    "DDPMParallel": ("DDPMParallel", UNCLIPPED, 400),
}


# In the names of stochastic schedulers.
RANDOM = ("SDE", "SA-Solver", "Ancestral", "DDPM", "SASolver")


def signal_kept(objective: dict) -> np.ndarray:
    """alpha^2 at each of the 1000 times of a variance-preserving objective, by the papers' formulas."""
    if objective["beta_schedule"] == "linear":
        kept = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    else:  # arXiv:2102.09672, eq. 17
        bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        kept = np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    if objective.get("rescale_betas_zero_snr"):  # arXiv:2305.08891, algorithm 1
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        kept[-1] = kept[-2] / 4  # has no logarithm; the last time is never interpolated
    return kept


class GaussianOracle(UNet2DModel):
    """The best denoiser of N(mean, DEVIATION^2); its path is its own, no call of what is tested."""

    def __init__(self, objective: dict, size: int = 32, mean: torch.Tensor = MEAN):
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        widths = {"in_channels": 4, "out_channels": 4, "block_out_channels": (4,), "norm_num_groups": 1}
        widths["attention_head_dim"] = 4
        super().__init__(sample_size=size, **blocks, **widths)
        self.predicts, self.mean = objective["prediction_type"], mean
        if self.predicts != "flow_prediction":
            kept = signal_kept(objective)
            self.log_snr = np.log(kept / (1 - kept)) / 2

    def forward(self, sample, timestep, return_dict=False):
        time, noisy = float(timestep.flatten()[0]), sample.double()
        if self.predicts == "flow_prediction":
            alpha, sigma = 1 - time / 1000, time / 1000
        else:
            log_snr = np.interp(time, np.arange(1000), self.log_snr)
            alpha, sigma = (1 + np.exp(-2 * log_snr)) ** -0.5, (1 + np.exp(2 * log_snr)) ** -0.5
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = self.mean + gain * (noisy - alpha * self.mean)  # E[clean | noisy] of two Gaussians
        noise = (noisy - alpha * clean) / sigma
        velocity = alpha * noise - sigma * clean
        targets = {"epsilon": noise, "v_prediction": velocity, "flow_prediction": noise - clean}
        return (targets[self.predicts].to(sample.dtype),)


def oracle_pipeline(objective: dict, scheduler, predicts: dict | None = None, size: int = 4) -> LDMPipeline:
    """The real pipeline around the oracle; `predicts` other than the objective is the bug to be caught."""
    vae, unet = _networks(json.dumps(predicts or objective), size)
    pipe = LDMPipeline(vae, unet, scheduler, objective=objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _networks(objective: str, size: int) -> tuple[AutoencoderKL, GaussianOracle]:
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1)
    return vae, GaussianOracle(json.loads(objective), size)


def standard_noise(images: int, size: int, seed: int = 0) -> torch.Tensor:
    """Noise whose mean and deviation in each channel are exactly 0 and 1.

    Under an exact denoiser a deterministic sampler is an affine map by channel: its error shows without any
    of the sample's own, however few the images.
    """
    noise = torch.randn(images, 4, size, size, generator=torch.Generator().manual_seed(seed)).double()
    noise = noise - noise.mean((0, 2, 3), keepdim=True)
    return (noise / noise.std((0, 2, 3), keepdim=True)).float()


def errors(latents: torch.Tensor) -> tuple[float, float]:
    """(error of the mean, error of the deviation) in percent of the deviation, of the worst channel each."""
    deviation, mean = torch.std_mean(latents.double(), (0, 2, 3), keepdim=True)
    both = torch.cat([(mean - MEAN) / DEVIATION, deviation / DEVIATION - 1])[:, :, 0, 0] * 100
    return tuple(row[row.abs().argmax()].item() for row in both)


def sample(pipe: LDMPipeline, steps: int, images: int = 4, seed: int = 0, **options) -> torch.Tensor:
    """Latents that the pipeline samples; of stochastic schedulers many, as chance does not cancel."""
    size = pipe.denoiser.config.sample_size
    name = type(pipe.scheduler).__name__ + str(pipe.scheduler.config.get("algorithm_type"))
    images = images * 40 if any(word in name for word in (*RANDOM, "sde")) else images
    options = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"} | options
    return pipe(latents=standard_noise(images, size), num_inference_steps=steps, **options).images


def build(case: str):
    """The scheduler of one of CASES."""
    name, options, _ = CASES[case]
    return getattr(diffusers, f"{name}Scheduler")(**options)


def all_schedulers() -> list[str]:
    """Every scheduler class that the installed Diffusers exports."""
    return sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def uncorrelated(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of `standard_noise`, of 16 images, without any correlation."""
    first, second = standard_noise(16, size, seed=1).double(), standard_noise(16, size, seed=2).double()
    second = second - first * (first * second).mean((0, 2, 3), keepdim=True)
    return first.float(), (second / second.std((0, 2, 3), keepdim=True)).float()


def exact_flow(noisy: torch.Tensor, tau: float) -> torch.Tensor:
    """Clean latents, in deviations, to which probability flow takes those of the noise level tau."""
    return (noisy - (1 - tau) * MEAN) / torch.sqrt(((1 - tau) * DEVIATION) ** 2 + tau**2)


def operations(case: str) -> dict[str, str]:
    """The errors of a scheduler's operations by name, or why it is refused."""
    pipe = oracle_pipeline(OBJECTIVES["flow"], build(case), size=8)
    pipe._decode = lambda latents: latents  # measurements are of the latents themselves
    steps, (clean, noise) = CASES[case][2], uncorrelated(8)
    data, free = (MEAN + DEVIATION * clean).float(), torch.zeros(16, 1, 8, 8)
    free[..., 4:] = 1
    known = 1 - free

    def draw(start: int = 0, **more) -> torch.Tensor:
        set_timesteps(pipe.scheduler, steps)
        timesteps = pipe.scheduler.timesteps[start * pipe.scheduler.order :]
        first, generator = first_latents(pipe.scheduler, noise), torch.Generator().manual_seed(0)
        return pipe.denoise_latents(first, timesteps, Condition(), generator=generator, **more)

    def from_the_middle() -> str:
        drawn = draw(steps // 3, source=Source(data, noise))
        if any(word in type(pipe.scheduler).__name__ + case for word in (*RANDOM, "ancestral")):
            return "{:+.1f} / {:+.1f} %".format(*errors(drawn))
        set_timesteps(pipe.scheduler, steps)
        tau = noise_levels(pipe.scheduler, pipe.objective)[steps // 3 * pipe.scheduler.order]
        wrong = (drawn - MEAN) / DEVIATION - exact_flow((1 - tau) * data + tau * noise, tau)
        return f"{wrong.square().mean().sqrt():.3f}"

    def blended() -> str:
        return "{:+.1f} / {:+.1f} %".format(*errors(draw(source=Source(data, noise, free))[..., 4:]))

    def by_gradient() -> str:
        drawn = draw(observation=Observation(lambda images: images * known, data * known))
        return f"{(((drawn - data) / DEVIATION)[..., :4]).square().mean().sqrt():.3f}"

    cells = {}
    for name, operation in {
        "image to image": from_the_middle,
        "inpainting, blend": blended,
        "inpainting and restore, gradient": by_gradient,
    }.items():
        try:
            cells[name] = operation()
        except ValueError as error:
            cells[name] = f"refused: {error}"
    return cells


def print_operations() -> None:
    print(
        "\nImage to image from two thirds of the way: distance from exact probability flow, in deviations; "
        "of stochastic schedulers errors of mean / deviation. Blend: those of the hole. Gradient: distance "
        "of what is known, in deviations, 1.414 without. Inversion, FlowEdit, rows, directions and the "
        "classifier go by no scheduler.\n"
    )
    for row, case in enumerate(CASES):
        cells = operations(case)
        if not row:
            print(f"| scheduler | steps | {' | '.join(cells)} |\n|{'---|' * (2 + len(cells))}")
        print(f"| {case} | {CASES[case][2]} | {' | '.join(cells.values())} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="images of 4x4x4 latents (default: 16)")
    parser.add_argument("--operations", action="store_true", help="also of image to image and inpainting")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("Errors of mean / deviation in percent of the deviation, worst of 4 channels; exact denoiser.\n")
    print(f"| scheduler | steps | {' | '.join(OBJECTIVES)} |\n|{'---|' * (2 + len(OBJECTIVES))}")
    for case, (_, _, enough) in CASES.items():
        for steps in sorted({STEPS, enough}):
            pipes = [oracle_pipeline(objective, build(case)) for objective in OBJECTIVES.values()]
            cells = [errors(sample(pipe, steps, options.images)) for pipe in pipes]
            row = [case, str(steps), *(f"{mean:+.1f} / {deviation:+.1f}" for mean, deviation in cells)]
            print(f"| {' | '.join(row)} |", flush=True)
    if options.operations:
        print_operations()
    print(f"\nRefused: {', '.join(sorted(set(all_schedulers()) - set(SCHEDULERS)))}")


if __name__ == "__main__":
    main()
