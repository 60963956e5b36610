"""`diffcam bench`: the commands."""

import json as json_module
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from diffcam_bench.cams_cli import cams, peer_suites
from diffcam_bench.engine_cli import endurance, engine, engine_gpu
from diffcam_bench.fidelity_cli import fidelity, photographs
from diffcam_bench.onnx_cli import onnx, onnx_cost, onnx_peers
from diffcam_bench.rows import read_rows, results_folder, write_rows
from diffcam_bench.scaling_cli import scaling
from diffcam_bench.sham_cli import sham
from diffcam_bench.standings_cli import all_of_it

if TYPE_CHECKING:
    from diffcam_bench.kernels import Case


@click.group()
def bench() -> None:
    """Measures this library: its cost, its peers, the networks it explains."""


for command in (
    all_of_it,
    cams,
    endurance,
    engine,
    engine_gpu,
    fidelity,
    onnx,
    onnx_cost,
    onnx_peers,
    peer_suites,
    photographs,
    scaling,
    sham,
):
    bench.add_command(command)


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


@bench.command()
@click.option("--write", is_flag=True, help="Keep the rows as benchmarks/results/aot.csv.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=None, help="Default: one a processor."
)
def aot(write: bool, processes: int | None) -> None:
    """Compiles every kernel for sm_80, sm_90 and sm_100, without a GPU.

    Registers, spills, shared memory and the width of loads are compared with the committed table;
    exit code 1 where they differ, where registers spill that need not, or where a load is narrow
    without need.
    """
    from diffcam_bench.aot import compile_all, complaints, differences, keys

    rows = compile_all(processes or os.cpu_count() or 1)
    path = results_folder() / "aot.csv"
    if write:
        write_rows(path, rows)
        click.echo(f"wrote {path}", err=True)
    found = complaints(rows) + differences(rows, path, table=keys())
    for line in found:
        click.echo(line)
    click.echo(f"{len(rows)} kernels compiled; {len(found)} objections", err=True)
    if found:
        raise SystemExit(1)


@bench.command()
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="cpu: agreement alone, in Triton's interpreter; no speeds.",
)
@click.option(
    "--only",
    metavar="TEXT",
    multiple=True,
    help="Cases that hold all these texts, as in: --only pooled --only 'N=64 ' --only ' float16 '.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed rounds."
)
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out; it takes long.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Rows as JSON.")
@click.option("--write", is_flag=True, help="Add the rows to benchmarks/results/kernels.csv.")
def kernels(
    device: str,
    only: tuple[str, ...],
    rounds: int,
    no_compile: bool,
    json_file: str | None,
    write: bool,
) -> None:
    """Each kernel over layers of real networks: time, bandwidth, and PyTorch beside it.

    Nothing is timed before the kernel agrees with float64 PyTorch. Without a GPU there is nothing
    to time: `--device cpu` checks the agreement of the small cases.
    """
    os.environ["DIFFCAM_KERNELS"] = "triton"
    if device == "cpu":
        # Read when the kernels are defined, a few lines below.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from diffcam_bench import kernels as bench_kernels

    if device == "auto" and not torch.cuda.is_available():
        click.echo(
            "there is no CUDA device here, so that no kernel can be timed; --device cpu checks "
            "that they compute the right maps, in Triton's interpreter",
            err=True,
        )
        raise SystemExit(1)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device; --device cpu checks agreement alone")
    found = bench_kernels.cases(*only)
    if not found:
        raise click.UsageError(f"no case holds {' and '.join(only)}")
    if device == "cpu":
        _check_kernels(found)
        return
    bandwidth = bench_kernels.copy_bandwidth()
    click.echo(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s", err=True)
    path = results_folder() / "kernels.csv"
    rows: list[dict[str, object]] = [dict(row) for row in (read_rows(path) if write else [])]
    generator, wrong = torch.Generator("cuda").manual_seed(1), 0
    for case in found:
        if bench_kernels.is_among(case, rows):
            continue
        try:
            bench_kernels.check_parity(case, bench_kernels.operands(case, "cuda", generator))
        except bench_kernels.ParityError as error:
            click.echo(error.format_message(), err=True)
            wrong += 1
            continue
        measured = bench_kernels.measure(case, rounds=rounds, compiled=not no_compile)
        rows += bench_kernels.rows_of(case, measured, bandwidth)
        for row in rows[-len(measured) :]:
            click.echo(
                f"{case.name:70} {row['name']:8} {row['ms_p20']:>8} {row['ms']:>8} "
                f"{row['ms_p80']:>8} ms {row['gb_per_s']:>6} GB/s {row['share_of_copy']} "
                f"of a copy, x{row['speedup_of_diffcam']}, {row['launches']} launches"
            )
        if write:
            write_rows(path, rows)
    if json_file is not None:
        with open(json_file, "w", encoding="utf-8") as file:
            json_module.dump(rows, file, indent=2)
    if wrong:
        raise SystemExit(1)


def _check_kernels(found: "list[Case]") -> None:
    """Agreement in the interpreter, of the cases that it can do in seconds."""
    import torch

    from diffcam_bench import kernels as bench_kernels

    small = [c for c in found if bench_kernels.work(c).bytes < 4e6 and c.n == 1]
    generator = torch.Generator().manual_seed(1)
    with _progress(len(small), "case") as progress:
        for number, case in enumerate(small, start=1):
            error = bench_kernels.check_parity(case, bench_kernels.operands(case, "cpu", generator))
            click.echo(f"{case.op:26} {case.layer:16} {case.dtype:9} {case.layout:5} {error:.1e}")
            progress(number)
    click.echo(
        f"all {len(small)} small cases agree with float64; {len(found) - len(small)} large ones "
        "were left out, and no speed is measured without a GPU",
        err=True,
    )


@contextmanager
def _progress(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, nothing in a pipe."""
    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield lambda done: bar.update(done - bar.n)
