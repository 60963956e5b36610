"""Training losses that are made of maps."""

import torch
from torch import Tensor


def cam_alignment_loss(
    activations: Tensor, weight: Tensor, labels: Tensor, *, detach_weight: bool = False
) -> Tensor:
    """How far the map of the true class is from that of all channels together: CAM-loss (arXiv
    2109.01359, ICCV 2021).

    mean |minmax(sum_k A_k) - minmax(sum_k w_yk A_k)|, each map brought to [0, 1] over its cells.
    A map that is constant to within its rounding is 0 and has no gradient. Added to the
    cross-entropy it teaches the features to leave out what the class does not need. The paper has
    no public code; this is its formula.

    Args:
        activations: A, (N, C, h, w), what the pooling in front of the classifier reads.
        weight: W, (K, C), of the classifier.
        labels: (N,) int64 in [0, K), the true classes.
        detach_weight: let the loss train the features alone.

    Returns:
        A scalar in [0, 1], float32 or wider, differentiable in the activations and the weight; 0
        for no images. NaN in an activation gives NaN.

    Raises:
        TypeError: the labels are not int64.
        ValueError: the shapes do not fit, or a label is no class.

    Example:
        >>> import torch
        >>> a = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> w = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])
        >>> cam_alignment_loss(a, w, torch.tensor([0])), cam_alignment_loss(a, w, torch.tensor([1]))
        (tensor(0.), tensor(1.))
    """
    if activations.ndim != 4 or weight.ndim != 2 or weight.shape[1] != activations.shape[1]:
        raise ValueError(
            f"need activations (N, C, h, w) and a weight (K, C) of the same C, got "
            f"{tuple(activations.shape)} and {tuple(weight.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 class indices, got {labels.dtype}; use .long()")
    if labels.shape != activations.shape[:1]:
        raise ValueError(
            f"labels must be ({len(activations)},), one for each image, got {tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(
            f"labels must be from 0 to {len(weight) - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    # Half precision cannot tell a constant map from a flat one, and autocast would return to it.
    with torch.autocast(activations.device.type, enabled=False):
        a = activations.to(torch.promote_types(activations.dtype, torch.float32))
        if a.numel() == 0:
            return a.sum()
        rows = (weight.detach() if detach_weight else weight)[labels].to(a.dtype)
        return (_unit(torch.ones_like(rows), a) - _unit(rows, a)).abs().mean()


def _unit(rows: Tensor, activations: Tensor) -> Tensor:
    """The maps (N, h, w) of weights (N, C), by their minima and maxima in [0, 1]."""
    maps = torch.einsum("nc,nchw->nhw", rows, activations)
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    with torch.no_grad():
        # What a sum of C products may be off by: it is not stretched to a map.
        size = torch.einsum("nc,nchw->nhw", rows.abs(), activations.abs())
        rounding = torch.finfo(maps.dtype).eps * rows.shape[1] ** 0.5
        constant = span <= rounding * size.amax(dim=(1, 2), keepdim=True)
    # A division by 1 keeps NaN out of the gradient of the other branch.
    scaled = (maps - low) / torch.where(constant, 1.0, span)
    return torch.where(constant, 0.0, scaled)
