"""``diffcam verify``: checks an explained ONNX file."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffcam_fast.formats import names_onnx

if TYPE_CHECKING:
    from diffcam_export.verify import Against

FAILED = 1


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--against",
    metavar="MODEL",
    help="What it was made from: a plain ONNX file, or a PyTorch model as explain takes it.",
)
@click.option("--weights", metavar="FILE", help="Weights of that model (.safetensors, .pth).")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    help="Of ONNX Runtime, such as CUDAExecutionProvider; may be repeated."
    "  [default: CUDA where it is there]",
)
@click.option("--threads", type=click.IntRange(1), help="For the work on the CPU.")
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Of timing, with and without the maps in turn; 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    file: Path,
    against: str | None,
    weights: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Checks an ONNX file that explains itself, and prints what was found.

    Whether it is valid ONNX, runs at two batch sizes and two resolutions, has the model's own
    outputs unchanged, and the maps of the PyTorch model where that is given; which provider takes
    its nodes; what the maps cost. Exit status: 0 nothing failed, 1 a check failed, 2 wrong usage.
    """
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    from diffcam_export.verify import verify as verified

    if not file.is_file():
        raise click.UsageError(f"there is no file {file}")
    if weights is not None and against is None:
        raise click.UsageError("--weights is for the model of --against, which was not given")
    try:
        made_from = None if against is None else _model(against, weights)
        report = verified(
            file, against=made_from, providers=providers or None, threads=threads, rounds=rounds
        )
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        facts = {"file": str(file), "ok": report.ok}
        checks = [dataclasses.asdict(check) for check in report.checks]
        click.echo(json.dumps({**facts, "checks": checks}, indent=2))
    else:
        for line in report.lines():
            click.echo(line)
    if not report.ok:
        raise click.exceptions.Exit(FAILED)


def _model(against: str, weights: str | None) -> "Against":
    from diffcam_fast.models.loading import load_model

    if names_onnx(against):
        if not Path(against).is_file():
            raise ValueError(f"there is no file {against}")
        if weights is not None:
            raise ValueError(f"{against} holds its own weights; leave --weights out")
        return Path(against)
    if weights is None or weights == "random":
        return load_model(against, weights="random" if weights else None)
    return load_model(against, weights=Path(weights))
