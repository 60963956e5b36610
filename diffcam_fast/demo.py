"""``python -m diffcam_fast.demo``: explains real photographs with a real ImageNet network, offline.

The photographs are those that ship inside scikit-image and scikit-learn; network and weights come
from packages too, all of them in the ``demo`` extra.
"""

import importlib.util
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffcam_fast.cli.console import Console
from diffcam_fast.cli.explain import (
    CONTRASTS,
    INTERRUPTED,
    SOME_FAILED,
    execute,
    stopping_on_signals,
)

if TYPE_CHECKING:
    from torch import Tensor

    from diffcam_fast.cli.job import Job

_PHOTOGRAPHS = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
_COMPARED = tuple(name for name in CONTRASTS if name != "none")


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    help="Output folder.",
)
def main(out: Path) -> None:
    """Explains a few photographs, and names the pictures and the report that it wrote."""
    from diffcam_fast.cli.request import Request

    console = Console()
    with stopping_on_signals():
        photographs = copy_photographs(out / "photos")
        click.echo(f"{len(photographs)} photographs, in {out / 'photos'}")
        request = Request(inputs=(str(out / "photos"),), out=out, report=True)
        job, summary, report = execute(request, console)
        if summary.interrupted:
            raise click.exceptions.Exit(INTERRUPTED)
        click.echo("\n".join(["", *_table(job, photographs), ""]))
    for entry in summary.done:
        said = f"{entry.labels[0]} {entry.probabilities[0]:.2f}"
        click.echo(f"{said:<22} {job.out / entry.files[0]}")
    click.echo(f"{'report':<22} {report}")
    if summary.failed:
        raise click.exceptions.Exit(SOME_FAILED)


def copy_photographs(folder: Path) -> list[Path]:
    """Copies the photographs out of the packages that they ship in.

    Args:
        folder: Where to; made where it is missing.

    Returns:
        The copies.

    Raises:
        click.UsageError: A package, or its photographs, are not installed.
    """
    sources = [photograph for package in _PHOTOGRAPHS for photograph in _shipped(package)]
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(source, folder / source.name)) for source in sources]


def _shipped(package: str) -> list[Path]:
    inside, names = _PHOTOGRAPHS[package]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise click.UsageError(
            "the demo needs more packages: pip install '.[demo]' in a checkout of diffcam-fast"
        )
    paths = [Path(found.origin).parent / inside / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise click.UsageError(f"this version of {package} ships without {', '.join(missing)}")
    return paths


def _table(job: "Job", photographs: Sequence[Path]) -> Iterator[str]:
    """How like Grad-CAM's maps DiffGradCAM's are, for the predicted class."""
    import torch

    from diffcam_fast.cli.opening import make_explainer
    from diffcam_fast.images.read import read_image
    from diffcam_fast.models.loading import LoadedModel

    loaded = job.loaded
    assert isinstance(loaded, LoadedModel)
    images = torch.stack([loaded.preprocess(read_image(path)) for path in photographs])
    plain = make_explainer(loaded, method="grad_cam")(images).maps
    columns = [
        [correlation(one, other) for one, other in zip(plain, maps, strict=True)]
        for name in _COMPARED
        for maps in [make_explainer(loaded, contrast=name)(images).maps]
    ]
    yield "Correlation of the maps of DiffGradCAM, by contrast, with those of Grad-CAM:"
    yield f"  {'':<12}" + "".join(f"{name:>12}" for name in _COMPARED)
    for photograph, row in zip(photographs, zip(*columns, strict=True), strict=True):
        yield f"  {photograph.stem:<12}" + "".join(f"{value:>12.3f}" for value in row)
    means = [sum(column) / len(column) for column in columns]
    yield f"  {'mean':<12}" + "".join(f"{value:>12.3f}" for value in means)
    yield ""
    yield "1.000 is, to three digits, the map of Grad-CAM. Lower is no fault: a contrast asks what"
    yield "speaks for the class and not for its rivals, and differs more the closer they are."


def correlation(one: "Tensor", other: "Tensor") -> float:
    """Pearson's correlation of two maps of one shape, in [-1, 1]; NaN where one is constant.

    Example:
        >>> import torch
        >>> round(correlation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 3.0, 1.0])), 6)
        -1.0
    """
    a, b = (values.double().flatten() - values.double().mean() for values in (one, other))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else math.nan


if __name__ == "__main__":
    main(prog_name="python -m diffcam_fast.demo")
