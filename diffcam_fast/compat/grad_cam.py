"""The classes of pytorch-grad-cam: the same constructor, call and output, over this engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.compat.asked import Explainers, Reshape, one_each, unit
from diffcam_fast.inspections import Layer
from diffcam_fast.methods import METHODS, GradientMethod, Method
from diffcam_fast.methods.base import principal
from diffcam_fast.targets import Targets
from diffcam_kernels.reference.precision import accumulate_dtype

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

    method: ClassVar[str | Method]

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
        self._explainers = Explainers(model, self.target_layers, reshape_transform)

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
        method = METHODS[self.method] if isinstance(self.method, str) else self.method
        method = replace(method, eigen_smooth=eigen_smooth)
        result = self._explainers(method, images, one_each(targets, len(images)))
        self.outputs = result.logits
        size = (images.shape[2], images.shape[3])
        each = []
        for maps in result.layer_maps:
            if maps.shape[1] != 1:
                raise ValueError(f"one target an image, got {maps.shape[1]}")
            scaled = unit(maps[:, 0].relu(), _EPS)
            each.append(F.interpolate(scaled[:, None], size, mode="bilinear")[:, 0])
        return unit(torch.stack(each).mean(dim=0), _EPS)


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


@dataclass(frozen=True)
class _ElementWise(GradientMethod):
    """sum_k relu(G_k A_k), cell by cell."""

    def reduced(self, activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
        """As `GradientMethod.reduced`."""
        terms = self.terms(activations, gradients)
        return principal(terms, relu) if self.eigen_smooth else terms.sum(dim=2)

    def terms(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """As `GradientMethod.terms`."""
        dtype = accumulate_dtype(activations, gradients)
        return (gradients.to(dtype) * activations[:, None].to(dtype)).relu()


class GradCAMElementWise(BaseCAM):
    """The positive products of gradients and activations; a method of pytorch-grad-cam alone."""

    method = _ElementWise("grad_cam_elementwise", "none", "pytorch-grad-cam", pooled=None)


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
    """Ablation-CAM (WACV 2020).

    Args:
        model: as for `BaseCAM`.
        target_layers: as for `BaseCAM`.
        reshape_transform: as for `BaseCAM`.
        ablation_layer: not taken: channels are set to 0 in the layer's output itself.
        batch_size: not needed: passes are bounded by memory.
        ratio_channels_to_ablate: 1, all of them.

    Raises:
        ValueError: an `ablation_layer`, or another ratio.
    """

    method = "ablation_cam"

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[Layer],
        reshape_transform: Reshape | None = None,
        ablation_layer: nn.Module | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: float = 1.0,
    ) -> None:
        if ablation_layer is not None or ratio_channels_to_ablate != 1:
            raise ValueError(
                "ablation_layer and ratio_channels_to_ablate are not taken: every channel is set "
                "to 0, in the output of the layer; leave them out"
            )
        super().__init__(model, target_layers, reshape_transform)
        self.batch_size = batch_size


class ReciproCAM(BaseCAM):
    """Recipro-CAM (arXiv 2209.14074); no class of pytorch-grad-cam."""

    method = "recipro_cam"
