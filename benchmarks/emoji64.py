"""Samples of a text-to-image model of emoji64, for the captions of pictures that it was not trained on.

    python benchmarks/emoji64.py runs/emoji64_text/pipeline path/to/emoji64 path/to/features.pt

Split validation holds known names in styles that training lacks for them (composition), split test unseen
names. Of each it prints, for samples and for pictures that bound them:

- style, group: the share that linear probes put into the style and the group of the caption. The probes are
  trained on features of real pictures of split train.
- retrieved: the share that is nearer to the caption's own real picture than to 99 % of the other real
  pictures of the split, by the cosine of standardised features. Chance is 0.01.

Samples are also judged by captions that were shuffled: what is then right is right by chance. The grid shows
ten names in all styles.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ldm_pipeline import LDMPipeline
from training.data.latents import encode
from training.data.order import seeded_generator
from training.evaluation.features import FeatureNetwork, load_network
from training.evaluation.plots import to_uint8

SPLITS = {"validation": "composition", "test": "unseen names"}
CLASSES = ("style", "group")
PENALTIES = (3e-3, 1e-2, 3e-2, 1e-1)
UNSEEN = "#e0007a"  # frame of the pairs that training never saw


@dataclass
class Rows:
    """Rows of a split: captions and names, `classes` int64 (N,) by column, images uint8 (N, 3, R, R)."""

    captions: list[str]
    names: list[str]
    classes: dict[str, Tensor]
    images: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def read(split: datasets.Dataset, indices: list[int]) -> Rows:
    """The rows `indices` of a split."""
    split = split.select(indices)
    images = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in split["image"]]
    classes = {column: torch.tensor(split[column]) for column in CLASSES}
    return Rows(list(split["text"]), list(split["name"]), classes, torch.stack(images))


def features(network: FeatureNetwork, images: Tensor, name: str) -> Tensor:
    """Features float32 `(N, D)` of images uint8 `(N, 3, R, R)`."""
    batches = tqdm(images.split(50), desc=f"features of {name}", mininterval=10)
    return torch.cat([network(batch)["features"] for batch in batches])


def fit_probe(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights `(D + 1, classes)` of a logistic regression; `penalty` weighs their squares, not the bias's."""
    weights = torch.zeros(inputs.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(weights, inputs), labels) + penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def scores(weights: Tensor, inputs: Tensor) -> Tensor:
    """Logits `(N, classes)` of a probe for inputs `(N, D)`."""
    return inputs @ weights[:-1] + weights[-1]


