"""What the methods share that look at outputs for masked activations or images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.network import Call, plain_float32
from diffcam_fast.passes import HeadPasses, bar, in_pieces
from diffcam_fast.split import Split
from diffcam_fast.targets import Target

Masked = Callable[[Tensor, Tensor], Tensor]
"""From images (M,) and masks (M,), both int64 indices, to activations (M, C, h, w)."""


def head_values(
    call: Call,
    split: Split,
    target: Target,
    pairs: Tensor,
    masked: Masked,
    *,
    what: str,
    values: Callable[[Tensor, Any, Tensor], Tensor] | None = None,
) -> Tensor:
    """The scores (M, T) of the head on masked activations.

    Args:
        call: what is being explained, at one layer.
        split: of the plain pass.
        target: what that turned out to be.
        pairs: (M, 2) int64, image and mask of each pass.
        masked: makes the activations of some of them.
        what: a word for the progress bar.
        values: in place of `target.values`.
    """
    [activations] = split.activations
    [returned] = split.returned
    passes = HeadPasses(call.network, call.images)
    layout = call.network.found.layout
    scores: list[Tensor] = []
    with bar(len(pairs), what, call.progress) as shown:
        for piece in in_pieces(len(pairs), passes.row_bytes(returned), call.memory):
            rows, masks = pairs[piece].unbind(1)
            with plain_float32(activations):
                cells = masked(rows, masks)
                outputs = layout.with_cells(returned[rows], cells)
            logits, output = passes(outputs, rows)
            with plain_float32(logits):
                scores.append((values or target.values)(logits.clone(), output, rows))
            shown.update(len(rows))
    if scores:
        return torch.cat(scores)
    return target.scores.new_zeros((0, target.scores.shape[1]))
