"""Running a model split at its target layers: what comes before them, their activations, and the
head behind them.

The split is a forward hook on each layer, set for one call and in one thread. Before the first of
them autograd records nothing. For a gradient the hook hands the head a fresh copy of the activation
as a leaf and turns recording on, so that the graph spans the head alone: neither weights nor
earlier layers get a gradient, and an in-place operator behind the layer overwrites the copy, never
the activation that the map is made of. A later layer of several is a value of that graph.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffcam_fast.layout import Layout
from diffcam_fast.running import evaluating, is_out_of_memory, pick_logits


@dataclass(frozen=True)
class Split:
    """One pass through a split model, free of any graph.

    Attributes:
        logits: (N, K).
        output: what the model returned, or what it would have.
        returned: what each layer returned.
        activations: of each layer A, (N, C, h, w), a view of that.
        gradients: of each layer G = dS/dA, (N, T, C, h, w); empty where none were asked for.
    """

    logits: Tensor
    output: Any
    returned: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


Layers = Mapping[str, Layout]
"""The target layers by their dotted names."""

Output = Callable[[Any], Tensor]
"""From what a model returns to its logits (N, K)."""


def forward(
    model: nn.Module, images: Tensor, layers: Layers, *, output: Output = pick_logits
) -> Split:
    """A plain forward pass in inference mode that keeps the activations of the layers.

    Args:
        model: the classifier.
        images: (N, ...).
        layers: whose activations are kept.
        output: what finds the logits in what the model returns.

    Raises:
        RuntimeError: a layer ran more than once, or not at all.
    """
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.enter_context(tapped(model, layer, kept[layer].append))
        # A model may normalise its input in place.
        returned = model(images.clone())
        logits = output(returned)
    # Outside inference mode a clone is an ordinary tensor again, which a caller may change in
    # place.
    with torch.inference_mode(False), torch.no_grad():
        values = [once(kept[layer], layer) for layer in layers]
        return Split(logits.clone(), returned, *_cells(values, layers), ())


Explained = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""From the logits (N, K) and what the model returned, both with a graph, to values (N, M) of that
graph and d (N, T, M): the scores are the products of both.
"""


def head_gradients(
    model: nn.Module,
    images: Tensor,
    layers: Layers,
    explained: Explained,
    *,
    output: Output = pick_logits,
    probabilities: bool = False,
) -> Split:
    """A forward pass, and the vector-Jacobian products of its head.

    Args:
        model: the classifier.
        images: (N, ...).
        layers: to whose activations gradients are taken.
        explained: what is differentiated.
        output: what finds the logits in what the model returns.
        probabilities: the model ends in a softmax; what that was given are the logits.

    Raises:
        RuntimeError: a layer ran more than once, or not at all, or the logits do not depend on
            it.
    """
    run = partial(_head_gradients, model, images, layers, explained, output)
    if probabilities:
        # A softmax that saturates has no gradient left; what it was given has.
        return run(_BeforeSoftmax())
    try:
        return run(nullcontext())
    except _NotRecorded:
        # The model turns gradients off around its features, and with them what the hook turned on.
        return run(_Recording())


class _NotRecorded(RuntimeError):
    """The logits came without a graph to the layer."""


