"""What the interfaces share: which output is explained, at which layers, and of which function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.compat.targets import ClassifierOutputTarget
from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.inspections import Layer
from diffcam_fast.layout import Layout
from diffcam_fast.methods import METHODS, Method
from diffcam_fast.refine import stage_activations
from diffcam_fast.running import pick_logits, unwrap
from diffcam_fast.split import forward
from diffcam_fast.targets import Targets, resolve_targets
from diffcam_kernels.reference import predicted

Reshape = Callable[[Tensor], Tensor]
"""From what a layer returns to (N, C, h, w)."""


class Explainers:
    """Explainers of one model at the same layers, one for each kind of image and method.

    Args:
        model: what is explained.
        layers: the target layers; None: found by running.
        reshape: from what they return to (N, C, h, w); None: as they return it.
        relu: as for `Explainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer] | None,
        reshape: Reshape | None = None,
        *,
        relu: bool = True,
    ) -> None:
        self._model, self._layers, self._reshape = model, layers, reshape
        self._relu = relu
        self._known: dict[tuple[object, ...], Explainer] = {}

    def __call__(self, method: str | Method, images: Tensor, targets: Targets) -> Explanation:
        """As `Explainer.__call__`, with a class of a model that ends in a softmax read as what
        that model returns, its probability, where other libraries read it so.
        """
        method = METHODS[method] if isinstance(method, str) else method
        explainer = self._explainer(method, images)
        weighs = method.needs_contrast or method.needs_pooled_head or method.class_agnostic
        if explainer.inspect().probabilities and not weighs and not _functions(targets):
            targets = self._as_probabilities(images, targets)
        return explainer(images, targets)

    def _explainer(self, method: Method, images: Tensor) -> Explainer:
        key = (method, *images.shape[1:])
        if key not in self._known:
            self._known[key] = Explainer(
                self._model,
                layer=self._layers,
                method=method,
                relu=self._relu,
                output=logits_of,
                layout=self._layout(images[:1]),
                example_inputs=images[:1],
            )
        return self._known[key]

    def _layout(self, image: Tensor) -> Layout | None:
        if self._reshape is None:
            return None
        model = unwrap(self._model)
        names = {id(module): name for name, module in model.named_modules()}
        given = [self._layers] if isinstance(self._layers, str | nn.Module) else self._layers
        layers = [y if isinstance(y, str) else names.get(id(y)) for y in given or ()]
        inside = [layer for layer in layers if layer is not None]
        if len(inside) != len(layers):
            raise ValueError("reshape_transform is for target layers that are modules of the model")
        outputs = stage_activations(model, _on(model, image), inside)
        layouts = {layout_of(self._reshape, output.shape) for output in outputs}
        if len(layouts) > 1:
            raise ValueError(
                f"the target layers have their cells in different places: {layouts}; "
                "explain them one at a time"
            )
        return layouts.pop()

    def _as_probabilities(self, images: Tensor, targets: Targets) -> Targets:
        model = unwrap(self._model)
        logits = forward(model, _on(model, images), {}, output=logits_of).logits
        classes = resolve_targets(targets, None, logits)
        classes = predicted(logits) if classes is None else classes
        if classes.shape[1] != 1:
            raise ValueError(f"one target an image, got {classes.shape[1]}")
        return [ClassifierOutputTarget(int(c)) for c in classes]


def _on(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the device and in the dtype of the model."""
    first = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.detach().to(first.device, first.dtype)


def _functions(targets: Targets) -> bool:
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        return any(callable(target) for target in targets)
    return callable(targets)


def one_each(targets: Targets, n: int) -> Targets:
    """As the engine takes targets: functions that are classes become classes.

    Raises:
        ValueError: more or fewer than images.
    """
    if targets is None or not isinstance(targets, Sequence) or isinstance(targets, str):
        return targets
    given: list[Any] = list(targets)
    if len(given) != n:
        raise ValueError(f"{len(given)} targets for {n} images; give one an image")
    if all(isinstance(target, ClassifierOutputTarget) or not callable(target) for target in given):
        return [t.category if isinstance(t, ClassifierOutputTarget) else t for t in given]
    return [t if callable(t) else ClassifierOutputTarget(int(t)) for t in given]


def logits_of(output: Any) -> Tensor:
    """Logits (N, K) in what a model returns; of scores (N, K, ...) of many places their means.

    Args:
        output: as for `pick_logits`, or (N,), or (N, K, ...), alone or as the `out` of a mapping.
    """
    if isinstance(output, Mapping) and "logits" not in output and "out" in output:
        output = output["out"]
    if isinstance(output, Tensor) and output.ndim > 2:
        return output.flatten(2).mean(dim=2)
    if isinstance(output, Tensor) and output.ndim == 1:
        return output[:, None]
    return pick_logits(output)


def layout_of(reshape: Reshape, shape: Sequence[int]) -> Layout:
    """The layout that a reshape transform amounts to, for a layer's output of this shape.

    Raises:
        ValueError: it does something else than to pick a grid of tokens, or to move an axis.
    """
    numbered = torch.arange(shape[1] * shape[-1] * (shape[2] if len(shape) == 4 else 1))
    numbered = numbered.double().view(1, *shape[1:])
    cells = reshape(numbered)
    candidates = [Layout(axis) for axis in (1, 3)] if len(shape) == 4 else []
    if len(shape) == 3 and cells.ndim == 4:
        grid = (cells.shape[2], cells.shape[3])
        first = int(cells.flatten()[0]) // shape[2]
        candidates = [Layout(2, grid, first)] if first + grid[0] * grid[1] <= shape[1] else []
    for layout in candidates:
        if torch.equal(layout.cells(numbered), cells):
            return layout
    raise ValueError(
        f"reshape_transform makes {tuple(cells.shape)} of the layer's {tuple(shape)}, which is "
        "neither a grid of tokens, row by row, nor channels moved to axis 1"
    )


def unit(maps: Tensor, eps: float) -> Tensor:
    """Maps (N, h, w) to [0, 1], with the small number that the other library adds."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + eps)
