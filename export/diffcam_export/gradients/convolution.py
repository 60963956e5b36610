"""Convolutions; their weights are constants."""

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal
from diffcam_export.gradients.shapes import sizes_of, static_shape
from diffcam_export.gradients.windows import Window, give_back, window_of


@first_rule("Conv")
def _conv(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, weight, group, kernel = _parts(node)
    window = window_of(node, kernel)
    if set(window.strides) == {1} and window.pads is not None:
        begin, end = (
            [extent - 1 - pad for extent, pad in zip(window.extents, pads, strict=True)]
            for pads in window.pads
        )
        if min(begin + end) >= 0:
            # Several times as fast as ConvTranspose in ONNX Runtime on a CPU; the turned weight is
            # a constant that the runtime computes once.
            return emit(
                "Conv",
                grad,
                _turned(weight, group, emit),
                kernel_shape=list(kernel),
                dilations=list(window.dilations),
                pads=[*begin, *end],
                group=group,
            )
    return give_back(grad, weight, x, window, emit, group=group)


@first_rule("ConvTranspose")
def _conv_transpose(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, weight, group, kernel = _parts(node)
    window: Window = window_of(node, kernel)
    attributes = node.attributes
    auto = attributes.get_string("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise refusal(node, "there is no rule for auto_pad SAME or output_shape")
    assert window.pads is not None
    result = emit(
        "Conv",
        grad,
        weight,
        kernel_shape=list(kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.pads[0], *window.pads[1]],
        group=group,
    )
    extra = attributes.get_ints("output_padding", [0])
    if all(e < s for e, s in zip(extra, window.strides, strict=False)):
        return result
    axes = emit.ints(*window.axes)
    zeros = emit.ints(*[0] * len(kernel))
    return emit("Slice", result, zeros, sizes_of(x, window.axes, emit), axes)


def _parts(node: ir.Node) -> tuple[ir.Value, ir.Value, int, tuple[int, ...]]:
    """Input, weight, groups, and size of the kernel."""
    x, weight, *_ = node.inputs
    assert x is not None and weight is not None
    kernel = node.attributes.get_ints("kernel_shape", []) or static_shape(weight)[2:]
    known = tuple(size for size in kernel if size is not None)
    if len(known) < len(kernel):
        raise refusal(node, "the size of its kernel is not known")
    return x, weight, node.attributes.get_int("group", 1), known


def _turned(weight: ir.Value, group: int, emit: Emitter) -> ir.Value:
    """(M, C / group, ...) to (C, M / group, ...) with the cells of each window in reverse."""
    out, each, *kernel = static_shape(weight)
    ndim = 2 + len(kernel)
    if group == 1:
        weight = emit("Transpose", weight, perm=[1, 0, *range(2, ndim)])
    elif out != group or each != 1:
        if out is None or each is None:
            raise ValueError(f"the sizes of the weight {weight.name!r} are not known")
        sizes = [-1 if size is None else size for size in kernel]
        weight = emit("Reshape", weight, emit.ints(group, out // group, each, *sizes))
        weight = emit("Transpose", weight, perm=[0, 2, 1, *range(3, ndim + 1)])
        weight = emit("Reshape", weight, emit.ints(group * each, out // group, *sizes))
    axes = [axis for axis, size in enumerate(kernel, 2) if size != 1]
    if not axes:
        return weight
    last, first, step = ([n] * len(axes) for n in (-1, -(2**31), -1))
    return emit(
        "Slice", weight, emit.ints(*last), emit.ints(*first), emit.ints(*axes), emit.ints(*step)
    )
