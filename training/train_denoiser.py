"""Stage 3: train the denoiser on the latents."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("denoiser")

from contextlib import nullcontext

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ldm_pipeline.models import build_scheduler, load_autoencoder
from ldm_pipeline.pipeline import Condition, LDMPipeline, num_classes
from training.config import DenoiserConfig, RunError
from training.data.latents import LatentDataset
from training.data.order import batch_flips, batch_indices, seeded_generator, slice_of_batch
from training.evaluation.monitor import Monitor
from training.evaluation.validation import draw_grid, validation_loss
from training.losses.denoising import DenoisingLoss, draw_timesteps, stratified
from training.networks import new_denoiser
from training.runtime.atomic import read_json, replacing
from training.runtime.checkpoints import Checkpoints
from training.runtime.distributed import draw_dropout, prepare, use_global_dropout, whole
from training.runtime.ema import EMA
from training.runtime.log import RunLog
from training.runtime.optimization import build_optimizer, nan_if_nonfinite, optimizer_step
from training.runtime.run import Run
from training.runtime.signals import Interrupted


def denoiser_stands(run: Run) -> str | None:
    """Skip rule: a denoiser was trained for `max_steps` on the present latents. RunError if on others."""
    key, done = _latents_key(run), run.done("denoiser")
    if not done or done["steps"] < run.config.denoiser.max_steps or not (run.folder / "pipeline").exists():
        return None
    if done["latents"] != key:
        raise RunError(f"{run.folder / 'denoiser'} was trained on other latents: --redo '[denoiser]'")
    return f"{run.folder / 'pipeline'} stands"


def _latents_key(run: Run) -> dict:
    return read_json(run.require(run.folder / "latents" / "manifest.json", "encode_latents.py"))["key"]


def train_denoiser(run: Run) -> None:
    """Leave `pipeline/` in the run folder: autoencoder, averaged denoiser and a sampler."""
    config, accelerator, device = run.config.denoiser, run.accelerator, run.device
    folder = run.folder / "denoiser"
    key = _latents_key(run)

    # Latents, networks, optimizer and what a checkpoint holds.
    autoencoder = load_autoencoder(run.folder / "autoencoder").to(device).eval()
    latents, held_out = (
        LatentDataset(run.folder / "latents", split, autoencoder, device, run.config.latents.resident)
        for split in ("train", "held_out")
    )
    check_scale(run, latents)
    trained = DenoisingLoss(new_denoiser(run.config, run.data, latents.shape), config).to(device)
    unet, dropouts = trained.unet, use_global_dropout(trained.unet)
    pipeline = LDMPipeline(
        autoencoder,
        unet,
        build_scheduler(trained.objective.config),
        trained.objective.config,
        run.data.id2label if num_classes(unet) else None,
        defaults_of(config, unet),
    )
    if config.compile:
        unet.compile()
    optimizer = build_optimizer(config, trained)
    model = prepare(accelerator, trained, unet, optimizer)
    ema = EMA(unet, config.ema_fraction, config.ema_half_life)
    checkpoints = Checkpoints(folder, {"model": trained, "ema": ema, "optimizer": optimizer}, config)
    record = checkpoints.restore(accelerator)
    if record.setdefault("latents", key) != key:
        raise RunError(f"{folder} was trained on other latents than there are now: --redo '[denoiser]'")
    place = (accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps)
    log = RunLog(run, "denoiser", config, record)
    drawn = (config.sample_steps, config.guidance_scale)
    monitor = Monitor(run, pipeline) if config.evaluate_every else None

    for step in range(record["step"], config.max_steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        batch = draw_batch(run, latents, step)
        dropout_seed = seeded_generator("cpu", run.config.seed, "dropout", step).initial_seed()
        for part in range(place[2]):
            share = slice_of_batch(config.batch_size, *place, part)
            draw_dropout(dropouts, dropout_seed, config.batch_size, share, device)
            clean = log.wait(
                latents.batch, *(batch[name][share] for name in ("indices", "flips", "posterior_noise"))
            )
            condition = condition_of(latents, unet, batch["indices"][share], batch["dropped"][share])
            with nullcontext() if part == place[2] - 1 else accelerator.no_sync(model):
                loss, errors = model(clean, batch["noise"][share], batch["timesteps"][share], condition)
                accelerator.backward(nan_if_nonfinite(loss) / place[2])
            log.add({"loss": loss / place[2], "error": errors.mean() / place[2]})
        norm, skipped = optimizer_step(accelerator, optimizer, config.max_grad_norm)
        log.add({"grad_norm": norm})
        ema.update((step + 1) * config.batch_size, config.batch_size)
        log.step_done(step + 1, skipped)

        with log.paused():
            if log.due(config.validate_every):
                with ema.swapped():
                    log.write(validation_loss(run, unet, trained.objective, held_out, limit=1024))
            if log.due(config.sample_every):
                draw_grid(run, pipeline, f"denoiser-{step + 1:07d}-raw.png", *drawn)
                with ema.swapped():
                    draw_grid(run, pipeline, f"denoiser-{step + 1:07d}-ema.png", *drawn)
            if config.evaluate_every and log.due(config.evaluate_every):
                with ema.swapped():
                    log.write(monitor.measure(step + 1))
            stopping = run.interruption.requested()
            if stopping or log.due(config.checkpoint_every):
                checkpoints.save(accelerator, step + 1, {**log.record(), "latents": key})
            if stopping:
                raise Interrupted

    log.close()
    save_pipeline(run, pipeline, ema)
    images = config.max_steps * config.batch_size
    run.finish(
        "denoiser", {"steps": config.max_steps, "images": images, "seconds": log.seconds, "latents": key}
    )


def check_scale(run: Run, latents: LatentDataset) -> None:
    """Refuse latents that are not normalised: the denoiser would learn another noise level.

    Raises:
        RunError: if the deviation of up to 2,048 images is not between 0.8 and 1.25.
    """
    indices = torch.randperm(len(latents), generator=seeded_generator("cpu", run.config.seed, "scale"))[:2048]
    noise = torch.randn(
        len(indices), *latents.shape, generator=seeded_generator(run.device, 0, "scale"), device=run.device
    )
    deviation = latents.batch(indices, torch.zeros_like(indices), noise).std().item()
    if not 0.8 <= deviation <= 1.25:
        raise RunError(
            f"the normalised latents have deviation {deviation:.3f}, wanted 0.8 to 1.25: the statistics "
            f"in {run.folder / 'autoencoder' / 'config.json'} are not those of "
            f"{run.folder / 'latents'}; measure them again with --redo '[latents]'"
        )
    run.print(f"latents: normalised deviation {deviation:.3f}")


def draw_batch(run: Run, latents: LatentDataset, step: int) -> dict[str, Tensor]:
    """Everything random of the global batch of `step`, a function of (seed, step); to be sliced."""
    config, seed, size, device = (
        run.config.denoiser,
        run.config.seed,
        run.config.denoiser.batch_size,
        run.device,
    )
    draws = seeded_generator(device, seed, "denoiser", step)
    uniform, dropped = (torch.rand(size, generator=draws, device=device) for _ in range(2))
    posterior_noise, noise = (
        torch.randn(size, *latents.shape, generator=draws, device=device) for _ in range(2)
    )
    return {
        "indices": batch_indices(seed, step, size, len(latents)),
        "flips": batch_flips(seed, step, size).long(),
        "timesteps": draw_timesteps(config, stratified(uniform)),
        "dropped": dropped < config.label_dropout,
        "posterior_noise": posterior_noise,
        "noise": noise,
    }


def condition_of(latents: LatentDataset, unet: nn.Module, indices: Tensor, dropped: Tensor) -> Condition:
    """The condition `(N,)` of some images, with the null class where `dropped` `(N,)` is true."""
    null = Condition.null(unet, len(indices), dropped.device)
    if null.class_labels is None:
        return null
    return Condition(class_labels=latents.class_labels(indices)).drop(dropped, null)


def defaults_of(config: DenoiserConfig, unet: nn.Module) -> dict:
    """What the finished pipeline draws with where a call says nothing else."""
    guidance = {"guidance_scale": config.guidance_scale} if num_classes(unet) else {}
    return {"num_inference_steps": config.sample_steps} | guidance


def save_pipeline(run: Run, pipeline: LDMPipeline, ema: EMA) -> None:
    """Write the pipeline folder with the averaged denoiser, whole or not at all."""
    averages = {name: whole(value).cpu() for name, value in ema.state_dict().items()}
    if run.accelerator.is_main_process:
        with torch.device("meta"):
            unet = UNet2DModel.from_config(pipeline.unet.config)  # the trained one may be in shards
        unet.load_state_dict(averages, assign=True)
        parts = {**pipeline.components, "unet": unet}
        averaged = LDMPipeline(
            **parts,
            objective=pipeline.config.objective,
            id2label=pipeline.config.id2label,
            defaults=pipeline.config.defaults,
        )
        size = sum(p.nbytes for part in (averaged.vae, unet) for p in part.parameters())
        with replacing(run.folder / "pipeline", size) as aside:
            averaged.save_pretrained(aside)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("denoiser", train_denoiser, denoiser_stands))
