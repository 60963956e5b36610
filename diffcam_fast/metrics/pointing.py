"""Whether a heatmap points at the object: by its peak, and by where its mass lies."""

import torch
from torch import Tensor

from diffcam_fast.metrics.correlation import constant_maps
from diffcam_fast.metrics.passes import check_heatmaps, unknown


def pointing_game(heatmaps: Tensor, masks: Tensor, *, tolerance: float = 15) -> Tensor:
    """1 where the largest pixel is less than `tolerance` pixels from the object, else 0; as
    TorchRay's (arXiv 1608.00507). Of equal pixels the first from the top left counts; a constant
    heatmap points nowhere and misses.

    The accuracy of a set is the mean; the paper takes it class by class first.

    Args:
        heatmaps: (N, H, W) in [0, 1].
        masks: (N, H, W) bool, the pixels of the object; see `box_masks`.
        tolerance: pixels; 0 asks for a pixel of the object itself.

    Returns:
        (N,) of 0 and 1.

    Raises:
        ValueError: what does not fit.

    Example:
        >>> peak = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])
        >>> mask = torch.tensor([[[True, False, False, False]]])
        >>> [float(pointing_game(peak, mask, tolerance=t)) for t in (0, 3, 3.5)]
        [0.0, 0.0, 1.0]
    """
    _check(heatmaps, masks)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0 pixels, got {tolerance}")
    if not len(heatmaps):
        return heatmaps.new_zeros(0)
    height, width = heatmaps.shape[1:]
    peak = heatmaps.flatten(1).argmax(dim=1)[:, None, None]
    y = torch.arange(height, device=heatmaps.device)[:, None] - peak // width
    x = torch.arange(width, device=heatmaps.device) - peak % width
    squared = y * y + x * x
    near = (squared < tolerance**2) | (squared == 0)
    hit = (near & masks).flatten(1).any(dim=1) & ~constant_maps(heatmaps)
    return hit.to(heatmaps.dtype).masked_fill(unknown(heatmaps), torch.nan)


def energy_pointing(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """The share of a heatmap's mass that lies on the object; more is better (Score-CAM's
    energy-based pointing game, arXiv 1910.01279). Of a heatmap of zeros it is 0.

    Args:
        heatmaps: (N, H, W) in [0, 1].
        masks: (N, H, W) bool, the pixels of the object; see `box_masks`.

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: what does not fit.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> energy_pointing(torch.tensor([[[0.9, 0.3]]]), mask)
        tensor([0.7500])
    """
    _check(heatmaps, masks)
    total = heatmaps.flatten(1).sum(dim=1)
    inside = (heatmaps * masks).flatten(1).sum(dim=1)
    return torch.where(total == 0, total, inside / total)


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes as masks.

    Args:
        boxes: (N, 4) of left, top, right, bottom in pixels; right and bottom lie outside.
        size: (H, W).

    Returns:
        (N, H, W) bool.

    Raises:
        ValueError: other boxes.

    Example:
        >>> box_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), got {tuple(boxes.shape)}")
    left, top, right, bottom = boxes.T[:, :, None, None]
    y = torch.arange(size[0], device=boxes.device)[:, None]
    x = torch.arange(size[1], device=boxes.device)
    masks: Tensor = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return masks


def _check(heatmaps: Tensor, masks: Tensor) -> None:
    check_heatmaps(heatmaps)
    if masks.dtype != torch.bool or masks.shape != heatmaps.shape:
        raise ValueError(
            f"masks must be bool {tuple(heatmaps.shape)}, as the heatmaps; got {masks.dtype} "
            f"{tuple(masks.shape)}"
        )
