"""Methods that weigh activations with gradients of the score."""

from collections.abc import Callable

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.emit import Emitter
from diffcam_export.gradients import vjp
from diffcam_export.layer import cast, cell_count, cells, class_rows
from diffcam_export.methods.component import component, fewer_cells
from diffcam_export.methods.form import Explained
from diffcam_export.reductions import REDUCTIONS, weighted
from diffcam_fast.methods import GradientMethod


def gradient_method(at: Explained, found: Found) -> ir.Value:
    """A reduction of activations and gradients; behind a pooled linear head (d W / P) . A."""
    emit, method = at.emit, at.method
    assert isinstance(method, GradientMethod)
    a = cells(emit, found.layer, found)
    if found.weight is None or method.pooled is None:
        return _backward(at, found, a, REDUCTIONS[method.reduction])
    w = emit("MatMul", at.d, class_rows(emit, found))
    if method.pooled == "positive":
        w = emit("Relu", w)
    return weighted(emit, emit("Div", w, cell_count(emit, a)), a)


def eigen_grad_cam(at: Explained, found: Found) -> ir.Value:
    """The first principal component of the products of activations and gradients."""
    emit = at.emit
    a = cells(emit, found.layer, found)

    def of_products(emit: Emitter, a: ir.Value, g: ir.Value) -> ir.Value:
        products = emit("Unsqueeze", emit("Mul", g, a), emit.ints(1))
        return component(emit, products, of_cells=fewer_cells(found))

    if found.weight is None:
        return _backward(at, found, a, of_products)
    w = emit("MatMul", at.d, class_rows(emit, found))
    g = emit("Unsqueeze", emit("Div", w, cell_count(emit, a)), emit.ints(3))
    products = emit("Mul", g, emit("Unsqueeze", a, emit.ints(1)))
    return component(emit, products, of_cells=fewer_cells(found))


def _backward(
    at: Explained,
    found: Found,
    a: ir.Value,
    reduce: Callable[[Emitter, ir.Value, ir.Value], ir.Value],
) -> ir.Value:
    """(N, T, P), each target's from a backward of the head."""

    def of_one(emit: Emitter, d: ir.Value) -> ir.Value:
        dy = cast(emit, d, found.logits.dtype)
        if found.logits.shape is not None and len(found.logits.shape) > 2:
            dy = emit("Reshape", dy, emit("Shape", found.logits, dtype=ir.DataType.INT64))
        [g] = vjp({found.logits: dy}, [found.layer], emit)
        assert g is not None
        return reduce(emit, a, cells(emit, g, found))

    return at.each_target(at.d, of_one)
