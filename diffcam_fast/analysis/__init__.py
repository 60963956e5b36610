"""Where a network can be explained: its data flow, its target layer, its head."""

from diffcam_fast.analysis.candidates import Candidate
from diffcam_fast.analysis.inspection import AnalysisError, Inspection, analyse

__all__ = ["AnalysisError", "Candidate", "Inspection", "analyse"]
