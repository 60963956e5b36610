"""From a trace to a decision: the target layer, the head behind it, and how its gradient is had."""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.analysis.head import Head, read_head
from diffcam_fast.analysis.trace import Node, Trace, trace
from diffcam_fast.layout import Layout
from diffcam_fast.running import pick_logits
from diffcam_fast.split import Output

# Linear maps and convolutions: three in VGG's head, four in attention pooling.
_LARGEST_HEAD = 8
_LISTED = 8


class AnalysisError(ValueError):
    """No layer of the model can be explained, or not the one that was asked for; the message lists
    candidates.
    """


Shape = tuple[int | str, int | str, int | str]
"""Sizes of three axes; an ONNX file may leave one free, which then has a name."""


@dataclass(frozen=True)
class Candidate:
    """A layer that could be explained.

    Attributes:
        name: dotted module name, as `get_submodule` takes it.
        shape: (C, h, w) of its output.
        note: what speaks against it; empty where nothing does.
    """

    name: str
    shape: Shape
    note: str


@dataclass(frozen=True)
class Inspection:
    """What was found out about a model at one input size.

    Attributes:
        layer: dotted module name of the target layer.
        shape: (C, h, w) of its output.
        layout: where in its output the channels and the cells are.
        head: the operators after the layer, in one line.
        closed_form: the head is a pooled linear one, and its gradient d W / P needs no backward
            pass.
        reason: why it is, or is not.
        weight: name of the head's weight, (K, C) or (K, C, 1, 1), where the form is closed.
        probabilities: the model ends in a softmax; what that is given are the logits.
        candidates: the layers all of the data passes through, last first; where there are none,
            the layers nearest to the logits.
        input_shape: (C, H, W) of the images that it holds for.
        largest: bytes of the largest value that the network computes for one image; 0 where that
            is not known.
    """

    layer: str
    shape: Shape
    layout: Layout
    head: str
    closed_form: bool
    reason: str
    weight: str | None
    probabilities: bool
    candidates: tuple[Candidate, ...]
    input_shape: Shape
    largest: int = 0


def analyse(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str | None = None,
    output: Output = pick_logits,
    layout: Layout | None = None,
) -> Inspection:
    """Finds the target layer and reads the head.

    Args:
        model: an image classifier, unwrapped (see `diffcam_fast.running.unwrap`).
        images: (N, C, H, W) at the size that will be explained; two tell a batch axis from a single
            image.
        layer: dotted module name of the target layer; None: the last spatial activation before the
            classifier.
        output: what finds the logits (N, K) in what the model returns.
        layout: where in the layer's output channels and cells are; None: found out.

    Raises:
        AnalysisError: no layer fits, or the given one does not.
        OutputError: the model returns no logits, a TypeError.
    """
    flow = trace(model, images, output=output)
    candidates = _candidates(flow)
    if layer is None:
        chosen = next((c for c in candidates if not c.note), None)
        if chosen is None:
            raise AnalysisError(
                f"no layer found: {_why_none(flow)}. Name a layer to explain it all the same. "
                f"{_about_torchscript(model)}{_listing(candidates)}"
            )
        layer = chosen.name
    node = _node(model, flow, layer, candidates)
    layout = Layout(node.channel_axis or 1)
    head: Head = read_head(model, images, flow, layer, node, layout=layout, output=output)
    h, w = node.shape[1:3] if node.channel_axis == 3 else node.shape[2:]
    return Inspection(
        layer=layer,
        shape=(node.channels, h, w),
        layout=layout,
        head=head.operators,
        closed_form=head.weight is not None,
        reason=head.reason,
        weight=head.weight,
        probabilities=head.probabilities,
        candidates=candidates,
        input_shape=(images.shape[1], images.shape[2], images.shape[3]),
        largest=flow.largest,
    )


