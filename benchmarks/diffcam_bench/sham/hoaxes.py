"""The maps that a fooled network shall show, and how alike two maps are."""

import math

import numpy as np
import torch
from torch import Tensor

from diffcam_bench.rows import optional
from diffcam_fast.metrics import pearson, rank_correlation
from diffcam_kernels import ops

SIMILARITIES = ("pearson", "ssim", "rank", "iou20")


def border(height: int, width: int) -> Tensor:
    """Ones on the border, a seventh of the side wide, zeros within: the location target of Heo et
    al. Shape (height, width).
    """
    across, along = max(1, height // 7), max(1, width // 7)
    mask = torch.ones(height, width)
    mask[across : height - across, along : width - along] = 0
    return mask


def hoax(height: int, width: int, entropy: float) -> Tensor:
    """Ones from the border inwards, so many that the map has this entropy.

    A map of n equal cells has an entropy of ln n nats. Cells are taken by their distance to the
    border, in one ring the corners first: 28 of 49 are the border and the corners of the next ring.
    Which cells beyond the border are taken is our choice.

    Args:
        height: of the map.
        width: of the map.
        entropy: in nats.
    """
    count = min(max(1, round(math.exp(entropy))), height * width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = torch.minimum(rows, height - 1 - rows)
    along = torch.minimum(columns, width - 1 - columns)
    # By ring; within a ring, the nearer to its corner the earlier.
    order = (
        torch.minimum(across, along) * (height + width) + torch.maximum(across, along)
    ).flatten()
    mask = torch.zeros(height * width)
    mask[order.argsort(stable=True)[:count]] = 1
    return mask.view(height, width)


def entropy(maps: Tensor) -> Tensor:
    """Of maps (N, h, w), at least 0, as distributions over their cells; in nats, (N,); 0 for a map
    of zeros.
    """
    share = maps.flatten(1).double()
    share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    nats: Tensor = torch.special.entr(share).sum(1)
    return nats


def similarities(maps: Tensor, others: Tensor) -> dict[str, np.ndarray]:
    """How alike maps (N, h, w) are, by each of `SIMILARITIES`, (N,).

    Pearson's and Spearman's correlation in [-1, 1], 0 where a map is constant; SSIM of maps scaled
    to [0, 1]; the intersection over union of their largest fifths, in [0, 1].
    """
    ssim = optional("skimage.metrics", distribution="scikit-image").structural_similarity
    height, width = maps.shape[1:]
    one, two = _scaled(maps), _scaled(others)
    # SSIM takes windows of odd sides.
    window = min(7, height, width)
    window -= 1 - window % 2
    pairs = zip(one.numpy(), two.numpy(), strict=True)
    return {
        "pearson": pearson(one, two).numpy(),
        "ssim": np.array([ssim(a, b, data_range=1.0, win_size=window) for a, b in pairs]),
        "rank": rank_correlation(one, two).numpy(),
        "iou20": _overlap(one.flatten(1).numpy(), two.flatten(1).numpy()),
    }


def correlation(maps: Tensor, others: Tensor) -> np.ndarray:
    """Pearson's of maps (N, h, w), as in `similarities`, (N,)."""
    found: np.ndarray = pearson(_scaled(maps), _scaled(others)).numpy()
    return found


def _scaled(maps: Tensor) -> Tensor:
    """Each map between its least and largest."""
    scaled: Tensor = ops.heatmap(maps[:, None].float(), *maps.shape[1:])[:, 0]
    return scaled


def _overlap(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    count = max(1, round(0.2 * one.shape[1]))
    tops = [np.argsort(-m, axis=1, kind="stable")[:, :count] for m in (one, two)]
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(*tops, strict=True)])
    overlap: np.ndarray = shared / (2 * count - shared)
    return overlap
