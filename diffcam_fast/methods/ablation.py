"""Ablation-CAM: what the score loses with each channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.methods.base import Method, weighted
from diffcam_fast.methods.masked import head_values
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_fast.passes import in_pieces
from diffcam_fast.targets import ClassTarget
from diffcam_kernels.reference import accumulate_dtype


@dataclass(frozen=True)
class AblationCAM(Method):
    """sum_k w_k A_k, w_k the fall of the score when channel k is set to 0 (WACV 2020).

    The authors divide the fall by the score, which scales a map, and turns its sign where the score
    is negative; here it stays in units of the score. Channels that are 0 already cost no pass.
    """

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        weight = call.network.head_weight()
        split = call.network.forward(call.images)
        [activations] = split.activations
        n, c = activations.shape[:2]
        with plain_float32(activations):
            target = call.asked.of(split.logits, split.output)
            rows = torch.arange(n, device=activations.device)
            whole = target.values(split.logits, split.output, rows)
            # NaN is no 0.
            alive = (activations != 0).flatten(2).any(dim=2)
        if weight is not None and isinstance(target, ClassTarget):
            with plain_float32(activations):
                lost = _closed_form(split.logits, activations, weight, target, call.memory)
            how = "closed form"
        else:
            pairs = alive.nonzero()

            def without(rows: Tensor, channels: Tensor) -> Tensor:
                changed = activations[rows]
                changed[torch.arange(len(rows), device=rows.device), channels] = 0
                return changed

            scores = head_values(call, split, target, pairs, without, what="channels")
            lost = whole.new_zeros((n, c, whole.shape[1]))
            lost[alive] = whole[pairs[:, 0]] - scores
            how = f"{c} passes of the head an image"
        with plain_float32(activations):
            maps = weighted(activations, lost.mT, relu=call.relu, eigen_smooth=self.eigen_smooth)
        return Maps(split.logits, target, (maps,), how, (activations,))


def _closed_form(
    logits: Tensor, activations: Tensor, weight: Tensor, target: ClassTarget, memory: int
) -> Tensor:
    """(N, C, T): without channel k a pooled linear head says z - W_k mean(A_k)."""
    n, c = activations.shape[:2]
    dtype = accumulate_dtype(logits, activations, weight)
    z, weight = logits.to(dtype), weight.to(dtype)
    means = activations.to(dtype).mean(dim=(2, 3))
    if target.of.is_linear:
        return (target.of.gradient(z, target.classes) @ weight * means[:, None]).mT
    # The score does not move with all logits; near 0 less of what they lose is rounded away.
    z = z - z.amax(dim=1, keepdim=True)
    rows = torch.arange(n, device=z.device).repeat_interleave(c)
    channels = torch.arange(c, device=z.device).repeat(n)
    whole = target.values(z, None, torch.arange(n, device=z.device))
    row_bytes = 4 * z.element_size() * z.shape[1] * whole.shape[1]
    lost = [
        whole[rows[piece]]
        - target.values(
            z[rows[piece]] - weight.T[channels[piece]] * means.flatten()[piece, None],
            None,
            rows[piece],
        )
        for piece in in_pieces(n * c, row_bytes, memory)
    ]
    return (torch.cat(lost) if lost else whole).view(n, c, whole.shape[1])