def _node(model: nn.Module, flow: Trace, layer: str, candidates: tuple[Candidate, ...]) -> Node:
    if layer not in dict(model.named_modules()):
        close = difflib.get_close_matches(layer, dict(model.named_modules()), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "."
        raise AnalysisError(f"the model has no layer {layer!r}{hint} {_listing(candidates)}")
    if flow.calls[layer] > 1:
        raise AnalysisError(
            f"layer {layer!r} runs {flow.calls[layer]} times in one forward pass, so that its "
            f"output is not one activation. {_listing(candidates)}"
        )
    node = flow.node_of(layer)
    if node is None:
        raise AnalysisError(
            f"layer {layer!r} does not run, or returns no tensor of its own. "
            f"{_about_torchscript(model)}{_listing(candidates)}"
        )
    spatial = node.channel_axis in (1, 3) or _read_by_convolution(flow, node)
    if len(node.shape) != 4 or not spatial:
        raise AnalysisError(
            f"layer {layer!r} returns {node.shape}, not a spatial activation (N, C, h, w). "
            f"{_listing(candidates)}"
        )
    return node


def _read_by_convolution(flow: Trace, node: Node) -> bool:
    """The channels of a value that was taken apart and put together, shuffled say, are where the
    convolution that reads it has them.
    """
    readers = (n for n in flow.nodes.values() if node.index in n.parents)
    return node.channel_axis is None and any("convolution" in n.operator for n in readers)


def _candidates(flow: Trace) -> tuple[Candidate, ...]:
    """One per spatial value that all data passes through, last first."""
    found: list[Candidate] = []
    mixers = [n for n in flow.leading_to_logits() if _mixes_channels(n)]
    mixing = [n.index for n in mixers if n.parameters]
    for node in flow.bottlenecks():
        name = _module_of(flow, node)
        if node.grid is None or name is None:
            continue
        note = ""
        # Past a bottleneck every later operator belongs to the head.
        behind = sum(index > node.index for index in mixing)
        # A weight that is computed on the way, normalised say, is no parameter of its operator.
        last = not any(n.index > node.index for n in mixers)
        if last and node.channels == flow.classes:
            note = "no weights between it and the logits: it is a map of class scores"
        elif _averages(node):
            note = "an average of an earlier activation"
        elif behind > max(_LARGEST_HEAD, len(mixing) - behind):
            note = "most of the network lies behind it"
        found.append(Candidate(name, (node.channels, *node.grid), note))
    return tuple(found) or _bypassed(flow)


def _bypassed(flow: Trace) -> tuple[Candidate, ...]:
    """Of a network of branches: the spatial values nearest to the logits, in all of them."""
    nodes = flow.leading_to_logits()[::-1]
    distance = {flow.logits: 0}
    for node in nodes:
        for parent in node.parents:
            distance[parent] = max(distance.get(parent, 0), distance[node.index] + 1)
    return tuple(
        Candidate(name, (node.channels, *node.grid), "part of the data passes by it")
        for node in sorted(nodes, key=lambda node: distance[node.index])
        if node.grid is not None and (name := _module_of(flow, node)) is not None
    )[:_LISTED]


def _module_of(flow: Trace, node: Node) -> str | None:
    """The outermost of the modules that return this value and run once, the first of its equals."""
    once = [name for name in flow.returned_by.get(node.index, ()) if flow.calls[name] == 1]
    return min(once, key=lambda name: name.count("."), default=None)


def _why_none(flow: Trace) -> str:
    batch = flow.nodes[flow.logits].shape[0]
    sequences = (
        n
        for n in flow.bottlenecks()
        if len(n.shape) == 3 and n.shape[0] == batch and n.shape[1] > 1
    )
    tokens = next((n for n in sequences if n.index in flow.returned_by), None)
    if tokens is not None:
        where = f"{tokens.module} " if tokens.module else ""
        return f"the network ends in tokens, {where}{tokens.shape}, which have no rows and columns"
    return (
        "no module before the classifier's weights returns an activation of more than one cell "
        "that all of the data passes through"
    )


def _about_torchscript(model: nn.Module) -> str:
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return ""
    return (
        "A scripted module m takes no hooks: put nn.Sequential(m) in its place, and that is a "
        "layer. "
    )


def _mixes_channels(node: Node) -> bool:
    return any(kind in node.operator for kind in ("convolution", "mm", "linear"))


def _averages(node: Node) -> bool:
    return "avg_pool" in node.operator or node.operator == "mean"


def _listing(candidates: tuple[Candidate, ...]) -> str:
    if not candidates:
        return "The model has no candidates."
    shown = ", ".join(
        f"{c.name} {c.shape}{f' ({c.note})' if c.note else ''}" for c in candidates[:_LISTED]
    )
    return f"Candidates: {shown}{' ...' if len(candidates) > _LISTED else ''}"


def example_images(model: nn.Module, size: tuple[int, int], *, channels: int = 3) -> Tensor:
    """Two random images (2, C, H, W), on the device and in the dtype of the model's weights.

    Args:
        model: an image classifier.
        size: (H, W) in pixels.
        channels: C.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, channels, *size)
    images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return images.to(device=weight.device, dtype=weight.dtype)
