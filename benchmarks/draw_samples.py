"""Draw class-balanced samples of a pipeline into an .npz of uint8 pictures, with their labels beside it.

python benchmarks/draw_samples.py runs/cifar10_cpu/pipeline --output samples.npz --guidance_scale 1.5
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm_pipeline import LDMPipeline


def draw(pipe: LDMPipeline, count: int, steps: int, guidance_scale: float, batch: int, seed: int):
    """Pictures uint8 `(count, H, W, C)`, a generator each, and labels `(count,)`, -1 without classes."""
    classes = (pipe.unet.config.num_class_embeds or 1) - 1
    labels = np.arange(count) % classes if classes else np.full(count, -1)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in tqdm(range(0, count, batch), desc="samples", unit="batch", mininterval=10):
        chosen = range(first, min(first + batch, count))
        images = pipe(
            class_labels=labels[chosen].tolist() if classes else None,
            num_inference_steps=steps,
            guidance_scale=guidance_scale if classes else 1.0,
            generator=[
                torch.Generator(pipe.device).manual_seed(seed * 1_000_000 + index) for index in chosen
            ],
            output_type="np",
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="local folder or Hub id")
    parser.add_argument("--output", type=Path, default=Path("samples.npz"))
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipe = LDMPipeline.from_pretrained(options.pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.perf_counter()
    pictures, labels = draw(
        pipe,
        options.count,
        options.num_inference_steps,
        options.guidance_scale,
        options.batch_size,
        options.seed,
    )
    np.savez(options.output, pictures)
    np.save(options.output.with_suffix(".labels.npy"), labels)
    print(f"{len(pictures)} pictures in {time.perf_counter() - begun:.0f} s: {options.output}")


if __name__ == "__main__":
    main()
