"""``diffcam explain --engine ray``: its options, what is read, and where it is run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from diffcam_fast.cli.cluster_summary import Outcome, read_outcome
from diffcam_fast.cli.console import Console

if TYPE_CHECKING:
    import ray.data

_Command = TypeVar("_Command", bound=Callable[..., object])

NAME = "maps.parquet"
# Of the local engine alone, by the names of their parameters.
_LOCAL = (
    "overlay",
    "report",
    "cmap",
    "text_list",
    "resume",
    "watch",
    "shard_size",
    "map_type",
    "dtype",
    "precision",
    "device",
    "backend",
    "timeout",
    "profile",
)
_RAY = ("ray_address", "actors", "actor_cpus", "actor_gpus")
# Shards of ResNet's maps are about a megabyte then, and few enough to list.
_ROWS_PER_FILE = 10_000


def cluster_options(command: _Command) -> _Command:
    """Adds the options of the engine to a command."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(("local", "ray")),
                default="local",
                show_default=True,
                help="This process, or Ray: many processes on one machine or many, --format parquet"
                " alone, and IMAGES and --out may be URIs (s3://...).",
            ),
            click.option(
                "--ray-address",
                help="A running Ray.  [default: RAY_ADDRESS, else one of its own on this machine]",
            ),
            click.option(
                "--actors", type=click.IntRange(1), help="With ray.  [default: as many as fit]"
            ),
            click.option(
                "--actor-cpus", type=click.IntRange(1), help="Cores of each.  [default: 1]"
            ),
            click.option(
                "--actor-gpus",
                type=click.FloatRange(0, 1),
                help="GPUs of each.  [default: 1 where there are any]",
            ),
        )
    ):
        command = option(command)
    return command


def check_engine(context: click.Context) -> None:
    """Refuses options of the other engine, and formats that this one does not write.

    Raises:
        click.UsageError: There are such.
    """
    ray = context.params["engine"] == "ray"
    given = [name for name in (_LOCAL if ray else _RAY) if _is_given(context, name)]
    if given:
        flags = {param.name: param.opts[-1] for param in context.command.params}
        named = ", ".join(flags[name] for name in given)
        if not ray:
            raise click.UsageError(f"{named} is for --engine ray; add it, or leave {named} out")
        hint = "; --actor-gpus says where the network is" if "device" in given else ""
        raise click.UsageError(f"{named} does not go with --engine ray; leave it out{hint}")
    if ray and set(context.params["formats"]) != {"parquet"}:
        raise click.UsageError("--engine ray writes --format parquet, and nothing else; say so")


@dataclass(frozen=True)
class Prepared:
    """A run that has only to be started.

    Attributes:
        rows: The dataset of maps, which nothing has asked for yet.
        out: Where it goes.
        asked: Targets of an image; where they were named, two may be one class.
    """

    rows: ray.data.Dataset
    out: str
    asked: int


