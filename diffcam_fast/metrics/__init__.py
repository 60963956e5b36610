"""How faithful a heatmap is to the network that it explains, and how well it points.

Every function takes a batch and returns one value an image, (N,); what to average is the caller's.
Images (N, C, H, W) are normalised as the model takes them, and are masked there: what a map hides
becomes 0, the mean colour. Heatmaps (N, H, W) are in [0, 1]; where one holds NaN, so does its
result.
"""

from diffcam_fast.metrics.coherent import adcc, coherency, complexity
from diffcam_fast.metrics.correlation import pearson, rank_correlation
from diffcam_fast.metrics.curves import blurred, deletion, insertion, perturbation_curve
from diffcam_fast.metrics.masked import Masked, average_drop, increase_in_confidence, masked
from diffcam_fast.metrics.passes import confidence, explain_with
from diffcam_fast.metrics.pointing import box_masks, energy_pointing, pointing_game
from diffcam_fast.metrics.road import impute, road
from diffcam_fast.metrics.sanity import cascade

__all__ = [
    "Masked",
    "adcc",
    "average_drop",
    "blurred",
    "box_masks",
    "cascade",
    "coherency",
    "complexity",
    "confidence",
    "deletion",
    "energy_pointing",
    "explain_with",
    "impute",
    "increase_in_confidence",
    "insertion",
    "masked",
    "pearson",
    "perturbation_curve",
    "pointing_game",
    "rank_correlation",
    "road",
]
