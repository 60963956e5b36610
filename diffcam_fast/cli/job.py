"""From the options of ``diffcam explain`` to everything that a run needs, checked."""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import numpy as np
import torch

from diffcam_fast.cli.backend import accelerated, recalled
from diffcam_fast.cli.console import Console, shortened
from diffcam_fast.cli.onnx import Described, Explains, open_explained
from diffcam_fast.contrast import Contrast
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.formats import names_onnx
from diffcam_fast.images.colour import colour_map
from diffcam_fast.images.inputs import SUFFIXES, Source, find_images
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models.labels import find_target, read_labels
from diffcam_fast.models.loading import LoadedModel, Weights, load_model
from diffcam_fast.outputs.writers import (
    HeatmapWriter,
    JsonlWriter,
    NpzWriter,
    OverlayWriter,
    ParquetWriter,
    Writer,
)
from diffcam_fast.running import is_out_of_memory

_Loaded = TypeVar("_Loaded", LoadedModel, Described)

DEFAULT_OUT = Path("diffcam-out")
DEFAULT_METHOD = "diff_grad_cam"
# These formats write files of their own for each image, and so can stand beside it.
_BESIDE = frozenset(("overlay", "heatmap", "npz"))


@dataclass(frozen=True)
class Request:
    """What the user asked for; the options of ``diffcam explain`` by their names.

    Attributes:
        inputs: Files, folders, globs, or ``-`` for a list on standard input.
        text_list: A text file with one path a line.
        model: As `diffcam_fast.models.load_model` takes it.
        weights: A file, ``random``, or None.
        out: Output folder; None: beside a single image, else ``diffcam-out``.
        formats: Of ``overlay heatmap npz jsonl parquet``.
        overlay: Whether overlays stand beside the image or are blended into it.
        report: Write ``report.html``.
        targets: Class indices or labels; none: the predicted class.
        topk: Explain the k most probable classes instead.
        size: Height and width of the network's input; None: the model's own.
        labels: A file of class names in place of the model's.
        resume: Go on where an earlier run into ``out`` stopped.
        timeout: Seconds that reading one image may take.
        profile: Tell how busy each stage was.
        backend: Which runtime explains; auto: the fastest, where finding it out is worth it.
        watch: A folder whose images are explained as they come, in place of inputs.
        shard_size: Images in one file of a Parquet dataset.
        map_type: Of the maps in it.
    """

    inputs: tuple[str, ...]
    text_list: Path | None = None
    model: str | None = None
    weights: str | None = None
    out: Path | None = None
    formats: tuple[str, ...] = ("overlay",)
    overlay: Literal["side", "blend"] = "side"
    report: bool = False
    targets: tuple[str, ...] = ()
    topk: int | None = None
    contrast: str | None = None
    temperature: float | None = None
    method: str | None = None
    layer: str | None = None
    size: str | None = None
    batch_size: int = 16
    device: str | None = None
    labels: Path | None = None
    cmap: str = "turbo"
    resume: bool = False
    timeout: float = 60.0
    profile: bool = False
    backend: Literal["auto", "torch", "onnxruntime"] = "auto"
    watch: Path | None = None
    shard_size: int = 1024
    map_type: Literal["float16", "uint8"] = "float16"


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
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded: LoadedModel | Described
    explainer: Explains
    if request.model is not None and names_onnx(request.model):
        described, explainer = open_explained(request)
        loaded = resized(described, request.size)
        device = described.device
        if described.assumed is not None:
            console.say(described.assumed)
        if described.single:
            request = replace(request, batch_size=1)
    elif (kept := recalled(request, device)) is not None:
        loaded, explainer, reason = kept
        console.why(f"runtime: {reason}")
    else:
        loaded, explainer = _loaded(
            request, device, None if request.watch is not None else len(sources), console
        )
    if device == "cpu" and not isinstance(explainer, Explainer):
        # ONNX Runtime has the processors. What is left for PyTorch is small, and its threads would
        # wait for each other.
        torch.set_num_threads(1)
    trial = try_out(loaded, explainer)
    classes = trial.logits.shape[1]
    labels = loaded.labels if request.labels is None else read_labels(request.labels)
    if request.labels is None and labels is not None and len(labels) != classes:
        # The names that were found do not belong to these logits.
        labels = None
    if request.labels is not None and labels is not None and len(labels) != classes:
        raise ValueError(f"{request.labels} names {len(labels)} classes, the model has {classes}")
    if request.topk is not None and request.topk > classes:
        raise ValueError(f"--topk is {request.topk}, but the model has {classes} classes")
    targets = tuple(find_target(text, labels, classes=classes) for text in request.targets)
    _explain_choices(loaded, explainer, trial.backend, console)
    return Job(
        request=request,
        sources=sources,
        out=out,
        ledger=not beside,
        watch=request.watch,
        loaded=loaded,
        explainer=explainer,
        labels=labels,
        targets=tuple(dict.fromkeys(targets)),
        backend=trial.backend,
        writers=writers,
        settings=_settings(request, targets, trial, loaded.preprocess),
        device=device,
    )


