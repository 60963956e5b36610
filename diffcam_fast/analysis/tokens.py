"""Layers of tokens: where in (N, L, C) the grid of the image is, and which layer to explain.

The grid is read from the positions that are followed through the network (`positions`): L tokens
hold one if those with a position are neighbours, stand row by row, and cover the image evenly. How
many stand before them is `first`.

The target layer is the last value of tokens whose whole grid reaches the logits: where a class
token alone is read, no other token of the last block gets a gradient. Behind the last such value
that all data passes through, a normalisation of it is taken in its place if nothing of the grid
reaches the logits past it: in a ViT the input of the last attention, which is the usual choice.
Gradients decide both, with weights that are 0 replaced, since a fresh classifier often is.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diffcam_fast.analysis.head import ends_in_softmax
from diffcam_fast.analysis.positions import SAME, Positions, same_positions
from diffcam_fast.analysis.trace import Node, Trace
from diffcam_fast.layout import Layout
from diffcam_fast.running import evaluating
from diffcam_fast.split import Output, head_gradients, tapped

# Of the cells of a grid that reach the logits; a rectifier may cut off some.
_NEARLY_ALL = 0.9
# Backwards through all of a large network take memory; the layer is most often near the end.
_AT_ONCE = 4

# Of the order of usual weights.
_FILL = 0.1

DEAD = "a token beside its grid is all that the logits are computed from"
SPLIT = "its channels are taken apart by what reads it"


@dataclass(frozen=True)
class TokenLayer:
    """A layer that returns tokens.

    Attributes:
        name: dotted module name.
        node: its value.
        layout: where its grid is.
        note: what speaks against it; empty where nothing does.
    """

    name: str
    node: Node
    layout: Layout
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """What was found out about the tokens of a network.

    Attributes:
        layers: last first; one without a note is the target.
        why_not: of the last tokens without a grid, why they have none.
    """

    layers: tuple[TokenLayer, ...]
    why_not: str


def is_tokens(node: Node, flow: Trace) -> bool:
    """Whether a value may be tokens (N, L, C)."""
    return (
        len(node.shape) == 3 and node.shape[0] == flow.nodes[flow.logits].shape[0]
    ) and node.shape[1] > 1


def find_tokens(
    model: nn.Module, images: Tensor, flow: Trace, *, output: Output, layout: Layout | None
) -> Tokens:
    """The layers of tokens that all data passes through, and the target among them.

    Args:
        model: an image classifier.
        images: (N, C, H, W).
        flow: its trace on them.
        output: what finds the logits in what the model returns.
        layout: of the layers; None: found out.
    """
    passed = [
        (n, name) for n in flow.bottlenecks() if is_tokens(n, flow) and (name := flow.name_of(n))
    ]
    behind = {node.index: _normalised(flow, node) for node, _ in passed}
    names = [name for _, name in passed] + [n for found in behind.values() for _, n in found]
    layouts = layouts_of(model, images, names, output=output, layout=layout, flow=flow)
    known = [
        TokenLayer(name, node, found, SPLIT if _taken_apart(flow, node) else "")
        for node, name in passed
        if isinstance(found := layouts[name], Layout)
    ]
    why_not = next((str(f) for _, name in passed if isinstance(f := layouts[name], str)), "")
    gradients = partial(_reach, model, images, output, ends_in_softmax(flow))
    for start in range(0, len(known), _AT_ONCE):
        piece = known[start : start + _AT_ONCE]
        reached = gradients({layer.name: layer.layout for layer in piece})
        for offset, layer in enumerate(piece):
            at = start + offset
            if not reached[layer.name]:
                known[at] = TokenLayer(layer.name, layer.node, layer.layout, layer.note or DEAD)
            elif not layer.note:
                later = [
                    TokenLayer(name, node, found)
                    for node, name in behind[layer.node.index]
                    if isinstance(found := layouts[name], Layout)
                ]
                target = next((t for t in later if _replaces(gradients, layer, t)), None)
                # Of the two the later one is the target, and all of them are listed in order.
                known[at:at] = [] if target is None else [target]
                return Tokens(tuple(known), why_not)
    return Tokens(tuple(known), why_not)


def layouts_of(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    *,
    flow: Trace,
    output: Output,
    layout: Layout | None = None,
) -> dict[str, Layout | str]:
    """Of each layer where its grid is, or why that is not known.

    Args:
        model: an image classifier.
        images: (N, C, H, W).
        names: dotted module names of layers that return tokens.
        flow: the model's trace on the images.
        output: what finds the logits in what the model returns.
        layout: of all of these layers; None: found out.
    """
    if layout is not None:
        nodes = {name: flow.node_of(name) for name in names}
        return {name: fitted(layout, node.shape) for name, node in nodes.items() if node}
    found: dict[str, Layout | str] = dict.fromkeys(names, "they are not made in every pass")
    if not names:
        return found
    images = images.clone()
    positions = Positions(images)

    def look(name: str, value: Tensor) -> None:
        found[name] = read_grid(positions.of(value))

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(images.device.type, enabled=False))
        stack.enter_context(evaluating(model))
        for name in names:
            stack.enter_context(tapped(model, name, partial(look, name)))
        stack.enter_context(positions)
        output(model(images))
    return found


def fitted(layout: Layout, shape: tuple[int, ...]) -> Layout | str:
    """The layout if an output of this shape can have it, or why it cannot."""
    if len(shape) != layout.ndim:
        return f"the given {layout} is for outputs of {layout.ndim} axes"
    if layout.grid is not None and layout.first + layout.grid[0] * layout.grid[1] > shape[1]:
        h, w = layout.grid
        return (
            f"the given layout takes {layout.first} + {h} x {w} = {layout.first + h * w} tokens, "
            f"and there are {shape[1]}"
        )
    return layout


def read_grid(positions: Tensor | None) -> Layout | str:
    """The layout of tokens (N, L, C) with these positions, or why they have none."""
    if positions is None or bool(positions.isnan().all()):
        return "where in the image they stand cannot be followed"
    tokens = positions[0, :, 0]
    if not same_positions(positions, tokens[:, None].expand(positions.shape)):
        return "they do not stand at the same place of the image in all channels and images"
    placed = (~tokens.isnan()).nonzero()[:, 0]
    first, count = int(placed[0]), len(placed)
    if int(placed[-1]) - first + 1 != count:
        return "others stand between those of the image"
    rows, columns = tokens[placed].real, tokens[placed].imag
    w = int(((rows - rows[0]).abs() <= SAME).long().cumprod(0).sum())
    if count % w or not _even(rows.view(-1, w)) or not _even(columns.view(-1, w).mT):
        return "they do not stand row by row, or do not cover the image evenly"
    return Layout(channel_axis=2, grid=(count // w, w), first=first)


def _even(places: Tensor) -> bool:
    """(n, m): constant along m; along n the middles, nearly, of n equal parts of [0, 1]."""
    steps, own = len(places), places[:, 0]
    if steps < 2 or not bool(((places - own[:, None]).abs() <= SAME).all()):
        return False
    wanted = (torch.arange(steps, device=places.device) + 0.5) / steps
    # Every second of 14 rows stands a quarter of a row off the middles of seven. Without its first,
    # its last or both a grid is off by more, or its rows are closer together.
    near = (own - wanted).abs() < 0.4 / steps
    return bool(near.all() and (own.diff() > 0.9 / steps).all())


def _normalised(flow: Trace, node: Node) -> list[tuple[Node, str]]:
    """Modules behind a value that make tokens of it alone and mix no channels, last first."""
    inside, found = {node.index}, []
    for later in flow.head_of(node.index):
        if inside.issuperset(later.parents) and not _interacts(later):
            inside.add(later.index)
            name = flow.name_of(later) if is_tokens(later, flow) else None
            if name is not None and later.shape[2] == node.shape[2]:
                found.append((later, name))
    passed = {n.index for n in flow.bottlenecks()}
    return [(n, name) for n, name in found[::-1] if n.index not in passed]


def _interacts(node: Node) -> bool:
    kinds = ("convolution", "mm", "linear", "attention", "transformer")
    return any(kind in node.operator for kind in kinds)


def _taken_apart(flow: Trace, node: Node) -> bool:
    """A projection to queries, keys and values, say: its axis of channels is cut in pieces."""
    cutting = ("view", "reshape", "split", "split_with_sizes", "unbind", "unflatten")
    readers = [n for n in flow.nodes.values() if node.index in n.parents]
    return any(n.operator in cutting and node.shape[2] not in n.shape for n in readers)


def _replaces(gradients: Any, layer: TokenLayer, later: TokenLayer) -> bool:
    """The grid of the later layer reaches the logits, and all that does of the earlier one's."""
    if not gradients({later.name: later.layout})[later.name]:
        return False
    return not gradients({layer.name: layer.layout}, cut=later, least=0.0)[layer.name]


