"""`diffcam bench sham`: its options, and what it prints."""

import json as json_module
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from diffcam_bench.rows import Row, results_folder

if TYPE_CHECKING:
    from diffcam_bench.sham.study import Study


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="An .npz file with train_images, train_labels, test_images, test_labels; default: "
    "CIFAR-10 by torchvision, which downloads it.",
)
@click.option(
    "--many-classes",
    is_flag=True,
    help="Pretrained networks of 1000 classes, on unlabelled photographs.",
)
@click.option(
    "--photographs",
    type=click.Path(exists=True, path_type=Path),
    default=None,
    help="With --many-classes: a folder, or an .npz file with images (N, 224, 224, 3), uint8; "
    "default: cut from those of scikit-image and scikit-learn.",
)
@click.option(
    "--weights",
    metavar="NAME=FILE",
    multiple=True,
    help="With --many-classes: of a network; default: what its library finds or downloads.",
)
@click.option(
    "--networks",
    metavar="A,B",
    default=None,
    help="Of: residual, plain; with --many-classes: efficientnet-lite0, mobilenet_v2, and resnet18 "
    "and resnet50 when named.",
)
@click.option("--arms", metavar="A,B", default=None, help="Only these.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=None,
    help="How many.  [default: 3; with --many-classes 1]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=None, help="Of the fine-tuning, instead of ours."
)
@click.option("--batch", type=click.IntRange(min=1), default=None, help="Of a step, likewise.")
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
@click.option(
    "--write", is_flag=True, help="Resume and keep sham.csv or sham_many.csv in benchmarks/results."
)
def sham(
    data: Path | None,
    many_classes: bool,
    photographs: Path | None,
    weights: tuple[str, ...],
    networks: str | None,
    arms: str | None,
    seeds: int | None,
    steps: int | None,
    batch: int | None,
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
    control that is fine-tuned towards nothing. With --many-classes the networks are pretrained,
    of 1000 classes, and the hoaxes of 24 and of 28 cells (sham_24, sham_28) have arms of their own.
    A study of this project, not the paper's.
    """
    import torch

    from diffcam_bench.sham.fooling import FIXED
    from diffcam_bench.sham.study import ARMS
    from diffcam_bench.sham.table import markdown

    if quick and write:
        raise click.UsageError("rows of --quick mean nothing beside real ones; leave --write out")
    if many_classes and data is not None:
        raise click.UsageError("--data is of few classes; --many-classes takes --photographs")
    if not many_classes and (photographs is not None or weights):
        raise click.UsageError("--photographs and --weights go with --many-classes")

    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # As on the CPU: whoever fools a network on purpose does not want noise.
    torch.backends.cudnn.allow_tf32 = False
    try:
        if many_classes:
            study, known = _many(photographs, weights, device, quick=quick)
        else:
            study, known = _few(data, device, quick=quick)
    except (ValueError, OSError, RuntimeError) as error:
        taken = "--photographs takes a folder" if many_classes else "--data takes an .npz file"
        raise click.UsageError(f"no pictures: {error}; {taken}") from error
    given = {"steps": steps, "batch": batch}
    study = replace(
        study,
        networks=_chosen("--networks", networks, known, study.networks),
        arms=_chosen("--arms", arms, (*ARMS, *FIXED), study.arms),
        sizes=replace(study.sizes, **{k: v for k, v in given.items() if v is not None}),
        seeds=study.seeds if seeds is None else range(seeds),
    )
    name = "sham_many.csv" if many_classes else "sham.csv"
    path = results_folder() / name if write else None
    rows = _run(study, path, pictures)
    if as_json:
        click.echo(json_module.dumps(rows, indent=2))
        return
    click.echo(markdown(rows))


def _run(study: "Study", path: Path | None, pictures: Path | None) -> list[Row]:
    quiet = not sys.stderr.isatty()
    with tqdm(total=study.total, unit="arm", disable=quiet, leave=False) as bar:
        return study.run(path, pictures, lambda done: bar.update(done - bar.n))


def _few(data: Path | None, device: str, *, quick: bool) -> tuple["Study", tuple[str, ...]]:
    """The study, and the networks that there are."""
    from diffcam_bench.sham.networks import NETWORKS
    from diffcam_bench.sham.pictures import Pictures, Sizes
    from diffcam_bench.sham.study import Study

    pictures = Pictures.read(data) if data is not None else Pictures.cifar10()
    study = Study(replace(pictures, device=device))
    if quick:
        sizes = Sizes(epochs=1, steps=8, batch=32, images=48)
        study = replace(study, sizes=sizes, seeds=(0,), which=("predicted",))
    return study, tuple(NETWORKS)


def _many(
    photographs: Path | None, weights: tuple[str, ...], device: str, *, quick: bool
) -> tuple["Study", tuple[str, ...]]:
    """The study, and the networks that there are."""
    from diffcam_bench.sham import many

    odd = [one for one in weights if one.partition("=")[0] not in many.KNOWN or "=" not in one]
    if odd:
        raise click.UsageError(f"--weights {odd[0]}: give NAME=FILE, of {', '.join(many.KNOWN)}")
    files = {name: Path(file) for name, _, file in (one.partition("=") for one in weights)}
    if quick:
        study = many.quick(photographs, device=device)
        return study, tuple(study.networks)
    return many.many_classes(photographs, files, device=device), many.KNOWN


def _chosen(
    option: str, given: str | None, known: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    if given is None:
        return tuple(default)
    names = tuple(given.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"{option} {','.join(unknown)}: there are {', '.join(known)}")
    return names
