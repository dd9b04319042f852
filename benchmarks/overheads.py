"""The package's cost beyond the networks' own arithmetic, as ratios measured side by side in one process.

python benchmarks/overheads.py --config training/configs/cifar10_cpu.yaml
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm_pipeline import LDMPipeline, build_scheduler
from ldm_pipeline.pipeline import Condition, denoise, denormalize_latents, set_latent_statistics
from training.config import parse_config
from training.data.images import SPLITS
from training.data.latents import LatentDataset, channel_statistics
from training.losses.denoising import DenoisingLoss
from training.networks import new_autoencoder, new_denoiser
from training.runtime.atomic import write_json
from training.runtime.optimization import build_optimizer
from training.runtime.run import Run, start
from training.train_denoiser import train_denoiser

IMAGES = 4096


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_by_side(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a slow moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            synchronize()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def put_latents(run: Run, parts: dict[str, Iterable[dict[str, torch.Tensor]]]) -> None:
    """Make a run that has trained no autoencoder look as if it had, and had encoded these latents.

    Args:
        parts: "mean" `(n, 2 or 1, *latent_shape)` and "class_labels" `(n,)` of each split.
    """
    folder, names = run.folder / "latents", {}
    folder.mkdir(exist_ok=True)
    for split, shards in parts.items():
        names[split] = []
        for number, moments in enumerate(shards):
            names[split].append(f"{split}-{number:05d}.safetensors")
            save_file(moments, folder / names[split][-1])
    autoencoder = new_autoencoder(run.config)
    mean, std = channel_statistics([folder / name for name in names["train"]])
    set_latent_statistics(autoencoder, mean.tolist(), std.tolist())
    autoencoder.save_pretrained(run.folder / "autoencoder")
    write_json(folder / "manifest.json", {"key": {}, "shape": list(run.latent_shape), **names})


def random_run(config_path: str, folder: Path, steps: int) -> Run:
    """A run of the configuration's networks, with random latents of ten classes for its first stages."""
    size = parse_config(["--config", config_path]).data.resolution
    data = [
        "--data.dataset=digits",
        "--data.channels=3",
        f"--data.resolution={size}",
        "--autoencoder.batch_size=1",
    ]
    never = [f"--denoiser.{key}=1000000000" for key in ("validate_every", "sample_every", "checkpoint_every")]
    length = [
        f"--denoiser.max_steps={2 * steps}",
        f"--denoiser.log_every={steps}",
        "--denoiser.warmup_steps=1",
    ]
    options = [
        "--config",
        config_path,
        f"--output_dir={folder}",
        "--mixed_precision=no",
        *data,
        *never,
        *length,
    ]
    run = start(parse_config(options), ["denoiser"])
    mean = torch.randn(IMAGES, 2, *run.latent_shape).half()
    put_latents(run, {split: [{"mean": mean, "class_labels": torch.arange(IMAGES) % 10}] for split in SPLITS})
    return run