def try_out(loaded: LoadedModel | Described, explainer: Explains) -> Explanation:
    """Explains one blank image: it tells the number of classes before any output is touched.

    Raises:
        ValueError: The network fails at this size.
    """
    with _running(loaded):
        blank = torch.zeros(1, 3, *loaded.preprocess.size)
        if isinstance(loaded, Described) and loaded.single:
            blank = torch.zeros(1, *loaded.preprocess.size, 3, dtype=torch.uint8)
        return explainer(blank)


def _found(request: Request, exclude: Path | None) -> list[Source]:
    return find_images(
        request.inputs,
        text_list=request.text_list,
        stdin=_standard_input() if "-" in request.inputs else None,
        exclude=exclude,
    )


def _loaded(
    request: Request, device: str, images: int | None, console: Console
) -> tuple[LoadedModel, Explains]:
    """The network that a request names, and what explains it."""
    loaded = load_model(request.model, weights=parse_weights(request.weights), device=device)
    if request.weights == "random":
        console.say("the weights are random: labels and maps mean nothing")
    loaded = resized(loaded, request.size)
    explainer = make_explainer(
        loaded,
        layer=request.layer,
        method=request.method or DEFAULT_METHOD,
        contrast=request.contrast,
        temperature=request.temperature,
    )
    fastest = accelerated(request, loaded, explainer, device, images)
    if fastest is None:
        return loaded, explainer
    console.why(f"runtime: {fastest.reason}")
    return loaded, fastest.explainer


def make_explainer(
    loaded: LoadedModel,
    *,
    layer: str | None = None,
    method: str = DEFAULT_METHOD,
    contrast: str | Contrast | None = None,
    temperature: float | None = None,
) -> Explainer:
    """The explainer of a loaded model at the size of its preprocessing.

    Raises:
        ValueError: No layer fits, or settings exclude each other; an exported program takes one
            batch size only; or the network fails at this size.
        TypeError: The model is no image classifier.
    """
    if loaded.batch is not None:
        raise ValueError(
            f"{loaded.name} was exported for batches of {loaded.batch} alone; export it with a"
            " dynamic batch: torch.export.export(model, (images,),"
            ' dynamic_shapes=({0: torch.export.Dim("batch")},))'
        )
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, 3, *loaded.preprocess.size)
    examples = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    with _running(loaded):
        return Explainer(
            loaded.model,
            layer=layer,
            method=method,
            contrast=contrast,
            temperature=temperature,
            example_inputs=examples,
        )


def resized(loaded: _Loaded, size: str | None) -> _Loaded:
    """The model for images of another size: ``224``, or ``HEIGHTxWIDTH``; None: as it is.

    Raises:
        ValueError: The text is no size.
    """
    if size is None:
        return loaded
    return replace(loaded, preprocess=loaded.preprocess.with_size(parse_size(size)))


@contextmanager
def _running(loaded: LoadedModel | Described) -> Iterator[None]:
    """Makes whatever a network raises a ValueError: its code is the user's, not this package's."""
    try:
        yield
    except (ValueError, TypeError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        height, width = loaded.preprocess.size
        raise ValueError(
            f"{loaded.name} does not take an image of {height} x {width} pixels:"
            f" {type(error).__name__}: {error}"
        ) from error


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
    if request.targets and request.topk is not None:
        raise ValueError("--target and --topk exclude each other")
    if request.out is not None and request.out.suffix.lower() in SUFFIXES:
        raise ValueError(f"-o names a folder, got {request.out}; files are named after the images")
    if request.out is not None and os.path.exists(request.out) and not os.path.isdir(request.out):
        raise ValueError(f"-o names a folder, but {request.out} is a file")


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


def parse_weights(text: str | None) -> Weights:
    """What ``--weights`` names: a file, ``random``, or nothing."""
    if text is None:
        return None
    return "random" if text == "random" else Path(text)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in ``224`` or ``HEIGHTxWIDTH``.

    Raises:
        ValueError: The text is no size.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"--size is {text!r}; give a side such as 224, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _settings(
    request: Request,
    targets: Sequence[int],
    trial: Explanation,
    preprocess: Preprocess,
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


def _explain_choices(
    loaded: LoadedModel | Described,
    explainer: Explains,
    backend: str,
    console: Console,
) -> None:
    preprocess = loaded.preprocess
    console.why(f"model: {loaded.name}, {preprocess.size[0]} x {preprocess.size[1]} pixels")
    if isinstance(explainer, Explainer):
        found = explainer.inspect()
        how = "closed form" if found.closed_form else "backward of the head"
        console.why(f"layer: {found.layer} {found.shape}")
        console.why(f"head: {shortened(found.head)}")
        console.why(f"gradient: {how}, because {found.reason}")
    for line in loaded.choices if isinstance(loaded, Described) else ():
        console.why(line)
    console.why(f"backend: {backend}")
