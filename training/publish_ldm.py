"""Share a trained model: make the folder of its Hub repository, and upload it."""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from training.config import RunError, fail
from training.options import new_parser


@dataclass
class Publication:
    """Make the folder of a trained model's Hub repository, and upload it."""

    repo_id: str | None = None
    """The repository on the Hub: a user or an organisation, and a name, such as org/cifar-ldm."""
    license: str | None = None
    """Licence of the weights, which is your decision: an identifier of the Hub, such as apache-2.0, mit,
    cc-by-4.0 or openrail."""
    folder: str | None = None
    """Folder for the content of the repository; an earlier export there is replaced.
    Default: hub/<name of the repository>."""
    private: bool = False
    """Make a new repository private. An existing one stays as it is, and must be private then."""
    revision: str | None = None
    """Branch to upload to, created if need be. Default: main."""
    tag: str | None = None
    """New name for the uploaded commit, such as v1."""
    title: str | None = None
    """Title of the model card. Default: "Latent diffusion on" and the dataset."""
    dataset: str | None = None
    """Hub id or name of the dataset for the card. Default: the configuration's own, of a path its last
    part."""
    source_url: str | None = None
    """Address of a git repository with this package, such as https://github.com/org/name: the card then tells
    how to install it from there. Default: the card needs Diffusers alone."""
    show_data: bool = True
    """Include the pictures that show images of the dataset: reconstructions.png, neighbours.png."""
    space: bool = False
    """Also make and upload a Space of the same name, the page that draws and edits with the model. Its folder
    is the model's with "-space" behind."""
    verify: bool = False
    """Download the upload again, and compare every file."""
    dry_run: bool = False
    """Make the folder, print what would be uploaded where, and stop: no request is sent."""


def parse(argv: list[str] | None = None) -> tuple[str, Publication]:
    """The run or pipeline folder, and the options. RunError for what is wrong."""
    parser = new_parser(
        Publication, "python training/publish_ldm.py RUN --repo_id ORG/NAME --license LICENCE ..."
    )
    parser.add_argument("run", type=str, help="Run folder, or folder of a pipeline.")
    parsed = parser.parse_args(argv)
    options = Publication(**{f.name: getattr(parsed, f.name) for f in fields(Publication)})
    if options.repo_id is None or options.license is None:
        raise RunError(
            "wanted: --repo_id, where to publish, such as org/cifar-ldm, and --license, the licence that you "
            "give the weights, such as apache-2.0 or cc-by-4.0"
        )
    return parsed.run, options


def publish(source: Path, options: Publication) -> None:
    """Check, export and upload. RunError or HubError for what can be mended."""
    from ldm_pipeline import TrainingRecord, hub, push_to_hub
    from ldm_pipeline.space import check_space, export_space, push_space
    from training.runtime.record import find_run, read_record, shareable

    hub.check_names(options.repo_id, options.license, options.source_url)
    folder = Path(options.folder or f"hub/{options.repo_id.split('/')[1]}")
    hub.check_target(folder)
    space = [folder.with_name(f"{folder.name}-space")] if options.space else []
    for path in space:
        check_space(path)
    if not options.dry_run:
        hub.require_token()
    run, dataset = find_run(source), shareable(options.dataset)
    pipe = load(run / "pipeline" if run else source, run)
    record = read_record(run, dataset, options.show_data) if run else TrainingRecord()
    hub.export_for_hub(
        pipe,
        folder,
        options.repo_id,
        options.license,
        title=options.title,
        dataset=dataset,
        source_url=options.source_url,
        record=record,
    )
    for path in space:
        text, prompts = pipe.text_encoder is not None, record.metrics.get("prompts", [])
        export_space(path, options.repo_id, options.license, options.title, text, prompts)
    print("\n\n".join("\n".join(listing(path)) for path in (folder, *space)))
    visibility, branch = "private" if options.private else "public", options.revision or "main"
    where = f"{options.repo_id} ({visibility}), branch {branch}" + (
        f", tag {options.tag}" if options.tag else ""
    )
    where += f", with the Space {options.repo_id}" if space else ""
    if options.dry_run:
        print(f"\n--dry_run: nothing was sent. It would be uploaded to {where}")
        return
    print(f"\nUploading to {where}", flush=True)
    print(f"Uploaded: {upload(push_to_hub, folder, options, 'private', 'revision', 'tag', 'verify')}")
    for path in space:
        print(f"Uploaded: {upload(push_space, path, options, 'private')}")
    if options.verify:
        print(f"Verified: downloaded again, every file is that of {folder}")


def load(folder: Path, run: Path | None):
    """The pipeline in a folder. RunError if it is damaged, or the run's metrics are of other weights."""
    from ldm_pipeline import LDMPipeline
    from training.evaluation.samples import pipeline_sha256
    from training.runtime.atomic import read_json

    try:
        pipeline = LDMPipeline.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} cannot be loaded: {error}") from error
    metrics = run / "metrics.json" if run else None
    measured = read_json(metrics).get("key", {}).get("weights") if metrics and metrics.exists() else None
    if measured and measured != pipeline_sha256(pipeline):
        raise RunError(
            f"{metrics} was measured with other weights than {folder} has now; measure again: "
            f"python training/evaluate_ldm.py --config {run / 'config.yaml'}"
        )
    return pipeline


def upload(push, folder: Path, options: Publication, *names: str) -> str:
    """The address of the commit. RunError with the command that tries again.

    push: `push_to_hub` or `push_space`, which take the options of these names.
    """
    from ldm_pipeline.hub import HubError

    try:
        return push(folder, options.repo_id, **{name: getattr(options, name) for name in names})
    except (HubError, KeyboardInterrupt) as error:
        reason = "stopped" if isinstance(error, KeyboardInterrupt) else error
        again = shlex.join(["python", *sys.argv])
        raise RunError(f"{reason}\n{folder} is complete. Try again: {again}") from error


def listing(folder: Path) -> list[str]:
    """Every file with its size, and the sum."""
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    lines = [f"{size:>15,}  {path.as_posix()}" for path, size in sizes.items()]
    return [*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files"]


def main(argv: list[str] | None = None) -> None:
    """The command; exits with code 2 and a message for what its user can mend."""
    try:
        source, options = parse(argv)
    except RunError as error:
        fail(error)
    from ldm_pipeline.hub import HubError  # here, because --help and a typo need no Diffusers

    try:
        publish(Path(source), options)
    except (RunError, HubError) as error:
        fail(error)


if __name__ == "__main__":
    main()
