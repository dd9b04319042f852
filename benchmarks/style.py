"""Style of a picture changed by a model of captions: emoji64's pictures, into one of its nine styles.

    python benchmarks/style.py runs/emoji64_text/pipeline path/to/emoji64 path/to/features.pt

Held-out pictures of other styles, whose names the target style has drawn too, so that the true answer is
known. By captions: image to image, inversion and FlowEdit, from the picture's own caption to the same in the
target style. By reference pictures, without a caption: the direction from pictures of its style to pictures
of the target style.

- style: read as the target style, by the linear probe of benchmarks/emoji64.py.
- group: read as the group of the picture, by the other probe: its content.
- retrieved: nearer to the picture of the same name in the target style than to 99 % of the others in it.
- distance: from the source, root mean square of pixels in [0, 1].
"""

import argparse
from pathlib import Path

import datasets
import torch
from torch import Tensor

from benchmarks.emoji64 import CLASSES, Judge, Rows, read, share_retrieved, share_right
from benchmarks.tasks import load, some
from ldm_pipeline import editing
from training.data.order import seeded_generator
from training.evaluation.features import load_network
from training.evaluation.plots import save_grid, to_uint8

GRID_ROWS = 8


def with_answers(splits: datasets.DatasetDict, style: int, limit: int) -> tuple[Rows, Rows, list[int]]:
    """Held-out pictures of other styles; all pictures of the style; which of these is the answer to each."""
    everything = datasets.concatenate_datasets([splits["train"], splits["validation"]])
    styled = [row for row, each in enumerate(everything["style"]) if each == style]
    answers = {name: row for row, name in enumerate(everything.select(styled)["name"])}
    held = splits["validation"]
    found = [
        row
        for row, (name, own) in enumerate(zip(held["name"], held["style"], strict=True))
        if own != style and name in answers
    ]
    sources = read(held, [found[index] for index in some(found, limit, "rows of styles")])
    return sources, read(everything, styled), [answers[name] for name in sources.names]


def by_captions(pipe, options, target: str, method: str, strength: float, sources: Rows) -> Tensor:
    """Pictures uint8 in the style `target`."""
    steps, size, parts = options.num_inference_steps, options.batch_size, []
    for start in range(0, len(sources), size):
        part = slice(start, start + size)
        images, captions = sources.images[part] / 255, sources.captions[part]
        wanted = [f"{name}, {target} style" for name in sources.names[part]]
        generators = [seeded_generator("cpu", options.seed, start + row) for row in range(len(captions))]
        given = {"guidance_scale": options.guidance_scale, "generator": generators, "output_type": "pt"}
        if method == "image to image":
            given |= {"num_inference_steps": round(2 * steps / strength), "strength": strength}
            drawn = pipe(wanted, image=images, **given).images
        else:
            given |= {"num_inference_steps": steps, "strength": strength, "method": method}
            drawn = editing.edit(pipe, images, captions, wanted, **given)
        parts.append(to_uint8(drawn.float() * 2 - 1))
    return torch.cat(parts)


def by_references(pipe, options, splits, style: int, number: int, sources: Rows) -> Tensor:
    """Pictures uint8, moved by the direction of `number` pictures of each of both styles."""
    moved = torch.empty_like(sources.images)
    train, styles = splits["train"], torch.tensor(splits["train"]["style"])

    def references(of: int) -> Tensor:
        rows = (styles == of).nonzero().flatten()
        return read(train, rows[some(rows, number, "references", of)].tolist()).images / 255

    for own in sources.classes["style"].unique().tolist():
        rows = sources.classes["style"] == own
        way = editing.direction(
            pipe, references(style), references(own), num_inference_steps=options.num_inference_steps
        )
        drawn = editing.shift(pipe, sources.images[rows] / 255, way, options.amount, output_type="pt")
        moved[rows] = to_uint8(drawn.float() * 2 - 1)
    return moved


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="pipeline folder or Hub id")
    parser.add_argument("dataset", help="folder of emoji64")
    parser.add_argument("features", help="network as of --evaluation.features, such as a TorchScript file")
    parser.add_argument("--style", default="openmoji", help="target")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--references", type=int, nargs="+", default=[1, 50], help="pictures of each style")
    parser.add_argument("--amount", type=float, default=1.0, help="of the direction")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="two evaluations each")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=100, help="pictures, at most")
    parser.add_argument("--train", type=int, default=4000, help="pictures that the probes learn from")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, default=Path("style.png"))
    return parser.parse_args()


def main():
    options = parse()
    splits, pipe = datasets.load_dataset(options.dataset), load(options.pipeline)
    names = splits["train"].features["style"].names
    style = names.index(options.style)
    sources, styled, answers = with_answers(splits, style, options.limit)
    results = {
        "the source as it is": sources.images,
        "the real picture in that style": styled.images[answers],
    }
    for method in ("image to image", "inversion", "flowedit"):
        for strength in options.strengths:
            results[f"{method}, {strength:g}"] = by_captions(
                pipe, options, options.style, method, strength, sources
            )
    for number in options.references:
        results[f"direction by {number} + {number} pictures"] = by_references(
            pipe, options, splits, style, number, sources
        )
    shown = torch.stack([images[:GRID_ROWS] for images in results.values()], 1).flatten(0, 1)
    save_grid(shown / 127.5 - 1, options.grid, columns=len(results))
    train = read(splits["train"], some(splits["train"], options.train, "pictures of the probes"))
    classes = {column: splits["train"].features[column].names for column in CLASSES}
    judge = Judge(load_network(options.features), train, classes)
    real, own = judge.see(styled.images, "the style"), torch.tensor(answers)
    print(f"\n{len(sources)} pictures into the style {options.style}, which has {len(styled)}\n")
    print("| pictures | style | group | retrieved | distance |\n|---|---|---|---|---|")
    for name, images in results.items():
        inputs = judge.see(images, name)
        right = [
            share_right(judge.probes["style"], inputs, torch.full((len(images),), style)),
            share_right(judge.probes["group"], inputs, sources.classes["group"]),
            share_retrieved(inputs, real, own),
            ((images.float() - sources.images) / 255).square().flatten(1).mean(1).sqrt().mean().item(),
        ]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in right)} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
