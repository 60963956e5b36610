"""The data flow of one forward pass, as a graph of operators.

The model runs once on real input under a dispatch mode that sees every ATen operator, functional
calls and in-place writes included; hooks note which module returned which value. No name, type or
source code of a module is looked at.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffcam_fast.running import OutputError, evaluating, pick_logits


@dataclass(frozen=True)
class Node:
    """One operator call whose result depends on the images.

    Attributes:
        index: its place in the order of execution.
        operator: ATen name without overload, `convolution` or `relu_`.
        parents: indices of the nodes whose values it reads; -1 is the images.
        parameters: names of the parameters and buffers that it reads.
        shape: of its first result.
        module: the innermost module that was running; "" is the model itself.
        channel_axis: the axis of the first result that holds channels, where that is known.
    """

    index: int
    operator: str
    parents: tuple[int, ...]
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    module: str
    channel_axis: int | None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of a spatial activation, a 4-D value of more than one cell whose channels are
        known.
        """
        if len(self.shape) != 4 or self.channel_axis not in (1, 3):
            return None
        h, w = self.shape[2:] if self.channel_axis == 1 else self.shape[1:3]
        return (h, w) if h * w > 1 else None

    @property
    def channels(self) -> int:
        """C of a spatial activation."""
        return self.shape[self.channel_axis or 1]


@dataclass(frozen=True)
class Trace:
    """What one forward pass did.

    Attributes:
        nodes: by index, those that depend on the images.
        returned_by: node index -> names of the modules that returned this value, innermost first.
        calls: how often each module ran.
        logits: the node of the logits.
        classes: K.
        largest: bytes of the largest value, for one image.
    """

    nodes: dict[int, Node]
    returned_by: dict[int, tuple[str, ...]]
    calls: Counter[str]
    logits: int
    classes: int
    largest: int

    def node_of(self, module: str) -> Node | None:
        """The value that a module returned; None if it did not run, or returned no tensor of its
        own.
        """
        return next(
            (self.nodes[i] for i, names in self.returned_by.items() if module in names), None
        )

    def name_of(self, node: Node) -> str | None:
        """The outermost of the modules that return this value and run once, the first of its
        equals.
        """
        once = [name for name in self.returned_by.get(node.index, ()) if self.calls[name] == 1]
        return min(once, key=lambda name: name.count("."), default=None)

    def head_of(self, index: int) -> list[Node]:
        """The nodes between a value and the logits, in order."""
        after = {index}
        for i in sorted(self.nodes):
            if i > index and after.intersection(self.nodes[i].parents):
                after.add(i)
        return [
            node for node in self.leading_to_logits() if node.index in after and node.index > index
        ]

    def bottlenecks(self) -> list[Node]:
        """The nodes through which all of the data passes on its way to the logits, last first."""
        slice_ = {node.index: node for node in self.leading_to_logits()}
        frontier, found = {self.logits}, []
        while frontier:
            index = max(frontier)
            frontier.remove(index)
            if index < 0:
                break
            if not frontier:
                found.append(slice_[index])
            frontier.update(slice_[index].parents)
        return found

    def leading_to_logits(self) -> list[Node]:
        """The nodes that the logits depend on, in order."""
        needed = {self.logits}
        for i in sorted(self.nodes, reverse=True):
            if i in needed:
                needed.update(self.nodes[i].parents)
        return [self.nodes[i] for i in sorted(needed) if i >= 0]


