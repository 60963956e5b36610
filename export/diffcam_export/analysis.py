"""From an ONNX graph to a decision: the logits, the target layer, the head behind it.

By topology and shapes; no name is looked at.
"""

import difflib
from dataclasses import dataclass

import onnx_ir as ir

from diffcam_export.flow import Flow, Size, dims, is_float, named, origin
from diffcam_export.head import Head, Layout, read_head
from diffcam_export.outputs import Chosen, OnnxAnalysisError, choose

__all__ = ["Candidate", "Found", "OnnxAnalysisError", "analyse"]

# Linear maps and convolutions: three in VGG's head, four in attention pooling.
_LARGEST_HEAD = 8
_LISTED = 8
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


@dataclass(frozen=True)
class Candidate:
    """A value that could be explained.

    Attributes:
        name: of the value in the file.
        shape: (C, h, w); sizes that are free have a name, or are `?`.
        note: what speaks against it; empty where nothing does.
    """

    name: str
    shape: tuple[Size, Size, Size]
    note: str


@dataclass(frozen=True)
class Found:
    """What was found out about a graph.

    Attributes:
        layer: the activation A, 4-D.
        channel_axis: 1 for (N, C, h, w), 3 for (N, h, w, C).
        logits: (N, K), or with further axes of size 1: flattened from axis 1 on it is (N, K). The
            values before a final softmax where there is one.
        output: the model's own output that holds them, or their softmax.
        probabilities: that output is a softmax's result.
        head: the operators after the layer, in one line.
        weight: W, where the head is the pooled linear one; of a quantized model the dequantized W.
        weight_layout: the axes of W, "KC", "CK" or "KC11" for (K, C, 1, 1).
        reason: why the form is closed, or why it is not.
        candidates: the values all of the data passes through, last first; where there are none,
            those nearest to the logits.
    """

    layer: ir.Value
    channel_axis: int
    logits: ir.Value
    output: ir.Value
    probabilities: bool
    head: str
    weight: ir.Value | None
    weight_layout: Layout | None
    reason: str
    candidates: tuple[Candidate, ...]


def analyse(graph: ir.Graph, *, layer: str | None = None, logits: str | None = None) -> Found:
    """Finds the target layer and reads the head.

    Args:
        graph: the main graph of what `read_onnx` returns.
        layer: name of the activation to explain, any 4-D value; None: the last spatial activation
            before the classifier that all of the data passes through.
        logits: name of the logits, a value (N, K); None: the one output that can be.

    Raises:
        OnnxAnalysisError: the model is no image classifier, or it is not clear what is meant.
    """
    chosen: Chosen = choose(graph, logits)
    flow = Flow.to(graph, chosen.logits)
    found = _candidates(flow)
    candidates = tuple(candidate for _, candidate in found)
    if layer is None:
        value = next((value for value, candidate in found if not candidate.note), None)
        if value is None:
            raise OnnxAnalysisError(
                f"no layer found: {_why_none(flow)}. Name a layer to explain it all the same. "
                f"{_listing(candidates)}"
            )
    else:
        value = _named_layer(flow, layer, candidates)
    axis = flow.channel_axes.get(value, 1)
    head: Head = read_head(flow, value, axis)
    return Found(
        layer=value,
        channel_axis=axis,
        logits=chosen.logits,
        output=chosen.output,
        probabilities=chosen.probabilities,
        head=head.operators,
        weight=head.weight,
        weight_layout=head.layout,
        reason=head.reason,
        candidates=candidates,
    )


