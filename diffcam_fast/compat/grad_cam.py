"""The classes of pytorch-grad-cam: the same constructor, call and output, over this engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.compat.targets import ClassifierOutputTarget
from diffcam_fast.explainer import Explainer
from diffcam_fast.inspections import Layer
from diffcam_fast.layout import Layout
from diffcam_fast.methods import METHODS
from diffcam_fast.refine import stage_activations
from diffcam_fast.running import pick_logits, unwrap
from diffcam_fast.targets import Targets

Reshape = Callable[[Tensor], Tensor]
"""From what a layer returns to (N, C, h, w)."""

_FACTORS = (0.9, 1.0, 1.1)
_EPS = 1e-7


class BaseCAM:
    """A method with the interface of pytorch-grad-cam.

    Args:
        model: returns logits (N, K); or (N, K, H, W), for targets that are functions of it.
        target_layers: modules of the model, or dotted names; of several the finished maps are
            averaged.
        reshape_transform: from what the layers return to (N, C, h, w). For the token models that
            the engine knows it may be left out.

    The model is left as it was: neither set to evaluation for good, nor given gradients. Nothing is
    kept of a call but `outputs`. `batch_size` is accepted and not needed: passes over masks are
    bounded by memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffcam_fast.compat import ClassifierOutputTarget, GradCAM
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head)
        >>> with GradCAM(model=model, target_layers=[model[1]]) as cam:
        ...     heatmaps = cam(torch.rand(2, 3, 8, 8), [ClassifierOutputTarget(1)] * 2)
        >>> heatmaps.shape, heatmaps.dtype
        ((2, 8, 8), dtype('float32'))
    """

    method: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[Layer],
        reshape_transform: Reshape | None = None,
    ) -> None:
        if isinstance(target_layers, str | nn.Module) or not target_layers:
            raise ValueError("target_layers must be a list of modules or names, of one at least")
        self.model = model
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform
        self.batch_size = 16
        self.outputs: Tensor | None = None
        self._explainers: dict[tuple[int, ...], Explainer] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.outputs = None

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Heatmaps at the size of the images.

        Args:
            input_tensor: (N, C, H, W), normalised.
            targets: one callable an image, from its output to a number; or classes, as `Explainer`
                takes them; None: the predicted class.
            aug_smooth: average over mirrored and darker and brighter images, six in all.
            eigen_smooth: the first principal component of what the channels add to a map, in place
                of their sum.

        Returns:
            (N, H, W) float32 in [0, 1], in host memory.

        Raises:
            ValueError: targets that do not fit, more or fewer than images among them.
        """
        if not aug_smooth:
            return self._heatmaps(input_tensor, targets, eigen_smooth).cpu().numpy()
        views = [(view, flip) for flip in (False, True) for view in _FACTORS]
        each = []
        for factor, flip in views:
            view = input_tensor.flip(3) if flip else input_tensor
            heatmaps = self._heatmaps(view * factor, targets, eigen_smooth)
            each.append(heatmaps.flip(2) if flip else heatmaps)
        return torch.stack(each).mean(dim=0).cpu().numpy()

    def _heatmaps(self, images: Tensor, targets: Targets, eigen_smooth: bool) -> Tensor:
        result = self._explainer(images, eigen_smooth)(images, _targets(targets, len(images)))
        self.outputs = result.logits
        size = (images.shape[2], images.shape[3])
        each = []
        for maps in result.layer_maps:
            if maps.shape[1] != 1:
                raise ValueError(f"one target an image, got {maps.shape[1]}")
            scaled = _unit(maps[:, 0].relu())
            each.append(F.interpolate(scaled[:, None], size, mode="bilinear")[:, 0])
        return _unit(torch.stack(each).mean(dim=0))

    def _explainer(self, images: Tensor, eigen_smooth: bool) -> Explainer:
        key = (*images.shape[1:], eigen_smooth)
        if key not in self._explainers:
            self._explainers[key] = Explainer(
                self.model,
                layer=self.target_layers,
                method=replace(METHODS[self.method], eigen_smooth=eigen_smooth),
                output=_logits,
                layout=self._layout(images[:1]),
                example_inputs=images[:1],
            )
        return self._explainers[key]

    def _layout(self, image: Tensor) -> Layout | None:
        if self.reshape_transform is None:
            return None
        inner = unwrap(self.model)
        layer = self.target_layers[0]
        names = {id(module): name for name, module in inner.named_modules()}
        name = layer if isinstance(layer, str) else names[id(layer)]
        first = next(inner.parameters())
        [output] = stage_activations(inner, image.to(first.device, first.dtype), [name])
        return layout_of(self.reshape_transform, output.shape)


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


def _targets(targets: Targets, n: int) -> Targets:
    """As the engine takes them; targets that are classes become classes."""
    if targets is None or not isinstance(targets, Sequence) or isinstance(targets, str):
        return targets
    given: list[Any] = list(targets)
    if len(given) != n:
        raise ValueError(f"{len(given)} targets for {n} images; give one an image")
    if all(isinstance(target, ClassifierOutputTarget) for target in given):
        return [int(target.category) for target in given]
    return given


def _logits(output: Any) -> Tensor:
    """Logits (N, K); of scores (N, K, ...) of many places their means."""
    if isinstance(output, Tensor) and output.ndim > 2:
        return output.flatten(2).mean(dim=2)
    if isinstance(output, Tensor) and output.ndim == 1:
        return output[:, None]
    return pick_logits(output)


def _unit(maps: Tensor) -> Tensor:
    """Maps (N, h, w) to [0, 1], with the small number that pytorch-grad-cam adds."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + _EPS)


class GradCAM(BaseCAM):
    """Grad-CAM (arXiv 1610.02391)."""

    method = "grad_cam"


class DiffGradCAM(BaseCAM):
    """DiffGradCAM (arXiv 2506.08514), against the log-odds; no class of pytorch-grad-cam."""

    method = "diff_grad_cam"


class GradCAMPlusPlus(BaseCAM):
    """Grad-CAM++ (arXiv 1710.11063), renormalised as by its authors."""

    method = "grad_cam_pp"


class DiffGradCAMPlusPlus(BaseCAM):
    """Grad-CAM++ of the log-odds; no class of pytorch-grad-cam."""

    method = "diff_grad_cam_pp"


class HiResCAM(BaseCAM):
    """HiResCAM (arXiv 2011.08891)."""

    method = "hires_cam"


class XGradCAM(BaseCAM):
    """XGrad-CAM (arXiv 2008.02312)."""

    method = "xgrad_cam"


class LayerCAM(BaseCAM):
    """LayerCAM (TIP 2021)."""

    method = "layer_cam"


class EigenCAM(BaseCAM):
    """Eigen-CAM (arXiv 2008.00299); the cell of the largest magnitude is positive."""

    method = "eigen_cam"


class EigenGradCAM(BaseCAM):
    """Eigen-CAM of the gradients times the activations; the sign as of `EigenCAM`."""

    method = "eigen_grad_cam"


class ScoreCAM(BaseCAM):
    """Score-CAM (arXiv 1910.01279)."""

    method = "score_cam"


class AblationCAM(BaseCAM):
    """Ablation-CAM (WACV 2020)."""

    method = "ablation_cam"


class ReciproCAM(BaseCAM):
    """Recipro-CAM (arXiv 2209.14074); no class of pytorch-grad-cam."""

    method = "recipro_cam"
