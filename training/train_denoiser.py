"""Stage 3: train the denoiser on the latents."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("denoiser")

from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from ldm_pipeline.loading import LDMPipeline, load_autoencoder
from ldm_pipeline.models import build_scheduler
from ldm_pipeline.pipeline import is_conditional, latent_shape, num_classes, text_width
from training.config import DenoiserConfig, RunError
from training.data.captions import CaptionDataset, cached_captions, words_encoder
from training.data.conditions import Conditions
from training.data.images import SPLITS
from training.data.latents import LatentDataset
from training.data.order import StepSampler, batch_flips, batch_indices, batch_slices, seeded_generator
from training.data.tasks import image_conditions, task_of
from training.evaluation.monitor import start_monitor
from training.evaluation.report import renew_report
from training.evaluation.samples import new_sampler
from training.evaluation.settings import SamplingSettings
from training.evaluation.validation import validation_loss
from training.losses.denoising import DenoisingLoss, sample_timesteps, stratified
from training.networks import new_denoiser, text_width_of
from training.runtime.atomic import read_json, replacing
from training.runtime.checkpoints import Checkpoints, ema_weights
from training.runtime.distributed import prepare, seed_dropout, use_global_dropout, whole
from training.runtime.ema import EMA
from training.runtime.log import RunLog
from training.runtime.optimization import build_optimizer, gradient_sync, nan_if_nonfinite, optimizer_step
from training.runtime.run import Run
from training.runtime.signals import Interrupted, leave_signals_to_parent


def denoiser_stands(run: Run) -> str | None:
    """Skip rule: a denoiser was trained for `max_steps` on the present latents. RunError if on others."""
    key, done = _latents_key(run), run.done("denoiser")
    if not done or done["steps"] < run.config.denoiser.max_steps or not (run.folder / "pipeline").exists():
        return None
    if done.get("guide_step", 0) != run.config.denoiser.guide_step:
        return None  # all steps are done: it writes the pipeline anew
    _check_key(run, done["latents"], key)
    return f"{run.folder / 'pipeline'} stands"


def _latents_key(run: Run) -> dict:
    folder, script = run.folder / "latents", "encode_latents.py"
    key = read_json(run.require(folder / "manifest.json", script))["key"]
    if run.text is not None:
        key |= {"encoded captions": read_json(run.require(folder / "captions.json", script))}
    return key


def _check_key(run: Run, trained_on: dict, key: dict) -> None:
    if trained_on != key:
        raise RunError(
            f"{run.folder / 'denoiser'} was trained on other latents than there are now: --redo '[denoiser]'"
        )


def train_denoiser(run: Run) -> None:
    """Leave `pipeline/` in the run folder: autoencoder, denoiser with its EMA weights, and a scheduler.

    Raises:
        RunError: if the latents are not normalised or not those of the checkpoint, or training fails.
    """
    config, accelerator, device, seed = run.config.denoiser, run.accelerator, run.device, run.config.seed
    folder, key = run.folder / "denoiser", _latents_key(run)

    # Latents, normalised by the statistics in the autoencoder's config.
    autoencoder = load_autoencoder(run.folder / "autoencoder").to(device).eval()
    latents, held_out = (
        LatentDataset(run.folder / "latents", split, autoencoder, device, run.config.latents.resident)
        for split in SPLITS
    )
    captions, held_out_captions = None, None
    if run.text is not None:
        cache = run.folder / "latents", device, run.config.latents.resident
        captions, held_out_captions = (cached_captions(run.data, split, *cache) for split in SPLITS)
    check_scale(run, latents)

    # Image conditions of a task: cached, or made of pixels in every step.
    task, cache = task_of(config, run.data), (run.folder / "latents", run.config.latents.resident)
    shown, held_out_shown = (image_conditions(task, run.data, split, autoencoder, *cache) for split in SPLITS)

    # Network with its loss, and the pipeline that samples with it.
    words = run.text[1] if config.trains_text_encoder else None
    width = text_width_of(config, run.text)
    network = new_denoiser(run.config, run.data, latents.shape, width)
    trained = DenoisingLoss(network, config, words).to(device)
    unet, dropouts = trained.unet, use_global_dropout(trained.unet)
    tokenizer, text_encoder = run.text or (None, None)
    conditions = Conditions(latents, unet, captions)
    held_out = Conditions(held_out, unet, held_out_captions, text_encoder, held_out_shown)
    pipeline = LDMPipeline(
        autoencoder,
        unet,
        build_scheduler(trained.objective.config),
        trained.objective.config,
        run.data.id2label if num_classes(unet) else None,
        default_arguments(config, unet),
        None if text_encoder is None else text_encoder.to(device),
        tokenizer,
        None if task is None else task.config,
    )
    size, pictures = run.config.evaluation.batch_size, run.folder / "samples"
    sampler = new_sampler(run, pipeline)
    settings = SamplingSettings.of_pipeline(pipeline)

    # Optimizer, wrapped for several processes; resume.
    if config.compile:
        unet.compile()
    optimizer = build_optimizer(config, trained)
    model = prepare(accelerator, trained, [unet] if words is None else [unet, words], optimizer)
    ema = EMA(trained.networks, config.ema_fraction, config.ema_half_life)
    checkpoints = Checkpoints(folder, {"model": trained, "ema": ema, "optimizer": optimizer}, config)
    record = checkpoints.restore(accelerator)
    _check_key(run, record.get("latents", key), key)
    batch_size, parts = config.batch_size, config.gradient_accumulation_steps
    slices = batch_slices(batch_size, accelerator.process_index, accelerator.num_processes, parts)
    steps, concats = range(record["step"], config.max_steps), repeat(None)
    if shown:
        order = StepSampler(len(latents), batch_size, seed, steps, run.config.data.horizontal_flip, slices)
        workers = {"num_workers": run.config.data.num_workers, "worker_init_fn": leave_signals_to_parent}
        concats = shown.batches(order, **workers)
    log = RunLog(run, "denoiser", config, record)
    monitor = start_monitor(run, sampler)

    for step in steps:
        # Learning rate, and all that is random.
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        batch = random_batch(run, latents, captions, step)

        # Gradients, part by part.
        for rows in slices:
            seed_dropout(dropouts, seed, step, rows)
            indices, flips, noise = (batch[name][rows] for name in ("indices", "flips", "posterior_noise"))
            clean = log.wait(latents.batch, indices, flips, noise)
            condition = conditions.training_batch(batch, rows, config)
            condition = replace(condition, concat=log.wait(next, concats))
            with gradient_sync(accelerator, model, last=rows is slices[-1]):
                loss, errors = model(clean, batch["noise"][rows], batch["timesteps"][rows], condition)
                accelerator.backward(nan_if_nonfinite(loss) / parts)
            log.add({"loss": loss / parts, "error": errors.mean() / parts})

        # Update of the network and the EMA weights.
        norm, skipped = optimizer_step(accelerator, optimizer, config.max_grad_norm)
        log.add({"grad_norm": norm})
        ema.update((step + 1) * batch_size, batch_size)
        log.step_done(step + 1, skipped)

        # Validation, samples and their metrics.
        with log.paused():
            if log.due(config.validate_every):
                with ema.swapped():
                    objective = trained.objective
                    log.write(validation_loss(accelerator, objective, held_out, 1024, size, seed))
            if log.due(config.sample_every):
                sampler.save_grid(settings, pictures / f"denoiser-{step + 1:07d}-raw.png")
                with ema.swapped():
                    sampler.save_grid(settings, pictures / f"denoiser-{step + 1:07d}-ema.png")
            if monitor and log.due(config.evaluate_every):
                with ema.swapped():
                    log.write(monitor.measure(step + 1))

        # Checkpoint, and the end if somebody asked for it.
        stopping = run.interruption.requested()
        if stopping or log.due(config.checkpoint_every):
            log.flush()
            with log.paused():
                checkpoints.save(accelerator, step + 1, {"seconds": log.seconds, "latents": key})
        if stopping:
            raise Interrupted
        if log.due(config.validate_every, config.sample_every, config.checkpoint_every):
            with log.paused():
                renew_report(run)

    # The result has the EMA weights.
    log.close()
    save_pipeline(run, pipeline, ema)
    images = config.max_steps * batch_size
    done = {"steps": config.max_steps, "images": images, "seconds": log.seconds, "latents": key}
    done["guide_step"] = config.guide_step
    run.finish("denoiser", done)


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


def random_batch(
    run: Run, latents: LatentDataset, captions: CaptionDataset | None, step: int
) -> dict[str, Tensor]:
    """Everything random in the global batch of `step`, as a function of (seed, step).

    Returns:
        By name, a tensor with one row per image: "indices", "flips", "timesteps" and "dropped" (uniform
        numbers that decide which conditions are dropped) `(N,)`, "posterior_noise" and "noise" `(N, C, ...)`;
        with captions the numbers "captions" `(N,)`. Indices, flips and captions are on the CPU.
    """
    config, seed, device = run.config.denoiser, run.config.seed, run.device
    count = config.batch_size
    generator = seeded_generator(device, seed, "denoiser", step)
    uniform, dropped = (torch.rand(count, generator=generator, device=device) for _ in range(2))
    posterior_noise, noise = (
        torch.randn(count, *latents.shape, generator=generator, device=device) for _ in range(2)
    )
    indices = batch_indices(seed, step, count, len(latents))
    drawn = {}
    if captions is not None:
        drawn["captions"] = captions.draw(indices, torch.rand(count, generator=generator, device=device))
    return drawn | {
        "indices": indices,
        "flips": batch_flips(seed, step, count).long(),
        "timesteps": sample_timesteps(config, stratified(uniform)),
        "dropped": dropped,
        "posterior_noise": posterior_noise,
        "noise": noise,
    }


def default_arguments(config: DenoiserConfig, unet: nn.Module) -> dict:
    """Default sampling arguments that are saved with the pipeline."""
    guidance = {"guidance_scale": config.guidance_scale}
    if config.guidance_interval != (0, 1):
        guidance["guidance_interval"] = config.guidance_interval
    return {"num_inference_steps": config.sample_steps} | (guidance if is_conditional(unet) else {})


def save_pipeline(run: Run, pipeline: LDMPipeline, ema: EMA) -> None:
    """Write the pipeline folder with EMA weights of the end and of `guide_step`, whole or not at all."""
    averages = {name: whole(value).cpu() for name, value in ema.state_dict().items()}
    if run.accelerator.is_main_process:
        with torch.device("meta"):  # the trained ones may be in shards
            shape, width = latent_shape(pipeline.unet), text_width(pipeline.unet) or None
            trained = {"unet": new_denoiser(run.config, run.data, shape, width)}
            if run.config.denoiser.trains_text_encoder:
                trained["text_encoder"] = words_encoder(run.config.denoiser, run.data, 0)[1]
        for name, part in trained.items():
            own = {key.removeprefix(f"{name}."): value for key, value in averages.items()
                   if len(trained) == 1 or key.startswith(f"{name}.")}  # fmt: skip
            part.load_state_dict(own, assign=True)
        if step := run.config.denoiser.guide_step:
            with torch.device("meta"):
                trained["guide_unet"] = new_denoiser(run.config, run.data, shape, width)
            weights = ema_weights(run.folder / "denoiser" / f"checkpoint-{step}")
            trained["guide_unet"].load_state_dict(weights, assign=True)
        parts = pipeline.components | trained
        averaged = LDMPipeline(
            **parts,
            objective=pipeline.config.objective,
            id2label=pipeline.config.id2label,
            defaults=pipeline.config.defaults,
            task=pipeline.config.task,
        )
        networks = [part for part in parts.values() if isinstance(part, nn.Module)]
        size = sum(p.nbytes for part in networks for p in part.parameters())
        with replacing(run.folder / "pipeline", size) as aside:
            averaged.save_pretrained(aside)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("denoiser", train_denoiser, denoiser_stands))
