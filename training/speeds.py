"""The images of a run by a sample of them, and the speed of networks here, timed before any training."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn

from ldm_pipeline.pipeline import Condition, denoise, latent_shape
from training.config import Config, RunError, check_config
from training.data.captions import encode_captions, unique_captions, words_encoder
from training.data.images import load_images
from training.data.latents import encode
from training.data.scan import MANY_IMAGES, SAMPLE_SIZE
from training.data.tasks import paired_column
from training.evaluation.features import FeaturesUnavailable, load_network
from training.evaluation.validation import inference, psnr, ssim
from training.networks import (
    blank_condition,
    check_networks,
    has_classes,
    pretrained_autoencoder,
    pretrained_text_encoder,
    text_width_of,
)
from training.recipes import UNETS, Facts, Speed, UNet, denoiser_options, put, smallest
from training.runtime.accelerator import choose_precision, usable_cores, wanted_threads
from training.runtime.timing import time_step, trial

Result = TypeVar("Result")
Setting = TypeVar("Setting")
LOOKED_AT = 200  # images
DRAWN = 0.3  # share of neighbouring pixels that are equal; photographs have few
TRYING = 0.005  # of the time, for the choice of precision, and for that of threads
IN_GPU_LOOP = 1.25  # times the seconds of a step alone, where a GPU waits for Python (docs/recipes.md)
CLOSE = 1.3  # threads and precisions this much slower than the best are not tried further


def agreed(value: float) -> float:
    """`value` of the first process, for all of them."""
    return broadcast_object_list([value])[0]


def timed(function: Callable, repeats: int = 2) -> float:
    """Seconds of a call that waits for the device, the best of some after a first one."""
    function()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return agreed(min(seconds))


class Bench:
    """The images of a run and the speed of networks on this machine; all processes measure alike.

    Args:
        config: its threads and precision are chosen here, unless they were given.
    """

    def __init__(self, config: Config, state: PartialState):
        self.config, self.state = copy.deepcopy(config), state
        self.device, self.cores, self.speeds = state.device, usable_cores(), {}
        own, captioned = self.config, config.denoiser.text_encoder is not None
        with state.main_process_first():  # one downloads
            self.text = pretrained_text_encoder(own.denoiser)
        draft = smallest(own, 32 * state.num_processes)
        check_config(draft)
        self._check(draft)
        with state.main_process_first():
            self.data = load_images(own.data, captioned, paired_column(own.denoiser))
        if own.denoiser.trains_text_encoder:
            self.text = words_encoder(own.denoiser, self.data, own.seed + 2)
        self._choose_arithmetic()
        self.facts = self._look()

    def _check(self, config: Config) -> tuple[int, int, int]:
        """The shape of the latents; RunError where the networks cannot be built or do not fit each other."""
        width = text_width_of(config.denoiser, self.text)
        return latent_shape(check_networks(config, self.state.num_processes, width)[1])

    def free(self) -> None:
        """Give the device's memory back."""
        self.speeds.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _look(self) -> Facts:
        """The images by a sample of them, and everything that surrounds the networks."""
        config, data = self.config, self.data
        cuda = self.device.type == "cuda"
        # Without gradients too, batches that stay in a CPU's caches are faster.
        sizes = {"latents.batch_size": 256 if cuda else 32, "evaluation.batch_size": 256 if cuda else 32}
        put(config, {"data.num_workers": min(8, self.cores - 1) if cuda else 0} | sizes)
        sides = sorted(self._some(lambda index: min(data.train.raw(index).size)))
        side = sides[len(sides) // 10]
        data.train.resolution, data.train.channels = min(128, max(16, 2 ** int(math.log2(side)))), 3
        if "data.resolution" in config.given:
            data.train.resolution = config.data.resolution

        def look(index: int) -> tuple[float, float, bool]:
            begun = time.perf_counter()
            image = data.train[index, False]["images"]
            seconds = time.perf_counter() - begun
            equal = (image[..., 1:] == image[..., :-1]).all(0).float().mean().item()
            return seconds, equal, bool((image == image[:1]).all())

        seconds, equal, grey = zip(*self._some(look), strict=True)
        decoding = agreed(sum(seconds) / len(seconds))
        return Facts(
            images=len(data.train),
            held_out=len(data.held_out),
            side=side,
            grey=all(grey),
            drawn=sum(equal) / len(equal) > DRAWN,
            classes=len(data.id2label) if data.id2label is not None and has_classes(config, data) else 0,
            decoding=decoding,
            readers=config.data.num_workers,
            scanning=self._scanning(decoding),
            captions=self._captions(),
            judging=self._judging(),
            processes=self.state.num_processes,
            sharded=parse_flag_from_env("ACCELERATE_USE_FSDP"),
            typical_batch=512 if cuda else 16 * self.state.num_processes,
        )

    def _some(self, look: Callable[[int], Result]) -> list[Result]:
        """The results for evenly spread training images, without those that cannot be read."""
        results, count = [], len(self.data.train)
        for index in range(0, count, math.ceil(count / LOOKED_AT)):
            try:
                results.append(look(index))
            except (RunError, OSError, ValueError):
                continue  # the scan tells of it
        if not results:
            raise RunError(f"--data.dataset {self.config.data.dataset}: none of its images can be read")
        return results

    def _scanning(self, decoding: float) -> float:
        """Seconds of the scan, which divides large splits among all cores."""
        config, total = self.config.data, 0.0
        for split in (self.data.train, self.data.held_out):
            count = len(split) if config.scan == "full" else min(len(split), SAMPLE_SIZE)
            total += count * decoding / ((config.num_workers or self.cores) if count >= MANY_IMAGES else 1)
        return total

    def _captions(self) -> float:
        """Seconds to encode all captions."""
        if self.text is None:
            return 0.0
        captions, (tokenizer, encoder) = unique_captions(self.data), self.text
        encoder.to(self.device)
        words, some = self.config.denoiser.trains_text_encoder, captions[:64]
        own = timed(lambda: encode_captions(some, tokenizer, encoder, 64, ids_only=words))
        return own / len(some) * len(captions) / self.state.num_processes

    def _judging(self) -> float | None:
        """Seconds of the feature network per image; None where samples are not to be judged."""
        if self.config.data.dataset == "digits":
            put(self.config, {"evaluation.features": "digits"})
        elif not self.config.given & {"evaluation.features", "evaluation.num_samples"}:
            return None
        try:
            with self.state.main_process_first():
                network = load_network(self.config.evaluation.features).to(self.device)
        except FeaturesUnavailable:
            return None
        size, count = self.data.train.resolution, 64 if self.device.type == "cuda" else 8
        images = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=self.device)
        return timed(lambda: network(images)["features"].sum().item()) / count

    def autocast(self) -> AbstractContextManager:
        """The arithmetic of the run."""
        return torch.autocast(self.device.type, torch.bfloat16, self.config.mixed_precision == "bf16")

    def _choose_arithmetic(self) -> None:
        """Set precision and threads: the fastest, by steps of larger and larger denoisers.

        The precision goes by the time of the processor, which other programs on it do not change.
        """
        config = self.config
        config.mixed_precision = choose_precision(config.mixed_precision, self.device.type)
        if self.device.type != "cpu":
            return
        torch.set_flush_denormal(True)  # as in the run
        wanted, cores = wanted_threads(config.num_threads), self.cores
        torch.set_num_threads(wanted or 1)
        if "mixed_precision" not in config.given:

            def by_precision(recipe: UNet, precision: str) -> float:
                return self._try(recipe, precision, time.process_time)

            config.mixed_precision = self._fastest(["no", "bf16"], by_precision)

        def by_threads(recipe: UNet, number: int) -> float:
            torch.set_num_threads(number)
            return self._try(recipe, config.mixed_precision, time.perf_counter)

        numbers = [wanted] if wanted else sorted({1, max(1, cores // 2), cores})
        config.num_threads = self._fastest(numbers, by_threads)
        torch.set_num_threads(config.num_threads)

    def _fastest(self, settings: list, seconds: Callable[[UNet, Setting], float]) -> Setting:
        """The setting of the fewest seconds, by larger denoisers until it is clear or takes too long."""
        begun = time.perf_counter()
        for recipe in UNETS:
            if len(settings) == 1:
                break
            results = {setting: seconds(recipe, setting) for setting in settings}
            best = min(results.values())
            settings = sorted((each for each in settings if results[each] < CLOSE * best), key=results.get)
            spent = agreed(time.perf_counter() - begun)
            # The next takes thrice as long.
            if 4 * spent > TRYING * self.config.minutes * 60:
                break
        return settings[0]

    def _try(self, recipe: UNet, precision: str, clock: Callable[[], float]) -> float:
        """Seconds of a step of a small denoiser."""
        draft, count = smallest(self.config, 16 * self.state.num_processes), 16
        put(draft, denoiser_options(draft, recipe, 16, 16 * self.state.num_processes))
        shape = self._check(draft)
        module, arguments = trial(draft, "denoiser", count, shape, self.data, self.text, self.device)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, precision == "bf16")
        return agreed(time_step(module, draft.denoiser, arguments, autocast, clock)[0])

    def measure(self, config: Config, name: str, exact: bool = True) -> Speed:
        """The speed of a network of `config`, which has the threads and the precision that were chosen.

        Args:
            exact: False takes a speed with another batch size, if there is one.
        """
        stage = getattr(config, name)
        own = ("widths", "layers_per_block", "attention", "compile")
        first = ("widths", "kind", "blocks", "latent_channels")
        key = (name, config.data.resolution, *(str(getattr(stage, each, None)) for each in own))
        key += tuple(str(getattr(config.autoencoder, each)) for each in first)
        known, size = self.speeds.setdefault(key, {}), stage.batch_size
        if size not in known and (exact or not known):
            try:
                known[size] = self._measure(config, name)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                known[size] = Speed(math.inf, math.inf, 0)
        return known.get(size) or next(iter(known.values()))

    def _measure(self, config: Config, name: str) -> Speed:
        stage, processes = getattr(config, name), self.state.num_processes
        part = max(1, stage.batch_size // processes // stage.gradient_accumulation_steps)
        shape = self._check(config)
        if name == "autoencoder" and stage.pretrained:
            return self._passes(config, pretrained_autoencoder(config).to(self.device), 0.0)
        module, arguments = trial(config, name, part, shape, self.data, self.text, self.device)
        begun = time.perf_counter()
        if stage.compile:
            (module if name == "autoencoder" else module.unet).compile()
        step = agreed(time_step(module, stage, arguments, self.autocast)[0]) / part / processes
        step *= IN_GPU_LOOP if self.device.type == "cuda" else 1
        # Training, and passes without gradients in two batch sizes, are compiled one after another.
        compiling = 3 * agreed(time.perf_counter() - begun) if stage.compile else 0.0
        if name == "autoencoder":
            return self._passes(config, module.autoencoder, step)
        count = config.evaluation.batch_size
        noise = torch.randn(count, *shape, device=self.device)
        condition = blank_condition(module.unet, count, self.device)
        with inference(module), self.autocast():
            evaluate = timed(partial(_evaluate, module.unet, noise, condition), 1)
        return Speed(step, evaluate / count, _parameters(module), compiling=compiling)

    def _passes(self, config: Config, autoencoder: nn.Module, step: float) -> Speed:
        """Speed of an autoencoder without gradients; `step` as in `Speed`."""
        size, count = config.data.resolution, config.latents.batch_size
        images = torch.randn(count, config.data.channels, size, size, device=self.device)

        def judge() -> Tensor:
            decoded = autoencoder.decode(encode(autoencoder, images)[0]).sample.float()
            return (psnr(decoded, images) + ssim(decoded, images)).sum().item()

        with inference(autoencoder), self.autocast():
            latents = encode(autoencoder, images)[0]
            coding = timed(lambda: encode(autoencoder, images)[0].sum().item())
            decoding = timed(lambda: autoencoder.decode(latents).sample.sum().item())
            judging = timed(judge)
        numbers = [seconds / count for seconds in (judging, coding, decoding)]
        return Speed(step, numbers[0], _parameters(autoencoder), *numbers[1:], latents.shape[-1])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _evaluate(denoiser: nn.Module, noise: Tensor, condition: Condition) -> float:
    return denoise(denoiser, noise, noise[:, 0, 0, 0], condition).sum().item()