def prepare_on_ray(options: Mapping[str, Any], console: Console) -> Prepared:
    """Checks what the options of ``diffcam explain`` name, and connects to Ray.

    Args:
        options: By the names of its parameters; `check_engine` has seen them.
        console: For what is said meanwhile.

    Raises:
        click.UsageError: The request cannot be met.
    """
    from diffcam_fast.distributed import explain
    from diffcam_fast.distributed.dataset import import_ray
    from diffcam_fast.images.inputs import find_images

    inputs: tuple[str, ...] = options["inputs"]
    files = [name for name in inputs if not is_uri(name)]
    out = shards(options["out"] or "diffcam-out")
    try:
        if not inputs:
            raise ValueError("no images were given; name files, folders, globs or URIs")
        if "-" in inputs:
            raise ValueError("--engine ray reads no list from standard input; name files or URIs")
        for name in inputs:
            if is_uri(name) and any(mark in name for mark in "*?["):
                raise ValueError(f"{name}: Ray reads no globs in URIs; name the folder")
        # Absolute: an actor may have another working folder.
        found = [os.path.abspath(source.path) for source in find_images(files)] if files else []
        _check_out(out)
        ray = import_ray()
        _connect(ray, options["ray_address"], verbose=console.verbose)
        if options["weights"] == "random":
            console.say("the weights are random: labels and maps mean nothing")
        size = options["batch_size"] or 16
        result = explain(
            _read(ray, found, [name for name in inputs if is_uri(name)], batch_size=size),
            model=_absolute(options["model"]),
            weights=_absolute(options["weights"]),
            method=options["method"],
            contrast=options["contrast"],
            temperature=options["temperature"],
            layer=options["layer"],
            targets=options["targets"],
            topk=options["topk"],
            size=options["size"],
            labels=options["labels"],
            batch_size=size,
            cpus_per_actor=options["actor_cpus"] or 1,
            gpus_per_actor=options["actor_gpus"],
            concurrency=options["actors"],
        )
    except OSError as error:
        raise click.UsageError(f"{type(error).__name__}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    return Prepared(result, out, options["topk"] or len(options["targets"]) or 1)


def run_on_ray(prepared: Prepared, console: Console) -> Outcome | None:
    """Writes the dataset and counts what it holds; None: it was stopped.

    Raises:
        click.ClickException: The run could not go on.
    """
    from ray.exceptions import RayError

    start = time.perf_counter()
    try:
        prepared.rows.write_parquet(prepared.out, min_rows_per_file=_ROWS_PER_FILE)
    except (RayError, OSError) as error:
        console.why(str(error))
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise click.ClickException(f"Ray could not go on: {last}") from error
    except KeyboardInterrupt:
        console.say(f"stopped; remove what {prepared.out} holds before the next run")
        return None
    seconds = time.perf_counter() - start
    return read_outcome(prepared.out, prepared.asked, seconds=seconds)


def is_uri(name: str) -> bool:
    """Whether an input or output is a URI rather than a path.

    Example:
        >>> is_uri("s3://bucket/photos"), is_uri("photos/cat.jpg")
        (True, False)
    """
    scheme, mark, _ = name.partition("://")
    return bool(mark) and scheme.isalnum()


def shards(out: str) -> str:
    """The dataset in an output folder; an absolute path, or a URI.

    Example:
        >>> shards("s3://bucket/run/")
        's3://bucket/run/maps.parquet'
    """
    return f"{(out if is_uri(out) else os.path.abspath(out)).rstrip('/')}/{NAME}"


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _absolute(name: str | None) -> str | None:
    if name is None or name == "random" or not os.path.isfile(name):
        return name
    return os.path.abspath(name)


def _check_out(out: str) -> None:
    """Ray adds to what is there, and images of two runs would be told apart by nothing."""
    from pyarrow import fs  # type: ignore[import-untyped,unused-ignore]

    filesystem, path = fs.FileSystem.from_uri(out)
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        raise ValueError(f"{out} is there already; remove it, or name another folder by -o")


def _connect(ray: Any, address: str | None, *, verbose: bool) -> None:
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    # Of a machine with one core: an actor, and what reads for it.
    cores = {} if address else {"num_cpus": max(2, os.cpu_count() or 1)}
    ray.init(address=address or "local", log_to_driver=verbose, **cores)


def _check_address(address: str) -> None:
    """Ray itself waits for minutes for a machine that does not answer."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"no Ray answers at {address}: {error}") from None


def _read(ray: Any, files: list[str], uris: list[str], *, batch_size: int) -> ray.data.Dataset:
    from diffcam_fast.distributed.actor import AHEAD
    from diffcam_fast.images.inputs import SUFFIXES

    parts = []
    if files:
        # Only the names travel: a file that cannot be opened is then one image, not the run.
        blocks = max(1, min(len(files) // (AHEAD * batch_size), 10_000))
        rows = [{"path": os.fsencode(name)} for name in files]
        parts.append(ray.data.from_items(rows, override_num_blocks=blocks))
    if uris:
        known = sorted(suffix.removeprefix(".") for suffix in SUFFIXES)
        parts.append(ray.data.read_binary_files(uris, include_paths=True, file_extensions=known))
    if len(parts) > 1:
        raise ValueError("files and URIs were both given; run the command once for each")
    dataset: ray.data.Dataset = parts[0]
    return dataset
