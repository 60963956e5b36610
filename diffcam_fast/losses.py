"""Training losses that are made of maps."""

import torch
from torch import Tensor


def cam_alignment_loss(
    activations: Tensor, weight: Tensor, labels: Tensor, *, detach_weight: bool = False
) -> Tensor:
    """How far the map of the true class is from that of all channels together: CAM-loss (arXiv
    2109.01359, ICCV 2021).

    mean |minmax(sum_k A_k) - minmax(sum_k w_yk A_k)|, each map brought to [0, 1] over its cells; a
    constant map is 0 and has no gradient. Added to the cross-entropy it teaches the features to
    leave out what the class does not need. Made from descriptions of the paper, whose own code is
    not public.

    Args:
        activations: A, (N, C, h, w), what the pooling in front of the classifier reads.
        weight: W, (K, C), of the classifier.
        labels: (N,) int64 in [0, K), the true classes.
        detach_weight: let the loss train the features alone.

    Returns:
        A scalar in [0, 1], differentiable in the activations and the weight; 0 for no images.

    Raises:
        ValueError: the shapes do not fit, or a label is no class.

    Example:
        >>> import torch
        >>> a = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
        >>> cam_alignment_loss(a, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1]))
        tensor(0.5000)
    """
    if activations.ndim != 4 or weight.ndim != 2 or weight.shape[1] != activations.shape[1]:
        raise ValueError(
            f"need A (N, C, h, w) and W (K, C), got {tuple(activations.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if labels.shape != activations.shape[:1] or labels.dtype.is_floating_point:
        raise ValueError(
            f"labels must be N = {len(activations)} class indices, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(f"labels must be from 0 to {len(weight) - 1}, got {labels.tolist()}")
    if activations.numel() == 0:
        return activations.sum()
    rows = (weight.detach() if detach_weight else weight)[labels]
    of_class = torch.einsum("nc,nchw->nhw", rows.to(activations.dtype), activations)
    return (_unit(activations.sum(dim=1)) - _unit(of_class)).abs().mean()


def _unit(maps: Tensor) -> Tensor:
    """Maps (N, h, w) by their minima and maxima to [0, 1]."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    constant = span == 0
    # A division by 1 keeps NaN out of the gradient of the other branch.
    scaled = (maps - low) / torch.where(constant, 1.0, span)
    return torch.where(constant, 0.0, scaled)