def trace(
    model: nn.Module, images: Tensor, *, output: Callable[[Any], Tensor] = pick_logits
) -> Trace:
    """Runs the model once on images (N, C, H, W) and follows the data to the logits that `output`
    finds in what it returns.

    Raises:
        OutputError: the model returns no logits, or they do not come from its operators.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(images.device.type, enabled=False),
        evaluating(model),
    ):
        # A model may normalise its input in place.
        recorder = _Recorder(model, images.clone())
        with recorder.watching():
            found = output(model(recorder.images))
    logits = recorder.value_of(found)
    if logits is None or logits < 0:
        raise OutputError(
            "the logits do not depend on the images through operators that PyTorch dispatches"
        )
    returned_by = {index: tuple(names) for index, names in recorder.returned_by.items()}
    largest = recorder.largest // max(len(images), 1)
    return Trace(recorder.nodes, returned_by, recorder.calls, logits, found.shape[1], largest)


@dataclass
class _Recorder:
    model: nn.Module
    images: Tensor
    nodes: dict[int, Node] = field(default_factory=dict)
    returned_by: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    calls: Counter[str] = field(default_factory=Counter)
    largest: int = 0

    def __post_init__(self) -> None:
        self._made: dict[int, int] = {id(self.images): -1}
        self._written: dict[int, int] = {}
        self._weights = {
            id(t): name for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]
        }
        # An id is unique only while its tensor lives.
        self._alive: list[Tensor] = [self.images]
        self._running: list[str] = [""]
        self._count = 0
        self._thread = threading.get_ident()

    def value_of(self, tensor: Tensor) -> int | None:
        """The last node that made or wrote this tensor; None for what does not depend on the
        images.
        """
        made, written = self._made.get(id(tensor)), self._written.get(_storage(tensor))
        return written if made is None else made if written is None else max(made, written)

    @contextmanager
    def watching(self) -> Iterator[None]:
        mode = _Watch(self)
        handles = []
        try:
            for name, module in self.model.named_modules():
                # TorchScript takes no hooks; its operators are seen all the same.
                if name and not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter(name)))
                    handles.append(module.register_forward_hook(self._leave(name)))
            with mode:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == self._thread:
                self._running.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            while self._running.pop() != name:
                pass
            self.calls[name] += 1
            value = self.value_of(output) if isinstance(output, Tensor) else None
            if value is not None and value >= 0:
                self.returned_by[value].append(name)

        return hook

    def record(
        self,
        func: Any,
        args: Any,
        inputs: list[Tensor],
        written: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        self._alive += inputs + outputs
        values = {value for t in inputs if (value := self.value_of(t)) is not None}
        names = tuple(dict.fromkeys(self._weights[id(t)] for t in inputs if id(t) in self._weights))
        if not values:
            # A view or a cast of one weight still stands for that weight.
            if len(names) == 1 and len(inputs) == 1:
                self._weights.update({id(t): names[0] for t in outputs})
            return
        index, self._count = self._count, self._count + 1
        shape = tuple(outputs[0].shape) if outputs else ()
        operator = func._schema.name.split("::")[1]
        parents = tuple(sorted(values))
        before = [self.nodes[i] for i in parents if i >= 0]
        axis = _channel_axis(operator, args, shape, before)
        self.nodes[index] = Node(index, operator, parents, names, shape, self._running[-1], axis)
        for tensor in outputs:
            self._made[id(tensor)] = index
            self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        for tensor in written:
            self._written[_storage(tensor)] = index


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The model runs uncompiled here; to skip the compiler PyTorch would import it, for seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        written: list[Tensor] = []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        self._recorder.record(func, args, inputs, written, outputs)
        return output


_CHANNELS_SECOND = ("convolution", "batch_norm", "group_norm", "max_pool2d", "avg_pool2d")
_CHANNELS_LAST = ("layer_norm", "linear", "addmm", "mm", "bmm", "baddbmm")


def _channel_axis(
    operator: str, args: Any, shape: tuple[int, ...], before: list[Node]
) -> int | None:
    """Where the channels of a result are: set by operators that have a fixed place for them, else
    inherited.
    """
    if any(kind in operator for kind in _CHANNELS_SECOND):
        return 1
    if any(operator.strip("_").endswith(kind) for kind in _CHANNELS_LAST):
        return len(shape) - 1
    source = next((node for node in before if node.channel_axis is not None), None)
    if source is None:
        return None
    axis = source.channel_axis
    if operator == "permute":
        return [d % len(shape) for d in args[1]].index(axis)
    if operator == "transpose":
        swap = {
            args[1] % len(shape): args[2] % len(shape),
            args[2] % len(shape): args[1] % len(shape),
        }
        return swap.get(axis, axis)
    if len(shape) == len(source.shape):
        return axis
    if shape[-1:] == source.shape[-1:] and axis == len(source.shape) - 1:
        return len(shape) - 1
    return 1 if axis == 1 and shape[:2] == source.shape[:2] else None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
