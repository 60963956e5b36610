"""Recipro-CAM: what the head says of each cell alone."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.methods.base import Method
from diffcam_fast.methods.masked import head_values
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_fast.passes import in_pieces
from diffcam_fast.targets import ClassTarget, Target
from diffcam_kernels.reference import accumulate_dtype


@dataclass(frozen=True)
class ReciproCAM(Method):
    """R_ij: the score of the activation with all cells but (i, j) set to 0 (arXiv 2209.14074).

    Without a contrast that is the probability of the class, as published; under a contrast
    `Contrast.value`. No ReLU: a score below 0 is no evidence against.
    """

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        weight = call.network.head_weight()
        split = call.network.forward(call.images)
        [activations] = split.activations
        n, _, h, w = activations.shape
        with plain_float32(activations):
            target = call.asked.of(split.logits, split.output)
        if weight is not None and isinstance(target, ClassTarget):
            with plain_float32(activations):
                scores = _closed_form(split.logits, activations, weight, target, call.memory)
            how = "closed form"
        else:
            pairs = torch.cartesian_prod(torch.arange(n), torch.arange(h * w))

            def one_cell(rows: Tensor, cells: Tensor) -> Tensor:
                flat = activations[rows].flatten(2)
                index = cells[:, None, None].expand(-1, flat.shape[1], 1)
                alone = torch.zeros_like(flat).scatter_(2, index, flat.gather(2, index))
                return alone.view(*flat.shape[:2], h, w)

            scores = head_values(
                call,
                split,
                target,
                pairs.to(activations.device),
                one_cell,
                what="cells",
                values=partial(_scores, target),
            )
            how = f"{h * w} passes of the head an image"
        maps = scores.view(n, h, w, target.scores.shape[1]).permute(0, 3, 1, 2).contiguous().float()
        return Maps(split.logits, target, (maps,), how)


def _closed_form(
    logits: Tensor, activations: Tensor, weight: Tensor, target: ClassTarget, memory: int
) -> Tensor:
    """(N P, T): with all else 0 the pooled linear head says W A_ij / P + b."""
    dtype = accumulate_dtype(logits, activations, weight)
    weight = weight.to(dtype)
    shares = activations.to(dtype).flatten(2) / (activations.shape[2] * activations.shape[3])
    bias = logits.to(dtype) - shares.sum(dim=2) @ weight.T
    rows = torch.arange(len(shares), device=shares.device).repeat_interleave(shares.shape[2])
    cells = shares.mT.flatten(0, 1)
    # The logits, and a few values of their size.
    logit_bytes = weight.shape[0] * target.scores.shape[1] + weight.shape[1]
    scores = [
        _scores(target, cells[piece] @ weight.T + bias[rows[piece]], None, rows[piece])
        for piece in in_pieces(len(cells), 4 * shares.element_size() * logit_bytes, memory)
    ]
    return torch.cat(scores) if scores else target.scores.new_zeros((0, target.scores.shape[1]))


def _scores(target: Target, logits: Tensor, output: Any, rows: Tensor) -> Tensor:
    if isinstance(target, ClassTarget) and target.contrast == "none":
        return logits.to(accumulate_dtype(logits)).softmax(dim=1).gather(1, target.classes[rows])
    return target.values(logits, output, rows)
