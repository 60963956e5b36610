"""Products of matrices."""

import re
from collections.abc import Sequence

import onnx_ir as ir

from diffcam_export.emit import Emitter
from diffcam_export.gradients.registry import refusal, rule
from diffcam_export.gradients.shapes import rank, reduce_to, static_shape

Grads = Sequence[ir.Value | None]


@rule("Gemm")
def _gemm(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    """`Y = alpha A' B' + beta C`, a prime where the operand is transposed first."""
    [grad] = grads
    a, b, *rest = node.inputs
    assert grad is not None and a is not None and b is not None
    get = node.attributes.get_int
    trans_a, trans_b = get("transA", 0), get("transB", 0)
    alpha = node.attributes.get_float("alpha", 1.0)
    results: list[ir.Value | None] = [None] * len(node.inputs)
    if wanted[0] and trans_a:
        results[0] = emit("Gemm", b, grad, alpha=alpha, transA=trans_b, transB=1)
    elif wanted[0]:
        results[0] = emit("Gemm", grad, b, alpha=alpha, transB=1 - trans_b)
    if wanted[1] and trans_b:
        results[1] = emit("Gemm", grad, a, alpha=alpha, transA=1, transB=trans_a)
    elif wanted[1]:
        results[1] = emit("Gemm", a, grad, alpha=alpha, transA=1 - trans_a)
    if rest and rest[0] is not None and wanted[2]:
        beta = emit.like(grad, node.attributes.get_float("beta", 1.0))
        results[2] = reduce_to(emit("Mul", grad, beta), rest[0], [rest[0], node.outputs[0]], emit)
    return results


@rule("MatMul")
def _matmul(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    """Of any number of axes: those before the last two broadcast."""
    [grad] = grads
    a, b = node.inputs
    assert grad is not None and a is not None and b is not None
    # A vector is a row on the left, a column on the right.
    row, column = rank(a) == 1, rank(b) == 1
    left = _unsqueezed(a, 0, emit) if row else a
    right = _unsqueezed(b, 1, emit) if column else b
    if column:
        grad = emit("Unsqueeze", grad, emit.ints(-1))
    if row:
        grad = emit("Unsqueeze", grad, emit.ints(-2))
    results: list[ir.Value | None] = [None, None]
    if wanted[0]:
        product = emit("MatMul", grad, _transposed(right, emit))
        product = reduce_to(product, left, [left, right], emit, trailing=2)
        results[0] = emit("Squeeze", product, emit.ints(0)) if row else product
    if wanted[1]:
        product = emit("MatMul", _transposed(left, emit), grad)
        product = reduce_to(product, right, [left, right], emit, trailing=2)
        results[1] = emit("Squeeze", product, emit.ints(1)) if column else product
    return results


def _unsqueezed(value: ir.Value, axis: int, emit: Emitter) -> ir.Value:
    [size] = static_shape(value)
    result = emit("Unsqueeze", value, emit.ints(axis))
    result.shape = ir.Shape([1, size] if axis == 0 else [size, 1])
    return result


def _transposed(value: ir.Value, emit: Emitter) -> ir.Value:
    *batch, rows, columns = range(rank(value))
    return emit("Transpose", value, perm=[*batch, columns, rows])


@rule("Einsum")
def _einsum(node: ir.Node, grads: Grads, wanted: Sequence[bool], emit: Emitter) -> Grads:
    """The same product with the operand and the result exchanged, each letter being elsewhere."""
    [grad] = grads
    assert grad is not None
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    match = re.fullmatch(r"([A-Za-z]*)(?:,([A-Za-z]*))?->([A-Za-z]*)", equation)
    if match is None:
        raise refusal(node, f"of its equation {equation!r}; only one or two operands, with ->")
    *terms, result = (term for term in match.groups() if term is not None)
    results: list[ir.Value | None] = []
    for index, (term, asked) in enumerate(zip(terms, wanted, strict=True)):
        others = [other for i, other in enumerate(terms) if i != index]
        if asked and (len(set(term)) < len(term) or not set(term) <= set(result).union(*others)):
            raise refusal(node, f"of its equation {equation!r}, which sums over a letter alone")
        operands = [value for i, value in enumerate(node.inputs) if i != index]
        inverse = f"{','.join([result, *others])}->{term}"
        results.append(emit("Einsum", grad, *operands, equation=inverse) if asked else None)
    return results
