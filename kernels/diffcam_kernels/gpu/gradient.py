"""gradient_cam: the map of a gradient method from activations and gradients.

A method is one device function in `CELLWISE` or a pair in `WEIGHTED`; nothing else here knows it.

A program owns a block of cells of one map, or a span of channels, and writes what they add. A
second launch adds the maps of spans, in order; where one span holds all channels, there is none.
Programs of further targets of the same cells run side by side and find A in the cache. No atomics.

Bytes: A and G once, the maps once; where there are spans, also a map for each, twice. FLOP: 2 N T C
P, for the weighted methods 4 to 10 N T C P.
"""

import torch
from torch import Tensor

from diffcam_kernels.gpu.cellwise import CELLWISE, plan_cellwise
from diffcam_kernels.gpu.launch import Launch, ceil_div, flat_cells
from diffcam_kernels.gpu.spans import plan_sum_spans
from diffcam_kernels.gpu.weighted import plan_weighted


def plan_gradient_cam(
    activations: Tensor, gradients: Tensor, reduction: str, maps: Tensor, relu: bool
) -> list[Launch]:
    """The launches that fill maps (N, T, h, w), with room of their own for the maps of spans."""
    n, c, height, width = activations.shape
    t = gradients.shape[1]
    plan = plan_cellwise if reduction in CELLWISE else plan_weighted
    tiles = plan(activations, gradients, reduction)
    spans = ceil_div(c, tiles.steps * tiles.block_c)
    parts = maps if spans == 1 else maps.new_empty((n, t, spans, height, width))
    arguments = {
        **{"a_ptr": activations, "g_ptr": gradients, "out_ptr": parts},
        **_sizes(activations, gradients),
    }
    constants = {
        **tiles.constants,
        **{"FLAT_A": flat_cells(activations), "FLAT_G": flat_cells(gradients)},
        **{"RELU": relu and spans == 1, "BLOCK_C": tiles.block_c, "BLOCK_P": tiles.block_p},
    }
    # A kernel for one layout takes fewer strides.
    taken = tiles.kernel.arg_names
    launch = Launch(
        tiles.kernel,
        (t * tiles.blocks * spans * n,),
        {name: value for name, value in arguments.items() if name in taken},
        {name: value for name, value in constants.items() if name in taken},
        num_warps=tiles.warps,
    )
    return [launch] if spans == 1 else [launch, plan_sum_spans(parts, maps, relu)]


def _sizes(activations: Tensor, gradients: Tensor) -> dict[str, int]:
    _, c, height, width = activations.shape
    strides = (*activations.stride(), *gradients.stride())
    names = ("an", "ac", "ah", "aw", "gn", "gt", "gc", "gh", "gw")
    return {
        **{"T": gradients.shape[1], "C": c, "P": height * width, "width": width},
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
    }


def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """See `diffcam_kernels.reference.gradient_cam`."""
    shape = (*gradients.shape[:2], *activations.shape[2:])
    maps = activations.new_empty(shape, dtype=torch.float32)
    for launch in plan_gradient_cam(activations, gradients, reduction, maps, relu):
        launch.run()
    return maps
