"""What a user asks of the CAM head, checked."""

from typing import Literal

from diffcam_export.cam import CamOptions
from diffcam_export.methods import form_of
from diffcam_export.pictures import HeatmapType
from diffcam_fast.contrast import Contrast
from diffcam_fast.explainer import method_and_contrast


def cam_options(
    *,
    method: str,
    contrast: str | Contrast | None,
    temperature: float | None,
    relu: bool,
    targets: Literal["predicted", "input"],
    topk: int | None,
    heatmap: HeatmapType | None,
) -> CamOptions:
    """The options of `diffcam_export.export_onnx` that say what is computed.

    Raises:
        ValueError: one that is not known, a method that a graph cannot have, or two that exclude
            each other.
        TypeError: a `topk` that is no whole number.
    """
    if targets not in ("predicted", "input"):
        raise ValueError(f"targets must be 'predicted' or 'input', got {targets!r}")
    if topk is not None:
        check_whole("topk", topk, least=1)
        if targets == "input":
            raise ValueError(f"topk={topk} excludes targets='input'; leave one out")
    if heatmap not in (None, "float32", "uint8"):
        raise ValueError(f"heatmap must be None, 'float32' or 'uint8', got {heatmap!r}")
    found, parsed = method_and_contrast(method, contrast, temperature)
    form = form_of(found)
    if parsed.weights is not None and parsed.weights.ndim != 1:
        raise ValueError(
            "the weights of a contrast must be (K,) in a file, the same for every image; got "
            f"{tuple(parsed.weights.shape)}"
        )
    return CamOptions(
        found,
        parsed,
        relu=relu and form.clipped,
        targets="input" if targets == "input" else topk or "predicted",
        heatmap=heatmap,
    )


def check_whole(name: str, given: object, *, least: int) -> None:
    """Refuses what is no whole number, or too small.

    Raises:
        TypeError: it is none.
        ValueError: it is too small.
    """
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"{name} must be a whole number, got {given!r}")
    if given < least:
        raise ValueError(f"{name} must be at least {least}, got {given}")
