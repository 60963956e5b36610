"""The CAM head: the nodes behind a classifier that make it explain itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.contrast import TARGETS_INPUT, Targets, chosen_classes, contrast_gradient
from diffcam_export.emit import Emitter
from diffcam_export.gradients import vjp
from diffcam_export.images import image_axes
from diffcam_export.pictures import HeatmapType, heatmap
from diffcam_export.reductions import REDUCTIONS, weighted
from diffcam_fast.contrast import Contrast
from diffcam_fast.methods import GradientMethod

MAP, TARGET, HEATMAP = "diffcam_map", "diffcam_target", "diffcam_heatmap"
"""The names of the added outputs."""


Size = int | str | None
"""Of an axis: a number, a name, or not known."""


@dataclass(frozen=True)
class CamOptions:
    """What the CAM head computes.

    Attributes:
        method: of the CAM family.
        contrast: what the class is held against.
        relu: clip negative cells of the maps to 0.
        targets: which classes are explained.
        heatmap: the element type of the heatmaps; None: none are made.
    """

    method: GradientMethod
    contrast: Contrast
    relu: bool = True
    targets: Targets = "predicted"
    heatmap: HeatmapType | None = None


@dataclass(frozen=True)
class CamHead:
    """Nodes that are not yet part of a graph, and what they are about.

    Attributes:
        nodes: in topological order.
        outputs: the added outputs of the model, named.
        targets: the added input, where classes are one.
    """

    nodes: Sequence[ir.Node]
    outputs: Sequence[ir.Value]
    targets: ir.Value | None


def cam_head(
    founds: Sequence[Found], images: ir.Value, options: CamOptions, *, prefix: str
) -> CamHead:
    """The CAM head of one or more layers of a classifier.

    Args:
        founds: one for each layer, all with the same logits.
        images: the network's input (N, C, H, W) or (N, H, W, C), of whose size heatmaps are.
        options: what to compute.
        prefix: what the names of new values begin with.

    Raises:
        MissingRuleError: an operator between a layer and the logits has no derivative here.
    """
    emit = Emitter(prefix)
    logits = _matrix(emit, founds[0].logits)
    asked = None
    if options.targets == "input":
        asked = ir.val(TARGETS_INPUT, ir.DataType.INT64, ["targets_n", "targets_t"])
    classes = chosen_classes(emit, logits, options.targets, asked)
    d = contrast_gradient(emit, logits, classes, options.contrast, checked=asked is not None)
    several = asked is not None or (isinstance(options.targets, int) and options.targets > 1)
    outputs = []
    n = None if logits.shape is None else size_of(logits.shape[0])
    t: Size = "targets_t" if asked is not None else options.targets if several else 1
    for index, found in enumerate(founds):
        name = f"{MAP}_{index}" if index else MAP
        made = _maps(emit, found, d, options, several)
        outputs.append(_named(made, name, [n, t, *_sizes(found)[1:]]))
    outputs.append(_named(emit("Identity", classes), TARGET, [n, t]))
    if options.heatmap is not None:
        _, height, width = image_axes(images)
        size = emit("Shape", images, dtype=ir.DataType.INT64, start=height, end=width + 1)
        for index, maps in enumerate(outputs[:-1]):
            heat = heatmap(emit, maps, size, options.heatmap)
            shape = images.shape
            sides = [None if shape is None else size_of(shape[axis]) for axis in (height, width)]
            name = f"{HEATMAP}_{index}" if index else HEATMAP
            outputs.append(_named(heat, name, [n, t, *sides]))
    return CamHead(emit.nodes, outputs, asked)


def _maps(emit: Emitter, found: Found, d: ir.Value, options: CamOptions, several: bool) -> ir.Value:
    """(N, T, h, w) from d (N, T, K)."""
    a = _cells(emit, found.layer, found)
    if found.weight is not None:
        w = emit("MatMul", d, _class_rows(emit, found))
        if options.method.pooled == "positive":
            w = emit("Relu", w)
        maps = weighted(emit, emit("Div", w, _count(emit, a)), a)
    elif several:
        maps = _for_each_target(emit, found, d, options, a)
    else:
        cotangent = emit("Squeeze", d, emit.ints(1))
        maps = _gradient_map(emit, found, cotangent, options, a)
    if options.relu:
        maps = emit("Relu", maps)
    # A 0 keeps the axis: N and T.
    _, height, width = _sizes(found)
    if isinstance(height, int) and isinstance(width, int):
        return emit("Reshape", maps, emit.ints(0, 0, height, width))
    first = 1 if found.channel_axis == 3 else 2
    grid = emit("Shape", found.layer, dtype=ir.DataType.INT64, start=first, end=first + 2)
    return emit("Reshape", maps, emit("Concat", emit.ints(0, 0), grid, axis=0))


def _gradient_map(
    emit: Emitter, found: Found, cotangent: ir.Value, options: CamOptions, a: ir.Value
) -> ir.Value:
    """(N, 1, P) for one target, from the cotangent of the logits (N, K)."""
    dy = _cast(emit, cotangent, found.logits.dtype)
    if found.logits.shape is not None and len(found.logits.shape) > 2:
        dy = emit("Reshape", dy, emit("Shape", found.logits, dtype=ir.DataType.INT64))
    [g] = vjp({found.logits: dy}, [found.layer], emit)
    assert g is not None
    return REDUCTIONS[options.method.reduction](emit, a, _cells(emit, g, found))


def _for_each_target(
    emit: Emitter, found: Found, d: ir.Value, options: CamOptions, a: ir.Value
) -> ir.Value:
    """(N, T, P): a loop over the targets, whose body reads what the forward pass computed."""
    body = Emitter(f"{emit.prefix}/target")
    one = ir.val(f"{body.prefix}/d", ir.DataType.FLOAT, [None, None])
    single = body("Squeeze", _gradient_map(body, found, one, options, a), body.ints(1))
    single.shape = ir.Shape([None, None])
    graph = ir.Graph([one], [single], nodes=body.nodes, name=body.prefix)
    first = emit("Transpose", d, perm=[1, 0, 2])
    maps = emit("Scan", first, body=graph, num_scan_inputs=1)
    return emit("Transpose", maps, perm=[1, 0, 2])


def _matrix(emit: Emitter, logits: ir.Value) -> ir.Value:
    """Logits (N, K) float32, K known, from (N, K) or (N, K, 1, 1)."""
    assert logits.shape is not None
    flat = logits if len(logits.shape) == 2 else emit("Flatten", logits, axis=1)
    flat = _cast(emit, flat, ir.DataType.FLOAT)
    if flat is not logits:
        flat.shape = ir.Shape(logits.shape[:2])
    return flat


def _cells(emit: Emitter, value: ir.Value, found: Found) -> ir.Value:
    """(N, C, P) float32 of an activation or its gradient."""
    if found.channel_axis == 3:
        value = emit("Transpose", value, perm=[0, 3, 1, 2])
    return emit("Reshape", _cast(emit, value, ir.DataType.FLOAT), _three(emit, found))


def _three(emit: Emitter, found: Found) -> ir.Value:
    """The shape (N, C, P) for a Reshape, as far as it is known; a 0 keeps an axis."""
    c, h, w = _sizes(found)
    channels = c if isinstance(c, int) else 0
    # With a batch of no images -1 would have no value.
    cells = h * w if isinstance(h, int) and isinstance(w, int) else -1
    return emit.ints(0, channels, cells)


def _sizes(found: Found) -> tuple[Size, Size, Size]:
    """C, h and w of the activation, as far as the file tells."""
    shape = found.layer.shape
    if shape is None:
        return None, None, None
    first, second, third = (size_of(size) for size in list(shape)[1:4])
    return (third, first, second) if found.channel_axis == 3 else (first, second, third)


def size_of(size: int | ir.SymbolicDim) -> Size:
    """As what writes a shape takes it."""
    return size if isinstance(size, int) else size.value


def _count(emit: Emitter, a: ir.Value) -> ir.Value:
    """P as a float32 number."""
    p = emit("Shape", a, dtype=ir.DataType.INT64, start=2, end=3)
    return emit("Cast", p, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)


def _class_rows(emit: Emitter, found: Found) -> ir.Value:
    """W (K, C) float32."""
    assert found.weight is not None
    weight = _cast(emit, found.weight, ir.DataType.FLOAT)
    if found.weight_layout == "KC11":
        return emit("Flatten", weight, axis=1)
    return emit("Transpose", weight, perm=[1, 0]) if found.weight_layout == "CK" else weight


def _cast(emit: Emitter, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return value if dtype in (None, value.dtype) else emit("Cast", value, dtype=dtype, to=dtype)


def _named(value: ir.Value, name: str, shape: Sequence[Size]) -> ir.Value:
    value.name = name
    value.shape = ir.Shape(shape)
    return value
