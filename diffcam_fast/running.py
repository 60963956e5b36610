"""Running somebody's model without leaving a trace in it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class OutputError(TypeError):
    """A model returns no logits."""


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`
    wrappers.

    A compiled forward calls no hooks, and a replica is another module than the one that was given.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass
class _Found:
    """How the first of a module's current users found it, for the last one to put back."""

    users: int
    training: bool
    compiled: Any


_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and uncompiled; the last of several threads restores it.

    Counted by module: two models may share a backbone. `Module.compile` leaves a module's class as
    it is and sets one attribute, which is taken away here: a compiled forward calls no hooks. The
    compiler's own switch would turn every model of every thread.
    """
    modules = list(model.modules())
    with _lock:
        for module in modules:
            state = _found.setdefault(
                module, _Found(0, module.training, module._compiled_call_impl)
            )
            state.users += 1
            # nn.Module sets attributes slowly, and most models are in this state already.
            if module.training:
                module.training = False
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                state = _found[module]
                state.users -= 1
                if state.users == 0:
                    del _found[module]
                    if module.training != state.training:
                        module.training = state.training
                    if module._compiled_call_impl is not state.compiled:
                        module._compiled_call_impl = state.compiled


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def filled(rows: Tensor, count: int) -> Tensor:
    """Rows up to a count, the last one repeated."""
    lacking = count - len(rows)
    return rows if lacking == 0 else torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])])


def first_line(error: BaseException) -> str:
    """What an error says, without the stack of C++ functions that may follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def pick_logits(output: Any) -> Tensor:
    """The logits (N, K) in what a classifier returns.

    Args:
        output: a tensor (N, K) or (N, K, 1, 1); an object or mapping with such `logits`; or a
            mapping or sequence that holds one such tensor.

    Raises:
        OutputError: nothing of the kind is there, or it is not clear which one is meant.
    """
    return find_logits(output).flatten(1)


def find_logits(output: Any) -> Tensor:
    """As `pick_logits`, the very tensor that the classifier returns."""
    found = _find_logits(output)
    if len(found) > 1:
        raise OutputError(
            f"the model returns {len(found)} tensors that could be logits, of shapes "
            f"{', '.join(str(tuple(t.shape)) for t in found)}; return them as `logits`"
        )
    if not found:
        raise OutputError(
            f"the model must return logits (N, K), or something that holds them as `logits`; "
            f"it returned {_describe(output)}"
        )
    return found[0]


def _find_logits(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        flat = output.ndim == 2 or (output.ndim == 4 and output.shape[2:] == (1, 1))
        return [output] if flat and output.is_floating_point() else []
    if isinstance(output, Mapping):
        parts = [output["logits"]] if "logits" in output else list(output.values())
    elif isinstance(getattr(output, "logits", None), Tensor):
        parts = [output.logits]
    elif isinstance(output, Sequence) and not isinstance(output, str):
        parts = list(output)
    else:
        parts = []
    return [tensor for part in parts for tensor in _find_logits(part)]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} {output.dtype}"
    return f"a {type(output).__name__}"


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this dotted name, as it is now."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor
