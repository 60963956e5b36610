"""Maps polished by the affinities of the network's stages."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.running import evaluating, unwrap
from diffcam_fast.split import once, tapped


def ssa(maps: Tensor, stages: Sequence[Tensor]) -> Tensor:
    """Maps spread over the cells that the network's stages find alike: our reading of SSA
    (arXiv 2111.03392), from its abstract.

    Of each stage S = relu(cosine of two cells' activations), each column divided by its sum, so
    that a map keeps its total; M' = mean over the stages of S M. A stage whose cells are all alike
    tells no two apart, and leaves the map as it is.

    Args:
        maps: M, (N, T, h, w).
        stages: activations (N, C_l, h_l, w_l), brought to h x w by bilinear interpolation.

    Returns:
        (N, T, h, w) float32, in the unit of the maps; NaN stays with its image.

    Raises:
        ValueError: no stage, or shapes that do not fit.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[[4.0, 0.0, 0.0]]]])
        >>> stage = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> ssa(maps, [stage])
        tensor([[[[2., 2., 0.]]]])
    """
    if maps.ndim != 4:
        raise ValueError(f"maps must be (N, T, h, w), got {tuple(maps.shape)}")
    if not stages:
        raise ValueError("give the activations of one stage at least")
    for stage in stages:
        if stage.ndim != 4 or len(stage) != len(maps):
            raise ValueError(
                f"a stage must be (N, C, h, w) with N = {len(maps)}, got {tuple(stage.shape)}"
            )
    size = (maps.shape[2], maps.shape[3])
    flat = maps.float().flatten(2)
    spread = [flat @ _affinity(stage, size).mT for stage in stages]
    return torch.stack(spread).mean(dim=0).view(maps.shape)


def _affinity(stage: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, P, P), columns of sum 1: what a cell in the column gives to a cell in the row."""
    stage = F.interpolate(stage.float(), size, mode="bilinear", align_corners=False).flatten(2)
    alike = (stage == stage[:, :, :1]).flatten(1).all(dim=1)
    directions = F.normalize(stage, dim=1, eps=torch.finfo(torch.float32).tiny)
    cosine = (directions.mT @ directions).relu()
    # A cell without activation is like itself alone.
    itself = torch.eye(cosine.shape[1], device=stage.device, dtype=torch.bool)
    silent = (stage == 0).all(dim=1)
    cosine = torch.where(itself & (silent[:, :, None] | alike[:, None, None]), 1.0, cosine)
    cosine = torch.where(~itself & alike[:, None, None], 0.0, cosine)
    return cosine / cosine.sum(dim=1, keepdim=True)


def stage_activations(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What layers of a network return for images, in one forward pass.

    Args:
        model: any network; it is left as it was.
        images: (N, C, H, W), as it takes them.
        layers: dotted module names.

    Returns:
        Of each layer its output, (N, C_l, h_l, w_l) in most convolutional networks.

    Raises:
        RuntimeError: a layer ran more than once, or not at all.
    """
    model = unwrap(model)
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.enter_context(tapped(model, layer, kept[layer].append))
        model(images.clone())
    return [once(kept[layer], layer) for layer in layers]
