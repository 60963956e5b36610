"""`diffcam bench`: the commands."""

import json as json_module
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
from tqdm import tqdm

from diffcam_bench.rows import results_folder, write_rows


@click.group()
def bench() -> None:
    """Measures this library: its cost, its peers, the networks it explains."""


@bench.command()
@click.option(
    "--model", default="torchvision:resnet50", show_default=True, help="timm: or torchvision:NAME."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed rounds."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Of torch; default: all processors."
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--write", is_flag=True, help="Keep the rows as benchmarks/results/methods.csv.")
def methods(
    model: str, batch_size: int, rounds: int, threads: int | None, as_json: bool, write: bool
) -> None:
    """Cost of an explanation over a plain forward pass, beside other libraries.

    On the CPU, with random weights, all alternating in one run. Nothing is timed unless all
    libraries give the same maps.
    """
    from diffcam_bench.methods import compare

    threads = threads or os.cpu_count() or 1
    with _progress(rounds, "round") as progress:
        found = compare(
            model, batch_size=batch_size, rounds=rounds, threads=threads, progress=progress
        )
    if write:
        path = results_folder() / "methods.csv"
        write_rows(path, found.rows())
        click.echo(f"wrote {path}", err=True)
    if as_json:
        click.echo(json_module.dumps(found.rows(), indent=2))
        return
    click.echo(found.table())
    same = ", ".join(
        f"{name.partition(',')[0]} {error:.0e}" for name, error in found.differences.items()
    )
    click.echo(f"\nLargest difference of their Grad-CAM maps from ours, in [0, 1]: {same}.")


@bench.command()
@click.option("--only", metavar="TEXT", default=None, help="Names that hold this text.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of torch."
)
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    help="Seconds a network.",
)
@click.option(
    "--memory", type=click.FloatRange(min=1), default=8, show_default=True, help="GiB a network."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a table.")
@click.option("--write", is_flag=True, help="Resume and keep benchmarks/results/families.csv.")
def families(
    only: str | None, threads: int, limit: float, memory: float, as_json: bool, write: bool
) -> None:
    """Our maps against float64 autograd, on one network of every family of timm and torchvision.

    Weights are random. The smallest network of each family stands for it.
    """
    from diffcam_bench.families import sweep
    from diffcam_bench.zoo import smallest_of_each_family

    path = results_folder() / "families.csv" if write else None
    with _progress(None, "network") as progress:
        networks = smallest_of_each_family(only, progress)
    if not networks:
        raise click.UsageError(f"no family and no network has {only!r} in its name")
    unsupported = 0
    for result in sweep(networks, path, threads=threads, limit_s=limit, memory_gib=memory):
        unsupported += result.supported != "yes"
        if as_json:
            click.echo(json_module.dumps(asdict(result)))
        else:
            what = (
                result.reason
                if result.supported != "yes"
                else f"{result.layer} ({result.shape}), {result.head}"
            )
            click.echo(f"{result.model:44} {result.error or '-':>8}  {what}")
    click.echo(
        f"{len(networks)} families; not supported, of those checked now: {unsupported}", err=True
    )


@contextmanager
def _progress(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, nothing in a pipe."""
    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield lambda done: bar.update(done - bar.n)
