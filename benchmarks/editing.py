"""Editing operations of a trained model on held-out pictures, beside what does without it.

    python benchmarks/editing.py runs/digits --features digits

- inpaint: the right half, or a random box, by latent blending, by the gradient, and by a plain blending
  written here, whose scheduler is Euler's and whose hole is grey.
- restore: x2 and x4 super-resolution and colorization by the gradient, beside bicubic and grey pictures.
  Beside both: the models of `--trained`, which were trained for the task.
- edit: another class by image to image (SDEdit), inversion and FlowEdit, at several strengths.
- shift: the direction between two classes.
- rows: pictures alone, of image to image at five strengths and of the way from one picture to the next.
- classify: the diffusion classifier, for each picture among all classes, or among its own caption and others.
- memory: what each operation adds to the memory of the process at its peak, for 16 pictures.

The model gets the pictures' own conditions, classes or captions; edit and shift need classes. "FD" is the
Frechet distance of features to those of the originals, "read" the share that the network's logits put into
the class asked for; errors are of pixels in [0, 1]. Seconds are per picture.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tasks import load
from ldm_pipeline import editing
from ldm_pipeline.pipeline import Task, is_conditional, resize, text_width
from training.config import parse_config
from training.data.images import load_images
from training.data.order import seeded_generator
from training.evaluation.features import load_network
from training.evaluation.metrics import FrechetDistance
from training.evaluation.plots import save_grid, to_uint8

OPERATIONS = ("inpaint", "restore", "edit", "shift", "rows", "classify", "memory")
GRID_ROWS = 5


def operation_of(task: Task) -> str:
    """Name of a trained task among the operations here."""
    names = {"superres": f"downscale:{task.config.get('factor')}", "colorize": "grey"}
    return names.get(task.kind, task.kind)


class Bench:
    """The model, held-out pictures (N, C, H, W) in [0, 1] with their classes (N,), and their judge."""

    def __init__(self, options: argparse.Namespace):
        config = parse_config(["--config", str(options.run / "config.yaml")], stages=())
        self.options, self.pipe = options, load(str(options.run / "pipeline"))
        self.texts = text_width(self.pipe.denoiser) > 0
        self.trained = {operation_of(pipe.task): pipe for pipe in map(load, options.trained)}
        data = load_images(config.data, captioned=self.texts)
        self.network = load_network(options.features)
        held = data.held_out
        order = torch.randperm(len(held), generator=seeded_generator("cpu", "rows"))
        rows = order[: options.limit].tolist()
        self.images = torch.stack([held[row, False]["images"] for row in rows]) / 2 + 0.5
        self.labels = held.labels[rows]
        self.conditions = [held.captions[row][0] for row in rows] if self.texts else self.labels.tolist()
        self.real = self.judge(self.images)
        self.distance = FrechetDistance(self.real["features"])

    def judge(self, images: Tensor) -> dict[str, Tensor]:
        """Features and logits of images in [0, 1]."""
        parts = [self.network(to_uint8(part * 2 - 1)) for part in images.split(100)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def generators(self, start: int, count: int) -> list:
        return [seeded_generator("cpu", self.options.seed, start + index) for index in range(count)]

    def draw(self, function: Callable) -> tuple[Tensor, float]:
        """`function` of the slices of all pictures and their generators, joined; and seconds per picture."""
        began, size, parts = time.perf_counter(), self.options.batch_size, []
        for start in range(0, len(self.images), size):
            part = slice(start, start + size)
            parts.append(function(part, self.generators(start, len(self.images[part]))).float().cpu())
        return torch.cat(parts), (time.perf_counter() - began) / len(self.images)

    def read(self, images: Tensor, labels: Tensor) -> float | str:
        """Share of images that are read as `labels`; of a model of captions there is no such."""
        return "" if self.texts else (self.judge(images)["logits"].argmax(1) == labels).float().mean().item()


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---|' * (len(columns) - 1)}")
    for name, *values in rows:
        print(
            f"| {name} | {' | '.join(v if isinstance(v, str) else f'{v:.3g}' for v in values)} |", flush=True
        )


def grid(bench: Bench, name: str, columns: list[Tensor]) -> None:
    """One row per picture, one column per result."""
    page = torch.stack([column[:GRID_ROWS] for column in columns], 1).flatten(0, 1)
    save_grid(page * 2 - 1, bench.options.grids / f"{name}.png", columns=len(columns))


def plain_blending(
    pipe, images: Tensor, hole: Tensor, labels: list[int], steps: int, generators: list
) -> Tensor:
    """Blended latent diffusion as most codes have it: Euler's steps, a grey hole, noise drawn anew."""
    clean = pipe.encode(torch.where(hole, 0.5, images))
    free = torch.nn.functional.interpolate(hole.float(), clean.shape[-2:]) > 0.5
    condition = editing.make_condition(pipe, labels, len(images))
    noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
    latents = noise
    for step in range(steps):
        tau, following = 1 - step / steps, 1 - (step + 1) / steps
        latents = latents + (following - tau) * editing.velocity(pipe, latents, tau, condition)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
        latents = torch.where(free, latents, (1 - following) * clean + following * noise)
    return torch.where(hole, pipe.decode(latents), images)


