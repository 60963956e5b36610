"""Operators that give the same elements another shape or order, or repeat them."""

from collections.abc import Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import first_rule, refusal, rule
from diffcam_export.gradients.shapes import (
    INT64,
    ints_of,
    normalised,
    rank,
    reduce_to,
    reshape_like,
    sizes_of,
    static_shape,
    zero_padded,
    zeros_like,
)

Grads = Sequence[ir.Value | None]


def _x(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return x


@first_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return reshape_like(grad, _x(node), emit)


@first_rule("Transpose")
def _transpose(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    order = node.attributes.get_ints("perm", None) or list(reversed(range(rank(_x(node)))))
    return emit("Transpose", grad, perm=sorted(range(len(order)), key=order.__getitem__))


@first_rule("Expand")
def _expand(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    x = _x(node)
    return reduce_to(grad, x, [x, node.outputs[0]], emit)


@first_rule("Tile")
def _tile(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """Each axis becomes two, copies and cells; the copies are added."""
    x = _x(node)
    repeats = ints_of(node.inputs[1])
    if repeats is None:
        raise refusal(node, "its repeats are computed when the model runs")
    axes = range(rank(x))
    pairs = [emit.ints(repeats[a]) for a in axes], [sizes_of(x, [a], emit) for a in axes]
    shape = emit("Concat", *(part for pair in zip(*pairs, strict=True) for part in pair), axis=0)
    split = emit("Reshape", grad, shape)
    return emit("ReduceSum", split, emit.ints(*(2 * a for a in axes)), keepdims=0)


@rule("Concat")
def _concat(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    [grad] = grads
    assert grad is not None
    operands = [value for value in node.inputs if value is not None]
    axis = normalised(node.attributes.get_int("axis"), rank(operands[0]))
    if len(operands) == 1:
        return [grad]
    sizes = [static_shape(value)[axis] for value in operands]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        lengths = emit.ints(*known)
    else:
        parts = [sizes_of(value, [axis], emit) for value in operands]
        lengths = emit("Concat", *parts, axis=0)
    if sum(wanted) == 1 and len(known) == len(sizes):
        index = list(wanted).index(True)
        first = sum(known[:index])
        bounds = [emit.ints(n) for n in (first, first + known[index], axis)]
        part = emit("Slice", grad, *bounds)
        return [part if asked else None for asked in wanted]
    pieces = emit.several("Split", grad, lengths, outputs=len(operands), axis=axis)
    return [piece if asked else None for piece, asked in zip(pieces, wanted, strict=True)]


@rule("Split")
def _split(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    given = next(grad for grad in grads if grad is not None)
    pieces = [
        zeros_like(value, given, emit) if grad is None else grad
        for value, grad in zip(node.outputs, grads, strict=True)
    ]
    whole = emit("Concat", *pieces, axis=node.attributes.get_int("axis", 0))
    return [whole, *[None] * (len(node.inputs) - 1)]


@first_rule("Trilu")
def _trilu(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("Trilu", grad, *node.inputs[1:], upper=node.attributes.get_int("upper", 1))


@first_rule("SpaceToDepth")
def _space_to_depth(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    return emit("DepthToSpace", grad, blocksize=node.attributes.get_int("blocksize"), mode="DCR")


@first_rule("DepthToSpace")
def _depth_to_space(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    size = node.attributes.get_int("blocksize")
    blocks = emit("SpaceToDepth", grad, blocksize=size)
    if node.attributes.get_string("mode", "DCR") == "DCR":
        return blocks
    # In a CRD layout the channels of a block stand together, not apart.
    tail = emit("Shape", blocks, dtype=INT64, start=2)
    split = emit("Concat", emit.ints(0, size * size, -1), tail, axis=0)
    turned = emit("Transpose", emit("Reshape", blocks, split), perm=[0, 2, 1, 3, 4])
    return emit("Reshape", turned, emit("Shape", blocks, dtype=INT64))


@first_rule("Pad")
def _pad(node: ir.Node, grad: ir.Value, emit: Emitter) -> ir.Value:
    """What was added is cut off, and what was cut off gets 0."""
    x = _x(node)
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant":
        raise refusal(node, f"there is no rule for its mode {mode!r}")
    if node.inputs[1] is None:
        raise refusal(node, "it has no pads")
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    named = range(rank(x)) if axes is None else ints_of(axes)
    if named is None:
        raise refusal(node, "its axes are computed when the model runs")
    pads = ints_of(node.inputs[1])
    if pads is None:
        opposite = emit("Neg", node.inputs[1], dtype=INT64)
        return emit("Pad", grad, opposite, emit.like(grad, 0.0), axes, mode="constant")
    begin, end = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if min(pads) < 0:
        places = [normalised(axis, rank(x)) for axis in named]
        counts = ((-before, -behind) for before, behind in zip(begin, end, strict=True))
        return zero_padded(grad, rank(x), dict(zip(places, counts, strict=True)), emit)
    padded = [i for i in range(len(begin)) if begin[i] or end[i]]
    if not padded:
        return grad
    return emit(
        "Slice",
        grad,
        emit.ints(*(begin[i] for i in padded)),
        emit.ints(*(-end[i] or 2**62 for i in padded)),
        emit.ints(*(named[i] for i in padded)),
    )
