"""diffcam-fast: where an image classifier looked, for every prediction, at the rate it predicts.

from diffcam_fast import Explainer
explainer = Explainer(model)
result = explainer(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcam_export import OnnxExplainer, accelerate, export_onnx
    from diffcam_fast.analysis import AnalysisError, Candidate, Inspection
    from diffcam_fast.compiled import CompiledExplainer
    from diffcam_fast.contrast import Contrast, contrast_score
    from diffcam_fast.explainer import Explainer
    from diffcam_fast.explanation import Explanation
    from diffcam_fast.fusion import Augment
    from diffcam_fast.layout import Layout

__version__ = "0.1.0"

_HOMES = {
    "AnalysisError": "diffcam_fast.analysis",
    "Augment": "diffcam_fast.fusion",
    "Candidate": "diffcam_fast.analysis",
    "CompiledExplainer": "diffcam_fast.compiled",
    "Contrast": "diffcam_fast.contrast",
    "Explainer": "diffcam_fast.explainer",
    "Explanation": "diffcam_fast.explanation",
    "Inspection": "diffcam_fast.analysis",
    "Layout": "diffcam_fast.layout",
    "OnnxExplainer": "diffcam_export",
    "accelerate": "diffcam_export",
    "contrast_score": "diffcam_fast.contrast",
    "export_onnx": "diffcam_export",
}

__all__ = [
    "AnalysisError",
    "Augment",
    "Candidate",
    "CompiledExplainer",
    "Contrast",
    "Explainer",
    "Explanation",
    "Inspection",
    "Layout",
    "OnnxExplainer",
    "accelerate",
    "contrast_score",
    "export_onnx",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # PyTorch is imported with the first name that needs it, so that `diffcam --help` is quick.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
