"""The main job: images in, a Diffusers pipeline out. Each stage is skipped when its result already stands."""

from training.encode_latents import encode_latents
from training.evaluate_ldm import evaluate, summary
from training.stages import main
from training.train_autoencoder import train_autoencoder
from training.train_denoiser import train_denoiser

if __name__ == "__main__":
    run = main(
        autoencoder=train_autoencoder,
        latents=encode_latents,
        denoiser=train_denoiser,
        evaluation=evaluate,
    )
    if run:
        run.print(summary(run))
