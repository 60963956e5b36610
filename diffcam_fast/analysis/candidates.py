"""The layers of a network that could be explained, and the one that is."""

from dataclasses import dataclass

from torch import Tensor, nn

from diffcam_fast.analysis.tokens import TokenLayer, find_tokens, is_tokens
from diffcam_fast.analysis.trace import Node, Trace
from diffcam_fast.layout import Layout
from diffcam_fast.split import Output

# Linear maps and convolutions: three in VGG's head, four in attention pooling.
_LARGEST_HEAD = 8
_LISTED = 8
EARLY = "most of the network lies behind it"

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
class Candidates:
    """What there is to choose from.

    Attributes:
        listed: the layers all of the data passes through, last first; where there are none, the
            layers nearest to the logits.
        chosen: the target layer; None where nothing fits.
        why_none: why there is none, in words; empty where there is one.
    """

    listed: tuple[Candidate, ...]
    chosen: str | None
    why_none: str = ""


def find_candidates(
    model: nn.Module, images: Tensor, flow: Trace, *, output: Output, layout: Layout | None
) -> Candidates:
    """Lists the layers and chooses the last one that nothing speaks against.

    Of a spatial layer and later tokens the tokens are chosen if most of the network lies behind the
    spatial layer, which is the patch embedding then. Else the tokens belong to the head.
    """
    found = _spatial(flow, _LARGEST_HEAD)
    chosen = next((node for node, candidate in found if not candidate.note), None)
    if not _may_end_in_tokens(flow, chosen):
        return _choice(flow, found, "")
    tokens = find_tokens(model, images, flow, output=output, layout=layout)
    located = [(layer.node, _of_tokens(flow, layer)) for layer in tokens.layers]
    if any(not candidate.note for _, candidate in located):
        found = _spatial(flow, 0)
    found = sorted(found + located, key=lambda pair: -pair[0].index)
    return _choice(flow, found, tokens.why_not)


def reason_for_tokens(where: str, shape: tuple[int, ...], why_not: str) -> str:
    """What a user is told of tokens without a grid, and what to do."""
    return (
        f"{where} {shape}, and {why_not}; tell it as layout=Layout(channel_axis=2, grid=(h, w), "
        "first=tokens before the grid)"
    )


_Found = list[tuple[Node, Candidate]]


def _choice(flow: Trace, found: _Found, why_not: str) -> Candidates:
    chosen = next((candidate.name for _, candidate in found if not candidate.note), None)
    listed = tuple(candidate for _, candidate in found) or _bypassed(flow)
    return Candidates(listed, chosen, "" if chosen else _why_none(flow, why_not))


def _spatial(flow: Trace, largest_head: int) -> _Found:
    """One per spatial value that all data passes through, last first."""
    found: _Found = []
    mixers = [n for n in flow.leading_to_logits() if _mixes_channels(n)]
    for node in flow.bottlenecks():
        name = flow.name_of(node)
        if node.grid is None or name is None:
            continue
        note = ""
        # A weight that is computed on the way, normalised say, is no parameter of its operator.
        last = not any(n.index > node.index for n in mixers)
        if last and node.channels == flow.classes:
            note = "no weights between it and the logits: it is a map of class scores"
        elif _averages(node):
            note = "an average of an earlier activation"
        elif _is_early(flow, node, largest_head):
            note = EARLY
        found.append((node, Candidate(name, (node.channels, *node.grid), note)))
    return found


def _of_tokens(flow: Trace, layer: TokenLayer) -> Candidate:
    assert layer.layout.grid is not None
    note = layer.note or (EARLY if _is_early(flow, layer.node, _LARGEST_HEAD) else "")
    return Candidate(layer.name, (layer.node.shape[2], *layer.layout.grid), note)


def _is_early(flow: Trace, node: Node, largest_head: int) -> bool:
    mixing = [n.index for n in flow.leading_to_logits() if _mixes_channels(n) and n.parameters]
    # Past a bottleneck every later operator belongs to the head.
    behind = sum(index > node.index for index in mixing)
    return behind > max(largest_head, len(mixing) - behind)


def _may_end_in_tokens(flow: Trace, spatial: Node | None) -> bool:
    after = -1 if spatial is None else spatial.index
    if spatial is not None and not _is_early(flow, spatial, 0):
        return False
    return any(
        node.index > after and is_tokens(node, flow) and flow.name_of(node) is not None
        for node in flow.bottlenecks()
    )


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
        if node.grid is not None and (name := flow.name_of(node)) is not None
    )[:_LISTED]


def _why_none(flow: Trace, why_not: str) -> str:
    tokens = next(
        (n for n in flow.bottlenecks() if is_tokens(n, flow) and n.index in flow.returned_by), None
    )
    if tokens is None:
        return (
            "no module before the classifier's weights returns an activation of more than one "
            "cell that all of the data passes through"
        )
    where = " ".join(filter(None, ["the network ends in tokens,", tokens.module]))
    if why_not:
        return reason_for_tokens(where, tokens.shape, why_not)
    return f"{where} {tokens.shape}, and no layer near the logits has all of the data"


def _mixes_channels(node: Node) -> bool:
    return any(kind in node.operator for kind in ("convolution", "mm", "linear"))


def _averages(node: Node) -> bool:
    return "avg_pool" in node.operator or node.operator == "mean"
