"""An `explain_func` for Quantus, which measures explanations."""

import numpy as np
import torch
from torch import nn

from diffcam_fast.explainer import Explainer
from diffcam_fast.inspections import Layer


def explain_func(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    method: str = "diff_grad_cam",
    layer: Layer | None = None,
    device: str | None = None,
    **ignored: object,
) -> np.ndarray:
    """Heatmaps of a batch, as Quantus asks for them.

    Args:
        model: an image classifier.
        inputs: (N, C, H, W).
        targets: (N,) classes.
        method: of the engine.
        layer: the target layer; None: found by running.
        device: not needed: the model knows its own.
        ignored: whatever else Quantus passes on.

    Returns:
        (N, 1, H, W) float32 in [0, 1].

    Example:
        >>> import numpy as np
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head)
        >>> explain_func(model, np.zeros((2, 3, 8, 8), np.float32), np.array([0, 1])).shape
        (2, 1, 8, 8)
    """
    images = torch.as_tensor(inputs, dtype=torch.float32)
    explainer = Explainer(model, method=method, layer=layer, example_inputs=images[:1])
    result = explainer(images, torch.as_tensor(targets).long())
    return result.heatmaps((images.shape[2], images.shape[3])).cpu().numpy()
