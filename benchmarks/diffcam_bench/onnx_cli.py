"""`diffcam bench onnx`, `onnx-cost`, `onnx-peers`: the commands about explained ONNX files."""

import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path

import click

from diffcam_bench.rows import results_folder, write_rows


@click.command()
@click.option("--only", metavar="TEXT", default=None, help="Networks whose name holds this text.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of PyTorch and ONNX Runtime.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds a network.",
)
@click.option(
    "--memory", type=click.FloatRange(min=1), default=16, show_default=True, help="GiB a network."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a table.")
@click.option("--write", is_flag=True, help="Resume and keep benchmarks/results/onnx_parity.csv.")
def onnx(
    only: str | None, threads: int, limit: float, memory: float, as_json: bool, write: bool
) -> None:
    """Maps of explained ONNX files against the float64 engine, of all of torchvision and more.

    Weights are random. Each network is exported from PyTorch, and from the plain ONNX files of
    PyTorch's two exporters; ten of them at three earlier layers too. Exit status 1 where a file
    has wrong maps or there is none.
    """
    from diffcam_bench.onnx_networks import cases
    from diffcam_bench.onnx_parity import holds, sweep

    found = cases(only)
    if not found:
        raise click.UsageError(f"no network has {only!r} in its name")
    path = results_folder() / "onnx_parity.csv" if write else None
    checked = wrong = 0
    for row in sweep(found, path, threads=threads, limit_s=limit, memory_gib=memory):
        checked, wrong = checked + 1, wrong + (not holds(row))
        if as_json:
            click.echo(json_module.dumps(asdict(row)))
            continue
        what = row.reason or f"{row.layer}, {row.head}{f' ({row.note})' if row.note else ''}"
        click.echo(f"{row.model:36} {row.route:16} {row.error or '-':>8}  {what}")
    click.echo(
        f"{len(found)} networks; {checked} files checked now, {wrong} of them fail", err=True
    )
    if wrong:
        raise SystemExit(1)


@click.command("onnx-cost")
@click.option("--only", metavar="TEXT", default=None, help="Models and layers that hold this text.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Timed rounds; four times as many at batch 1.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    help="May be repeated.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Of ONNX Runtime.",
)
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a table.")
@click.option(
    "--write",
    is_flag=True,
    help="Keep the rows as benchmarks/results/onnx_cost.csv, on CUDA onnx_cost_gpu.csv.",
)
def onnx_cost(
    only: str | None,
    rounds: int,
    batches: tuple[int, ...],
    threads: int,
    device: str,
    as_json: bool,
    write: bool,
) -> None:
    """Latency with maps over latency without, in ONNX Runtime.

    ResNet-50 and EfficientNet-B0 in the closed form, ResNet-50 at layer3 with the gradient, beside
    what its multiplications account for. Exit status 1 where a file costs more than it should.
    """
    from diffcam_bench.onnx_cost import costs

    rows, complaints = [], []
    cuda = device == "cuda"
    for cost in costs(rounds=rounds, threads=threads, text=only, batches=batches, cuda=cuda):
        rows.append(cost.row(threads=threads))
        complaints += cost.complaints()
        if as_json:
            click.echo(json_module.dumps(rows[-1]))
            continue
        click.echo(
            f"{cost.model:28} {cost.layer:10} batch {cost.batch:2}  {cost.ratio:.3f} "
            f"({cost.ratio_p20:.3f} - {cost.ratio_p80:.3f}) of {cost.plain_ms:.1f} ms, "
            f"multiplications {cost.flop_ratio:.3f}, {cost.added_bytes:,} bytes, {cost.head}"
        )
    if not rows:
        raise click.UsageError(f"no case has {only!r} in its name")
    _keep(rows, "onnx_cost_gpu.csv" if cuda else "onnx_cost.csv", write=write)
    for line in complaints:
        click.echo(line, err=True)
    if complaints:
        raise SystemExit(1)


@click.command("onnx-peers")
@click.option("--model", default="torchvision:resnet50", show_default=True)
@click.option(
    "--python",
    default=sys.executable,
    help="A Python that imports openvino_xai, torch and torchvision.  [default: this one]",
)
@click.option(
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What OpenVINO XAI exported of the same network, in place of --python.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Of ONNX Runtime.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a table.")
@click.option("--write", is_flag=True, help="Keep the rows as benchmarks/results/onnx_peers.csv.")
def onnx_peers(
    model: str,
    python: str,
    file: Path | None,
    rounds: int,
    threads: int,
    as_json: bool,
    write: bool,
) -> None:
    """Our explained file beside OpenVINO XAI's: size, latency, and the batches that they take.

    Both are made from one network of random weights, and run in turn in ONNX Runtime on the CPU.
    """
    from diffcam_bench.onnx_peers import compare

    rows = []
    for found in compare(model, python=python, file=file, rounds=rounds, threads=threads):
        rows.append(found.row(threads=threads))
        if as_json:
            click.echo(json_module.dumps(rows[-1]))
            continue
        click.echo(
            f"{found.name:14} batch {found.batch}  {found.ratio:>6} times {found.median_ms:>6} ms, "
            f"{found.nodes} nodes, {found.bytes:,} bytes, {found.gflops} GFLOP an image, works for "
            f"batches of {found.batches.replace(' ', ', ')}; {found.maps or 'no maps'}"
        )
    _keep(rows, "onnx_peers.csv", write=write)


def _keep(rows: list[dict[str, object]], name: str, *, write: bool) -> None:
    if write:
        path = results_folder() / name
        write_rows(path, rows)
        click.echo(f"wrote {path}", err=True)