def _named_layer(flow: Flow, layer: str, candidates: tuple[Candidate, ...]) -> ir.Value:
    values = {v.name: v for node in flow.graph for v in node.outputs if v.name}
    if layer not in values:
        close = difflib.get_close_matches(layer, values, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "."
        raise OnnxAnalysisError(f"the model computes no {layer!r}{hint} {_listing(candidates)}")
    value = values[layer]
    shape = dims(value)
    what = None
    if value.producer() not in flow.place:
        what = "does not lie between the image and the logits"
    elif shape is None or len(shape) != 4:
        what = f"has the shape {shape or 'unknown'}, and is no spatial activation (N, C, h, w)"
    elif not is_float(value):
        what = f"holds {value.dtype}, not floats; take the value behind its DequantizeLinear"
    elif flow.channel_axes.get(value, 1) not in (1, 3):
        what = f"has its channels on axis {flow.channel_axes[value]}, not on 1 or 3"
    if what is not None:
        raise OnnxAnalysisError(f"layer {layer!r} {what}. {_listing(candidates)}")
    return value


def _candidates(flow: Flow) -> list[tuple[ir.Value, Candidate]]:
    """One per spatial value that all data passes through, last first."""
    found: list[tuple[ir.Value, Candidate]] = []
    mixers = flow.mixers()
    mixing = [flow.place[node] for node in mixers if flow.weights(node)]
    last = max((flow.place[node] for node in mixers), default=-1)
    classes = flow.classes()
    for value in flow.bottlenecks():
        shape = _spatial(flow, value)
        node = value.producer()
        if shape is None or node is None or node.op_type in ("Identity", "Cast", "Dropout"):
            continue
        place = flow.place[node]
        # Past a bottleneck every later operator belongs to the head.
        behind = sum(index > place for index in mixing)
        source = origin(value).producer()
        note = ""
        if last <= place and shape[0] == classes:
            note = "no weights between it and the logits: it is a map of class scores"
        elif source is not None and source.op_type in _AVERAGES:
            note = "an average of an earlier activation"
        elif behind > max(_LARGEST_HEAD, len(mixing) - behind):
            note = "most of the network lies behind it"
        found.append((value, Candidate(value.name or "", shape, note)))
    return found or _bypassed(flow)


def _bypassed(flow: Flow) -> list[tuple[ir.Value, Candidate]]:
    """Of a network of branches: the spatial values nearest to the logits, in all of them."""
    distance: dict[ir.Value, int] = {flow.logits: 0}
    for node in reversed(flow.nodes):
        own = max(distance.get(value, 0) for value in node.outputs)
        for value in flow.inputs(node):
            distance[value] = max(distance.get(value, 0), own + 1)
    nearest = sorted(distance, key=lambda value: distance[value])
    return [
        (value, Candidate(value.name or "", shape, "part of the data passes by it"))
        for value in nearest
        if value.producer() is not None and (shape := _spatial(flow, value)) is not None
    ][:_LISTED]


def _spatial(flow: Flow, value: ir.Value) -> tuple[Size, Size, Size] | None:
    """(C, h, w) of a float value of more than one cell whose channels are known."""
    shape, axis = dims(value), flow.channel_axes.get(value)
    if shape is None or len(shape) != 4 or axis not in (1, 3) or not is_float(value):
        return None
    h, w = shape[2:] if axis == 1 else shape[1:3]
    return None if (h, w) == (1, 1) else (shape[axis], h, w)


def _why_none(flow: Flow) -> str:
    bottlenecks = flow.bottlenecks()
    tokens = next(
        (v for v in bottlenecks if len(s := dims(v) or ()) == 3 and s[1] != 1 and is_float(v)), None
    )
    if tokens is not None:
        shape = dims(tokens)
        return f"the network ends in tokens, {tokens.name} {shape}, which have no rows and columns"
    unknown = next((node for node in flow.nodes if dims(node.outputs[0]) is None), None)
    if unknown is not None:
        return f"the shape behind {named(unknown)} cannot be told"
    return (
        "no value before the classifier's weights is an activation of more than one cell that all "
        "of the data passes through"
    )


def _listing(candidates: tuple[Candidate, ...]) -> str:
    if not candidates:
        return "The model has no candidates."
    shown = ", ".join(
        f"{c.name} ({', '.join(map(str, c.shape))}){f' ({c.note})' if c.note else ''}"
        for c in candidates[:_LISTED]
    )
    return f"Candidates: {shown}{' ...' if len(candidates) > _LISTED else ''}"
