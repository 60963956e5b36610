"""Methods in closed form alone: what a pooled linear head z = W mean_ij(A) + b says."""

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.emit import Emitter
from diffcam_export.layer import cell_count, cells, class_rows
from diffcam_export.methods.form import Explained
from diffcam_export.methods.value import linear_value, lost_value, of_whole_images, value
from diffcam_export.reductions import weighted


def class_activation_map(at: Explained, found: Found) -> ir.Value:
    """(d W) . A."""
    w = at.emit("MatMul", at.d, class_rows(at.emit, found))
    return weighted(at.emit, w, cells(at.emit, found.layer, found))


def recipro_cam(at: Explained, found: Found) -> ir.Value:
    """The score of W A_ij / P + b; without a contrast its probability."""
    emit = at.emit
    a, w = cells(emit, found.layer, found), class_rows(emit, found)
    shares = emit("Div", a, cell_count(emit, a))
    spoken = emit("MatMul", _means(emit, a), emit("Transpose", w, perm=[1, 0]))
    bias = emit("Sub", at.logits, spoken)
    if at.contrast.name != "none" and at.contrast.is_linear:
        cellwise = weighted(emit, emit("MatMul", at.d, w), shares)
        return emit("Add", cellwise, linear_value(at, bias))
    # A convolution takes batches without an image, which a product of W and A does not.
    rows = emit("Conv", shares, emit("Unsqueeze", w, emit.ints(2)))
    rows = emit("Add", rows, emit("Unsqueeze", bias, emit.ints(2)))
    if at.contrast.name == "none":
        return weighted(emit, at.d, emit("Softmax", rows, axis=1))
    return of_whole_images(at, at.each_target(at.column, lambda e, c: value(e, at, rows, c)))


def ablation_cam(at: Explained, found: Found) -> ir.Value:
    """sum_k w_k A_k, w_k what the score loses with channel k: z becomes z - W_k mean(A_k).

    Under a contrast that is not linear, N K C logits are made.
    """
    emit = at.emit
    a, w = cells(emit, found.layer, found), class_rows(emit, found)
    means = emit("Unsqueeze", _means(emit, a), emit.ints(1))
    if at.contrast.is_linear:
        return weighted(emit, emit("Mul", emit("MatMul", at.d, w), means), a)
    # The score does not move with all logits; near 0 less of what they lose is rounded away.
    z = emit("Sub", at.logits, emit("ReduceMax", at.logits, emit.ints(1), keepdims=1))
    whole = emit("Unsqueeze", z, emit.ints(2))
    rows = emit("Concat", whole, emit("Sub", whole, emit("Mul", w, means)), axis=2)
    lost = at.each_target(at.column, lambda e, c: lost_value(e, at, rows, c))
    return weighted(emit, of_whole_images(at, lost), a)


def _means(emit: Emitter, a: ir.Value) -> ir.Value:
    """(N, C)."""
    return emit("ReduceMean", a, emit.ints(2), keepdims=0)
