"""An explainer whose calls are replayed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffcam_fast.compiled.graphs import Captured, Order, Padded, Replay
from diffcam_fast.compiled.steps import CannotCompile, Step, compiled, trace
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.running import filled, first_line, is_out_of_memory
from diffcam_fast.streaming import Streaming
from diffcam_fast.targets import Asked, Targets, resolve_targets

# Shapes and numbers of targets that are kept; whoever asks for more gets the explainer itself.
_KEPT = 16


@dataclass(frozen=True)
class _Asked:
    """What tells one recorded step from another."""

    shape: tuple[int, ...]
    classes: int | None
    topk: int | None


@dataclass(frozen=True)
class _Kept:
    step: Step
    replay: Replay


class CompiledExplainer(Streaming):
    """An `Explainer` on CUDA without the time that Python takes: called and answering as it is.

    The first call of a shape runs the explainer, records its operators, and captures them as a CUDA
    graph; later calls copy their images into it and replay it, in one launch. Batches are cut into
    `batch_size` images, and the last one is filled up. What cannot be recorded runs in the
    explainer, and `refused` says why. On the CPU nothing is captured.

    Args:
        explainer: what is recorded, with the weights that its model has at the first call.
        batch_size: the most images at once.
        compile: fuse the operators with `torch.compile` too, which the first call waits for.

    Raises:
        ValueError: the batch size is not positive.

    Example:
        >>> from torch import nn
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head)
        >>> fast = CompiledExplainer(Explainer(model), batch_size=2)
        >>> fast(torch.rand(5, 3, 8, 8)).maps.shape
        torch.Size([5, 1, 6, 6])
    """

    def __init__(
        self, explainer: Explainer, *, batch_size: int = 64, compile: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._explainer, self._size, self._compile = explainer, batch_size, compile
        self._kept: dict[_Asked, _Kept | str] = {}
        self._classes: int | None = None
        self._lock = threading.Lock()
        self._order = Order()
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @property
    def layer(self) -> str:
        """Dotted module name of the target layer."""
        return self._explainer.layer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._explainer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, and of the images that need no cast."""
        return self._explainer.dtype

    @property
    def explainer(self) -> Explainer:
        """What is recorded."""
        return self._explainer

    @property
    def batch_size(self) -> int:
        """The most images at once, which calls with fewer are filled up to."""
        return self._size

    @property
    def refused(self) -> str | None:
        """Why calls of some kind run in the explainer itself; None: none did so far."""
        with self._lock:
            return next((kept for kept in self._kept.values() if isinstance(kept, str)), None)

    def __call__(
        self, images: Tensor, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch: arguments, result and errors are those of `Explainer`."""
        images = self._explainer.prepare(images)
        function = Asked(targets, topk, self._explainer.setup.contrast).function
        if len(images) == 0 or function is not None or (targets is not None and topk is not None):
            return self._explainer(images, targets, topk=topk)
        classes = self._checked(targets, images)
        parts, start = [], 0
        while start < len(images):
            part = slice(start, start + self._size)
            chosen = None if classes is None else classes[part]
            parts.append(self._batch(images[part], chosen, topk))
            start = part.stop
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _checked(self, targets: Targets, images: Tensor) -> Tensor | None:
        """Classes (N, T) on the device, or None for the prediction."""
        # Their number is known once a step was recorded, which runs the explainer's own checks.
        shape = (len(images), self._classes or 2**31)
        found = resolve_targets(targets, None, torch.empty(()).expand(shape))
        return None if found is None else found.to(images.device, non_blocking=True)

    def _batch(self, images: Tensor, classes: Tensor | None, topk: int | None) -> Explanation:
        operands = (images,) if classes is None else (images, classes)
        asked = _Asked(tuple(images.shape[1:]), None if classes is None else classes.shape[1], topk)
        with self._lock:
            kept = self._kept.get(asked)
            if kept is None and len(self._kept) < _KEPT:
                kept = self._kept[asked] = self._record(operands, topk)
        if not isinstance(kept, _Kept):
            return self._explainer(images, classes, topk=topk)
        return kept.step.explanation(kept.replay(*operands), self._how)

    @property
    def _how(self) -> str:
        ways = ["compiled"] if self._compile else []
        return ", ".join([*ways, "CUDA graph"] if self._pool is not None else [*ways, "recorded"])

    def _record(self, operands: Sequence[Tensor], topk: int | None) -> _Kept | str:
        """A step for batches like this one, or why there is none."""
        whole = [filled(operand, self._size) for operand in operands]
        try:
            step = trace(self._explainer, *whole, topk=topk)
            self._classes = step.example.logits.shape[1]
            step = compiled(step) if self._compile else step
            if self._pool is None:
                return _Kept(step, Padded(step.run, self._size))
            return _Kept(step, Captured(step.run, whole, self._pool, self._order))
        except CannotCompile as reason:
            return str(reason)
        except Exception as error:
            if is_out_of_memory(error):
                # The caller tries again with fewer images; more than those fit are not recorded.
                self._size = max(1, self._size // 2)
                raise
            if not isinstance(error, RuntimeError):
                raise
            return f"its operators cannot be captured: {first_line(error)}"


def _joined(parts: Sequence[Explanation]) -> Explanation:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    layers = zip(*(part.layer_maps for part in parts), strict=True)
    return replace(
        parts[0],
        logits=joined("logits"),
        targets=joined("targets"),
        scores=joined("scores"),
        maps=joined("maps"),
        layer_maps=tuple(torch.cat(maps) for maps in layers),
    )
