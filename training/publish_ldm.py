"""Share a trained model: make the folder of its Hub repository, upload it, and try what was uploaded."""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser

from training import config  # noqa: F401  # sets up how jsonargparse reads docstrings
from training.config import redact


@dataclass
class Publication:
    """What is published, and where."""

    repo_id: str | None = None
    """The repository on the Hub: a user or an organisation, and a name, such as org/cifar-ldm."""
    license: str | None = None
    """Licence of the weights, which is your decision: an identifier of the Hub, such as apache-2.0, mit,
    cc-by-4.0 or openrail."""
    folder: str | None = None
    """Where the content of the repository is made; an earlier export there is replaced.
    Default: hub/<name of the repository>."""
    private: bool = False
    """Make a new repository private. An existing one stays as it is, and must be private then."""
    revision: str | None = None
    """Branch to upload to, created if need be. Default: main."""
    tag: str | None = None
    """Name for the uploaded commit, such as v1."""
    title: str | None = None
    """Title of the model card. Default: "Latent diffusion on" and the data's name."""
    dataset: str | None = None
    """Hub id or name of the data for the card. Default: the configuration's own, of a path its last part."""
    show_data: bool = True
    """Include the pictures that show images of the data: reconstructions.png, neighbours.png."""
    verify: bool = True
    """Download the model again afterwards, draw a picture, and compare it with one of the folder's."""
    dry_run: bool = False
    """Make the folder, say what would be uploaded where, and stop: no request is sent."""


def parse(argv: list[str] | None = None) -> tuple[str, Publication]:
    """The run or pipeline folder, and the options; exits with code 2 and a message for what is wrong."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", type=str, help="Run folder, or folder of a pipeline.")
    parser.add_class_arguments(Publication)
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        stop(f"{error}\nAll options: --help")
    return parsed.run, Publication(**{f.name: getattr(parsed, f.name) for f in fields(Publication)})


def publish(source: str, options: Publication) -> None:
    """Check, export, upload, verify; ValueError for what can be mended."""
    from ldm_pipeline import hub  # here, because --help needs no Diffusers, which takes seconds to import

    if options.repo_id is None or options.license is None:
        raise ValueError(
            "wanted: --repo_id, where to publish, such as org/cifar-ldm, and --license, the licence that you "
            "give the weights, such as apache-2.0 or cc-by-4.0"
        )
    hub.check_names(options.repo_id, options.license)
    folder = Path(options.folder or f"hub/{options.repo_id.split('/')[1]}")
    hub.check_target(folder)
    check_figures(hub.find_run(Path(source)))
    if not options.dry_run:
        hub.require_token()
    hub.export_for_hub(
        source,
        folder,
        options.repo_id,
        options.license,
        title=options.title,
        dataset=options.dataset,
        show_data=options.show_data,
    )
    visibility, branch = "private" if options.private else "public", options.revision or "main"
    where = (
        f"{options.repo_id} ({visibility}), branch {branch}{f', tag {options.tag}' if options.tag else ''}"
    )
    print("\n".join(listing(folder)))
    if options.dry_run:
        print(f"\n--dry_run: nothing was sent. It would be uploaded to {where}")
        return
    print(f"\nUploading to {where}", flush=True)
    print(f"Uploaded: {upload(folder, options)}")
    if options.verify:
        print(f"Verified: downloaded again, it draws the same picture as {folder}")


def upload(folder: Path, options: Publication) -> str:
    """The address of the commit; ValueError with the command that tries again."""
    from ldm_pipeline import push_to_hub

    try:
        return push_to_hub(
            folder,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            tag=options.tag,
            verify=options.verify,
        )
    except (ValueError, KeyboardInterrupt) as error:
        reason = "stopped" if isinstance(error, KeyboardInterrupt) else error
        again = shlex.join(["python", *sys.argv])
        raise ValueError(f"{reason}\n{folder} is complete. Try again: {again}") from error


def check_figures(run: Path | None) -> None:
    """ValueError where the run's figures were measured of other weights than its pipeline now has."""
    if run is None or not (run / "metrics.json").exists():
        return
    from ldm_pipeline.pipeline import LDMPipeline, read_json
    from training.evaluation.samples import weights_of

    measured = read_json(run / "metrics.json").get("key", {}).get("weights")
    if measured and measured != weights_of(LDMPipeline.from_pretrained(run / "pipeline")):
        raise ValueError(
            f"{run / 'metrics.json'} was measured of other weights than {run / 'pipeline'} now has; measure "
            f"again: accelerate launch training/evaluate_ldm.py --config {run / 'config.yaml'}"
        )


def listing(folder: Path) -> list[str]:
    """Every file with its size, and the sum."""
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    lines = [f"{size:>15,}  {path.as_posix()}" for path, size in sizes.items()]
    return [*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files"]


def stop(message: str) -> NoReturn:
    """Exit with code 2 and the message, without tokens."""
    print(redact(f"error: {message}"), file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """The command; exits with code 2 and a message for what its user can mend."""
    source, options = parse(argv)
    try:
        publish(source, options)
    except (ValueError, OSError) as error:
        stop(str(error))


if __name__ == "__main__":
    main()
