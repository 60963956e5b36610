"""`diffcam bench engine`: the command."""

import itertools
import json as json_module
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import click
from tqdm import tqdm

from diffcam_bench.rows import read_rows, results_folder, write_rows


class _Contest(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def runtime(self) -> str: ...
    def rows(self) -> list[dict[str, object]]: ...
    def verdicts(self) -> list[str]: ...


MODELS = ("torchvision:resnet50", "torchvision:efficientnet_b0")


_MODEL = click.option(
    "--model",
    "models",
    multiple=True,
    default=MODELS,
    show_default=True,
    help="timm: or torchvision:NAME; may be repeated.",
)
_NO_PEERS = click.option("--no-peers", is_flag=True, help="Plain inference and ours alone.")
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")


@click.command()
@_MODEL
@click.option(
    "--source",
    "sources",
    type=click.Choice(("memory", "files")),
    multiple=True,
    default=("memory", "files"),
    show_default=True,
    help="Images as the network takes them, or JPEG files.",
)
@click.option("--images", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Default: all.")
@_NO_PEERS
@_JSON
@click.option("--write", is_flag=True, help="Keep the rows in benchmarks/results/engine.csv.")
def engine(
    models: tuple[str, ...],
    sources: tuple[str, ...],
    images: int,
    batch_size: int,
    rounds: int,
    threads: int | None,
    no_peers: bool,
    as_json: bool,
    write: bool,
) -> None:
    """Images a second, explained, beside plain inference and other libraries.

    On the CPU, with random weights, all in turn on the same images. Nothing is timed unless the
    maps agree. Exit code 1 where something that was asked for does not hold.
    """
    from diffcam_bench.engine import Contest, contest

    def all_of_them() -> Iterator[Contest]:
        for model in models:
            for source in sources:
                with tqdm(total=rounds, unit="round", leave=False) as bar:
                    yield contest(
                        model,
                        source=source,
                        images=images,
                        batch_size=batch_size,
                        rounds=rounds,
                        threads=threads or os.cpu_count() or 1,
                        peers=not no_peers,
                        progress=lambda done, bar=bar: bar.update(),  # type: ignore[misc]
                    )

    _report(all_of_them(), "engine.csv" if write else None, as_json=as_json)


def _report(contests: Iterable[_Contest], name: str | None, *, as_json: bool) -> None:
    """Tells what was measured as it comes, keeps it, and exits with 1 where something was lost."""
    made: list[dict[str, object]] = []
    lost = 0
    for found in contests:
        rows = found.rows()
        made += rows
        if name is not None:
            _keep(rows, results_folder() / name)
        verdicts = found.verdicts()
        lost += sum(verdict.endswith("LOST") for verdict in verdicts)
        if not as_json:
            click.echo(
                f"{found.model}, {found.source}, {found.batch_size} at once: {found.runtime}"
            )
            for row in rows:
                click.echo(
                    f"  {row['name']!s:<28} {row['images_per_s']!s:>7} images/s   ours over it "
                    f"{row['ours_over']!s:>6} ({row['ours_over_p20']} - {row['ours_over_p80']})"
                )
            for verdict in verdicts:
                click.echo(f"  {verdict}")
    if as_json:
        click.echo(json_module.dumps(made, indent=2))
    if lost:
        raise SystemExit(1)


def _keep(new: list[dict[str, object]], path: Path) -> None:
    """In place of the rows of an earlier run of the same."""

    def key(row: Mapping[str, object]) -> tuple[str, ...]:
        names = ("model", "source", "batch_size", "gpu")
        return tuple(str(row.get(name, "")) for name in names)

    replaced = {key(row) for row in new}
    kept = [row for row in read_rows(path) if key(row) not in replaced]
    write_rows(path, [*kept, *new])


@click.command("engine-gpu")
@_MODEL
@click.option(
    "--source",
    "sources",
    type=click.Choice(("device", "files")),
    multiple=True,
    default=("device", "files"),
    show_default=True,
    help="Batches that are on the GPU, or JPEG files.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16")),
    default="bfloat16",
    show_default=True,
)
@click.option("--images", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option(
    "--batch-size",
    "sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(64, 256),
    show_default=True,
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Default: all.")
@_NO_PEERS
@_JSON
@click.option("--write", is_flag=True, help="Keep the rows in benchmarks/results/engine_gpu.csv.")
def engine_gpu(
    models: tuple[str, ...],
    sources: tuple[str, ...],
    dtype: str,
    images: int,
    sizes: tuple[int, ...],
    rounds: int,
    workers: int | None,
    no_peers: bool,
    as_json: bool,
    write: bool,
) -> None:
    """As engine, on CUDA: beside the plain forward pass, compiled and in a CUDA graph as ours is.

    Exit code 1 where something that was asked for does not hold.
    """
    import torch

    from diffcam_bench.engine_gpu import contest

    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device here")
    runs = itertools.product(models, sources, sizes)
    found = (
        contest(
            model,
            source=source,
            dtype=dtype,
            images=images,
            batch_size=size,
            rounds=rounds,
            workers=workers or os.cpu_count() or 1,
            peers=not no_peers,
        )
        for model, source, size in runs
    )
    _report(found, "engine_gpu.csv" if write else None, as_json=as_json)


@click.command()
@click.option("--images", type=click.IntRange(min=100), default=50_000, show_default=True)
@_JSON
@click.option("--write", is_flag=True, help="Keep the rows as benchmarks/results/endurance.csv.")
def endurance(images: int, as_json: bool, write: bool) -> None:
    """Memory and speed of one long run of the command line, tenth by tenth.

    The default network explains JPEG files into Parquet shards. Exit code 1 where memory or time
    for an image are not flat.
    """
    from diffcam_bench.endurance import endure

    with tqdm(total=images, unit="img", leave=False) as bar:
        found = endure(images, progress=lambda done: bar.update(done - bar.n))
    rows = found.rows()
    if write:
        write_rows(results_folder() / "endurance.csv", rows)
    if as_json:
        click.echo(json_module.dumps(rows, indent=2))
    else:
        for row in rows:
            click.echo(
                f"{row['explained']!s:>8} images: {row['memory_mib']} MiB, "
                f"{row['images_per_s']} images/s"
            )
    verdicts = found.verdicts()
    for verdict in verdicts:
        click.echo(verdict, err=as_json)
    if any(verdict.endswith("LOST") for verdict in verdicts):
        raise SystemExit(1)
