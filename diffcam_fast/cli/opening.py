"""``-m`` and what goes with it: from the options to a network that has explained an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffcam_fast.cli.backend import accelerated, recalled
from diffcam_fast.cli.console import Console, shortened
from diffcam_fast.cli.onnx import Described, Explains, open_explained
from diffcam_fast.cli.request import Request
from diffcam_fast.contrast import Contrast
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.formats import names_onnx
from diffcam_fast.images.inputs import Source
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import ImageError, read_image
from diffcam_fast.models.labels import read_labels
from diffcam_fast.models.loading import LoadedModel, Weights, load_model
from diffcam_fast.running import is_out_of_memory
from diffcam_fast.stream import CPU_BATCH, fitting_batch_size

_Loaded = TypeVar("_Loaded", LoadedModel, Described)

DEFAULT_METHOD = "diff_grad_cam"
# More say little more about ranges.
_CALIBRATION = 64


@dataclass(frozen=True)
class Opened:
    """A network that has explained its first image.

    Attributes:
        request: With a batch size that the network takes.
        loaded: The network, its preprocessing and its own class names.
        explainer: Of that network, or of an ONNX file.
        labels: K class names, or None.
        trial: The explanation of a blank image.
        device: Where the network is.
        agreement: How near int8 is to float32; None: it is float32.
        calibrated: A digest of the images that int8 was fitted to.
    """

    request: Request
    loaded: LoadedModel | Described
    explainer: Explains
    labels: tuple[str, ...] | None
    trial: Explanation
    device: str
    agreement: Any = None
    calibrated: str | None = None

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return int(self.trial.logits.shape[1])


def open_model(
    request: Request,
    console: Console,
    *,
    images: int | None,
    calibration: Callable[[Preprocess], Tensor] | None = None,
) -> Opened:
    """Loads what a request names, in the runtime that it asks for.

    Args:
        request: Whose options about the model are read.
        console: Is told of what was assumed and chosen.
        images: How many will be explained; None: without end.
        calibration: Gives images as the network takes them, for int8.

    Raises:
        ValueError: Anything in the request that cannot be done.
        TypeError: The model is no image classifier.
    """
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    automatic = request.batch_size is None
    if automatic:
        request = replace(request, batch_size=CPU_BATCH)
    loaded: LoadedModel | Described
    explainer: Explains
    agreement, calibrated = None, None
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
        made = _loaded(request, device, images, calibration, console, automatic=automatic)
        request, loaded, explainer, agreement, calibrated = made
    if device == "cpu" and not isinstance(explainer, Explainer):
        # ONNX Runtime has the processors. What is left for PyTorch is small, and its threads would
        # wait for each other.
        torch.set_num_threads(1)
    trial = try_out(loaded, explainer)
    if automatic and isinstance(loaded, Described) and not loaded.single:
        request = _sized(request, loaded, explainer, device, console)
    _explain_choices(loaded, explainer, trial.backend, console)
    labels = _labels(request.labels, loaded.labels, trial.logits.shape[1])
    return Opened(request, loaded, explainer, labels, trial, device, agreement, calibrated)


def calibration_images(sources: Sequence[Source], preprocess: Preprocess) -> Tensor:
    """Up to 64 of the images, from all over the list, without those that cannot be read.

    Returns:
        (N, 3, H, W), as the network takes them.

    Raises:
        ValueError: None can be read.
    """
    step = max(1, len(sources) // _CALIBRATION)
    found = []
    for source in sources[::step][:_CALIBRATION]:
        with suppress(ImageError):
            found.append(preprocess(read_image(source.path)))
    if not found:
        raise ValueError("--precision int8 needs images to be fitted to, and none could be read")
    return torch.stack(found)


def _labels(file: Path | None, own: tuple[str, ...] | None, classes: int) -> tuple[str, ...] | None:
    if file is None:
        # Names that were found for another number of classes do not belong to these logits.
        return own if own is not None and len(own) == classes else None
    labels = read_labels(file)
    if len(labels) != classes:
        raise ValueError(f"{file} names {len(labels)} classes, the model has {classes}")
    return labels


def _loaded(
    request: Request,
    device: str,
    images: int | None,
    calibration: Callable[[Preprocess], Tensor] | None,
    console: Console,
    *,
    automatic: bool,
) -> tuple[Request, LoadedModel, Explains, Any, str | None]:
    """The request with a batch size that fits, the network that it names, what explains it, and
    where that is int8, how well, and a digest of the images that it was fitted to.
    """
    loaded = load_model(request.model, weights=parse_weights(request.weights), device=device)
    if request.weights == "random":
        console.say("the weights are random: labels and maps mean nothing")
    loaded = resized(loaded, request.size)
    if request.dtype is not None:
        loaded.model.to(getattr(torch, request.dtype))
    if device.startswith("cuda"):
        loaded.model.to(memory_format=torch.channels_last)
    explainer = make_explainer(
        loaded,
        layer=request.layer,
        method=request.method or DEFAULT_METHOD,
        contrast=request.contrast,
        temperature=request.temperature,
    )
    if automatic:
        request = _sized(request, loaded, explainer, device, console)
    chosen = None
    if request.precision == "int8" and calibration is not None:
        chosen = calibration(loaded.preprocess)
    fastest = accelerated(request, loaded, explainer, device, images, chosen)
    if fastest is None:
        return request, loaded, explainer, None, None
    # int8 changes the maps: that is no detail.
    tell = console.why if fastest.agreement is None else console.say
    tell(f"runtime: {fastest.reason}")
    if chosen is None:
        return request, loaded, fastest.explainer, None, None
    from diffcam_export.cache import digest_of_images

    digest = digest_of_images(chosen)[:16]
    return request, loaded, fastest.explainer, fastest.agreement, digest


def _sized(
    request: Request,
    loaded: LoadedModel | Described,
    explainer: Explains,
    device: str,
    console: Console,
) -> Request:
    """With as many images at once as a GPU has memory for."""
    if not device.startswith("cuda"):
        return request
    with _running(loaded):
        blank = torch.zeros(3, *loaded.preprocess.size)
        size = fitting_batch_size(explainer, blank, torch.device(device))
    console.why(f"batch size: {size}")
    return replace(request, batch_size=size)


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
