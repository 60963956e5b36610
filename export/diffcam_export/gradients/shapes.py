"""Shapes of values: numbers where inference knows them, nodes where it does not."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from diffcam_export.emit import Emitter

INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL


def static_shape(value: ir.Value) -> tuple[int | None, ...]:
    """The sizes of a value's axes, None for each that inference does not know.

    Raises:
        ValueError: not even the number of axes is known.
    """
    if value.shape is None:
        raise ValueError(
            f"the number of axes of tensor {value.name!r} cannot be told from the file; fold its "
            "constants first (onnxscript.optimizer.optimize), choose a layer behind that tensor, "
            "or export the PyTorch model"
        )
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def rank(value: ir.Value) -> int:
    """The number of axes of a value."""
    return len(static_shape(value))


def normalised(axis: int, ndim: int) -> int:
    """An axis counted from the front."""
    return axis + ndim if axis < 0 else axis


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The elements of a constant, None for what is computed or absent."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Identity":
            break
        value = node.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def ints_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a constant of whole numbers, None for what is computed or absent."""
    array = array_of(value)
    return None if array is None else tuple(int(n) for n in array.reshape(-1))


def shape_of(value: ir.Value, emit: Emitter) -> ir.Value:
    """The sizes of all axes, int64."""
    if value.shape is not None:
        sizes = static_shape(value)
        if None not in sizes:
            return emit.ints(*(size for size in sizes if size is not None))
    return emit("Shape", value, dtype=INT64)


def sizes_of(value: ir.Value, axes: Sequence[int], emit: Emitter) -> ir.Value:
    """The sizes of some axes, int64 of one axis; the axes are counted from the front."""
    sizes = [static_shape(value)[axis] for axis in axes]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return emit.ints(*known)
    if list(axes) == list(range(axes[0], axes[0] + len(axes))):
        return emit("Shape", value, dtype=INT64, start=axes[0], end=axes[0] + len(axes))
    return emit("Gather", emit("Shape", value, dtype=INT64), emit.ints(*axes))


def count_of(value: ir.Value, axes: Sequence[int], grad: ir.Value, emit: Emitter) -> ir.Value:
    """The product of the sizes of some axes, a scalar of the element type of grad."""
    sizes = [static_shape(value)[axis] for axis in axes]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return emit.like(grad, float(np.prod(known, dtype=np.int64)))
    product = emit("ReduceProd", sizes_of(value, axes, emit), keepdims=0)
    assert grad.dtype is not None
    return emit("Cast", product, dtype=grad.dtype, to=grad.dtype.value)


def zero_padded(
    grad: ir.Value,
    ndim: int,
    grown: Mapping[int, tuple[int | ir.Value, int | ir.Value]],
    emit: Emitter,
) -> ir.Value:
    """Zeros before and behind some axes.

    Args:
        grad: a value of `ndim` axes.
        ndim: how many.
        grown: an axis -> how many cells come before and behind, each a number or int64 (1,).
        emit: writes the nodes.
    """
    # All axes are named: ONNX Runtime (1.31) moves a Transpose past a Pad as if they were.
    pairs = [grown.get(axis, (0, 0)) for axis in range(ndim)]
    counts = [before for before, _ in pairs] + [behind for _, behind in pairs]
    numbers = [count for count in counts if isinstance(count, int)]
    if len(numbers) == len(counts):
        pads = emit.ints(*numbers)
    else:
        parts = (count if isinstance(count, ir.Value) else emit.ints(count) for count in counts)
        pads = emit("Concat", *parts, axis=0, dtype=INT64)
    return emit("Pad", grad, pads, emit.like(grad, 0.0), mode="constant")


def zeros_like(value: ir.Value, grad: ir.Value, emit: Emitter) -> ir.Value:
    """Zeros of the shape of one value and the element type of another."""
    return emit("Expand", emit.like(grad, 0.0), shape_of(value, emit))


def reshape_like(grad: ir.Value, value: ir.Value, emit: Emitter) -> ir.Value:
    """The same elements in the shape of a value."""
    if value.shape is not None:
        sizes = [-1 if size is None else size for size in static_shape(value)]
        # One size may be left to the runtime, which cannot tell it where there are no elements.
        if sizes.count(-1) <= 1 and 0 not in sizes:
            return emit("Reshape", grad, emit.ints(*sizes))
    return emit("Reshape", grad, shape_of(value, emit))


def reduce_to(
    grad: ir.Value,
    operand: ir.Value,
    operands: Sequence[ir.Value],
    emit: Emitter,
    *,
    trailing: int = 0,
) -> ir.Value:
    """Sums over the axes along which an operand was repeated to meet the others.

    Args:
        grad: of the shape that the operands broadcast to.
        operand: one of the operands.
        operands: all of them.
        emit: writes the nodes.
        trailing: so many last axes take no part in broadcasting, as those of MatMul.
    """
    ndim = max(rank(value) for value in operands)
    missing = ndim - rank(operand)
    repeated = list(range(missing))
    unsure = False
    for axis in range(missing, ndim - trailing):
        size = _size_at(operand, axis, ndim)
        others = [_size_at(value, axis, ndim) for value in operands if value is not operand]
        differing = [other for other in others if other not in (1, size)]
        if size == 1 and differing:
            repeated.append(axis)
        unsure = unsure or (not isinstance(size, int) and bool(differing))
    if missing and len(repeated) == missing:
        grad = emit("ReduceSum", grad, emit.ints(*repeated), keepdims=0)
    elif repeated:
        grad = emit("ReduceSum", grad, emit.ints(*repeated), keepdims=1)
        if missing:
            grad = emit("Squeeze", grad, emit.ints(*range(missing)))
    return _sum_at_run_time(grad, operand, trailing, emit) if unsure else grad


def _size_at(value: ir.Value, axis: int, ndim: int) -> object:
    """The size, or the symbol, of the axis that meets the given one; something unique where even
    that is not known.
    """
    assert value.shape is not None
    index = axis - (ndim - len(value.shape))
    if index < 0:
        return 1
    size = value.shape[index]
    return object() if isinstance(size, ir.SymbolicDim) and size.value is None else size


def _sum_at_run_time(grad: ir.Value, operand: ir.Value, trailing: int, emit: Emitter) -> ir.Value:
    """Sums over the axes on which the operand turns out to have size 1."""
    sizes = emit("Shape", operand, dtype=INT64, end=rank(operand) - trailing)
    ones = emit("Equal", sizes, emit.ints(1), dtype=BOOL)
    axes = emit("Reshape", emit("NonZero", ones, dtype=INT64), emit.ints(-1))
    return emit("ReduceSum", grad, axes, keepdims=1, noop_with_empty_axes=1)