def inpaint(bench: Bench) -> None:
    side, count = bench.images.shape[-1], len(bench.images)
    half = torch.zeros(count, 1, side, side, dtype=torch.bool)
    half[..., side // 2 :] = True
    box = torch.zeros_like(half)
    for index in range(count):
        top, left = torch.randint(
            0, side // 2, (2,), generator=seeded_generator("cpu", "box", index)
        ).tolist()
        box[index, :, top : top + side // 2, left : left + side // 2] = True
    for name, hole in {"half": half, "box": box}.items():
        inpaint_hole(bench, name, hole)


def inpaint_hole(bench: Bench, name: str, hole: Tensor) -> None:
    pipe, images, labels = bench.pipe, bench.images, bench.labels
    steps = bench.options.num_inference_steps

    def call(model, part, generators, **more):
        if is_conditional(model.denoiser):
            more |= {"prompt" if bench.texts else "class_labels": bench.conditions[part]}
        more |= {"image": images[part], "mask_image": hole[part].float(), "output_type": "pt"}
        return model(generator=generators, guidance_scale=1.0, num_inference_steps=steps, **more).images

    def plain(part, generators):
        return plain_blending(pipe, images[part], hole[part], bench.conditions[part], steps, generators)

    def autoencoded(part, generators):
        return torch.where(hole[part], pipe.decode(pipe.encode(images[part])), images[part])

    methods = {"plain latent blending": plain, "blend": lambda *given: call(pipe, *given)}
    methods["gradient"] = lambda *given: call(pipe, *given, method="gradient")
    if trained := bench.trained.get("inpaint"):
        methods["trained for it"] = lambda *given: call(trained, *given)
    methods["the original through the autoencoder"] = autoencoded
    rows, shown = [], []
    for key, function in methods.items():
        drawn, seconds = bench.draw(function)
        error = ((drawn - images).abs() * hole).sum() / (hole.sum() * images.shape[1])
        fd = bench.distance(bench.judge(drawn)["features"])
        rows.append([key, fd, bench.read(drawn, labels), error.item(), seconds])
        shown.append(drawn)
    title = f"inpainting of the {name}, {len(images)} pictures, {steps} evaluations each"
    table(title, ["method", "FD", "read", "error in the hole", "seconds"], rows)
    grid(bench, f"inpaint_{name}", [torch.where(hole, 0.5, images), *shown, images])


def restore(bench: Bench) -> None:
    pipe, images, options = bench.pipe, bench.images, bench.options
    size, columns = images.shape[-2:], []
    for name in ("downscale:2", "downscale:4", "grey"):
        if name == "grey" and images.shape[1] == 1:
            continue
        measure = editing.operator(name)
        given = measure(images).clamp(0, 1)
        naive = given.expand_as(images) if name == "grey" else resize(given, size)

        def restored(part, generators, name=name, given=given):
            more = {"num_inference_steps": options.restore_steps, "condition": bench.conditions[part]}
            return editing.restore(pipe, given[part], name, generator=generators, output_type="pt", **more)

        results = {"grey" if name == "grey" else "bicubic": (naive, 0.0)}
        results["restore"] = bench.draw(restored)
        if model := bench.trained.get(name):

            def learned(part, generators, model=model, given=given):
                more = {"num_inference_steps": options.restore_steps, "guidance_scale": 1.0}
                return model(image=given[part], generator=generators, output_type="pt", **more).images

            results["trained for it"] = bench.draw(learned)
        rows = []
        for key, (drawn, seconds) in results.items():
            psnr = -10 * (drawn - images).square().flatten(1).mean(1).log10().mean()
            consistency = (measure(drawn) - given).square().mean().sqrt()
            fd, right = bench.distance(bench.judge(drawn)["features"]), bench.read(drawn, bench.labels)
            rows.append([key, fd, right, psnr.item(), consistency.item(), seconds])
        title = f"{name}, {len(images)} pictures, {options.restore_steps} evaluations each"
        table(title, ["result", "FD", "read", "PSNR", "error of the degraded", "seconds"], rows)
        columns += [drawn for drawn, _ in results.values()]
    grid(bench, "restore", [*columns, images])


def edit(bench: Bench) -> None:
    pipe, images, options = bench.pipe, bench.images, bench.options
    number = len(pipe.config.id2label or {}) or 10
    source, target = bench.labels, (bench.labels + 1) % number
    steps, rows, shown = options.num_inference_steps, [], []
    scale = options.guidance_scale

    def image_to_image(strength, part, g):
        more = {"num_inference_steps": round(steps / strength), "guidance_scale": scale}
        more |= {"class_labels": target[part].tolist(), "generator": g, "output_type": "pt"}
        return pipe(image=images[part], strength=strength, **more).images

    def by(method, strength, part, g):
        more = {"strength": strength, "num_inference_steps": steps // 2, "generator": g}
        more |= {"guidance_scale": scale, "output_type": "pt", "method": method}
        return editing.edit(pipe, images[part], source[part].tolist(), target[part].tolist(), **more)

    methods = {"image to image": image_to_image}
    methods |= {name: partial(by, name) for name in ("inversion", "flowedit")}
    for key, function in methods.items():
        for strength in options.strengths:
            drawn, seconds = bench.draw(partial(function, strength))
            distance = (drawn - images).square().flatten(1).mean(1).sqrt().mean().item()
            rows.append([key, f"{strength:g}", bench.read(drawn, target), distance, seconds])
            shown.append(drawn)
    title = (
        f"from each class to the next, {len(images)} pictures, {steps} evaluations each, guidance {scale:g}"
    )
    table(title, ["method", "strength", "read as the target", "distance from the source", "seconds"], rows)
    grid(bench, "edit", [images, *shown])


def shift(bench: Bench) -> None:
    pipe, images, options = bench.pipe, bench.images, bench.options
    rows, shown = [], []
    for number in range(3):
        negative, positive = number, number + 1
        drawn = [
            pipe(
                class_labels=label, batch_size=64, generator=bench.generators(0, 64), output_type="pt"
            ).images
            for label in (positive, negative)
        ]
        way = editing.direction(pipe, *drawn, num_inference_steps=options.num_inference_steps // 2)
        own = images[bench.labels == negative]
        for amount in (0.0, 0.5, 1.0, 1.5):
            moved = editing.shift(pipe, own, way, amount, output_type="pt").cpu()
            right = bench.read(moved, torch.full((len(own),), positive))
            distance = (moved - own).square().flatten(1).mean(1).sqrt().mean().item()
            rows.append([f"{negative} to {positive}", f"{amount:g}", right, distance])
            shown.append(moved)
    table("directions between classes", ["direction", "amount", "read as the target", "distance"], rows)
    smallest = min(len(each) for each in shown)
    grid(bench, "shift", [each[:smallest] for each in shown])


def rows(bench: Bench) -> None:
    pipe, images, conditions = bench.pipe, bench.images[:GRID_ROWS], bench.conditions[:GRID_ROWS]
    name = "prompt" if bench.texts else "class_labels"
    options = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "pt"}
    shown = [images]
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        given = {name: conditions, "generator": bench.generators(0, len(images)), "strength": strength}
        shown.append(pipe(image=images, **given, **options).images)
    grid(bench, "image_to_image", shown)
    ways = []
    for first in range(len(images) - 1):
        ends = slice(first, first + 2)
        ways.append(editing.interpolate(pipe, images[ends], conditions[ends], frames=8, output_type="pt"))
    grid(bench, "interpolate", list(torch.stack(ways, 1)))


def classify(bench: Bench) -> None:
    pipe, options = bench.pipe, bench.options
    count, rows = min(options.classified, len(bench.images)), []
    others = list(dict.fromkeys(bench.conditions)) if bench.texts else sorted(set(bench.labels.tolist()))
    rounds = ((4,), ()), ((4, 16, 64), (len(others) // 2, 2) if len(others) < 20 else (10, 3))
    for samples, keep in rounds:
        began, right = time.perf_counter(), 0
        given = samples, keep, seeded_generator("cpu", options.seed), options.batch_size
        for start in range(0, count, options.batch_size):
            own = bench.conditions[start : min(start + options.batch_size, count)]
            # The same candidates for all pictures of a part: their own conditions, and some others.
            known = list(dict.fromkeys([*own, *others]))[: max(options.candidates, len(set(own)))]
            pictures = bench.images[start : start + len(own)]
            ranks = editing.classify(pipe, pictures, known, *given)
            right += sum(rank.candidates[0] == each for rank, each in zip(ranks, own, strict=True))
        seconds = (time.perf_counter() - began) / count
        rows.append([f"{samples}, keep {keep}", ranks[0].evaluations, right / count, seconds])
    title = f"classifier among {len(known)}, {count} pictures"
    table(title, ["samples", "evaluations", "accuracy", "seconds"], rows)
    if not bench.texts:
        print(f"\nthe network itself reads {bench.read(bench.images[:count], bench.labels[:count]):.3f}")


def memory(bench: Bench) -> None:
    pipe, images, conditions = bench.pipe, bench.images[:16], bench.conditions[:16]
    hole, side = torch.ones(1, 1, *images.shape[2:]), images.shape[-1] // 2
    hole[..., :side] = 0
    name = "prompt" if bench.texts else "class_labels"
    own, few = {name: conditions}, {"num_inference_steps": 3}
    functions = {
        "drawing, without guidance": lambda: pipe(**own, **few, guidance_scale=1.0),
        "drawing, guided": lambda: pipe(**own, **few, guidance_scale=2.0),
        "image to image": lambda: pipe(image=images, **own, **few, guidance_scale=1.0),
        "inpainting, blend": lambda: pipe(image=images, mask_image=hole, **own, **few, guidance_scale=1.0),
        "inpainting, gradient": lambda: pipe(
            image=images, mask_image=hole, method="gradient", **own, **few, guidance_scale=1.0
        ),
        "invert": lambda: editing.invert(pipe, images, conditions, 3),
        "edit, guided": lambda: editing.edit(pipe, images, conditions, conditions, **few),
        "restore": lambda: editing.restore(pipe, images, "blur:1", conditions, **few),
        "classify, batches of 64": lambda: editing.classify(pipe, images, conditions, (2,), ()),
    }
    rows = [[key, added_memory(function)] for key, function in functions.items()]
    table("memory added at the peak, 16 pictures", ["operation", "MiB"], rows)


def added_memory(function: Callable) -> float:
    """MiB that `function` adds to the largest resident size of a process, in a fork of this one."""
    reading, writing = os.pipe()
    if not os.fork():
        before = resident_peak()
        function()
        os.write(writing, f"{resident_peak() - before}".encode())
        os._exit(0)
    os.wait()
    return float(os.read(reading, 100))


def resident_peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of a model of classes or captions")
    parser.add_argument("--features", required=True, help="network with logits, as of --evaluation.features")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--trained", nargs="*", default=[], help="pipeline folders of tasks")
    parser.add_argument("--limit", type=int, default=300, help="held-out pictures, at most")
    parser.add_argument("--classified", type=int, default=100, help="pictures to classify, at most")
    parser.add_argument("--candidates", type=int, default=100, help="captions to classify among")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--restore_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.4, 0.6, 0.8, 0.95])
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, default=Path("."), help="folder of the grids")
    options = parser.parse_args()
    options.grids.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    if bench.texts and (wrong := {"edit", "shift"} & set(options.operations)):
        parser.error(f"--operations {' '.join(sorted(wrong))}: these need a model of classes")
    for name in options.operations:
        globals()[name](bench)


if __name__ == "__main__":
    main()
