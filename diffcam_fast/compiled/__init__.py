"""Explainers without Python on the way: traced once, compiled where asked, replayed on CUDA."""

from diffcam_fast.compiled.explainer import CompiledExplainer
from diffcam_fast.compiled.steps import CannotCompile

__all__ = ["CannotCompile", "CompiledExplainer"]
