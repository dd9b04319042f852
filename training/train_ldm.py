"""The main job: images in, a Diffusers pipeline out. The same command continues a run that was stopped."""

from training.config import command_line


def main() -> None:
    """Run the four stages; each is skipped where its result stands."""
    config = command_line()

    # Imported here, because torch and Diffusers take seconds and a typo is answered at once.
    from training.encode_latents import encode_latents, latents_stand
    from training.evaluate_ldm import evaluate, evaluation_stands, summary
    from training.stages import Stage, run_stages
    from training.train_autoencoder import autoencoder_stands, train_autoencoder
    from training.train_denoiser import denoiser_stands, train_denoiser

    run = run_stages(
        config,
        # name           work               skipped when
        Stage("autoencoder", train_autoencoder, autoencoder_stands),  # it was trained to max_steps
        Stage("latents", encode_latents, latents_stand),  # same autoencoder, images and transform
        Stage("denoiser", train_denoiser, denoiser_stands),  # trained to max_steps on these latents
        Stage("evaluation", evaluate, evaluation_stands),  # same weights, images and settings
    )
    if run:
        run.print(summary(run))


if __name__ == "__main__":
    main()
