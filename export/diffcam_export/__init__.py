"""ONNX models that explain themselves: from PyTorch or ONNX to one plain ONNX file, and back to
maps.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcam_export.candidate import Fastest
    from diffcam_export.explainer import OnnxExplainer
    from diffcam_export.export import Exported, export_onnx
    from diffcam_export.fastest import accelerate
    from diffcam_export.verify import Check, Report, verify

_HOMES = {
    "Check": "verify",
    "Exported": "export",
    "Fastest": "candidate",
    "OnnxExplainer": "explainer",
    "Report": "verify",
    "accelerate": "fastest",
    "export_onnx": "export",
    "verify": "verify",
}

__all__ = [
    "Check",
    "Exported",
    "Fastest",
    "OnnxExplainer",
    "Report",
    "accelerate",
    "export_onnx",
    "verify",
]


def __getattr__(name: str) -> Any:
    # PyTorch and ONNX Runtime are imported with the first name that needs them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
