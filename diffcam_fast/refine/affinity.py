"""Maps polished by the affinities of the network's stages."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.running import evaluating, unwrap

_ROUNDING = 16 * torch.finfo(torch.float32).eps


def ssa(maps: Tensor, stages: Sequence[Tensor]) -> Tensor:
    """Maps spread over the cells that the network's stages find alike: our reading of SSA
    (arXiv 2111.03392), made from its abstract.

    Of each stage S_ij = relu(cosine of the activations of cells i and j), and R = S with each row
    divided by its sum; M' = mean over the stages of R^T M. A cell gives what it has to the cells
    like it, so that a map keeps its total. Neither classes nor parameters take part.

    Two cases where S says nothing are decided: a cell without activation keeps what it has, and a
    stage whose cells are all the same, to within rounding, is the identity. By the formula it
    would level the map.

    Args:
        maps: M, (N, T, h, w), of any sign and unit.
        stages: activations (N, C_l, h_l, w_l), brought to h x w by bilinear interpolation.

    Returns:
        (N, T, h, w) float32, in the unit of the maps. NaN stays with its image.

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
        raise ValueError("give the activations of at least one stage")
    for stage in stages:
        if stage.ndim != 4 or len(stage) != len(maps) or 0 in stage.shape[1:]:
            raise ValueError(
                f"a stage must be (N, C, h, w) with N = {len(maps)}, got {tuple(stage.shape)}"
            )
    if maps.numel() == 0:
        return maps.float()
    size = (maps.shape[2], maps.shape[3])
    with torch.autocast(maps.device.type, enabled=False):
        flat = maps.float().flatten(2)
        fused = torch.zeros_like(flat)
        for stage in stages:
            fused += flat @ _affinity(stage, size)
    return (fused / len(stages)).view(maps.shape)


def _affinity(stage: Tensor, size: tuple[int, int]) -> Tensor:
    """R (N, P, P): what the cell of a row gives to the cell of a column; rows of sum 1."""
    stage = F.interpolate(stage.float(), size, mode="bilinear", align_corners=False).flatten(2)
    peak = stage.abs().amax(dim=1, keepdim=True)
    # From their peaks directions do not underflow, however small the activations.
    unit = stage / torch.where(peak == 0, 1.0, peak)
    unit = unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(1.0)
    cosine = (unit.mT @ unit).relu()
    spread = (stage.amax(dim=2) - stage.amin(dim=2)).amax(dim=1)
    same = spread <= _ROUNDING * peak.amax(dim=(1, 2))
    itself = torch.eye(cosine.shape[1], dtype=torch.bool, device=stage.device)
    cosine = torch.where(itself & (peak == 0), 1.0, cosine)
    cosine = torch.where(same[:, None, None], itself.float(), cosine)
    return cosine / cosine.sum(dim=2, keepdim=True)


def stage_activations(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What layers of a network return for images, in one forward pass.

    Args:
        model: any network; it runs in evaluation mode and is left as it was.
        images: (N, C, H, W), as it takes them.
        layers: dotted module names.

    Returns:
        Of each layer its output, (N, C_l, h_l, w_l) in most convolutional networks: a copy, which
        operators in place behind the layer do not reach.

    Raises:
        TypeError: a layer returns no tensor.
        ValueError: the model has no layer of this name.
        RuntimeError: a layer ran more than once, or not at all.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        >>> [tuple(a.shape) for a in stage_activations(model, torch.rand(2, 3, 16, 16), ["1", "2"])]
        [(2, 8, 14, 14), (2, 8, 7, 7)]
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    for layer in layers:
        if layer not in modules:
            raise ValueError(f"the model has no layer {layer!r}; named_modules() lists them")
    kept: dict[str, list[Any]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluating(model))
        for layer, outputs in kept.items():
            handle = modules[layer].register_forward_hook(_keeping(outputs))
            stack.callback(handle.remove)
        model(images.clone())
    return [_once(kept[layer], layer) for layer in layers]


def _keeping(outputs: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # Another thread may run the same model meanwhile.
        if threading.get_ident() == thread:
            # Copied outside inference mode, so that the caller may change it.
            with torch.inference_mode(False), torch.no_grad():
                outputs.append(output.clone() if isinstance(output, Tensor) else output)

    return hook


def _once(outputs: list[Any], layer: str) -> Tensor:
    if len(outputs) != 1:
        times = f"{len(outputs)} times" if outputs else "not at all"
        raise RuntimeError(f"layer {layer!r} ran {times} in one forward pass, not once")
    if not isinstance(outputs[0], Tensor):
        raise TypeError(f"layer {layer!r} returns {type(outputs[0]).__name__}, not a tensor")
    return outputs[0]
