"""Stage 4: figures and pictures of the finished model."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version

import torch
from torch import nn

from ldm_pipeline.pipeline import LDMPipeline
from training.files import file_sha256, read_json, write_json
from training.latents import LatentSet
from training.metrics import draw_grid, measure_reconstruction, validation_loss
from training.run import Run, cpu_capabilities
from training.script import main


def evaluate(run: Run) -> None:
    """Leave `metrics.json` and the final grids in the run folder."""
    path = run.folder / "metrics.json"
    run.require(run.folder / "pipeline", "train_denoiser.py")
    weights = run.folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    key = {"denoiser": file_sha256(weights), "evaluation": asdict(run.config.evaluation)}
    if path.exists() and read_json(path)["key"] == key:
        run.print(f"evaluation: {path} stands; --redo '[evaluation]' measures again")
        return
    run.accelerator.wait_for_everyone()
    pipeline = LDMPipeline.from_pretrained(run.folder / "pipeline").to(run.device)
    limit = run.config.evaluation.num_images
    reconstruction = measure_reconstruction(run, pipeline.vae, limit, "reconstructions.png")
    held_out = LatentSet(
        run.folder / "latents", "held_out", pipeline.vae, run.device, run.config.latents.resident
    )
    loss = validation_loss(run, pipeline.unet, pipeline.config.objective, held_out, limit)
    draw_grid(run, pipeline, "samples.png", rows=8)
    figures = {
        **reconstruction,
        **loss,
        "held_out_images": min(limit, len(held_out)),
        "seconds": {
            stage: (run.done(stage) or {}).get("seconds") for stage in ("autoencoder", "latents", "denoiser")
        },
        "parameters": {name: count_parameters(getattr(pipeline, name)) for name in ("vae", "unet")},
        "seed": run.config.seed,
        "hardware": hardware(run),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "ldm-pipeline")},
        "key": key,
    }
    if run.accelerator.is_main_process:
        write_json(path, figures)
    run.accelerator.wait_for_everyone()


def hardware(run: Run) -> str:
    """The device in words, for every figure measured on it."""
    processes = run.accelerator.num_processes
    if run.device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(run.device)}, {run.accelerator.mixed_precision}"
    name = cpu_capabilities().get("cpu_name") or platform.processor()
    return f"{name}, {processes} x {torch.get_num_threads()} threads, {run.accelerator.mixed_precision}"


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def summary(run: Run) -> str:
    """Where the results are, and how to use them."""
    figures = read_json(run.folder / "metrics.json")
    names = LDMPipeline.load_config(run.folder / "pipeline")["id2label"]
    label = f"class_labels={json.dumps(names[str(min(7, len(names) - 1))])}, " if names else ""
    return "\n".join([
        f"grid:     {run.folder / 'samples' / 'samples.png'}",
        f"figures:  {run.folder / 'metrics.json'} (PSNR {figures['psnr']:.2f} dB, "
        f"SSIM {figures['ssim']:.3f}, validation loss {figures['val_loss']:.4f})",
        f"pipeline: {run.folder / 'pipeline'}",
        "",
        "from ldm_pipeline import LDMPipeline",
        f'pipe = LDMPipeline.from_pretrained("{(run.folder / "pipeline").as_posix()}")',
        f'pipe({label}num_inference_steps=20).images[0].save("picture.png")',
    ])  # fmt: skip


if __name__ == "__main__":
    main(evaluation=evaluate)
