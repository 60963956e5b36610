"""head_cam: all of a pooled linear head, from activations to maps.

    z = W mean_p(A) + b,   w = (e_c - q) W / P,   M[n, t, p] = sum_c w[n, t, c] A[n, c, p]

The maps need every weight, a weight all logits, and a logit all channels: the device has to wait
for all of itself three times.

Plan: launches of the mean of each channel, of the product with W as `product` plans it, of the
channel weights as `channel_weights` plans them, and of `pooled_cam`. W is read twice, in its own
precision. Images go in runs whose A fits in half of the L2 cache: A crosses device memory once, and
`pooled_cam` finds it in the cache. So does the second launch that reads W.

A few images can instead go through `head_phases`, whose programs wait for each other within a
launch: `in_phases` decides.

Bytes: A, W and the logits once, the maps once. FLOP: 4 N K C where targets share a product with W,
2 N K C + 2 N T K C where they do not, and N C P + 2 N T C P.
"""

import torch
from torch import Tensor

from diffcam_kernels.gpu.channel_weights import fill_channel_weights
from diffcam_kernels.gpu.contrast import class_by_class
from diffcam_kernels.gpu.head_phases import APART, TOGETHER, Room, fits_phases, plan_phases, waits
from diffcam_kernels.gpu.launch import image_chunks
from diffcam_kernels.gpu.means import plan_channel_means
from diffcam_kernels.gpu.pooled import fill_pooled_cam
from diffcam_kernels.gpu.product import fill_product

# The most targets of all images that go through the phases, where launches cost more than the work
# in them: every program of a phase makes the contrast of all of them.
PHASES_ROWS = 5


def head_cam(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    reference: Tensor | None,
    blend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `diffcam_kernels.reference.head_cam`."""
    n, c, height, width = activations.shape
    t, k = 1 if targets is None else targets.shape[1], weight.shape[0]
    maps = activations.new_empty((n, t, height, width), dtype=torch.float32)
    room = Room(
        means=maps.new_empty((n, c)),
        logits=maps.new_empty((n, k)),
        weights=maps.new_empty((n, t, c)),
        maps=maps,
        chosen=maps.new_empty((n, t), dtype=torch.int64),
        scores=maps.new_empty((n, t)),
        arrived=maps.new_empty(1, dtype=torch.int32),
    )
    weight, bias = weight.detach(), None if bias is None else bias.detach().contiguous()
    targets = None if targets is None else targets.contiguous()
    if in_phases(activations, weight, t, reference, blend):
        phases = TOGETHER if waits(activations) else APART
        head = (weight, bias, targets, temperature, relu)
        for launch in plan_phases(activations, *head, room, phases):
            launch.run()
    else:
        _fill_by_launches(
            activations, weight, bias, targets, temperature, relu, reference, blend, room
        )
    return maps, room.logits, room.chosen, room.scores


def in_phases(
    activations: Tensor,
    weight: Tensor,
    targets: int,
    reference: Tensor | None,
    blend: Tensor | None,
) -> bool:
    """Whether the targets are few enough for `head_phases`, and the operands what it takes."""
    few = len(activations) * max(targets, 1) <= PHASES_ROWS and reference is None and blend is None
    return few and fits_phases(activations, weight)


def _fill_by_launches(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    reference: Tensor | None,
    blend: Tensor | None,
    room: Room,
) -> None:
    cells = activations.shape[2] * activations.shape[3]
    reference, blend = class_by_class(reference, blend)
    for run in image_chunks(activations):
        plan_channel_means(activations[run], room.means[run]).run()
        fill_product(room.means[run], weight.mT, bias, room.logits[run])
        fill_channel_weights(
            room.logits[run],
            weight,
            cells,
            None if targets is None else targets[run],
            temperature,
            None if reference is None else reference[run],
            None if blend is None else blend[run],
            room.weights[run],
            room.chosen[run],
            room.scores[run],
        )
        fill_pooled_cam(activations[run], room.weights[run], room.maps[run], relu)
