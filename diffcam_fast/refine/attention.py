"""Maps diffused along a transformer's attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffcam_fast.running import evaluating, unwrap


def ad_cam(maps: Tensor, attention: Tensor, *, first: int = 0, steps: int = 1) -> Tensor:
    """Maps diffused along attention, where it is shared: our reading of AD-CAM (arXiv 2211.10931),
    from its abstract.

    A is the attention between the cells, its heads averaged. Two cells that attend to each other
    count for more if they attend to the same others: B = A * (A A^T), each row divided by its sum.
    M' = B^T M: each cell gives what it has to the cells that it attends to, and the total stays.

    Args:
        maps: M, (N, T, h, w).
        attention: (N, heads, L, L) or (N, L, L), rows attending, as `attention_maps` gives it.
        first: how many tokens stand before those of the cells: a class token, registers.
        steps: how often the map is diffused, at least 1.

    Returns:
        (N, T, h, w) float32, in the unit of the maps; NaN stays with its image.

    Raises:
        ValueError: the shapes do not fit, or no step.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[[4.0, 0.0]]]])
        >>> ad_cam(maps, torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
        tensor([[[[2., 2.]]]])
    """
    h, w = maps.shape[-2:]
    if maps.ndim != 4 or attention.ndim not in (3, 4) or len(attention) != len(maps):
        raise ValueError(
            f"need maps (N, T, h, w) and attention (N, heads, L, L) or (N, L, L), got "
            f"{tuple(maps.shape)} and {tuple(attention.shape)}"
        )
    if attention.shape[-1] != attention.shape[-2] or first + h * w > attention.shape[-1]:
        raise ValueError(
            f"attention between {attention.shape[-2]} and {attention.shape[-1]} tokens does not "
            f"hold {h} x {w} cells behind the first {first}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    among = attention.float().mean(dim=1) if attention.ndim == 4 else attention.float()
    among = among[:, first : first + h * w, first : first + h * w]
    shared = among * (among @ among.mT)
    total = shared.sum(dim=2, keepdim=True)
    # A cell that attends to none keeps what it has.
    itself = torch.eye(h * w, device=maps.device).expand_as(shared)
    shared = torch.where(total == 0, itself, shared / torch.where(total == 0, 1.0, total))
    flat = maps.float().flatten(2)
    for _ in range(steps):
        flat = flat @ shared
    return flat.view(maps.shape)


def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention of each layer of a transformer, in one forward pass.

    Seen are PyTorch's attention operators, whose weights are computed again from queries and keys,
    and every softmax that is shaped as attention, however the model spells it.

    Args:
        model: any network; it is left as it was.
        images: (N, C, H, W), as it takes them.

    Returns:
        Of each layer, in order, (N', heads, L, L) float32 with rows of sum 1; N' is N unless
        attention runs in windows. Cross-attention between unlike numbers of tokens is left out.
    """
    model = unwrap(model)
    # In inference mode operators come whole, not as what they are made of.
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), _Attention() as seen:
        model(images.clone())
    maps: list[Tensor] = seen.maps
    return maps


class _Attention(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maps: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._schema.name.split("::")[1]
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if operator == "_native_multi_head_attention":
            # What it would throw away; the output is the same.
            output, weights = func(**given | {"need_weights": True, "average_attn_weights": False})
            self._keep(weights)
            return output, weights
        output = func(*args, **kwargs)
        if operator.startswith("_scaled_dot_product") and not given.get("is_causal"):
            self._keep(_weights(given))
        elif operator == "_softmax" and output.ndim == 4:
            self._keep(output)
        return output

    def _keep(self, weights: Tensor) -> None:
        if weights.shape[-1] == weights.shape[-2]:
            self.maps.append(weights.float())


def _weights(given: dict[str, Any]) -> Tensor:
    """softmax(q k^T scale + bias), (N, heads, L, L), of the arguments of an attention operator."""
    query, key, scale = given["query"].float(), given["key"].float(), given.get("scale")
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    bias = given.get("attn_mask", given.get("attn_bias"))
    weights: Tensor = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights
