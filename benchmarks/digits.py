"""Are drawn digits read as what they were drawn for, and do they differ from each other as real ones do?

python benchmarks/digits.py runs/digits/pipeline
"""

import argparse

import numpy as np
import torch
from draw_samples import draw
from sklearn.svm import SVC

from ldm_pipeline import LDMPipeline
from training.config import DataConfig
from training.data import load_images


def mean_distance(images: np.ndarray) -> float:
    """Mean Euclidean distance between two different images of a set `(N, D)`."""
    flat = torch.from_numpy(images)
    return torch.pdist(flat).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    options = parser.parse_args()
    pipe = LDMPipeline.from_pretrained(options.pipeline)
    drawn, labels = draw(
        pipe, options.count, options.num_inference_steps, options.guidance_scale, 250, seed=0
    )
    drawn = drawn.reshape(len(drawn), -1).astype(np.float32) / 255
    data = load_images(
        DataConfig(dataset="digits", resolution=pipe.vae.config.get("sample_size", 16), channels=1)
    )
    splits = [data.train, data.held_out]
    real = torch.cat(
        [torch.stack([split[i, False]["images"] for i in range(len(split))]) for split in splits]
    )
    real, real_labels = (
        (real.flatten(1).numpy() + 1) / 2,
        torch.cat([split.labels for split in splits]).numpy(),
    )

    held_out = len(data.held_out)
    classifier = SVC().fit(real[:-held_out], real_labels[:-held_out])
    print(
        f"SVC on {held_out} held-out real digits: "
        f"{classifier.score(real[-held_out:], real_labels[-held_out:]):.3f}"
    )
    read = SVC().fit(real, real_labels).predict(drawn)
    print("| digit | read as drawn | distance / real distance |\n|---|---|---|")
    ratios = []
    for digit in range(10):
        ratios.append(mean_distance(drawn[labels == digit]) / mean_distance(real[real_labels == digit]))
        print(f"| {digit} | {(read == digit)[labels == digit].mean():.3f} | {ratios[-1]:.3f} |")
    print(f"| all | {(read == labels).mean():.3f} | {np.mean(ratios):.3f} |")


if __name__ == "__main__":
    main()
