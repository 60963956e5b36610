"""Operators that take some of the elements: their gradient is 0 at the others."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal
from diffcam_export.gradients.shapes import (
    INT64,
    array_of,
    ints_of,
    normalised,
    rank,
    shape_of,
    sizes_of,
    static_shape,
    zero_padded,
    zeros_like,
)


def _x(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


@dataclass(frozen=True)
class _Cut:
    """What a Slice does along one axis; ends beyond the last cell mean all of them."""

    axis: int
    start: int
    end: int
    step: int

    def places(self, size: int) -> np.ndarray:
        """The cells it takes of so many. Unlike Python's, a start before the first cell is the
        first one when going backwards.
        """
        start, end = (n + size if n < 0 else n for n in (self.start, self.end))
        if self.step > 0:
            return np.arange(min(max(start, 0), size), min(max(end, 0), size), self.step)
        return np.arange(min(max(start, 0), size - 1), min(max(end, -1), size - 1), self.step)


@first_rule("Slice")
def _slice(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, y = _x(node), node.outputs[0]
    cuts = _cuts(node)
    if cuts is None:
        return _slice_at_run_time(node, grad, emit)
    before: dict[int, ir.Value] = {}
    for cut in cuts:
        size = static_shape(x)[cut.axis]
        if size is not None:
            places = cut.places(size)
            if len(places) == size and cut.step == 1:
                continue
            if cut.step != 1 or not len(places):
                grad = _spread(grad, places, size, cut.axis, rank(x), emit)
                continue
            before[cut.axis] = emit.ints(int(places[0]))
        elif cut.step != 1:
            grad = _spread_at_run_time(grad, cut, x, emit)
        elif cut.start >= 0:
            before[cut.axis] = emit.ints(cut.start)
        else:
            # As many from the end as there are; all, where there are fewer.
            from_end = emit("Add", sizes_of(x, [cut.axis], emit), emit.ints(cut.start))
            before[cut.axis] = emit("Max", from_end, emit.ints(0))
    return _padded(grad, before, x, y, emit) if before else grad


def _cuts(node: ir.Node) -> list[_Cut] | None:
    """None where something about it is computed when the model runs."""
    given = [ints_of(value) for value in node.inputs[1:]]
    if any(v is not None and g is None for v, g in zip(node.inputs[1:], given, strict=True)):
        return None
    starts, ends, axes, steps = [*given, None, None][:4]
    assert starts is not None and ends is not None
    ndim = rank(_x(node))
    places = [normalised(axis, ndim) for axis in axes or range(len(starts))]
    ones = (1,) * len(starts)
    return [_Cut(*cut) for cut in zip(places, starts, ends, steps or ones, strict=True)]


def _padded(
    grad: ir.Value, before: dict[int, ir.Value], x: ir.Value, y: ir.Value, emit: Emitter
) -> ir.Value:
    """Zeros before and behind, up to the sizes of x."""
    grown: dict[int, tuple[int | ir.Value, int | ir.Value]] = {}
    for axis, start in before.items():
        first, size, count = ints_of(start), static_shape(x)[axis], static_shape(y)[axis]
        if first is not None and size is not None and count is not None:
            grown[axis] = first[0], size - count - first[0]
        else:
            added = emit("Sub", sizes_of(x, [axis], emit), sizes_of(y, [axis], emit))
            grown[axis] = start, emit("Sub", added, start)
    return zero_padded(grad, rank(x), grown, emit)


def _spread(
    grad: ir.Value, places: np.ndarray, size: int, axis: int, ndim: int, emit: Emitter
) -> ir.Value:
    """Cell i of an axis goes to places[i] of a longer one, no two to the same."""
    # Cells that nothing goes to read the zero that is put behind the last one.
    source = np.full(size, len(places), dtype=np.int64)
    source[places] = np.arange(len(places))
    ended = zero_padded(grad, ndim, {axis: (0, 1)}, emit)
    return emit("Gather", ended, emit.constant(source), axis=axis)


def _spread_at_run_time(grad: ir.Value, cut: _Cut, x: ir.Value, emit: Emitter) -> ir.Value:
    size = sizes_of(x, [cut.axis], emit)
    scalar = emit("Squeeze", size, emit.ints(0))
    zero, one = (emit.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    cells = emit("Range", zero, scalar, one, dtype=INT64)
    bounds = (emit.ints(n) for n in (cut.start, cut.end, 0, cut.step))
    places = emit("Slice", cells, *bounds)
    count = emit("Shape", places, dtype=INT64)
    numbers = emit("Range", zero, emit("Squeeze", count, emit.ints(0)), one, dtype=INT64)
    source = emit("ScatterElements", emit("Expand", count, size), places, numbers, axis=0)
    ended = zero_padded(grad, rank(x), {cut.axis: (0, 1)}, emit)
    return emit("Gather", ended, source, axis=cut.axis)


def _slice_at_run_time(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """The same Slice of the elements' numbers says where each came from."""
    x = _x(node)
    shape = shape_of(x, emit)
    count = emit("Size", x, dtype=INT64)
    zero, one = (emit.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    numbers = emit("Reshape", emit("Range", zero, count, one, dtype=INT64), shape)
    places = emit("Slice", numbers, *node.inputs[1:])
    flat = emit.ints(-1)
    zeros = emit("Expand", emit.like(grad, 0.0), emit("Reshape", count, flat))
    parts = emit("Reshape", places, flat), emit("Reshape", grad, flat)
    return emit("Reshape", emit("ScatterElements", zeros, *parts), shape)


@first_rule("Gather")
def _gather(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, indices = _x(node), node.inputs[1]
    assert indices is not None
    axis = normalised(node.attributes.get_int("axis", 0), rank(x))
    size = static_shape(x)[axis]
    places = array_of(indices)
    if places is not None and (size is not None or (places.size == 1 and int(places.min()) >= 0)):
        # The axes of the indices become one.
        if places.ndim == 0:
            grad = emit("Unsqueeze", grad, emit.ints(axis))
        elif places.ndim > 1:
            grad = _merged(grad, x, axis, places.size, emit)
        places = places.reshape(-1).astype(np.int64)
        if size is None:
            return _only_cell(grad, int(places[0]), axis, x, emit)
        places = np.where(places < 0, places + size, places)
        if len(places) == 1:
            place = int(places[0])
            return zero_padded(grad, rank(x), {axis: (place, size - 1 - place)}, emit)
        if len(set(places.tolist())) == len(places):
            return _spread(grad, places, size, axis, rank(x), emit)
        grad_rank_one = emit.constant(places)
        return _gather_added(grad, grad_rank_one, axis, x, emit)
    flat = emit("Reshape", indices, emit.ints(-1))
    return _gather_added(_merged(grad, x, axis, -1, emit), flat, axis, x, emit)


def _merged(grad: ir.Value, x: ir.Value, axis: int, count: int, emit: Emitter) -> ir.Value:
    """The axes that the indices put in the place of one become one again."""
    parts = [emit.ints(count)]
    if axis:
        parts.insert(0, sizes_of(x, range(axis), emit))
    if axis + 1 < rank(x):
        parts.append(sizes_of(x, range(axis + 1, rank(x)), emit))
    return emit("Reshape", grad, emit("Concat", *parts, axis=0))


def _only_cell(grad: ir.Value, place: int, axis: int, x: ir.Value, emit: Emitter) -> ir.Value:
    behind = emit("Sub", sizes_of(x, [axis], emit), emit.ints(place + 1))
    return zero_padded(grad, rank(x), {axis: (place, behind)}, emit)


def _gather_added(
    grad: ir.Value, places: ir.Value, axis: int, x: ir.Value, emit: Emitter
) -> ir.Value:
    """For places that may be taken several times."""
    column = emit("Reshape", places, emit.ints(-1, *[1] * (rank(x) - axis - 1)))
    everywhere = emit("Expand", column, emit("Shape", grad, dtype=INT64))
    return emit(
        "ScatterElements", zeros_like(x, grad, emit), everywhere, grad, axis=axis, reduction="add"
    )


@first_rule("GatherElements")
def _gather_elements(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x, indices = _x(node), node.inputs[1]
    axis = node.attributes.get_int("axis", 0)
    zeros = zeros_like(x, grad, emit)
    return emit("ScatterElements", zeros, indices, grad, axis=axis, reduction="add")


@first_rule("GatherND")
def _gather_nd(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    if node.attributes.get_int("batch_dims", 0):
        raise refusal(node, "there is no rule for its batch_dims")
    zeros = zeros_like(_x(node), grad, emit)
    return emit("ScatterND", zeros, node.inputs[1], grad, reduction="add")
