"""Geometry that convolutions and pools share, and how windows give back what they were given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.shapes import INT64, shape_of, sizes_of, static_shape


@dataclass(frozen=True)
class Window:
    """The windows of a node, one entry for each spatial axis.

    Attributes:
        kernel: how many cells a window has.
        strides: how far apart windows are.
        dilations: how far apart the cells of a window are.
        pads: cells added before and behind, None where they depend on the size.
        upper: where they do, the odd one is added behind.
        ceil: a last window that is not whole counts, where it begins inside.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, ...], tuple[int, ...]] | None
    upper: bool
    ceil: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The spatial axes, after batch and channels."""
        return tuple(range(2, 2 + len(self.kernel)))

    @property
    def extents(self) -> tuple[int, ...]:
        """From the first to the last cell of a window."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def count(self, i: int, size: int) -> int:
        """How many windows there are along a spatial axis of so many cells; what shape inference
        says of ceil_mode is sometimes one too many.
        """
        stride = self.strides[i]
        if self.pads is None:
            return -(-size // stride)
        begin, end = self.pads[0][i], self.pads[1][i]
        room = size + begin + end - self.extents[i]
        if not self.ceil:
            return room // stride + 1
        count = -(-room // stride) + 1
        return count - 1 if (count - 1) * stride >= size + begin else count


def window_of(node: ir.Node, kernel: Sequence[int]) -> Window:
    """Reads strides, dilations and padding from the attributes of a node and its input's sizes."""
    attributes = node.attributes
    ones = [1] * len(kernel)
    strides = tuple(attributes.get_ints("strides", ones))
    dilations = tuple(attributes.get_ints("dilations", ones))
    auto = attributes.get_string("auto_pad", "NOTSET")
    ceil = attributes.get_int("ceil_mode", 0) == 1 and auto == "NOTSET"
    window = Window(tuple(kernel), strides, dilations, None, auto == "SAME_UPPER", ceil)
    if auto.startswith("SAME"):
        pads = _same_pads(window, node)
    else:
        flat = list(attributes.get_ints("pads", [])) if auto == "NOTSET" else []
        flat = flat or [0, 0] * len(kernel)
        pads = (tuple(flat[: len(kernel)]), tuple(flat[len(kernel) :]))
    return replace(window, pads=pads)


def _same_pads(window: Window, node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Padding by which a stride of 1 keeps the size, None where that is not known but needed."""
    x = node.inputs[0]
    assert x is not None
    totals = []
    for axis, stride, extent in zip(window.axes, window.strides, window.extents, strict=True):
        size = 0 if stride == 1 else static_shape(x)[axis]
        if size is None:
            return None
        totals.append(max(extent - stride + -size % stride, 0))
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (less, more) if window.upper else (more, less)


def give_back(
    grad: ir.Value,
    weight: ir.Value,
    x: ir.Value,
    window: Window,
    emit: Emitter,
    *,
    group: int = 1,
) -> ir.Value:
    """Each window spreads its number over its cells: the transpose of a convolution.

    Args:
        grad: (N, M, ...), one for each window.
        weight: (M, C / group, ...), of the convolution.
        x: what it was given; its spatial sizes are those of the result.
        window: its geometry.
        emit: writes the nodes.
        group: its groups.
    """
    begin, end = window.pads or (None, None)
    inside = begin is not None and begin == end
    pads = begin if inside and begin is not None else (0,) * len(window.kernel)
    extra, cut = _sizes_behind(x, window, pads, inside)
    full = emit(
        "ConvTranspose",
        grad,
        weight,
        kernel_shape=list(window.kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        group=group,
        pads=[*pads, *pads],
        output_padding=list(extra),
    )
    if not cut:
        return full
    sizes = sizes_of(x, window.axes, emit)
    axes = emit.ints(*window.axes)
    if inside:
        return emit("Slice", full, emit.ints(*[0] * len(pads)), sizes, axes)
    starts = _begin_at_run_time(x, window, emit) if begin is None else emit.ints(*begin)
    return emit("Slice", full, starts, emit("Add", starts, sizes), axes)


def _sizes_behind(
    x: ir.Value, window: Window, pads: Sequence[int], inside: bool
) -> tuple[tuple[int, ...], bool]:
    """Cells to add behind, so that no size of x is missed, and whether some are to be cut off."""
    extra: list[int] = []
    cut = not inside
    for i, axis in enumerate(window.axes):
        size = static_shape(x)[axis]
        stride = window.strides[i]
        if size is None:
            # Every remainder of the stride is covered; one too many is cut off.
            extra.append(stride - 1)
            cut = cut or stride > 1
            continue
        begin = 0 if window.pads is None else window.pads[0][i]
        shown = stride * (window.count(i, size) - 1) + window.extents[i] - 2 * pads[i]
        needed = size + (0 if inside else begin)
        extra.append(max(needed - shown, 0) if window.pads is not None else stride - 1)
        cut = cut or shown > needed
    return tuple(extra), cut


def _begin_at_run_time(x: ir.Value, window: Window, emit: Emitter) -> ir.Value:
    """SAME padding before the first cell, where the sizes are known only when the model runs."""
    sizes = emit("Slice", shape_of(x, emit), emit.ints(2), emit.ints(2 + len(window.kernel)))
    strides = emit.ints(*window.strides)
    counts = emit("Div", emit("Sub", emit("Add", sizes, strides), emit.ints(1)), strides)
    needed = emit("Mul", emit("Sub", counts, emit.ints(1)), strides)
    needed = emit("Add", needed, emit.ints(*window.extents))
    total = emit("Max", emit("Sub", needed, sizes), emit.ints(0))
    less = emit("Div", total, emit.ints(2))
    assert total.dtype == INT64
    return less if window.upper else emit("Sub", total, less)
