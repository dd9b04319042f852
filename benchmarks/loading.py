"""The cost of imports and loading beside Diffusers' own import and reading the weights, as ratios.

python benchmarks/loading.py --pipeline runs/cifar10_cpu/pipeline
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers.utils.logging import disable_progress_bar
from safetensors.torch import load_file

from benchmarks.overheads import side_by_side
from ldm_pipeline import LDMPipeline, build_autoencoder, build_scheduler, build_unet, set_latent_statistics
from training.config import objective_of, parse_config

ROOT = Path(__file__).parent.parent
IMPORTS = {
    "package": "import ldm_pipeline",
    "diffusers": "import diffusers",
    "pipeline": "import ldm_pipeline; ldm_pipeline.LDMPipeline",
    "parts": "from diffusers import DiffusionPipeline, AutoencoderKL, UNet2DModel",
}


def new_process(code: str) -> None:
    """Run `code` in a fresh interpreter, with the checkout on its path."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def import_ratios(rounds: int) -> dict[str, float]:
    """Wall time of whole processes, start of the interpreter included."""
    processes = {name: lambda code=code: new_process(code) for name, code in IMPORTS.items()}
    seconds = side_by_side(rounds, **processes)
    pairs = (("pipeline", "parts"), ("package", "diffusers"))
    return {f"`{IMPORTS[ours]}` / `{IMPORTS[bare]}`": seconds[ours] / seconds[bare] for ours, bare in pairs}


def save_untrained(config_path: str, folder: Path) -> None:
    """A pipeline of the configuration's networks, with ten classes and the weights they start from."""
    config = parse_config(["--config", config_path])
    stage, denoiser, data = config.autoencoder, config.denoiser, config.data
    channels, factor = stage.latent_channels, 2 ** (len(stage.widths) - 1)
    vae = build_autoencoder(stage.kind, stage.widths, stage.blocks, channels, data.channels, data.resolution)
    set_latent_statistics(vae, [0.0] * channels, [1.0] * channels)
    unet = build_unet(
        data.resolution // factor,
        channels,
        denoiser.widths,
        denoiser.layers_per_block,
        denoiser.attention,
        denoiser.attention_head_dim,
        denoiser.norm_groups,
        num_classes=10,
    )
    objective = objective_of(denoiser)
    LDMPipeline(vae, unet, build_scheduler(objective), objective=objective).save_pretrained(folder)


def from_pretrained_ratio(folder: Path, rounds: int) -> float:
    """Seconds of `from_pretrained` over those of reading the weights that it reads."""
    names = [f"diffusion_pytorch_model{end}" for end in (".safetensors", "-*.safetensors")]  # no variants
    files = [path for part in ("vae", "unet") for name in names for path in (folder / part).glob(name)]

    def read():
        # Tensors of a file are mapped; the copy is what brings their bytes into memory.
        return [tensor.clone() for path in files for tensor in load_file(path).values()]

    seconds = side_by_side(rounds, load=lambda: LDMPipeline.from_pretrained(folder), read=read)
    return seconds["load"] / seconds["read"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, help="a saved pipeline; by default an untrained one")
    parser.add_argument(
        "--config", default="training/configs/cifar10_cpu.yaml", help="whose networks the untrained one has"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    ratios = import_ratios(options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        if options.pipeline is None:
            save_untrained(options.config, Path(folder))
        ratio = from_pretrained_ratio(options.pipeline or Path(folder), options.rounds)
    ratios["`LDMPipeline.from_pretrained(folder)` / reading its safetensors with `load_file`"] = ratio
    print("| ratio of seconds | measured |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
