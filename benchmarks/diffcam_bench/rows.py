"""Result rows: what ran, on what, as CSV."""

import csv
import importlib
import importlib.metadata
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType

import click

from diffcam_fast.outputs.atomic import atomic_write

Row = Mapping[str, object]

_HERE = Path(__file__).resolve().parent


def results_folder() -> Path:
    """`benchmarks/results` of this checkout, or of the current folder once installed."""
    root = _HERE.parent if _HERE.parent.name == "benchmarks" else Path.cwd() / "benchmarks"
    return root / "results"


def provenance(*packages: str, threads: int) -> dict[str, object]:
    """Columns that say where a row comes from: machine, cpus, threads, versions, commit, date.

    Args:
        packages: distributions beside torch whose versions matter; empty where one is missing.
        threads: the threads that torch was given.
    """
    versions = {name: _version(name) for name in ("torch", *packages)}
    return {
        "machine": machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@cache
def machine() -> str:
    """The processor's name, or what the platform tells of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@cache
def commit() -> str:
    """Short hash, with a plus where tracked code differs; the version where there is no git."""
    try:
        return _git("rev-parse", "--short=10", "HEAD") + ("+" if _changed() else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {_version('diffcam-fast') or 'unknown'}"


def _changed() -> bool:
    # Results do not change what is measured, and a sweep writes them as it goes.
    return bool(
        _git("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results")
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _version(distribution: str) -> str:
    # ONNX Runtime with its CUDA provider is a distribution of another name.
    for name in (distribution, f"{distribution}-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def optional(module: str, *, distribution: str | None = None) -> ModuleType:
    """A package that only benchmarks need.

    Raises:
        click.ClickException: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = distribution or module.partition(".")[0]
        raise click.ClickException(
            f"this benchmark needs {name} ({error}):"
            " pip install '.[bench]' in a checkout of diffcam-fast"
        ) from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, a CSV file with one line each, in place of what was there.

    Raises:
        ValueError: there is no row, or rows with different columns.
    """
    columns = list(rows[0]) if rows else []
    odd = next((row for row in rows if list(row) != columns), None)
    if not rows or odd is not None:
        raise ValueError(f"rows must share their columns; got {columns} and {list(odd or ())}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, all values as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
