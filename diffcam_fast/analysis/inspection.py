"""From a trace to a decision: the target layer, the head behind it, and how its gradient is had."""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.analysis.candidates import (
    Candidate,
    Shape,
    find_candidates,
    reason_for_tokens,
)
from diffcam_fast.analysis.head import Head, read_head
from diffcam_fast.analysis.tokens import fitted, is_tokens, layouts_of
from diffcam_fast.analysis.trace import Node, Trace, trace
from diffcam_fast.layout import Layout
from diffcam_fast.running import pick_logits
from diffcam_fast.split import Output

_LISTED = 8


class AnalysisError(ValueError):
    """No layer of the model can be explained, or not the one that was asked for; the message lists
    candidates.
    """


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
            classifier, or the last tokens whose whole grid the logits are computed from.
        output: what finds the logits (N, K) in what the model returns.
        layout: where in the layer's output channels and cells are; None: found out.

    Raises:
        AnalysisError: no layer fits, or the given one does not.
        OutputError: the model returns no logits, a TypeError.
    """
    flow = trace(model, images, output=output)
    candidates = find_candidates(model, images, flow, output=output, layout=layout)
    if layer is None:
        if candidates.chosen is None:
            raise AnalysisError(
                f"no layer found: {candidates.why_none}. Name a layer to explain it all the same. "
                f"{_about_torchscript(model)}{_listing(candidates.listed)}"
            )
        layer = candidates.chosen
    node = _node(model, flow, layer, candidates.listed)
    found = _layout(model, images, flow, layer, node, output=output, layout=layout)
    if isinstance(found, str):
        raise AnalysisError(f"{found}. {_listing(candidates.listed)}")
    head: Head = read_head(model, images, flow, layer, node, layout=found, output=output)
    h, w = found.grid or (node.shape[1:3] if found.channel_axis == 3 else node.shape[2:])
    return Inspection(
        layer=layer,
        shape=(node.shape[found.channel_axis], h, w),
        layout=found,
        head=head.operators,
        closed_form=head.weight is not None,
        reason=head.reason,
        weight=head.weight,
        probabilities=head.probabilities,
        candidates=candidates.listed,
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
    return node


def _layout(
    model: nn.Module,
    images: Tensor,
    flow: Trace,
    layer: str,
    node: Node,
    *,
    output: Output,
    layout: Layout | None,
) -> Layout | str:
    """Where the cells of a layer are, or why it has none, in words."""
    returns = f"layer {layer!r} returns {node.shape}"
    if layout is not None:
        found = fitted(layout, node.shape)
        return f"{returns}; {found}" if isinstance(found, str) else found
    if is_tokens(node, flow):
        read = layouts_of(model, images, [layer], flow=flow, output=output)
        why_not = read[layer]
        if isinstance(why_not, Layout):
            return why_not
        return reason_for_tokens(f"layer {layer!r} returns tokens", node.shape, why_not)
    if len(node.shape) == 4 and (node.channel_axis in (1, 3) or _read_by_convolution(flow, node)):
        return Layout(node.channel_axis or 1)
    return f"{returns}, not a spatial activation (N, C, h, w), nor tokens (N, L, C)"


def _read_by_convolution(flow: Trace, node: Node) -> bool:
    """The channels of a value that was taken apart and put together, shuffled say, are where the
    convolution that reads it has them.
    """
    readers = (n for n in flow.nodes.values() if node.index in n.parents)
    return node.channel_axis is None and any("convolution" in n.operator for n in readers)


def _about_torchscript(model: nn.Module) -> str:
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return ""
    return (
        "A scripted module m takes no hooks: put nn.Sequential(m) in its place, and that is a "
        "layer. "
    )


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
