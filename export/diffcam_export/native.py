"""onnx's own passes, which are C++ and take a serialized model: run without the large weights.

A protobuf holds at most 2 GiB, and a model may hold more. Weights that no pass has to look into
stand as inputs meanwhile.
"""

from collections.abc import Callable

import onnx
import onnx_ir as ir

from diffcam_export import apart

# Elements; those within may be axes, shapes or scales that a pass must read.
_SMALL = 256


def light(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """A copy in which large weights are inputs after the model's own, and these weights by name."""
    graph = model.graph
    own = list(graph.inputs)
    heavy = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and (value.const_value.size > _SMALL or isinstance(value.const_value, ir.ExternalTensor))
    }
    tensors = {name: value.const_value for name, value in heavy.items()}
    order = list(graph.initializers.values())
    try:
        for name, value in heavy.items():
            tensor = tensors[name]
            assert tensor is not None
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        return ir.serde.serialize_model(model), heavy
    finally:
        graph.inputs.clear()
        graph.inputs.extend(own)
        graph.initializers.clear()
        for value in order:
            if value.name in tensors:
                value.const_value = tensors[value.name]
            graph.register_initializer(value)


def rewritten(model: ir.Model, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> ir.Model:
    """A model after a pass of onnx; inputs, outputs, metadata and large weights are kept.

    Raises:
        ValueError: the pass renamed an input or an output.
    """
    proto, heavy = light(model)
    result = ir.serde.deserialize_model(change(proto))
    for value in [v for v in result.graph.inputs if v.name in heavy]:
        assert value.name is not None
        result.graph.inputs.remove(value)
        value.const_value = heavy[value.name].const_value
        result.graph.register_initializer(value)
    ends = [*model.graph.inputs, *model.graph.outputs]
    new = [*result.graph.inputs, *result.graph.outputs]
    if [v.name for v in ends] != [v.name for v in new]:
        raise ValueError(f"inputs or outputs were renamed to {[v.name for v in new]}")
    for before, after in zip(ends, new, strict=True):
        after.shape, after.type = before.shape, before.type
    result.metadata_props.clear()
    result.metadata_props.update(model.metadata_props)
    return result


def infer_shapes(model: ir.Model) -> None:
    """Fills in shapes and element types of the main graph's values, as far as they follow.

    A node whose declared shapes contradict each other keeps what is declared.
    """
    proto, _ = light(model)
    graph = apart.infer(proto).graph
    found = {info.name: info for info in (*graph.value_info, *graph.output)}
    for node in model.graph:
        for value in node.outputs:
            if value.name not in found:
                continue
            told = ir.serde.deserialize_value_info_proto(found[value.name], None)
            if told.type is not None and value.type is None:
                value.type = told.type
            if told.shape is None:
                continue
            if value.shape is None or not value.is_graph_output():
                value.shape = told.shape
            elif len(value.shape) == len(told.shape):
                # Declared names stay; a number says more than a name.
                value.shape = ir.Shape(
                    size if isinstance(size, int) and not isinstance(name, int) else name
                    for name, size in zip(value.shape, told.shape, strict=True)
                )
