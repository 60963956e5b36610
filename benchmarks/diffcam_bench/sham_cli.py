"""`diffcam bench sham`: its options, and what it prints."""

import json as json_module
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from diffcam_bench.rows import Row, results_folder

if TYPE_CHECKING:
    from diffcam_bench.sham.pictures import Pictures
    from diffcam_bench.sham.study import Study


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="An .npz file with train_images, train_labels, test_images, test_labels; default: "
    "CIFAR-10 by torchvision, which downloads it.",
)
@click.option("--networks", metavar="A,B", default=None, help="Of: residual, plain.")
@click.option("--arms", metavar="A,B", default=None, help="Only these.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Of torch; default: all processors."
)
@click.option("--device", default=None, help="Of the networks.  [default: cuda where there is one]")
@click.option("--quick", is_flag=True, help="A minute: too little for any conclusion.")
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="A folder for a grid of maps of each arm.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--write", is_flag=True, help="Resume and keep benchmarks/results/sham.csv.")
def sham(
    data: Path | None,
    networks: str | None,
    arms: str | None,
    seeds: int,
    threads: int | None,
    device: str | None,
    quick: bool,
    pictures: Path | None,
    as_json: bool,
    write: bool,
) -> None:
    """Whether maps can be fooled: networks trained to show a hoax and to decide as before.

    Small networks are trained on pictures of few classes, then fine-tuned towards a hoax: the
    border (location), dark where the honest map is bright (top_k), another centre of mass, a map of
    the honest maps' entropy (sham), and that against the contrasts themselves (adaptive); beside a
    control that is fine-tuned towards nothing. A study of this project, not the paper's.
    """
    import torch

    from diffcam_bench.sham.networks import NETWORKS
    from diffcam_bench.sham.pictures import Sizes
    from diffcam_bench.sham.study import ARMS, Study
    from diffcam_bench.sham.table import markdown

    if quick and write:
        raise click.UsageError("rows of --quick mean nothing beside real ones; leave --write out")

    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # As on the CPU: whoever fools a network on purpose does not want noise.
    torch.backends.cudnn.allow_tf32 = False
    study = Study(
        replace(_read(data), device=device),
        networks=_chosen("--networks", networks, tuple(NETWORKS)),
        arms=_chosen("--arms", arms, ARMS),
        seeds=range(seeds),
    )
    if quick:
        sizes = Sizes(epochs=1, steps=8, batch=32, images=48)
        study = replace(study, sizes=sizes, seeds=(0,), which=("predicted",))
    path = results_folder() / "sham.csv" if write else None
    rows = _run(study, path, pictures)
    if as_json:
        click.echo(json_module.dumps(rows, indent=2))
        return
    click.echo(markdown(rows))


def _run(study: "Study", path: Path | None, pictures: Path | None) -> list[Row]:
    quiet = not sys.stderr.isatty()
    with tqdm(total=study.total, unit="arm", disable=quiet, leave=False) as bar:
        return study.run(path, pictures, lambda done: bar.update(done - bar.n))


def _read(data: Path | None) -> "Pictures":
    from diffcam_bench.sham.pictures import Pictures

    try:
        return Pictures.read(data) if data is not None else Pictures.cifar10()
    except (ValueError, OSError, RuntimeError) as error:
        raise click.UsageError(f"no pictures: {error}; --data takes an .npz file") from error


def _chosen(option: str, given: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return known
    names = tuple(given.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"{option} {','.join(unknown)}: there are {', '.join(known)}")
    return names
