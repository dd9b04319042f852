"""Shares of the machine's speed that a run reaches: arithmetic of the networks, images of scan and latents.

    python benchmarks/rates.py --config training/configs/cifar10_cpu.yaml --data.dataset path/to/cifar10 \\
      --data.max_images 8192

Takes the options of the training scripts. A training step is held against the fastest square matrix product
in the run's precision, on the same threads; the scan against decoding and transforming the images alone, the
latents against that and the encoder's passes. All take turns, so that a slow moment of the machine meets all.
"""

import shutil
import tempfile
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.overheads import side_by_side
from training.config import command_line
from training.data.latents import encode
from training.data.scan import scan
from training.encode_latents import encode_latents
from training.networks import new_autoencoder
from training.runtime.atomic import write_json
from training.runtime.run import Run, start
from training.runtime.timing import time_step, trial

ROUNDS = 3
NETWORKS = ("autoencoder", "denoiser")
SHOWN = 8  # operators of a profile


def matrix_products(run: Run) -> float:
    """Floating point operations a second of the fastest of some square matrix products."""
    dtype = torch.bfloat16 if run.accelerator.mixed_precision == "bf16" else torch.float32
    rates = []
    for side in (1024, 2048, 4096):
        matrix = torch.randn(side, side, dtype=dtype, device=run.device)
        rates.append(2 * side**3 / side_by_side(3, product=lambda m=matrix: m @ m)["product"])
    return max(rates)


class Step:
    """A training step of a network of the run, on random images or latents."""

    def __init__(self, run: Run, name: str):
        self.run, self.config = run, getattr(run.config, name)
        self.size = self.config.batch_size // self.config.gradient_accumulation_steps
        self.module, self.arguments = trial(
            run.config, name, self.size, run.latent_shape, run.data, run.text, run.device
        )

    def seconds(self) -> float:
        """Seconds of a step with its optimizer and averages, by the clock."""
        return time_step(self.module, self.config, self.arguments, self.run.accelerator.autocast)[0]

    def operations(self) -> int:
        """Floating point operations of the products and convolutions, forwards and backwards."""
        with FlopCounterMode(display=False) as counter, self.run.accelerator.autocast():
            loss = self.module(*self.arguments)[0]
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
        self.module.zero_grad()
        return counter.get_total_flops()

    def profile(self) -> list[tuple[str, float]]:
        """The operators that take most of the time, and their shares of it."""
        cuda = self.run.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        with profile(activities=kinds) as found:
            self.seconds()
        own = "self_device_time_total" if cuda else "self_cpu_time_total"
        times = {event.key: getattr(event, own) for event in found.key_averages()}
        total = sum(times.values())
        first = sorted(times, key=times.get, reverse=True)[:SHOWN]
        return [(name, times[name] / total) for name in first]


def of_networks(run: Run) -> None:
    """Print what share of the machine's matrix products each network reaches, and its profile."""
    steps = {name: Step(run, name) for name in NETWORKS}
    products, seconds = [], {name: [] for name in NETWORKS}
    for _ in range(ROUNDS):
        products.append(matrix_products(run))
        for name, step in steps.items():
            seconds[name].append(step.seconds())
    peak = median(products)
    print(f"Matrix products in {run.accelerator.mixed_precision}: {peak / 1e9:.0f} GFLOP/s\n")
    print("| step | batch | images/s | GFLOP per image | GFLOP/s | share |\n|---|---|---|---|---|---|")
    for name, step in steps.items():
        taken, work = median(seconds[name]), step.operations()
        row = [name, step.size, f"{step.size / taken:.1f}", f"{work / step.size / 1e9:.3f}"]
        row += [f"{work / taken / 1e9:.0f}", f"{work / taken / peak:.2f}"]
        print("|", " | ".join(map(str, row)), "|")
    for name, step in steps.items():
        print(f"\nOperators of the {name}'s step, by their own time:\n\n| operator | share |\n|---|---|")
        for operator, share in step.profile():
            print(f"| {operator} | {share:.3f} |")


@torch.no_grad()
def of_images(run: Run) -> None:
    """Print images a second of decoding, of the scan, of the encoder and of the latents' stage."""
    config, splits = run.config, (run.data.train, run.data.held_out)
    folder, count = run.folder / "autoencoder", sum(map(len, splits))
    autoencoder = new_autoencoder(config).to(run.device).eval()
    autoencoder.save_pretrained(folder)
    write_json(folder / "done.json", {})
    size, flips = config.latents.batch_size, 1 + config.data.horizontal_flip
    pixels = torch.randn(size, config.data.channels, *[config.data.resolution] * 2, device=run.device)

    def decode() -> None:
        for split in splits:
            for index in range(len(split)):
                split[index, False]

    def passes() -> None:
        with run.accelerator.autocast():
            for _ in range(0, count * flips, size):
                encode(autoencoder, pixels)

    def latents() -> None:
        encode_latents(run)
        shutil.rmtree(run.folder / "latents")

    works = {"decoding": decode, "scan": lambda: scan(run.data), "encoder": passes, "latents": latents}
    taken = side_by_side(ROUNDS, **works)
    print(f"\n| {count:,} images, {flips} latents each | images/s |\n|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {count / seconds:.0f} |")
    alone = taken["decoding"] + taken["encoder"]
    print("\n| ratio of seconds | measured |\n|---|---|")
    print(f"| scan / decoding | {taken['scan'] / taken['decoding']:.3f} |")
    print(f"| latents / decoding and encoder | {taken['latents'] / alone:.3f} |")


def main():
    config = command_line()
    with tempfile.TemporaryDirectory() as folder:
        config.output_dir = str(Path(folder) / "run")
        run = start(config, list(NETWORKS))
        of_networks(run)
        of_images(run)


if __name__ == "__main__":
    main()
