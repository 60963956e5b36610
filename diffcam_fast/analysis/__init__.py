"""Where a network can be explained: its data flow, its target layer, its head."""

from diffcam_fast.analysis.inspection import AnalysisError, Candidate, Inspection, analyse

__all__ = ["AnalysisError", "Candidate", "Inspection", "analyse"]