def bare_step(run: Run, shape: tuple[int, ...], unet: torch.nn.Module) -> Callable[[], None]:
    """Forward, backward and optimizer step on tensors that lie ready, and nothing else."""
    config, device = run.config.denoiser, run.device
    module = DenoisingLoss(unet, config).to(device)
    optimizer = build_optimizer(config, module)
    noise, times = (
        torch.randn(config.batch_size, *shape, device=device),
        torch.rand(config.batch_size, device=device),
    )
    labels = Condition(class_labels=torch.arange(config.batch_size, device=device) % 10)

    def step() -> None:
        with run.accelerator.autocast():
            loss, _ = module(noise, noise, times * 1000, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loop_against_bare(run: Run, shape: tuple[int, ...], rounds: int) -> float:
    """Seconds of a step of `train_denoiser`, with all it does, over the bare step's; medians of turns."""
    steps = run.config.denoiser.log_every
    bare = bare_step(run, shape, new_denoiser(run.config, run.data, shape))
    bare()
    ratios = []
    for _ in range(rounds):
        for result in ("denoiser", "pipeline"):
            shutil.rmtree(run.folder / result, ignore_errors=True)
        begun = time.perf_counter()
        for _ in range(steps):
            bare()
        synchronize()
        seconds = (time.perf_counter() - begun) / steps
        train_denoiser(run)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rate = [line["images_per_second"] for line in lines if "images_per_second" in line][-1]
        ratios.append(run.config.denoiser.batch_size / rate / seconds)
    return statistics.median(ratios)


@torch.no_grad()
def call_against_networks(
    run: Run, shape: tuple[int, ...], rounds: int, images: int = 16, steps: int = 10
) -> float:
    """Seconds of a pipeline call over those of its network evaluations and one decode."""
    pipe = LDMPipeline.from_pretrained(run.folder / "pipeline").to(run.device)
    pipe.scheduler = build_scheduler(pipe.config.objective)
    pipe.set_progress_bar_config(disable=True)
    noisy, times = torch.randn(2 * images, *shape, device=run.device), torch.full((2 * images,), 500.0)
    condition = Condition(class_labels=torch.arange(2 * images, device=run.device) % 10)

    def networks() -> None:
        for _ in range(steps):
            denoise(pipe.unet, noisy, times.to(run.device), condition)
        pipe.vae.decode(denormalize_latents(pipe.vae, noisy[:images]))

    labels = [index % 10 for index in range(images)]
    call = lambda: pipe(class_labels=labels, num_inference_steps=steps, guidance_scale=2.0, output_type="pt")  # noqa: E731
    seconds = side_by_side(rounds, call=call, networks=networks)
    return seconds["call"] / seconds["networks"]


def bf16_against_float32(run: Run, shape: tuple[int, ...], rounds: int) -> float:
    """Seconds of a bare step under bf16 autocast over those in float32."""
    step = bare_step(run, shape, new_denoiser(run.config, run.data, shape))

    def in_bf16() -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            step()

    seconds = side_by_side(rounds, bf16=in_bf16, float32=step)
    return seconds["bf16"] / seconds["float32"]


def mapped_against_resident(run: Run, rounds: int) -> float:
    """Seconds in which a batch of latents is read from mapped files over those from memory."""
    pipe = LDMPipeline.from_pretrained(run.folder / "pipeline")
    size = run.config.denoiser.batch_size
    readers = {}
    for where in ("disk", "device"):
        latents = LatentDataset(run.folder / "latents", "train", pipe.vae, run.device, where)
        noise = torch.randn(size, *latents.shape, device=run.device)
        indices, flips = torch.randint(IMAGES, (size,)), torch.randint(2, (size,))
        readers[where] = lambda s=latents, n=noise, i=indices, f=flips: (s.batch(i, f, n), s.class_labels(i))
    seconds = side_by_side(20 * rounds, **readers)
    return seconds["disk"] / seconds["device"]


def pixels_against_latents(run: Run, shape: tuple[int, ...], rounds: int) -> float:
    """Seconds of a bare step on pixels over those on latents, for a U-Net of the same widths."""
    data = run.config.data
    pixels = (data.channels, data.resolution, data.resolution)
    steps = {
        name: bare_step(run, size, new_denoiser(run.config, run.data, size))
        for name, size in (("pixels", pixels), ("latents", shape))
    }
    seconds = side_by_side(rounds, **steps)
    return seconds["pixels"] / seconds["latents"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config", default="training/configs/cifar10_cpu.yaml", help="whose networks are measured"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of the training loop that are timed at once"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = random_run(options.config, Path(folder) / "run", options.steps)
        shape = run.latent_shape
        ratios = {
            "training step of the loop / bare forward, backward, optimizer step": loop_against_bare(
                run, shape, options.rounds
            ),
            "pipeline call / its network evaluations and one decode": call_against_networks(
                run, shape, options.rounds
            ),
            "step under bf16 autocast / float32": bf16_against_float32(run, shape, options.rounds),
            "batch of memory-mapped / resident latents": mapped_against_resident(run, options.rounds),
            "step on pixels / on latents, same U-Net widths": pixels_against_latents(
                run, shape, options.rounds
            ),
        }
    print("| ratio of seconds | measured |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
