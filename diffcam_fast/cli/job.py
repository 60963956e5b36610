"""From the options of ``diffcam explain`` to everything that a run needs, checked."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from diffcam_fast.cli.console import Console
from diffcam_fast.cli.onnx import Described, Explains
from diffcam_fast.cli.opening import calibration_images, open_model
from diffcam_fast.cli.request import Request
from diffcam_fast.explanation import Explanation
from diffcam_fast.formats import names_onnx
from diffcam_fast.images.colour import colour_map
from diffcam_fast.images.inputs import SUFFIXES, Source, find_images
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models.labels import find_target
from diffcam_fast.models.loading import LoadedModel
from diffcam_fast.outputs.writers import (
    HeatmapWriter,
    JsonlWriter,
    NpzWriter,
    OverlayWriter,
    ParquetWriter,
    Writer,
)

DEFAULT_OUT = Path("diffcam-out")
# These formats write files of their own for each image, and so can stand beside it.
_BESIDE = frozenset(("overlay", "heatmap", "npz"))


@dataclass(frozen=True)
class Job:
    """Everything that a run needs.

    Attributes:
        sources: The images.
        out: Where outputs go.
        watch: The folder whose images are explained as they come; None: there is an end.
        ledger: Whether the run keeps account in ``out``; not so beside a single image.
        loaded: The network, its preprocessing and its own class names.
        explainer: Of that network, or of an ONNX file.
        labels: K class names, or None.
        targets: Class indices to explain for every image; empty: the predicted class.
        backend: What computes the maps.
        writers: One for each format.
        settings: What the results depend on, for the ledger.
        device: Where the network is.
        agreement: How near int8 is to float32; None: it is float32.
    """

    request: Request
    sources: list[Source]
    out: Path
    ledger: bool
    watch: Path | None
    loaded: LoadedModel | Described
    explainer: Explains
    labels: tuple[str, ...] | None
    targets: tuple[int, ...]
    backend: str
    writers: tuple[Writer, ...]
    settings: dict[str, Any]
    device: str
    agreement: Any = None


def prepare(request: Request, console: Console) -> Job:
    """Checks a request and loads what it names; writes nothing.

    Raises:
        ValueError: Anything in the request that cannot be done.
        TypeError: The model is no image classifier.
    """
    _check(request)
    if request.report:
        colour_map(np.zeros((1, 1)), request.cmap)
    beside = _stands_beside(request)
    out = Path(request.inputs[0]).parent if beside else request.out or DEFAULT_OUT
    sources = [] if request.watch is not None else _found(request, None if beside else out)
    if not sources and request.watch is None:
        raise ValueError("the list names no images")
    # Before the model: a wrong colour map need not wait for it.
    writers = tuple(_make_writer(name, out, request) for name in dict.fromkeys(request.formats))
    endless = request.watch is not None
    opened = open_model(
        request,
        console,
        images=None if endless else len(sources),
        calibration=lambda preprocess: calibration_images(sources, preprocess),
    )
    request, labels, classes = opened.request, opened.labels, opened.classes
    if request.topk is not None and request.topk > classes:
        raise ValueError(f"--topk is {request.topk}, but the model has {classes} classes")
    targets = tuple(find_target(text, labels, classes=classes) for text in request.targets)
    return Job(
        request=request,
        sources=sources,
        out=out,
        ledger=not beside,
        watch=request.watch,
        loaded=opened.loaded,
        explainer=opened.explainer,
        labels=labels,
        targets=tuple(dict.fromkeys(targets)),
        backend=opened.trial.backend,
        writers=writers,
        settings=_settings(
            request, targets, opened.trial, opened.loaded.preprocess, opened.calibrated
        ),
        device=opened.device,
        agreement=opened.agreement,
    )


def _found(request: Request, exclude: Path | None) -> list[Source]:
    return find_images(
        request.inputs,
        text_list=request.text_list,
        stdin=_standard_input() if "-" in request.inputs else None,
        exclude=exclude,
    )


def _standard_input() -> TextIO:
    # A list is read alike from here and from --list, whatever the locale makes of file names.
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    return sys.stdin


def _check(request: Request) -> None:
    if request.watch is not None:
        _check_watch(request, request.watch)
    elif not request.inputs and request.text_list is None:
        raise ValueError("no images were given; name files, folders or globs, or use --list FILE")
    if request.precision == "int8":
        _check_int8(request)
    if request.dtype is not None and request.model is not None and names_onnx(request.model):
        raise ValueError(f"{request.model} has the dtype it was exported with; leave --dtype out")
    if request.targets and request.topk is not None:
        raise ValueError("--target and --topk exclude each other")
    if request.out is not None and request.out.suffix.lower() in SUFFIXES:
        raise ValueError(f"-o names a folder, got {request.out}; files are named after the images")
    if request.out is not None and os.path.exists(request.out) and not os.path.isdir(request.out):
        raise ValueError(f"-o names a folder, but {request.out} is a file")


def _check_int8(request: Request) -> None:
    onnx = request.model is not None and names_onnx(request.model)
    if request.backend == "torch" or request.dtype is not None or onnx:
        other = "--backend torch" if request.backend == "torch" else "--dtype"
        raise ValueError(
            f"--precision int8 does not go with {'an ONNX file' if onnx else other}; leave one out"
        )
    if request.watch is not None:
        raise ValueError(
            "--precision int8 is fitted to the images that are there when it begins, and --watch"
            " has none; leave one out"
        )


def _check_watch(request: Request, folder: Path) -> None:
    if request.inputs or request.text_list is not None:
        raise ValueError(
            f"--watch explains the images of {folder} and those that come; leave other images out"
        )
    if request.report:
        raise ValueError("--report is written at the end, and --watch has none; leave one out")
    if not folder.is_dir():
        raise ValueError(f"--watch: {folder} is no folder")
    if importlib.util.find_spec("watchfiles") is None:
        raise ValueError(
            "--watch needs watchfiles: pip install '.[watch]' in a checkout of diffcam-fast"
        )


def _stands_beside(request: Request) -> bool:
    return (
        request.out is None
        and request.watch is None
        and request.text_list is None
        and not (request.report or request.resume)
        and _BESIDE.issuperset(request.formats)
        and len(request.inputs) == 1
        and os.path.isfile(request.inputs[0])
    )


def _make_writer(name: str, out: Path, request: Request) -> Writer:
    if name == "overlay":
        return OverlayWriter(out, mode=request.overlay, cmap=request.cmap)
    makers: dict[str, Callable[[Path], Writer]] = {
        "heatmap": HeatmapWriter,
        "npz": NpzWriter,
        "jsonl": JsonlWriter,
        "parquet": lambda folder: ParquetWriter(
            folder, shard_images=request.shard_size, map_type=request.map_type
        ),
    }
    if name not in makers:
        raise ValueError(f"unknown format {name!r}; known are overlay, {', '.join(makers)}")
    return makers[name](out)


def _settings(
    request: Request,
    targets: Sequence[int],
    trial: Explanation,
    preprocess: Preprocess,
    fitted: str | None,
) -> dict[str, Any]:
    """What the outputs depend on; a resumed run must have the same."""
    return {
        "model": request.model or "default",
        "model file": _digest(request.model),
        "weights": _digest(request.weights) or request.weights,
        "labels": _digest(str(request.labels)) if request.labels is not None else None,
        "layer": trial.layer,
        "method": trial.method,
        "contrast": trial.contrast,
        "temperature": None if request.temperature is None else str(request.temperature),
        "dtype": request.dtype,
        "precision": None if fitted is None else f"int8, fitted to images {fitted}",
        "size": list(preprocess.size),
        "targets": list(targets),
        "topk": request.topk,
        "formats": sorted(set(request.formats)),
        "overlay": request.overlay if "overlay" in request.formats else None,
        "map type": request.map_type if "parquet" in request.formats else None,
        "cmap": request.cmap,
        "report": request.report,
    }


def _digest(name: str | None) -> str | None:
    """A file by name and content: weights trained on under the same name are other weights."""
    if name is None or not Path(name).is_file():
        return None
    with open(name, "rb") as file:
        return f"{Path(name).name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
