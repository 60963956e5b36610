"""What a target is compared with: from logits to the gradient of the score."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_kernels.reference.precision import accumulate_dtype


def contrast_weights(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The blend q of the other classes that a target is contrasted with.

    q = softmax over j != c of z_j / T, and q_c = 0. T = infinity is the plain mean, T = 0 the one
    best other class (exact ties: the lowest index). A logit of -inf takes no part, in the mean
    neither. NaN logits give NaN.

    Args:
        logits: (N, K).
        targets: (N, T), int64 in [0, K).
        temperature: T in [0, inf], in units of the logits.
        reference: (N, T, K) bool, the classes to contrast with; None: all but the target.
        weights: (N, K), q itself; the temperature is not used then.

    Returns:
        (N, T, K), each row sums to 1.
    """
    z = logits.to(accumulate_dtype(logits))
    if weights is not None:
        return weights.to(z.dtype)[:, None, :].expand(-1, targets.shape[1], -1)
    others = z[:, None, :].repeat(1, targets.shape[1], 1)
    others.scatter_(2, targets[:, :, None], -math.inf)
    if reference is not None:
        others = others.masked_fill(~reference, -math.inf)
    # Past the range of the dtype a temperature is its limit.
    if temperature > torch.finfo(z.dtype).max:
        taken = others > -math.inf
        q = taken.to(z.dtype) / taken.sum(dim=2, keepdim=True)
    elif temperature < torch.finfo(z.dtype).tiny:
        q = F.one_hot(others.argmax(dim=2), z.shape[1]).to(z.dtype)
    else:
        # The maximum goes first: z / T overflows for a small T.
        q = torch.softmax((others - others.amax(dim=2, keepdim=True)) / temperature, dim=2)
    return torch.where(z.isnan().any(dim=1)[:, None, None], math.nan, q)


def contrast_gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float | None,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """d = dS/dz = e_c - q of the score S = z_c - sum_j q_j z_j with q held fixed.

    Args:
        logits: (N, K).
        targets: (N, T), int64 in [0, K).
        temperature: as in `contrast_weights`; None: no contrast, S = z_c and d = e_c.
        reference: as in `contrast_weights`.
        weights: as in `contrast_weights`.

    Returns:
        (N, T, K) float32 (float64 for float64 logits).
    """
    d = F.one_hot(targets, logits.shape[1]).to(accumulate_dtype(logits))
    if temperature is None and weights is None:
        return d
    return d - contrast_weights(
        logits, targets, math.inf if temperature is None else temperature, reference, weights
    )


def contrast_score(logits: Tensor, gradient: Tensor) -> Tensor:
    """S = sum_k d_k z_k (N, T), from the logits (N, K) and d (N, T, K); classes with d = 0 take no
    part.
    """
    z = logits.to(gradient.dtype)[:, None, :]
    return torch.where(gradient == 0, 0.0, gradient * z).sum(dim=2)


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit of each image, (N, 1) int64; ties take the lowest index."""
    if len(logits) == 0:
        return logits.new_zeros((0, 1), dtype=torch.int64)
    return logits.argmax(dim=1, keepdim=True)
