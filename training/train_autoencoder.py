"""Stage 1: train the autoencoder, or take an existing one."""

if __name__ == "__main__":  # first, so that a typo is answered before torch is imported
    from training.config import command_line

    CONFIG = command_line("autoencoder")

from contextlib import nullcontext

import torch
from accelerate.utils import DistributedType
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch.utils.data import DataLoader

from training.config import RunError
from training.data.order import StepSampler, seeded_generator, slice_of_batch
from training.evaluation.validation import measure_reconstruction
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
from training.runtime.optimization import build_optimizer, nan_if_nonfinite, optimizer_step
from training.runtime.run import Run
from training.runtime.signals import Interrupted, leave_signals_to_parent


def autoencoder_stands(run: Run) -> str | None:
    """Skip rule: an autoencoder was trained for `max_steps`, or taken from `pretrained`."""
    done, config = run.done("autoencoder"), run.config.autoencoder
    if done and (config.pretrained or done["steps"] >= config.max_steps):
        return f"{run.folder / 'autoencoder'} stands"
    return None


def train_autoencoder(run: Run) -> None:
    """Leave `autoencoder/` in the run folder: a stock Diffusers autoencoder with averaged weights."""
    config, data, accelerator = run.config.autoencoder, run.config.data, run.accelerator
    folder = run.folder / "autoencoder"
    if config.pretrained:
        with accelerator.main_process_first():  # one downloads
            save_autoencoder(run, pretrained_autoencoder(run.config))
        run.finish("autoencoder", {"pretrained": config.pretrained, "steps": 0, "seconds": 0.0})
        return

    if accelerator.distributed_type == DistributedType.FSDP:
        raise RunError("FSDP is for the denoiser: train the autoencoder first, without it, by "
                       "train_autoencoder.py and encode_latents.py")  # fmt: skip

    # Networks, optimizers and what a checkpoint holds.
    autoencoder = new_autoencoder(run.config).to(run.device)
    discriminator = PatchDiscriminator(data.channels).to(run.device) if config.gan_weight else None
    perceptual = perceptual_distance(config)
    trained = AutoencoderLoss(autoencoder, config, None if perceptual is None else perceptual.to(run.device))
    ema = EMA(autoencoder, config.ema_fraction, config.ema_half_life)
    optimizer = build_optimizer(config, autoencoder)
    states = {"autoencoder": autoencoder, "ema": ema, "optimizer": optimizer}
    if discriminator is not None:
        discriminator_optimizer = build_optimizer(config, discriminator)
        states |= {"discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
    checkpoints = Checkpoints(folder, states, config)
    record = checkpoints.restore(accelerator)
    if config.compile:
        trained.compile()
    model = accelerator.prepare(trained)
    judge = None if discriminator is None else accelerator.prepare(discriminator)

    # The order of the images and all noise are functions of (seed, step), so a resumed run continues exactly.
    seed, batch, parts = run.config.seed, config.batch_size, config.gradient_accumulation_steps
    place = (accelerator.process_index, accelerator.num_processes, parts)
    sampler = StepSampler(
        len(run.data.train), batch, seed, record["step"], config.max_steps, data.horizontal_flip, *place
    )
    loader = iter(
        DataLoader(
            run.data.train,
            batch_sampler=sampler,
            num_workers=data.num_workers,
            worker_init_fn=leave_signals_to_parent,
        )
    )
    latent_shape = run.latent_shape
    log = RunLog(run, "autoencoder", config, record)

    for step in range(record["step"], config.max_steps):
        for each in (optimizer,) if discriminator is None else (optimizer, discriminator_optimizer):
            each.param_groups[0]["lr"] = config.learning_rate_at(step)
        draws = seeded_generator(run.device, seed, "autoencoder", step)
        noise = torch.randn(batch, *latent_shape, generator=draws, device=run.device)
        chance = torch.rand((), generator=seeded_generator("cpu", seed, "equivariance", step)).item()
        halve = step >= config.max_steps // 2 and chance < config.equivariance
        adversarial = discriminator is not None and step >= config.gan_start

        for part in range(parts):
            images = log.wait(next, loader)["images"].to(run.device, non_blocking=True)
            share = slice_of_batch(batch, *place, part)
            with nullcontext() if part == parts - 1 else accelerator.no_sync(model):
                terms, target, reconstruction = model(images, noise[share], halve)
                loss = terms["loss"]
                if adversarial:
                    with accelerator.autocast():
                        fooled = generator_loss(discriminator, reconstruction)
                    terms["adversarial"] = fooled
                    terms["adaptive_weight"] = adaptive_weight(loss, fooled, last_layer(autoencoder))
                    loss = loss + config.gan_weight * terms["adaptive_weight"] * fooled
                accelerator.backward(nan_if_nonfinite(loss) / parts)
            if adversarial:
                with nullcontext() if part == parts - 1 else accelerator.no_sync(judge):
                    logits = judge(torch.cat([target, reconstruction.detach()]))
                    terms["discriminator"] = discriminator_loss(*logits.chunk(2))
                    accelerator.backward(nan_if_nonfinite(terms["discriminator"]) / parts)
            log.add({key: value / parts for key, value in terms.items()})
        norm, skipped = optimizer_step(accelerator, optimizer, config.max_grad_norm)
        log.add({"grad_norm": norm})
        if adversarial:
            norm, bad = optimizer_step(accelerator, discriminator_optimizer, config.max_grad_norm)
            log.add({"discriminator_grad_norm": norm})
            skipped = skipped | bad
        ema.update((step + 1) * batch, batch)
        log.step_done(step + 1, skipped)

        with log.paused():
            if log.due(config.validate_every):
                with ema.swapped():
                    log.write(
                        measure_reconstruction(run, autoencoder, 512, f"autoencoder-{step + 1:07d}.png")
                    )
            stopping = run.interruption.requested()
            if stopping or log.due(config.checkpoint_every):
                checkpoints.save(accelerator, step + 1, log.record())
            if stopping:
                raise Interrupted

    log.close()
    with ema.swapped():
        save_autoencoder(run, autoencoder)
    images = config.max_steps * batch
    run.finish("autoencoder", {"steps": config.max_steps, "images": images, "seconds": log.seconds})


def save_autoencoder(run: Run, autoencoder: torch.nn.Module) -> None:
    """Write the finished autoencoder beside its checkpoints, each file whole; `done.json` makes it count."""
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
