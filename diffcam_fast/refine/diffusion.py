"""Maps diffused along a transformer's attention."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffcam_fast.running import evaluating, unwrap

_ROUNDING = 16 * torch.finfo(torch.float32).eps


def ad_cam(maps: Tensor, attention: Tensor, *, first: int = 0, steps: int = 1) -> Tensor:
    """Maps diffused along attention, where it is shared: our reading of AD-CAM (arXiv 2211.10931),
    made from its abstract.

    A is the attention between the cells, the mean of its heads. A pair counts for more if both of
    it attend to the same others: B = A * (A A^T), each row divided by its sum; M' = B^T M. A cell
    gives what it has to the cells that it attends to, so that a map keeps its total.

    Two cases where A says nothing are decided: a cell that attends to no other cell and not to
    itself keeps what it has, and attention that is the same between all cells, to within rounding,
    is the identity. By the formula it would level the map.

    Args:
        maps: M, (N, T, h, w), of any sign and unit.
        attention: (N, heads, L, L) or (N, L, L), at least 0, rows attending to columns, as
            `attention_maps` gives it.
        first: how many tokens stand before those of the cells (class token, registers); what they
            attend to and who attends to them is left out. first + h w = L.
        steps: how often the map is diffused, at least 1.

    Returns:
        (N, T, h, w) float32, in the unit of the maps. NaN stays with its image.

    Raises:
        ValueError: the shapes do not fit, or no step.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[[4.0, 0.0, 1.0]]]])
        >>> attention = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
        >>> ad_cam(maps, attention)
        tensor([[[[2., 2., 1.]]]])
    """
    if maps.ndim != 4 or attention.ndim not in (3, 4) or len(attention) != len(maps):
        raise ValueError(
            f"need maps (N, T, h, w) and attention (N, heads, L, L) or (N, L, L) of the same N, "
            f"got {tuple(maps.shape)} and {tuple(attention.shape)}"
        )
    cells, tokens = maps.shape[2] * maps.shape[3], attention.shape[-1]
    if attention.shape[-2] != tokens:
        raise ValueError(f"attention must be square, got {tuple(attention.shape)}")
    if first < 0 or first + cells != tokens:
        fitting = f"first={tokens - cells}" if tokens >= cells else "attention of another layer"
        raise ValueError(
            f"{tokens} tokens are not {first} and {maps.shape[2]} x {maps.shape[3]} cells behind "
            f"them; these maps take {fitting}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if maps.numel() == 0:
        return maps.float()
    with torch.autocast(maps.device.type, enabled=False):
        among = attention.mean(dim=1, dtype=torch.float32) if attention.ndim == 4 else attention
        shared = _shared(among[:, first:, first:].float())
        flat = maps.float().flatten(2)
        for _ in range(steps):
            flat = flat @ shared
    return flat.view(maps.shape)


def _shared(among: Tensor) -> Tensor:
    """B (N, P, P), rows of sum 1, of the attention A (N, P, P) between the cells."""
    high, low = among.amax(dim=(1, 2), keepdim=True), among.amin(dim=(1, 2), keepdim=True)
    same = high - low <= _ROUNDING * high
    # B has a row's scale twice and A's once, which its sum takes out again: without them nothing
    # underflows where a class token or a register takes nearly all attention.
    row = among.amax(dim=2, keepdim=True)
    scaled = among / torch.where(row == 0, 1.0, row)
    shared = scaled * (scaled @ (among / torch.where(high == 0, 1.0, high)).mT)
    total = shared.sum(dim=2, keepdim=True)
    shared = shared / torch.where(total == 0, 1.0, total)
    itself = torch.eye(among.shape[1], device=among.device)
    return torch.where(same | (total == 0), itself, shared)


def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention of each layer of a transformer, in one forward pass.

    Seen are calls of `torch.nn.functional.scaled_dot_product_attention` and of
    `multi_head_attention_forward`, whose weights softmax(q k^T scale + mask) are computed again,
    and softmax over the last axis of a tensor (N, heads, L, L), as attention written out has it.
    That covers the vision transformers of timm and torchvision.

    Args:
        model: any network; it runs in evaluation mode and is left as it was.
        images: (N, C, H, W), as it takes them.

    Returns:
        Of each layer, in the order of the calls, (N', heads, L, L) float32 with rows of sum 1; N'
        is N unless attention runs in windows. Attention between unlike numbers of tokens is left
        out; a square one between channels looks the same and is not.

    Raises:
        RuntimeError: no attention was seen: there is none, or TorchScript hides it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=8, batch_first=True)
        >>> [tuple(a.shape) for a in attention_maps(model, torch.rand(3, 5, 8))]
        [(3, 2, 5, 5)]
    """
    model, seen = unwrap(model), _Attention()
    with torch.inference_mode(), evaluating(model), seen:
        model(images.clone())
    if not seen.maps:
        raise RuntimeError(
            f"saw no attention in {type(model).__name__}; it must call PyTorch's attention or a "
            "softmax over (N, heads, L, L), outside TorchScript"
        )
    return seen.maps


class _Attention(TorchFunctionMode):
    """Keeps the square attention of every call in its block; a mode holds for one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The mode is off in here, so that what a call is made of is not seen a second time.
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(_weights(*args, **kwargs))
        elif func in _SOFTMAX and _is_last(output, *args[1:], **kwargs):
            self._keep(output)
        return output

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given.apply_defaults()
        asked, averaged = (
            given.arguments[name] for name in ("need_weights", "average_attn_weights")
        )
        given.arguments.update(need_weights=True, average_attn_weights=False)
        output, weights = F.multi_head_attention_forward(*given.args, **given.kwargs)
        assert weights is not None
        self._keep(weights)
        if not asked:
            return output, None
        return output, weights.mean(dim=-3) if averaged else weights

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]:
            # Copied outside inference mode: the model may overwrite it, and so may the caller.
            with torch.inference_mode(False), torch.no_grad():
                self.maps.append(weights.to(torch.float32, copy=True))


_SOFTMAX = (torch.softmax, torch.special.softmax, Tensor.softmax, F.softmax)


def _is_last(output: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> bool:
    """Whether a softmax was taken over the last axis, as its arguments behind the input say."""
    return kwargs.get("dim", dim) in (-1, output.ndim - 1)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask), (N, heads, L, S), of what attention is called with."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().mT
        logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return logits.softmax(dim=-1)
