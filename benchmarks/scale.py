"""Time and memory of every stage by the number of images: time should be linear, memory flat.

    python benchmarks/scale.py path/to/large/disk --counts 10000 100000 1000000

Makes sets of synthetic pictures of 32x32 pixels, as parquet or (`--kind files`) as one PNG file per picture,
and runs the commands of a checkout on them, with the smallest networks and few steps:

- scan: `train_ldm.py --dry_run`, which decodes every image once.
- latents: `encode_latents.py` after ten steps of an autoencoder, and that again, which finds them whole.
- training: `train_denoiser.py` with the latents in memory or mapped (`--latents.resident disk`), for 200
  steps, and again for 400, which is a resume.

Memory is the highest of the anonymous pages of all processes of a command together, without mapped files,
which the system can drop. Each row tells what a command took beyond an equal one on 1,000 images.
"""

import argparse
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parent.parent
BASE = 1000
MIB = 2**20
SMALL = """
data: {resolution: 32, horizontal_flip: false, label_column: label}
autoencoder:
  {kind: AutoencoderDC, widths: [8, 16], blocks: [0, 1], batch_size: 64, max_steps: 10, warmup_steps: 1}
denoiser:
  {widths: [16, 32], layers_per_block: 1, attention_head_dim: 16, norm_groups: 8, attention: [false, false],
  batch_size: 64, max_steps: 200, warmup_steps: 1, validate_every: 100000, sample_every: 100000}
evaluation: {num_samples: 0}
"""


def picture(index: int) -> bytes:
    """A PNG of 32x32 pixels: a coloured square on a plain ground, another one for every index."""
    draw = np.random.default_rng(index)
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:] = draw.integers(0, 256, 3)
    (top, left), side = draw.integers(0, 16, 2), draw.integers(4, 16)
    pixels[top : top + side, left : left + side] = draw.integers(0, 256, 3)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make(folder: Path, count: int, kind: str) -> Path:
    """A set of `count` pictures of ten classes in a folder, which is made once."""
    path = folder / f"{kind}-{count}"
    if path.exists():
        return path
    aside = folder / f"{kind}-{count}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if kind == "files":
        for label in range(10):
            (aside / str(label)).mkdir()
        for index in range(count):
            (aside / str(index % 10) / f"{index}.png").write_bytes(picture(index))
    else:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
        for first in range(0, count, 50_000):
            indices = range(first, min(first + 50_000, count))
            rows = {"image": [{"bytes": picture(i), "path": None} for i in indices]}
            rows |= {"label": [i % 10 for i in indices]}
            part = datasets.Dataset.from_dict(rows, features)
            part.to_parquet(aside / f"train-{first // 50_000:05d}.parquet")
    aside.rename(path)
    return path


def measured(command: list) -> tuple[float, float]:
    """Seconds and MiB of a command of the checkout; SystemExit with its output if it fails."""
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous, [psutil.Process(process.pid), *children(process.pid)])))
            time.sleep(0.05)
        seconds, output = time.perf_counter() - begun, process.stdout.read()
    if process.returncode:
        raise SystemExit(output)
    return seconds, peak / MIB


def children(pid: int) -> list[psutil.Process]:
    """All descendants of a process that still runs."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def anonymous(process: psutil.Process) -> int:
    """Bytes of a process that belong to no file; 0 if it has ended."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - memory.shared


def stages(data: Path, run: Path, config: Path) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of every command on a data set, by name."""
    shutil.rmtree(run, ignore_errors=True)
    given = ["--config", config, "--data.dataset", data, "--output_dir", run]
    mapped = ["--latents.resident", "disk", "--redo", "[denoiser]"]
    commands = {
        "scan (dry run)": ["train_ldm.py", "--dry_run"],
        "autoencoder, 10 steps": ["train_autoencoder.py"],
        "latents": ["encode_latents.py"],
        "latents, whole already": ["encode_latents.py"],
        "training, 200 steps, in memory": ["train_denoiser.py", "--latents.resident", "device"],
        "training, 200 steps, mapped": ["train_denoiser.py", *mapped],
        "resume for 200 more, mapped": ["train_denoiser.py", *mapped[:2], "--denoiser.max_steps", 400],
    }
    return {
        name: measured([f"training/{script}", *given, *more]) for name, (script, *more) in commands.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the sets and runs are made; about 3 GB per million")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--kind", choices=("parquet", "files"), default="parquet")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    config = options.folder / "small.yaml"
    config.write_text(SMALL)
    base = None
    for count in [BASE, *options.counts]:
        found = stages(make(options.folder, count, options.kind), options.folder / f"run-{count}", config)
        base = base or found
        print(f"\n{count:,} images as {options.kind}\n")
        print("| command | s | microseconds per image more | MiB | MiB more |\n|---|---|---|---|---|")
        for name, (seconds, memory) in found.items():
            more = 1e6 * (seconds - base[name][0]) / max(count - BASE, 1)
            print(
                f"| {name} | {seconds:.1f} | {more:.0f} | {memory:.0f} | {memory - base[name][1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
