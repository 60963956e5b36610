"""`diffcam bench aot`: every kernel compiled ahead of time, and what the compiler made of it.

What is compiled here is what runs on a GPU, see `launches`. No GPU is needed.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import triton

from diffcam_bench.compiled import compile_launch
from diffcam_bench.launches import cases
from diffcam_bench.rows import read_rows

CAPABILITIES = (80, 90, 100)
# Of the sample, all launches are compiled for this one, what the tiles were measured on.
MEASURED = 90
# Tiles were chosen by measuring on sm_90, where nothing spills. On the two others, which were not
# to be had, smaller ones would be a guess: these spill a few registers, 22 at most.
MAY_SPILL = {
    ("gradient_cam grad_cam_pp", "layer1 float16 nchw", "100"): 6,
    ("pooled_cam", "resnet50 float16 nchw T=1", "80"): 4,
    ("pooled_cam", "layer3 float16 nchw T=1", "80"): 4,
    ("contrast_channel_weights", "N=1 T=1 K=1000 C=2048 temperature=None weights", "100"): 6,
    ("head_cam", "K=1000 C=2048 T=1 float32", "80"): 21,
    ("head_cam", "K=1000 C=2048 T=5 float32", "80"): 22,
    ("head_cam", "K=1000 C=2048 T=1 float16", "80"): 16,
    ("head_cam", "K=1000 C=2048 T=5 float16", "80"): 4,
}


Key = tuple[str, str, str, str]
"""Operator, variant, number of the launch, architecture."""


def compile_all(processes: int, *, sample: bool = False) -> list[dict[str, object]]:
    """A row for each launch on each architecture, in a fixed order.

    Args:
        processes: how many compile at once.
        sample: only the first launch of each kernel of each operator on all architectures, the
            others on sm_90.
    """
    jobs = [(index, sm) for index, sms in enumerate(_capabilities(sample)) for sm in sms]
    with (
        _no_interpreter(),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        return list(pool.map(_row, jobs, chunksize=8))


def keys() -> set[Key]:
    """Of the rows of the whole table, without compiling."""
    return {
        (case.kernel, case.variant, str(case.number), str(sm))
        for case, _ in cases()
        for sm in CAPABILITIES
    }


def _capabilities(sample: bool) -> Iterator[tuple[int, ...]]:
    """For what each launch is compiled."""
    seen = set()
    for case, launch in cases():
        kernel = case.kernel, launch.kernel.__name__
        yield (MEASURED,) if sample and kernel in seen else CAPABILITIES
        seen.add(kernel)


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """Processes that start meanwhile define kernels to be compiled, not interpreted."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _row(job: tuple[int, int]) -> dict[str, object]:
    index, capability = job
    case, launch = cases()[index]
    resources = compile_launch(launch, capability)
    return {
        "kernel": case.kernel,
        "variant": case.variant,
        "launch": case.number,
        "sm": capability,
        "aligned": "yes" if case.aligned else "no",
        "warps": launch.num_warps,
        **asdict(resources),
        "triton": triton.__version__,
    }


def complaints(rows: list[dict[str, object]]) -> list[str]:
    """What the gates object to: spilled registers, narrow loads where wide ones are possible."""
    found = []
    for row in rows:
        name = f"{row['kernel']} ({row['variant']}) on sm_{row['sm']}"
        allowed = MAY_SPILL.get((str(row["kernel"]), str(row["variant"]), str(row["sm"])), 0)
        if int(str(row["spills"])) > allowed:
            found.append(f"{name} spills registers, {row['spills']} times")
        if row["aligned"] == "yes" and int(str(row["load_bytes"])) < 16:
            found.append(f"{name} loads {row['load_bytes']} bytes at a time, not 16")
    return found


def differences(
    rows: list[dict[str, object]], path: Path, *, table: set[Key] | None = None
) -> list[str]:
    """Where the committed table says something else than was compiled.

    Args:
        rows: what was compiled.
        path: the table.
        table: of which launches it has to have a row, `keys()`; None: of those in `rows`.
    """
    old = {_key(dict(row)): dict(row) for row in read_rows(path)}
    new = {_key(row): {name: str(value) for name, value in row.items()} for row in rows}
    wanted = set(new) if table is None else table
    found = [f"{' '.join(k)}: not in the table" for k in wanted - old.keys()]
    found += [f"{' '.join(k)}: in the table, but no longer compiled" for k in old.keys() - wanted]
    for k in new.keys() & old.keys():
        changed = [f"{n} {old[k].get(n)} -> {v}" for n, v in new[k].items() if old[k].get(n) != v]
        if changed:
            found.append(f"{' '.join(k)}: {', '.join(changed)}")
    return sorted(found)


def _key(row: dict[str, object]) -> Key:
    return str(row["kernel"]), str(row["variant"]), str(row["launch"]), str(row["sm"])
