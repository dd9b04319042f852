"""The main job: images in, a Diffusers pipeline out. Each stage is skipped when its result already stands."""

from training.encode_latents import encode_latents
from training.evaluate_ldm import evaluate, summary
from training.plan import describe_plan, draw_data
from training.run import start
from training.train_autoencoder import train_autoencoder
from training.train_denoiser import train_denoiser


def main() -> None:
    """Run the stages in order; the same command continues a run that was stopped."""
    run = start()
    if run.config.dry_run:
        run.print(describe_plan(run))
        run.print(draw_data(run))
        return
    train_autoencoder(run)
    encode_latents(run)
    train_denoiser(run)
    evaluate(run)
    run.print(summary(run))


if __name__ == "__main__":
    main()
