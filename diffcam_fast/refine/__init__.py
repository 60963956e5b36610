"""Refinements of any map: our readings of two papers, of which only the abstracts could be read.

Both spread a map over cells that belong together and keep its total; both take what the network
computed on the way, which `stage_activations` and `attention_maps` collect.
"""

from diffcam_fast.refine.affinity import ssa, stage_activations
from diffcam_fast.refine.diffusion import ad_cam, attention_maps

__all__ = ["ad_cam", "attention_maps", "ssa", "stage_activations"]
