"""Prints what every Diffusers scheduler makes of a Gaussian whose best denoiser is known in closed form."""

import argparse
import warnings

import diffusers
import diffusers.schedulers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DModel

from ldm_pipeline.pipeline import SCHEDULERS, LDMPipeline, scheduler_family

MEAN, DEVIATION = 0.7, 0.5  # of a latent element; neither centred nor of unit variance: clipping shows
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
OBJECTIVES = {
    "epsilon": {"prediction_type": "epsilon", **BETAS},
    "v": {"prediction_type": "v_prediction", **BETAS},
    "flow": {"prediction_type": "flow_prediction"},
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


class GaussianOracle(UNet2DModel):
    """The best denoiser of N(MEAN, DEVIATION^2); its path is its own, no call of what is tested."""

    def __init__(self, prediction_type: str, size: int = 32):
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        widths = {"in_channels": 4, "out_channels": 4, "block_out_channels": (4,), "norm_num_groups": 1}
        super().__init__(sample_size=size, **blocks, **widths)
        self.predicts = prediction_type
        betas = np.linspace(0.0001, 0.02, 1000, dtype=np.float32).astype(np.float64)
        kept = np.cumprod(1 - betas)
        self.log_snr = np.log(kept / (1 - kept)) / 2

    def forward(self, sample, timestep, return_dict=False):
        time, noisy = float(timestep.flatten()[0]), sample.double()
        if self.predicts == "flow_prediction":
            alpha, sigma = 1 - time / 1000, time / 1000
        else:
            log_snr = np.interp(time, np.arange(1000), self.log_snr)
            alpha, sigma = (1 + np.exp(-2 * log_snr)) ** -0.5, (1 + np.exp(2 * log_snr)) ** -0.5
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = MEAN + gain * (noisy - alpha * MEAN)  # E[clean | noisy] of two Gaussians
        noise = (noisy - alpha * clean) / sigma
        velocity = alpha * noise - sigma * clean
        targets = {"epsilon": noise, "v_prediction": velocity, "flow_prediction": noise - clean}
        return (targets[self.predicts].to(sample.dtype),)


def oracle_pipeline(objective: dict, scheduler, predicts: str | None = None, size: int = 32) -> LDMPipeline:
    """The real pipeline around the oracle; `predicts` other than the objective's is the bug to be caught."""
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1)
    unet = GaussianOracle(predicts or objective["prediction_type"], size)
    pipe = LDMPipeline(vae, unet, scheduler, objective=objective)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def errors(pipe: LDMPipeline, steps: int, images: int = 16, seed: int = 0, **options) -> tuple[float, float]:
    """(error of the mean, error of the deviation) of what the pipeline samples, in percent of the truth."""
    generator = torch.Generator().manual_seed(seed)
    options = {"batch_size": images, "generator": generator, "output_type": "latent"} | options
    latents = pipe(num_inference_steps=steps, **options).images.double()
    return 100 * (float(latents.mean()) / MEAN - 1), 100 * (float(latents.std()) / DEVIATION - 1)


def build(case: str):
    """The scheduler of one of CASES."""
    name, options, _ = CASES[case]
    return getattr(diffusers, f"{name}Scheduler")(**options)


def all_schedulers() -> list[str]:
    """Every scheduler class that the installed Diffusers exports."""
    return sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def refusal(name: str) -> str:
    """Why the pipeline refuses a scheduler class; empty if it does not."""
    nameless = type(name, (), {"config": {}})()  # some cannot be built without arguments or extra packages
    try:
        scheduler_family(nameless)
    except ValueError as error:
        return str(error).split(" These can:")[0]
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="images of 4x32x32 latents (default: 16)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"Errors of mean / deviation in percent; data N({MEAN}, {DEVIATION}^2), exact denoiser.\n")
    print(f"| scheduler | steps | {' | '.join(OBJECTIVES)} |\n|{'---|' * (2 + len(OBJECTIVES))}")
    for case, (_, _, enough) in CASES.items():
        for steps in sorted({STEPS, enough}):
            pipes = [oracle_pipeline(objective, build(case)) for objective in OBJECTIVES.values()]
            cells = [errors(pipe, steps, options.images) for pipe in pipes]
            row = [case, str(steps), *(f"{mean:+.1f} / {deviation:+.1f}" for mean, deviation in cells)]
            print(f"| {' | '.join(row)} |", flush=True)
    print("\nRefused:\n")
    for name in sorted(set(all_schedulers()) - set(SCHEDULERS)):
        print(f"- {refusal(name)}")


if __name__ == "__main__":
    main()
