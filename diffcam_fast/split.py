"""Running a model split at its target layer: what comes before it, its activation, and the head
behind it.

The split is a forward hook on the layer, set for one call and in one thread. Before the layer
autograd records nothing. For a gradient the hook hands the head a fresh copy of the activation as a
leaf and turns recording on, so that the graph spans the head alone: neither weights nor earlier
layers get a gradient, and an in-place operator behind the layer overwrites the copy, never the
activation that the map is made of.
"""

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffcam_fast.running import evaluating, is_out_of_memory, pick_logits


@dataclass(frozen=True)
class Split:
    """One pass through a split model, free of any graph.

    Attributes:
        logits: (N, K).
        activations: A, (N, C, h, w).
        gradients: G = dS/dA, (N, T, C, h, w); empty where none were asked for.
    """

    logits: Tensor
    activations: Tensor
    gradients: Tensor


def forward(model: nn.Module, images: Tensor, layer: str, *, channel_axis: int = 1) -> Split:
    """A plain forward pass in inference mode that keeps the activation of one layer.

    Raises:
        RuntimeError: the layer ran more than once, or not at all.
    """
    kept: list[Tensor] = []
    with torch.inference_mode(), evaluating(model), _tapped(model, layer, kept.append):
        # A model may normalise its input in place.
        logits = pick_logits(model(images.clone()))
    activation = _once(kept, layer).movedim(channel_axis, 1)
    # Outside inference mode a clone is an ordinary tensor again, which a caller may change in
    # place.
    with torch.inference_mode(False), torch.no_grad():
        return Split(logits.clone(), activation, activation[:, :0])


def head_gradients(
    model: nn.Module,
    images: Tensor,
    layer: str,
    cotangents: Callable[[Tensor], Tensor],
    *,
    channel_axis: int = 1,
    probabilities: bool = False,
) -> Split:
    """A forward pass, and the vector-Jacobian products of its head.

    Args:
        model: the classifier.
        images: (N, ...).
        layer: dotted module name.
        cotangents: from the logits (N, K) to d (N, T, K).
        channel_axis: where the layer has its channels.
        probabilities: the model ends in a softmax; what that was given are the logits.

    Raises:
        RuntimeError: the layer ran more than once, or not at all, or the logits do not depend on
            it.
    """
    if probabilities:
        # A softmax that saturates has no gradient left; what it was given has.
        return _head_gradients(model, images, layer, cotangents, channel_axis, _BeforeSoftmax())
    try:
        return _head_gradients(model, images, layer, cotangents, channel_axis, nullcontext())
    except _NotRecorded:
        # The model turns gradients off around its features, and with them what the hook turned on.
        return _head_gradients(model, images, layer, cotangents, channel_axis, _Recording())


class _NotRecorded(RuntimeError):
    """The logits came without a graph to the layer."""


def _head_gradients(
    model: nn.Module,
    images: Tensor,
    layer: str,
    cotangents: Callable[[Tensor], Tensor],
    channel_axis: int,
    mode: "nullcontext[None] | _Recording",
) -> Split:
    leaves: list[Tensor] = []

    def start_recording(activation: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        if isinstance(mode, _Recording):
            mode.started = True
        with torch.inference_mode(False):
            leaf = activation.detach().clone().requires_grad_()
            leaves.append(leaf)
            # A leaf may not be written in place, its copy may.
            return leaf.clone()

    # no_grad outermost: leaving it also undoes what the hook turned on.
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        with _tapped(model, layer, start_recording), mode:
            logits = pick_logits(model(images.clone()))
            if isinstance(mode, _BeforeSoftmax):
                logits = mode.logits_of(logits)
        leaf = _once(leaves, layer)
        if not logits.requires_grad:
            raise _NotRecorded(
                f"the logits do not depend on layer {layer!r}, or the model turns gradients "
                "off behind it"
            )
        gradients = _vjp(logits, leaf, cotangents(logits.detach()).to(logits.dtype))
    return Split(
        logits.detach(),
        leaf.detach().movedim(channel_axis, 1),
        gradients.movedim(channel_axis + 1, 2),
    )


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


def _vjp(logits: Tensor, leaf: Tensor, d: Tensor) -> Tensor:
    """G (N, T, ...) for d (N, T, K): all targets in one batched backward."""
    if d.shape[1] == 1:
        return torch.autograd.grad(logits, leaf, d[:, 0])[0].unsqueeze(1)
    try:
        batched = torch.autograd.grad(
            logits, leaf, d.movedim(1, 0), retain_graph=True, is_grads_batched=True
        )[0]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # An operator of the head, a custom one say, has no rule for a batch of backwards.
        each = [torch.autograd.grad(logits, leaf, g, retain_graph=True)[0] for g in d.unbind(1)]
        return torch.stack(each, dim=1)
    return batched.movedim(0, 1)


@contextmanager
def _tapped(model: nn.Module, layer: str, tap: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
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


def _once(taken: list[Tensor], layer: str) -> Tensor:
    if len(taken) != 1:
        times = f"{len(taken)} times" if taken else "not at all"
        raise RuntimeError(
            f"layer {layer!r} ran {times} in one forward pass; a map needs a layer that runs once"
        )
    return taken[0]
