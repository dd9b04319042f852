"""Stage 1: train the autoencoder, or use an existing one."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("autoencoder")

import torch
from accelerate.utils import DistributedType
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch.utils.data import DataLoader

from training.config import RunError
from training.data.order import StepSampler, batch_slices, seeded_generator
from training.evaluation.report import renew_report
from training.evaluation.validation import reconstruction_metrics
from training.losses.autoencoder import (
    AutoencoderLoss,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer,
    perceptual_distance,
)
from training.networks import new_autoencoder, pretrained_autoencoder
from training.runtime.atomic import write_bytes, write_tensors
from training.runtime.checkpoints import Checkpoints
from training.runtime.ema import EMA
from training.runtime.log import RunLog
from training.runtime.optimization import build_optimizer, gradient_sync, nan_if_nonfinite, optimizer_step
from training.runtime.run import Run
from training.runtime.signals import Interrupted, leave_signals_to_parent


def autoencoder_stands(run: Run) -> str | None:
    """Skip rule: an autoencoder was trained for `max_steps`, or taken from `pretrained`."""
    done, config = run.done("autoencoder"), run.config.autoencoder
    if done and (config.pretrained or done["steps"] >= config.max_steps):
        return f"{run.folder / 'autoencoder'} stands"
    return None


def train_autoencoder(run: Run) -> None:
    """Leave `autoencoder/` in the run folder: a stock Diffusers autoencoder with its EMA weights.

    Raises:
        RunError: under FSDP, or when training fails for a reason that an option mends.
    """
    config, accelerator, device = run.config.autoencoder, run.accelerator, run.device
    folder = run.folder / "autoencoder"
    if config.pretrained:
        with accelerator.main_process_first():  # one downloads
            save_autoencoder(run, pretrained_autoencoder(run.config))
        run.finish("autoencoder", {"pretrained": config.pretrained, "steps": 0, "seconds": 0.0})
        return
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RunError("FSDP is for the denoiser: train the autoencoder first, without it, by "
                       "train_autoencoder.py and encode_latents.py")  # fmt: skip

    # Networks, optimizers and EMA weights.
    autoencoder = new_autoencoder(run.config).to(device)
    discriminator = PatchDiscriminator(run.config.data.channels).to(device) if config.gan_weight else None
    perceptual = perceptual_distance(config)
    trained = AutoencoderLoss(autoencoder, config, None if perceptual is None else perceptual.to(device))
    ema = EMA(autoencoder, config.ema_fraction, config.ema_half_life)
    optimizers = [build_optimizer(config, autoencoder)]
    states = {"autoencoder": autoencoder, "ema": ema, "optimizer": optimizers[0]}
    if discriminator is not None:
        optimizers.append(build_optimizer(config, discriminator))
        states |= {"discriminator": discriminator, "discriminator_optimizer": optimizers[1]}

    # Resume, then compile and wrap.
    checkpoints = Checkpoints(folder, states, config)
    record = checkpoints.restore(accelerator)
    if config.compile:
        trained.compile()
    model = accelerator.prepare(trained)
    critic = None if discriminator is None else accelerator.prepare(discriminator)

    # Order and noise are functions of (seed, step), so a resumed run continues exactly.
    seed, batch_size, parts = run.config.seed, config.batch_size, config.gradient_accumulation_steps
    slices = batch_slices(batch_size, accelerator.process_index, accelerator.num_processes, parts)
    steps = range(record["step"], config.max_steps)
    loader = iter(load_batches(run, steps, slices))
    noise_shape = (batch_size, *run.latent_shape)
    log = RunLog(run, "autoencoder", config, record)

    for step in steps:
        # Learning rate and loss terms of this step.
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        adversarial = discriminator is not None and step >= config.gan_start
        chance = torch.rand((), generator=seeded_generator("cpu", seed, "equivariance", step)).item()
        halve = step >= config.max_steps // 2 and chance < config.equivariance

        # Noise of the global batch.
        generator = seeded_generator(device, seed, "autoencoder", step)
        noise = torch.randn(*noise_shape, generator=generator, device=device)

        for rows in slices:
            images = log.wait(next, loader)["images"].to(device, non_blocking=True)
            last = rows is slices[-1]

            # Gradients of the autoencoder.
            with gradient_sync(accelerator, model, last):
                terms, target, reconstruction = model(images, noise[rows], halve)
                loss = terms["loss"]
                if adversarial:
                    with accelerator.autocast():
                        fooled = generator_loss(discriminator, reconstruction)
                    terms["adversarial"] = fooled
                    terms["adaptive_weight"] = adaptive_weight(loss, fooled, last_layer(autoencoder))
                    loss = loss + config.gan_weight * terms["adaptive_weight"] * fooled
                accelerator.backward(nan_if_nonfinite(loss) / parts)

            # Gradients of the discriminator.
            if adversarial:
                with gradient_sync(accelerator, critic, last):
                    logits = critic(torch.cat([target, reconstruction.detach()]))
                    terms["discriminator"] = discriminator_loss(*logits.chunk(2))
                    accelerator.backward(nan_if_nonfinite(terms["discriminator"]) / parts)
            log.add({key: value / parts for key, value in terms.items()})

        # Update of both networks and the EMA weights.
        norm, skipped = optimizer_step(accelerator, optimizers[0], config.max_grad_norm)
        log.add({"grad_norm": norm})
        if adversarial:
            norm, skipped_too = optimizer_step(accelerator, optimizers[1], config.max_grad_norm)
            log.add({"discriminator_grad_norm": norm})
            skipped = skipped | skipped_too
        ema.update((step + 1) * batch_size, batch_size)
        log.step_done(step + 1, skipped)

        # Validation with the EMA weights.
        if log.due(config.validate_every):
            grid = run.folder / "samples" / f"autoencoder-{step + 1:07d}.png"
            held_out, size = run.data.held_out, run.config.evaluation.batch_size
            with log.paused(), ema.swapped():
                log.write(reconstruction_metrics(accelerator, autoencoder, held_out, 512, size, grid))

        # Checkpoint, and the end if somebody asked for it.
        stopping = run.interruption.requested()
        if stopping or log.due(config.checkpoint_every):
            log.flush()
            with log.paused():
                checkpoints.save(accelerator, step + 1, {"seconds": log.seconds})
        if stopping:
            raise Interrupted
        if log.due(config.validate_every, config.checkpoint_every):
            with log.paused():
                renew_report(run)

    # The result has the EMA weights.
    log.close()
    with ema.swapped():
        save_autoencoder(run, autoencoder)
    images = config.max_steps * batch_size
    run.finish("autoencoder", {"steps": config.max_steps, "images": images, "seconds": log.seconds})


def load_batches(run: Run, steps: range, slices: list[slice]) -> DataLoader:
    """This process's parts of the global batches of `steps`."""
    data, config = run.config.data, run.config.autoencoder
    count = len(run.data.train)
    return DataLoader(
        run.data.train,
        batch_sampler=StepSampler(
            count, config.batch_size, run.config.seed, steps, data.horizontal_flip, slices
        ),
        num_workers=data.num_workers,
        worker_init_fn=leave_signals_to_parent,
    )


def save_autoencoder(run: Run, autoencoder: torch.nn.Module) -> None:
    """Write weights and config beside the checkpoints; they count once `done.json` is there."""
    if run.accelerator.is_main_process:
        folder = run.folder / "autoencoder"
        folder.mkdir(exist_ok=True)
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in autoencoder.state_dict().items()
        }
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors)
        write_bytes(folder / CONFIG_NAME, autoencoder.to_json_string().encode())


if __name__ == "__main__":
    from training.stages import Stage, run_stages

    run_stages(CONFIG, Stage("autoencoder", train_autoencoder, autoencoder_stands))