def _reach(
    model: nn.Module,
    images: Tensor,
    output: Output,
    probabilities: bool,
    layers: Mapping[str, Layout],
    *,
    cut: TokenLayer | None = None,
    least: float = _NEARLY_ALL,
) -> dict[str, bool]:
    """Whether more than this share of the cells of each layer reaches the logits, with the grid of
    one layer cut off from what comes before it.
    """

    def explained(logits: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (len(logits), 1, logits.shape[1])
        d = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return logits, d.to(logits.device)

    def cut_off(value: Tensor) -> Tensor | None:
        assert cut is not None
        if value.requires_grad:
            return cut.layout.with_cells(value, cut.layout.cells(value).detach())
        return None

    with ExitStack() as stack:
        stack.enter_context(torch.autocast(images.device.type, enabled=False))
        if cut is not None:
            stack.enter_context(tapped(model, cut.name, cut_off))
        stack.enter_context(_NoZeroWeights())
        split = head_gradients(
            model, images, layers, explained, output=output, probabilities=probabilities
        )
    shares = [
        float((gradient != 0).any(dim=(0, 1, 2)).float().mean()) for gradient in split.gradients
    ]
    return {name: share > least for name, share in zip(layers, shares, strict=True)}


class _NoZeroWeights(TorchFunctionMode):
    """Calls see random numbers in place of parameters that are 0 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(nn.Parameter, _filled, (args, kwargs or {}))
        return func(*args, **kwargs)


def _filled(weight: nn.Parameter) -> Tensor:
    if not weight.is_floating_point() or bool(weight.detach().any()):
        return weight
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return values.to(weight) * _FILL
