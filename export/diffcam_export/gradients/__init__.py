"""Reverse-mode differentiation of an ONNX graph, rule by rule."""

# Each module enters its rules.
from diffcam_export.gradients import (
    activations,
    convolution,
    elementwise,
    indexing,
    linear,
    normalisation,
    pooling,
    quantization,
    rearranging,
    reduction,
)
from diffcam_export.gradients.backward import vjp
from diffcam_export.gradients.registry import RULES, MissingRuleError, rule

__all__ = [
    "RULES",
    "MissingRuleError",
    "activations",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "normalisation",
    "pooling",
    "quantization",
    "rearranging",
    "reduction",
    "rule",
    "vjp",
]
