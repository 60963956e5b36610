"""The CAM head: the nodes behind a classifier that make it explain itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.contrast import TARGETS_INPUT, Targets, chosen_classes
from diffcam_export.emit import Emitter
from diffcam_export.images import image_axes
from diffcam_export.layer import Size, cast, grid, size_of, sizes
from diffcam_export.methods import Explained, form_of
from diffcam_export.pictures import HeatmapType, heatmap
from diffcam_fast.contrast import Contrast
from diffcam_fast.methods import Method

MAP, TARGET, HEATMAP = "diffcam_map", "diffcam_target", "diffcam_heatmap"
"""The names of the added outputs."""


@dataclass(frozen=True)
class CamOptions:
    """What the CAM head computes.

    Attributes:
        method: of the CAM family, one that has a form.
        contrast: what the class is held against.
        relu: clip negative cells of the maps to 0.
        targets: which classes are explained.
        heatmap: the element type of the heatmaps; None: none are made.
    """

    method: Method
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
    several = asked is not None or (isinstance(options.targets, int) and options.targets > 1)
    explained = Explained(
        emit,
        options.method,
        logits,
        classes,
        options.contrast,
        several=several,
        checked=asked is not None,
    )
    form = form_of(options.method)
    outputs = []
    n = None if logits.shape is None else size_of(logits.shape[0])
    t: Size = "targets_t" if asked is not None else options.targets if several else 1
    for index, found in enumerate(founds):
        name = f"{MAP}_{index}" if index else MAP
        made = form.write(explained, found)
        if options.relu:
            made = emit("Relu", made)
        outputs.append(_named(grid(emit, made, found), name, [n, t, *sizes(found)[1:]]))
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


def _matrix(emit: Emitter, logits: ir.Value) -> ir.Value:
    """Logits (N, K) float32, K known, from (N, K) or (N, K, 1, 1)."""
    assert logits.shape is not None
    flat = logits if len(logits.shape) == 2 else emit("Flatten", logits, axis=1)
    flat = cast(emit, flat, ir.DataType.FLOAT)
    if flat is not logits:
        flat.shape = ir.Shape(logits.shape[:2])
    return flat


def _named(value: ir.Value, name: str, shape: Sequence[Size]) -> ir.Value:
    value.name = name
    value.shape = ir.Shape(shape)
    return value
