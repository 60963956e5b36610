"""`diffcam bench cams` and `peer-suites`: their options, and what they print."""

import json as json_module
import os
from pathlib import Path

import click

from diffcam_bench.rows import read_rows, results_folder, write_rows


@click.command()
@click.option(
    "--model", default="torchvision:resnet50", show_default=True, help="timm: or torchvision:NAME."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timed rounds."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Of torch; default: all processors."
)
@click.option("--methods", metavar="A,B", default=None, help="Only these methods.")
@click.option(
    "--slow", is_flag=True, help="The methods that take a pass for each channel, and only these."
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--write", is_flag=True, help="Keep the rows in benchmarks/results/cams.csv.")
def cams(
    model: str,
    batch_size: int,
    rounds: int,
    threads: int | None,
    methods: str | None,
    slow: bool,
    as_json: bool,
    write: bool,
) -> None:
    """Each method of the CAM family beside the same method of other libraries.

    On the CPU, with random weights, all of a method alternating in one run. Nothing is timed unless
    the maps agree, or differ for the reason that is given.
    """
    import torch

    from diffcam_bench.cam_peers import SLOW
    from diffcam_bench.cams import chosen, contest, prepared, rows
    from diffcam_fast import Explainer

    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    try:
        names = chosen(methods, slow)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    network, images = prepared(model, batch_size)
    layer = Explainer(network, example_inputs=images).layer
    size = (images.shape[2], images.shape[3])
    found: list[dict[str, object]] = []
    for name in names:
        # Thousands of passes leave nothing cold.
        made = contest(name, network, images, rounds=rounds, warmup=0 if name in SLOW else 1)
        new = rows(
            made, model=model, layer=layer, batch_size=batch_size, size=size, threads=threads
        )
        found += new
        if write:
            _keep(new)
        if not as_json:
            click.echo(f"{name} ({made.backend})")
            for row in new:
                maps = f"   maps: {row['maps']} {row['maps_value']}" if row["maps"] else ""
                spread = f"{row['ratio_p20']} - {row['ratio_p80']}"
                click.echo(
                    f"  {row['name']!s:<26} {row['median_ms']!s:>8} ms   {row['ratio']!s:>6} "
                    f"times ours ({spread}){maps}"
                )
    if as_json:
        click.echo(json_module.dumps(found, indent=2))


def _keep(new: list[dict[str, object]]) -> None:
    """In place of the rows of an earlier run of the same."""
    path = results_folder() / "cams.csv"
    same = ("model", "batch_size", "method")
    replaced = {tuple(str(row[key]) for key in same) for row in new}
    old = read_rows(path) if path.exists() else []
    kept = [row for row in old if tuple(row[key] for key in same) not in replaced]
    write_rows(path, [*kept, *new])


_CHECKOUT = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("peer-suites")
@click.option("--pytorch-grad-cam", type=_CHECKOUT, help="A checkout of it.")
@click.option("--torch-cam", type=_CHECKOUT, help="A checkout of it.")
@click.option("--captum", type=_CHECKOUT, help="A checkout of it.")
@click.option("--write", is_flag=True, help="Keep the rows in benchmarks/results/peer_suites.csv.")
def peer_suites(
    pytorch_grad_cam: Path | None, torch_cam: Path | None, captum: Path | None, write: bool
) -> None:
    """The tests of other libraries, run against the compat layer in their own checkouts.

    A test passes, fails, or asks for a class that is not offered here.
    """
    from diffcam_bench.peer_suites import run_suite

    given = {"pytorch-grad-cam": pytorch_grad_cam, "torch-cam": torch_cam, "captum": captum}
    checkouts = {name: path for name, path in given.items() if path is not None}
    if not checkouts:
        raise click.UsageError("give the checkout of one library at least")
    found = []
    for name, checkout in checkouts.items():
        try:
            found += run_suite(name, checkout)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    for outcome in found:
        click.echo(
            f"{outcome.library} {outcome.file}: {outcome.passed} passed, {outcome.failed} failed, "
            f"{outcome.not_offered} ask for what is not offered, {outcome.skipped} skipped"
        )
        for failure in outcome.failures:
            click.echo(f"  {failure}")
    if write:
        path = results_folder() / "peer_suites.csv"
        ran = {outcome.library for outcome in found}
        old = read_rows(path) if path.exists() else []
        kept = [row for row in old if row["library"] not in ran]
        write_rows(path, [*kept, *(outcome.row() for outcome in found)])
