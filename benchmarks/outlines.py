"""Makes a paired data set: to each picture of a data set its outline, for `--denoiser.task column:outline`.

    python benchmarks/outlines.py path/to/data path/to/outlines

The outline is where brightness changes, black on white, one byte per pixel. All other columns stay.
"""

import argparse
from pathlib import Path

import datasets
from PIL import Image, ImageFilter

THRESHOLD = 40  # of 255: changes of brightness below it are no outline


def outline(picture: Image.Image) -> Image.Image:
    """Edges of a picture, black on white, of mode L."""
    bordered = Image.new("RGB", (picture.width + 2, picture.height + 2), "white")
    bordered.paste(picture, (1, 1))  # the filter leaves the border as it is
    edges = bordered.convert("L").filter(ImageFilter.FIND_EDGES)
    edges = edges.crop((1, 1, picture.width + 1, picture.height + 1))
    return edges.point(lambda value: 0 if value > THRESHOLD else 255)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="data set or folder")
    parser.add_argument("output", type=Path, help="folder of the new data set; one parquet file per split")
    parser.add_argument("--image_column", default="image")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    for name, split in datasets.load_dataset(options.dataset).items():
        split = split.map(
            lambda row: {"outline": outline(row[options.image_column])},
            features=datasets.Features(split.features | {"outline": datasets.Image()}),
            keep_in_memory=True,
        )
        split.to_parquet(options.output / f"{name}-00000-of-00001.parquet")
        print(f"{name}: {len(split):,} pictures, columns {', '.join(split.column_names)}")


if __name__ == "__main__":
    main()
