"""`diffcam bench scaling`: its options, and what it prints."""

import json as json_module
import os
from collections.abc import Mapping, Sequence

import click
from tqdm import tqdm

from diffcam_bench.rows import read_rows, results_folder, write_rows

_KEY = ("model", "batch_size", "device", "gpu")


@click.command()
@click.option(
    "--model", default="torchvision:resnet50", show_default=True, help="timm: or torchvision:NAME."
)
@click.option("--layers", metavar="A,B", default=None, help="Default: layer4 to layer1.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timed rounds."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Default: all.")
@click.option("--quick", is_flag=True, help="Few small points in two rounds; they mean little.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@click.option("--write", is_flag=True, help="Keep the rows in benchmarks/results/scaling.csv.")
def scaling(
    model: str,
    layers: str | None,
    batch_size: int,
    rounds: int,
    device: str,
    threads: int | None,
    quick: bool,
    as_json: bool,
    write: bool,
) -> None:
    """Cost over a plain forward pass by the number of targets, the layer and the image size.

    With random weights; the points of one image size and a plain forward pass take turns.
    """
    from dataclasses import replace

    import torch

    from diffcam_bench.scaling import QUICK, Plan, measure, points, prepared, rows

    if quick and write:
        raise click.UsageError("rows of --quick mean nothing beside real ones; leave --write out")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    plan = QUICK if quick else Plan()
    if layers is not None:
        plan = replace(plan, layers=tuple(layers.split(",")))
    network = prepared(model, device)
    if quick:
        batch_size, rounds = 1, 2
    with tqdm(total=len(points(plan, network)), unit="point", leave=False, disable=None) as bar:
        found = measure(
            network,
            plan,
            batch_size=batch_size,
            rounds=rounds,
            device=device,
            progress=lambda done: bar.update(done - bar.n),
        )
        made = rows([*found], model=model, batch_size=batch_size, device=device, threads=threads)
    if write:
        _keep(made)
    if as_json:
        click.echo(json_module.dumps(made, indent=2))
        return
    for row in made:
        click.echo(
            f"{row['series']!s:<11} {row['value']!s:<7} {row['layer']!s:<16} {row['size']!s:<10} "
            f"{row['median_ms']!s:>8} ms   {row['ratio']!s:>6} over a plain forward "
            f"({row['ratio_p20']} - {row['ratio_p80']})   {row['head']}"
        )


def _keep(new: Sequence[Mapping[str, object]]) -> None:
    """In place of the rows of an earlier run of the same."""
    path = results_folder() / "scaling.csv"

    def key(row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in _KEY)

    replaced = {key(row) for row in new}
    write_rows(path, [*(row for row in read_rows(path) if key(row) not in replaced), *new])