def _head_gradients(
    model: nn.Module,
    images: Tensor,
    layers: Layers,
    explained: Explained,
    output: Output,
    mode: "nullcontext[None] | _Recording",
) -> Split:
    taken: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def start_recording(layer: str, activation: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        if isinstance(mode, _Recording):
            mode.started = True
        with torch.inference_mode(False):
            # Behind another layer it is a value of the graph already.
            inside = activation.requires_grad and any(taken.values())
            value = activation if inside else activation.detach().clone().requires_grad_()
            taken[layer].append(value)
            # A leaf may not be written in place, its copy may.
            return value.clone()

    with ExitStack() as stack:
        # no_grad outermost: leaving it also undoes what the hook turned on.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(tapped(model, layer, partial(start_recording, layer)))
            hooks.enter_context(mode)
            returned = model(images.clone())
            logits = output(returned)
            if isinstance(mode, _BeforeSoftmax):
                logits = mode.logits_of(logits)
        values = [once(taken[layer], layer) for layer in layers]
        with torch.enable_grad():
            found, d = explained(logits, returned)
        if not found.requires_grad:
            raise _NotRecorded(
                f"the logits do not depend on layer {', '.join(layers)!r}, or the model turns "
                "gradients off behind it"
            )
        gradients = _vjp(found, values, d.to(found.dtype))
    _, cells = _cells(gradients, layers)
    return Split(logits.detach(), returned, *_cells(values, layers), cells)


def _cells(values: list[Tensor], layers: Layers) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The values without their graphs, and the cells in them."""
    detached = tuple(value.detach() for value in values)
    layouts = layers.values()
    return detached, tuple(o.cells(v) for o, v in zip(layouts, detached, strict=True))


class _Recording(TorchFunctionMode):
    """Records every call behind the layer, in whatever gradient mode the model makes it.

    In front of the layer it undoes inference mode alone: a value from there that the head reads
    must be an ordinary tensor, or the backward cannot save it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.started and not torch.is_inference_mode_enabled():
            return func(*args, **(kwargs or {}))
        with torch.inference_mode(False), torch.set_grad_enabled(self.started):
            return func(*args, **(kwargs or {}))


class _BeforeSoftmax(_Recording):
    """Knows of a softmax, and of what is made of its result, what that softmax was given."""

    def __init__(self) -> None:
        super().__init__()
        self._given: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        source = args[0] if args else (kwargs or {}).get("input")
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")
        if name not in ("softmax", "special_softmax"):
            source = self._given.get(source) if isinstance(source, Tensor) else None
        if source is not None and isinstance(result, Tensor):
            self._given[result] = source
        return result

    def logits_of(self, probabilities: Tensor) -> Tensor:
        """What the softmax behind these probabilities (N, K) was given."""
        given = self._given.get(probabilities)
        if given is not None and given.numel() == probabilities.numel():
            given = given.reshape(probabilities.shape)
            # Not so where the result was transposed, say: then its elements are in another order.
            again = given.float().softmax(dim=1)
            if torch.allclose(again, probabilities.float(), atol=1e-2, equal_nan=True):
                return given
        # Inside TorchScript, or rearranged, or named otherwise. The logarithm is off by the same
        # for all classes, which no softmax sees.
        return probabilities.log()


def _vjp(found: Tensor, values: list[Tensor], d: Tensor) -> list[Tensor]:
    """G (N, T, ...) of each value for d (N, T, M): all targets in one batched backward."""
    if d.shape[1] == 1:
        return [g.unsqueeze(1) for g in torch.autograd.grad(found, values, d[:, 0])]
    try:
        batched = torch.autograd.grad(
            found, values, d.movedim(1, 0), retain_graph=True, is_grads_batched=True
        )
        return [g.movedim(0, 1) for g in batched]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # An operator of the head, a custom one say, has no rule for a batch of backwards.
        each = [torch.autograd.grad(found, values, g, retain_graph=True) for g in d.unbind(1)]
        return [torch.stack(gradients, dim=1) for gradients in zip(*each, strict=True)]


@contextmanager
def tapped(model: nn.Module, layer: str, tap: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `tap` with the output of a layer, and passes on what it returns, in this thread
    alone.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        return tap(output) if threading.get_ident() == thread else None

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def once(taken: list[Tensor], layer: str) -> Tensor:
    """The one value that was taken of a layer.

    Raises:
        RuntimeError: it ran more than once, or not at all.
    """
    if len(taken) != 1:
        times = f"{len(taken)} times" if taken else "not at all"
        raise RuntimeError(
            f"layer {layer!r} ran {times} in one forward pass; a map needs a layer that runs once"
        )
    return taken[0]
