"""Which value of a graph holds the logits."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from diffcam_export.flow import (
    MIXING,
    REARRANGING,
    Flow,
    dims,
    is_float,
    moving_values,
    origin,
    read_by,
)


class OnnxAnalysisError(ValueError):
    """A graph that cannot be explained, or not as asked; the message has the reason."""


@dataclass(frozen=True)
class Chosen:
    """The logits and the output they are returned in.

    Attributes:
        logits: (N, K), or with further axes of size 1.
        output: of the model.
        probabilities: it is a softmax of the logits.
    """

    logits: ir.Value
    output: ir.Value
    probabilities: bool


def choose(graph: ir.Graph, name: str | None) -> Chosen:
    """The logits of a classifier.

    Args:
        graph: the main graph.
        name: an output, or the value (N, K) to take; None: the one output that can be.

    Raises:
        OnnxAnalysisError: there is none, or more than one.
    """
    moving = moving_values(graph)
    outputs = [value for value in graph.outputs if value in moving]
    if name is not None:
        return _named(graph, outputs, moving, name)
    fitting = [read for value in outputs if (read := _read(value)) is not None]
    if not fitting:
        raise OnnxAnalysisError(
            "no output holds logits (N, K) of two or more classes that depend on the input: "
            f"{_listing(graph.outputs)}. Where a value inside does, name it (--logits)"
        )
    fitting = _first_of_their_kind(graph, fitting)
    logits = list(dict.fromkeys(one.logits for one in fitting))
    if len(logits) > 1:
        raise OnnxAnalysisError(
            f"the model has {len(logits)} outputs that could be logits: "
            f"{_listing([one.output for one in fitting])}. Name one as the logits (--logits)"
        )
    return min(fitting, key=lambda one: one.probabilities)


def _named(graph: ir.Graph, outputs: list[ir.Value], moving: set[ir.Value], name: str) -> Chosen:
    values = {v.name: v for node in graph for v in node.outputs if v.name and v in moving}
    value = values.get(name)
    if value is None:
        close = difflib.get_close_matches(name, values, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise OnnxAnalysisError(
            f"the model computes no {name!r} from its input{hint}. Outputs: {_listing(outputs)}"
        )
    if not _fits(value, least=1):
        raise OnnxAnalysisError(f"logits must be floats (N, K), not {_listing([value])}")
    if value in outputs:
        return _read(value) or Chosen(value, value, False)
    holding = [one for output in outputs if (one := _read(output)) and one.logits is value]
    if holding:
        return min(holding, key=lambda one: one.probabilities)
    after = {value}
    for node in graph:
        if not after.isdisjoint(read_by(node)):
            after.update(node.outputs)
    output = next((output for output in outputs if output in after), None)
    if output is None:
        raise OnnxAnalysisError(f"no output depends on {name!r}. Outputs: {_listing(outputs)}")
    return Chosen(value, output, False)


def _read(output: ir.Value) -> Chosen | None:
    """The logits behind an output, if it has their shape."""
    if not _fits(output):
        return None
    value = _before(output)
    node = value.producer()
    if node is None or node.op_type not in ("Softmax", "LogSoftmax") or node.domain != "":
        return Chosen(output, output, False)
    logits = node.inputs[0]
    shape = None if logits is None else dims(logits)
    if logits is None or shape is None or not _fits(logits):
        return None
    axis = node.attributes.get_int("axis", -1) % len(shape)
    if axis == 0 or shape[axis] == 1:
        # Not over the classes: the network means something else.
        return Chosen(output, output, False)
    # A logarithm of probabilities serves as logits itself: they differ by a constant.
    return Chosen(logits, output, node.op_type == "Softmax")


def _before(value: ir.Value) -> ir.Value:
    """What a value holds in another shape or element type."""
    while True:
        value = origin(value)
        node = value.producer()
        if node is None or node.op_type not in REARRANGING or node.inputs[0] is None:
            return value
        value = node.inputs[0]


def _first_of_their_kind(graph: ir.Graph, fitting: list[Chosen]) -> list[Chosen]:
    """Those that are neither features, from which others' logits are computed with weights, nor
    made of others' logits without any: probabilities, scaled logits, the best few.
    """
    dropped = set()
    for other in fitting:
        flow = Flow.to(graph, other.logits)
        for one in fitting:
            nodes = flow.behind(one.logits)
            if any(node.op_type in MIXING for node in nodes):
                dropped.add(one.logits)
            elif nodes and not any(_learned(v) for node in nodes for v in flow.weights(node)):
                dropped.add(other.logits)
    return [one for one in fitting if one.logits not in dropped] or fitting


def _learned(weight: ir.Value) -> bool:
    """Whether it is more than a single number."""
    return is_float(weight) and dims(weight) not in ((), (1,))


def _fits(value: ir.Value, *, least: int = 2) -> bool:
    """Whether it can be logits (N, K), with one axis after the first that is not 1."""
    shape = dims(value)
    if shape is None or len(shape) < 2 or not is_float(value):
        return False
    if len(shape) == 2:
        return not isinstance(shape[1], int) or shape[1] >= least
    free = [d for d in shape[1:] if d != 1]
    return len(shape) == 4 and len(free) == 1 and isinstance(free[0], int)


def _listing(values: Iterable[ir.Value]) -> str:
    return "; ".join(_told(value) for value in values) or "none"


def _told(value: ir.Value) -> str:
    shape = dims(value)
    sizes = "of unknown shape" if shape is None else f"({', '.join(map(str, shape))})"
    return f"{value.name} {sizes} {'' if value.dtype is None else value.dtype.name}".strip()
