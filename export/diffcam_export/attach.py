"""Changes to a graph: a CAM head behind it, a preparation of photographs in front of it."""

import numpy as np
import onnx_ir as ir

from diffcam_export.cam import CamHead
from diffcam_export.emit import Emitter
from diffcam_export.function import DOMAIN, as_function
from diffcam_export.images import image_axes
from diffcam_export.layer import size_of
from diffcam_export.pictures import prepared
from diffcam_fast.images.preprocess import Preprocess


def attach(model: ir.Model, head: CamHead, *, inline: bool) -> None:
    """Puts a CAM head behind the last node of a model, and its outputs behind the model's own.

    Args:
        model: changed in place.
        head: that reads the model's values.
        inline: leave its nodes among the others; else they become one ONNX function.
    """
    graph = model.graph
    if inline:
        graph.extend(head.nodes)
        graph.outputs.extend(head.outputs)
    else:
        call, function = as_function(
            head.nodes, head.outputs, name="Cam", opset=graph.opset_imports[""]
        )
        graph.append(call)
        graph.outputs.extend(call.outputs)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
    if head.targets is not None:
        # An input with an initializer may be left out.
        head.targets.const_value = ir.tensor(
            np.array([[-1]], dtype=np.int64), name=head.targets.name
        )
        graph.inputs.append(head.targets)
        graph.initializers.add(head.targets)


def bake(model: ir.Model, images: ir.Value, preprocess: Preprocess) -> ir.Value:
    """Lets a model take photographs, uint8 (N, height, width, 3), in place of its input.

    Args:
        model: changed in place.
        images: its input (N, 3, H, W) or (N, H, W, 3); H and W must be those of `preprocess` or
            free.
        preprocess: from a photograph to that input.

    Returns:
        The new input, of the old one's name.

    Raises:
        ValueError: the input is of another size than the preprocessing.
    """
    graph = model.graph
    channels, *spatial = image_axes(images)
    sides = [None if images.shape is None else images.shape[axis] for axis in spatial]
    fixed = [
        (side, size)
        for side, size in zip(sides, preprocess.size, strict=True)
        if isinstance(side, int) and side != size
    ]
    if fixed:
        raise ValueError(
            f"the model takes {sides[0]} x {sides[1]} pixels, the preprocessing makes "
            f"{preprocess.size[0]} x {preprocess.size[1]}"
        )
    assert images.dtype is not None
    batch = size_of(images.shape[0]) if images.shape is not None else None
    photographs = ir.val(images.name, ir.DataType.UINT8, [batch, "photo_height", "photo_width", 3])
    emit = Emitter(f"{DOMAIN}/photo")
    ready = prepared(emit, photographs, preprocess, images.dtype)
    if channels == 3:
        ready = emit("Transpose", ready, perm=[0, 2, 3, 1])
    images.replace_all_uses_with(ready)
    ready.shape = images.shape
    graph.inputs[list(graph.inputs).index(images)] = photographs
    graph[0].prepend(emit.nodes)
    return photographs