def share_right(weights: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Accuracy of a probe."""
    return (scores(weights, inputs).argmax(1) == labels).float().mean().item()


def choose_probe(inputs: Tensor, labels: Tensor, names: list[str], classes: int) -> tuple[Tensor, float]:
    """A probe, and the penalty that is best where a fifth of the names is held out."""
    unique = sorted(set(names))
    order = torch.randperm(len(unique), generator=seeded_generator("cpu", "names of the probes")).tolist()
    held_out = {unique[index] for index in order[: len(unique) // 5]}
    held = torch.tensor([name in held_out for name in names])

    def accuracy(penalty: float) -> float:
        weights = fit_probe(inputs[~held], labels[~held], classes, penalty)
        return share_right(weights, inputs[held], labels[held])

    best = max(PENALTIES, key=accuracy)
    return fit_probe(inputs, labels, classes, best), best


def share_retrieved(queries: Tensor, real: Tensor, own: Tensor) -> float:
    """Share of `queries` `(M, D)` that are nearer to their own picture than to 99 % of the others.

    Args:
        real: the pictures `(N, D)`.
        own: the row of `real` that belongs to each query, int64 `(M,)`.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(real, dim=1).T
    nearer = (similarity > similarity.gather(1, own[:, None])).sum(1)
    return (nearer <= 0.01 * (len(real) - 1)).float().mean().item()


def draw(pipe, captions: list[str], name: str, options: argparse.Namespace) -> Tensor:
    """Samples uint8 `(N, 3, R, R)` of the captions."""
    chosen = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    size, batches = options.batch_size, []
    for first in tqdm(range(0, len(captions), size), desc=f"samples of {name}", mininterval=10):
        part = range(first, min(first + size, len(captions)))
        # One generator per picture: then a picture does not depend on its batch.
        generators = [seeded_generator("cpu", options.seed, name, index) for index in part]
        prompts = captions[first : first + size]
        with torch.autocast(pipe.device.type, torch.bfloat16, options.bf16):
            images = pipe(prompts, generator=generators, output_type="pt", **chosen).images
        batches.append((images.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(batches)


@torch.no_grad()
def reconstruct(pipe, images: Tensor) -> Tensor:
    """Images uint8 `(N, 3, R, R)` through the pipeline's autoencoder."""
    batches = (images / 127.5 - 1).to(pipe.device).split(50)
    return torch.cat(
        [to_uint8(pipe.vae.decode(encode(pipe.vae, batch)[0]).sample).cpu() for batch in batches]
    )


def in_other_styles(rows: datasets.Dataset, indices: list[int], pool: datasets.Dataset) -> dict[int, int]:
    """A row of `pool` with the same name in another style, by position in `indices`, where there is one."""
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(pool["name"]):
        by_name.setdefault(name, []).append(index)
    names, styles, pool_styles = rows["name"], rows["style"], pool["style"]
    found = {}
    for position, index in enumerate(indices):
        others = [i for i in by_name.get(names[index], []) if pool_styles[i] != styles[index]]
        if others:
            found[position] = others[position % len(others)]
    return found


class Judge:
    """Standardised features of real pictures of split train, and the probes that they trained."""

    def __init__(self, network: FeatureNetwork, train: Rows, class_names: dict[str, list[str]]):
        self.network = network
        values = features(network, train.images, "split train")
        self.mean, self.std = values.mean(0), values.std(0).clamp(min=1e-6)
        inputs, self.probes = (values - self.mean) / self.std, {}
        for column, names in class_names.items():
            self.probes[column], penalty = choose_probe(
                inputs, train.classes[column], train.names, len(names)
            )
            print(f"probe of {column}: {len(train):,} pictures, penalty {penalty:g}")

    def see(self, images: Tensor, name: str) -> Tensor:
        """Standardised features of images uint8 `(N, 3, R, R)`."""
        return (features(self.network, images, name) - self.mean) / self.std

    def measure(self, inputs: Tensor, rows: Rows, real: Tensor, own: Tensor) -> dict[str, float]:
        """Metrics of pictures with the features `inputs` `(M, D)`, drawn for the rows `own` `(M,)`."""
        accuracy = {
            column: share_right(self.probes[column], inputs, rows.classes[column][own]) for column in CLASSES
        }
        return accuracy | {"retrieved": share_retrieved(inputs, real, own)}


def measure_split(judge: Judge, pipe, splits: datasets.DatasetDict, split: str, options) -> dict[str, dict]:
    """Metrics by kind of pictures: samples, their control, and the real pictures that bound them."""
    data = splits[split]
    indices = list(range(len(data)))
    if options.limit is not None:
        order = torch.randperm(len(data), generator=seeded_generator("cpu", "limit", split))
        indices = order[: options.limit].tolist()
    rows = read(data, indices)
    everyone, real = torch.arange(len(rows)), judge.see(rows.images, f"split {split}")
    pool = splits["train"] if split == "validation" else data  # unseen names are in no other split
    others = in_other_styles(data, indices, pool)
    other_styles = judge.see(read(pool, list(others.values())).images, "other styles")
    reconstructions = judge.see(reconstruct(pipe, rows.images), "reconstructions")
    samples = judge.see(draw(pipe, rows.captions, f"split {split}", options), "samples")
    shuffled = torch.randperm(len(rows), generator=seeded_generator("cpu", "shuffled captions"))
    return {
        "real": judge.measure(real, rows, real, everyone),
        "their reconstructions": judge.measure(reconstructions, rows, real, everyone),
        "real, the name in another style": judge.measure(other_styles, rows, real, torch.tensor([*others])),
        "**samples**": judge.measure(samples, rows, real, everyone),
        "samples for shuffled captions": judge.measure(samples[shuffled], rows, real, everyone),
    }


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Markdown: a line per kind of pictures, each accuracy with its ratio to that of the real pictures."""
    lines = ["| pictures | style | / real | group | / real | retrieved |", "|---|---|---|---|---|---|"]
    for name, values in metrics.items():
        cells = [f"{values[c]:.3f} | {values[c] / max(metrics['real'][c], 1e-9):.2f}" for c in CLASSES]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['retrieved']:.3f} |")
    return "\n".join(lines)


def grid_names(splits: datasets.DatasetDict, count: int = 10) -> list[str]:
    """Names of split validation, of all groups in turn; those that most sets drew come first."""
    data = splits["validation"]
    drawn = [name for split in splits.values() for name in split["name"]]
    by_group: dict[int, list[str]] = {}
    for name, group in zip(data["name"], data["group"], strict=True):
        by_group.setdefault(group, []).append(name)
    queues = [sorted(names, key=lambda name: -drawn.count(name)) for _, names in sorted(by_group.items())]
    chosen = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return chosen[:count]


def save_names_by_styles(pipe, splits: datasets.DatasetDict, path: Path, options) -> None:
    """Write a PNG of ten names (rows) x all styles (columns); pairs that split train lacks are framed."""
    names, styles = grid_names(splits), splits["train"].features["style"].names
    trained = set(zip(splits["train"]["name"], splits["train"]["style"], strict=True))
    captions = [f"{name}, {style} style" for name in names for style in styles]
    images = draw(pipe, captions, "the grid", options)
    side, left, top, gap = images.shape[-1], 200, 36, 8
    cell = side + gap
    page = Image.new("RGB", (left + cell * len(styles), top + cell * len(names)), "white")
    pen = ImageDraw.Draw(page)
    for column, style in enumerate(styles):
        pen.text((left + column * cell, 4), style.replace(" ", "\n"), "black")
    for row, name in enumerate(names):
        pen.text((6, top + row * cell + side // 2 - 6), name[:32], "black")
        for column in range(len(styles)):
            x, y = left + column * cell, top + row * cell
            picture = images[row * len(styles) + column].permute(1, 2, 0).numpy()
            page.paste(Image.fromarray(picture), (x, y))
            if (name, column) not in trained:
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=UNSEEN, width=2)
    page.save(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="pipeline folder or Hub id")
    parser.add_argument("dataset", help="folder of emoji64")
    parser.add_argument("features", help="network as of --evaluation.features, such as a TorchScript file")
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's own")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's own")
    parser.add_argument("--bf16", action="store_true", help="sample in bf16, faster where a CPU has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=50, help="samples at once; changes no sample")
    parser.add_argument(
        "--limit", type=int, help="held-out rows per split, at most; compare equal limits only"
    )
    parser.add_argument("--train", type=int, default=4000, help="pictures that the probes learn from")
    parser.add_argument("--grid", type=Path, default=Path("emoji64.png"), help="PNG of names x styles")
    return parser.parse_args()


def main():
    options = parse()
    splits = datasets.load_dataset(options.dataset)
    network = load_network(options.features)
    pipe = LDMPipeline.from_pretrained(options.pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    save_names_by_styles(pipe, splits, options.grid, options)  # first: a wrong pipeline fails within a minute
    print(f"{options.grid}: names x styles; training lacked the framed pairs", flush=True)
    order = torch.randperm(len(splits["train"]), generator=seeded_generator("cpu", "pictures of the probes"))
    train = read(splits["train"], order[: options.train].tolist())
    judge = Judge(network, train, {column: splits["train"].features[column].names for column in CLASSES})
    for split, meaning in SPLITS.items():
        metrics = measure_split(judge, pipe, splits, split, options)
        print(f"\nSplit {split}: {meaning}\n\n{table(metrics)}", flush=True)


if __name__ == "__main__":
    main()
