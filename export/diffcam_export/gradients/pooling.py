"""Pools."""

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule
from diffcam_export.gradients.shapes import (
    INT64,
    count_of,
    rank,
    reshape_like,
    shape_of,
    sizes_of,
    static_shape,
)
from diffcam_export.gradients.windows import Window, give_back, window_of


def _first(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


@first_rule("GlobalAveragePool")
def _global_average_pool(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _first(node)
    share = emit("Div", grad, count_of(x, range(2, rank(x)), grad, emit))
    return emit("Expand", share, shape_of(x, emit))


@first_rule("GlobalMaxPool")
def _global_max_pool(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """All of the gradient goes to the first maximum."""
    x = _first(node)
    rows = emit("Reshape", x, emit.ints(0, 0, -1))
    place = emit("ArgMax", rows, dtype=INT64, axis=2, keepdims=1)
    zeros = emit("Expand", emit.like(grad, 0.0), emit("Shape", rows, dtype=INT64))
    grad = emit("Reshape", grad, emit.ints(0, 0, 1))
    return reshape_like(emit("ScatterElements", zeros, place, grad, axis=2), x, emit)


@first_rule("MaxPool")
def _max_pool(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """All of a window's gradient goes to its first maximum, whose place a second MaxPool tells."""
    x = _first(node)
    attributes = {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name != "storage_order"
    }
    _, places = emit.several("MaxPool", x, outputs=2, **attributes)
    places.dtype = INT64
    flat = emit.ints(-1)
    # Places count over the whole tensor.
    size = emit("Reshape", emit("Size", x, dtype=INT64), flat)
    if None not in static_shape(x):
        size = emit.ints(int(np.prod([n or 0 for n in static_shape(x)], dtype=np.int64)))
    zeros = emit("Expand", emit.like(grad, 0.0), size)
    window = window_of(node, node.attributes.get_ints("kernel_shape"))
    apart = all(s >= e for s, e in zip(window.strides, window.extents, strict=True))
    scattered = emit(
        "ScatterElements",
        zeros,
        emit("Reshape", places, flat),
        emit("Reshape", grad, flat),
        reduction="none" if apart else "add",
    )
    return reshape_like(scattered, x, emit)


@first_rule("AveragePool")
def _average_pool(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _first(node)
    window = window_of(node, node.attributes.get_ints("kernel_shape"))
    grad = emit("Mul", grad, _share(node, window, x, grad, emit))
    spread = _spread_evenly(window, x, grad, emit)
    if spread is not None:
        return spread
    # Channels become images, so that one kernel serves all.
    counts = emit("Shape", node.outputs[0], dtype=INT64, start=2)
    single = emit("Concat", emit.ints(-1, 1), counts, axis=0)
    ones = emit.constant(np.ones((1, 1, *window.kernel), dtype=_dtype(grad).numpy()))
    images = emit("Reshape", grad, single)
    return reshape_like(give_back(images, ones, x, window, emit), x, emit)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _spread_evenly(window: Window, x: ir.Value, grad: ir.Value, emit: Emitter) -> ir.Value | None:
    """The two cases in which fast operators spread each number over its window."""
    sizes = [static_shape(x)[axis] for axis in window.axes]
    unpadded = window.pads is not None and not any(map(any, window.pads))
    whole = [s is not None and s % k == 0 for s, k in zip(sizes, window.kernel, strict=True)]
    if window.kernel == window.strides and set(window.dilations) == {1} and unpadded and all(whole):
        if tuple(sizes) == window.kernel:
            return emit("Expand", grad, shape_of(x, emit))
        scales = np.array([1, 1, *window.kernel], dtype=np.float32)
        return emit(
            "Resize",
            grad,
            None,
            emit.constant(scales),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    if set(window.strides) == {1} == set(window.dilations) and window.pads is not None:
        begin, end = (
            [k - 1 - pad for k, pad in zip(window.kernel, pads, strict=True)]
            for pads in window.pads
        )
        if min(begin + end) >= 0:
            mean = emit(
                "AveragePool",
                grad,
                kernel_shape=list(window.kernel),
                pads=[*begin, *end],
                count_include_pad=1,
            )
            return emit("Mul", mean, emit.like(grad, float(np.prod(window.kernel))))
    return None


def _share(node: ir.Node, window: Window, x: ir.Value, grad: ir.Value, emit: Emitter) -> ir.Value:
    """One over the number of cells that a window is an average of."""
    with_pads = node.attributes.get_int("count_include_pad", 0) == 1
    ceil = node.attributes.get_int("ceil_mode", 0) == 1
    padded = window.pads is None or any(map(any, window.pads))
    if (with_pads or not padded) and not ceil:
        return emit.like(grad, 1.0 / float(np.prod(window.kernel)))
    sizes = [static_shape(x)[axis] for axis in window.axes]
    known = [size for size in sizes if size is not None]
    if window.pads is None or len(known) < len(sizes):
        return _share_at_run_time(node, window, x, grad, emit)
    share = np.ones([1, 1] + [1] * len(known))
    for i, size in enumerate(known):
        count = window.count(i, size)
        along = [count if j == i + 2 else 1 for j in range(share.ndim)]
        share = share / _cells(window, i, size, count, with_pads).reshape(along)
    return emit.constant(share.astype(_dtype(grad).numpy()))


def _cells(window: Window, axis: int, size: int, count: int, with_pads: bool) -> np.ndarray:
    """How many cells each window has along an axis: padding counts or not, what lies behind the
    padding never does.
    """
    assert window.pads is not None
    begin, end = (pads[axis] for pads in window.pads)
    first = np.arange(count) * window.strides[axis] - begin
    places = first[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis]
    lowest, highest = (-begin, size + end) if with_pads else (0, size)
    cells: np.ndarray = ((places >= lowest) & (places < highest)).sum(axis=1)
    return cells


def _share_at_run_time(
    node: ir.Node, window: Window, x: ir.Value, grad: ir.Value, emit: Emitter
) -> ir.Value:
    """The pool itself says what it divides by: of ones it makes the cells of the image that a
    window covers, over that.
    """
    tail = sizes_of(x, window.axes, emit)
    ones = emit("Expand", emit.like(grad, 1.0), emit("Concat", emit.ints(1, 1), tail, axis=0))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    mean = emit("AveragePool", ones, **attributes)
    geometry = {k: v for k, v in attributes.items() if k not in ("ceil_mode", "count_include_pad")}
    if window.pads is not None:
        begin, end = window.pads
        # Conv knows no ceil_mode: a window more is made, and cut off where the pool has none.
        behind = [pad + stride - 1 for pad, stride in zip(end, window.strides, strict=True)]
        geometry |= {"pads": [*begin, *behind], "auto_pad": "NOTSET"}
    kernel = emit.constant(np.ones((1, 1, *window.kernel), dtype=_dtype(grad).numpy()))
    cells = emit("Conv", ones, kernel, **geometry)
    axes = window.axes
    counts = emit("Shape", mean, dtype=INT64, start=2)
    cells = emit("Slice", cells, emit.ints(*[0] * len(axes)), counts, emit.ints(*axes))
    return emit("Div", mean, cells)
