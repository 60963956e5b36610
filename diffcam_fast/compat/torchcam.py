"""The extractors of torch-cam: hooks that remember a forward pass, explained afterwards.

The images of the user's own forward pass are kept until they are explained, and the engine runs the
model on them again, in evaluation mode: a head in closed form, or a graph behind the target layer
only, is what makes that cheaper than a graph through the whole network. That first pass needs no
graph: run it under `torch.inference_mode()`. `diffcam_fast.Explainer` runs the model once.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.compat.asked import Explainers, Reshape, one_each, unit
from diffcam_fast.inspections import Layer
from diffcam_fast.running import unwrap
from diffcam_fast.targets import Targets

_EPS = 1e-8


class _Extractor:
    """An extractor with the interface of torch-cam.

    Args:
        model: an image classifier.
        target_layer: a module or dotted name, or a list of them; None: found by running.
        input_shape: (C, H, W), not needed.
        enable_hooks: remember the next forward passes.
        reshape_transform: from what the layers return to (N, C, h, w), where it picks a grid of
            tokens or moves an axis; the layers must be given then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head).eval()
        >>> with GradCAM(model) as extractor:
        ...     scores = model(torch.rand(2, 3, 8, 8))
        ...     [maps] = extractor(1, scores)
        >>> maps.shape
        torch.Size([2, 6, 6])
    """

    method: ClassVar[str]
    relu: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | Sequence[Layer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Reshape | None = None,
    ) -> None:
        if reshape_transform is not None and not callable(reshape_transform):
            raise TypeError("reshape_transform must be a function")
        if reshape_transform is not None and target_layer is None:
            raise ValueError("with a reshape_transform give the target_layer too")
        several = target_layer if isinstance(target_layer, list | tuple) else (target_layer,)
        for layer in several:
            _check_layer(model, layer)
        self.model = model
        self._images: Tensor | None = None
        self._explainers = Explainers(model, target_layer, reshape_transform, relu=self.relu)
        self._hooks_enabled = enable_hooks
        # On the wrapper, if there is one: a compiled module calls no hooks inside, a replica of
        # DataParallel sees some of the images.
        self.hook_handles = [model.register_forward_pre_hook(self._remember, with_kwargs=True)]

    def _remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if self._hooks_enabled and given:
            # The model may write into its input.
            self._images = given[0].detach().clone()

    def enable_hooks(self) -> None:
        """Remember the next forward passes."""
        self._hooks_enabled = True

    def disable_hooks(self) -> None:
        """Leave the next forward passes alone."""
        self._hooks_enabled = False

    def reset_hooks(self) -> None:
        """Forget the last forward pass."""
        self._images = None

    def remove_hooks(self) -> None:
        """Take the hook from the model."""
        for handle in self.hook_handles:
            handle.remove()
        self.hook_handles.clear()
        self._images = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove_hooks()

    def __call__(
        self,
        class_idx: int | Sequence[int] | None = None,
        scores: Tensor | None = None,
        normalized: bool = True,
        *,
        targets: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None = None,
        retain_graph: bool = False,
    ) -> list[Tensor]:
        """The maps of the last forward pass.

        Args:
            class_idx: a class, or one an image.
            scores: what the model returned; not needed.
            normalized: bring each map to [0, 1].
            targets: a function of the output of one image to a number, or one for each, in place
                of classes.
            retain_graph: not needed: another class may always follow.

        Returns:
            (N, h, w) for each layer, at its resolution, on the model's device.

        Raises:
            ValueError: neither or both of class_idx and targets, or not as many as images.
            TypeError: targets that are no functions.
            RuntimeError: there was no forward pass.
        """
        if (class_idx is None) == (targets is None):
            raise ValueError("give either class_idx or targets")
        if self._images is None:
            raise RuntimeError("run the model on images first, with the hooks enabled")
        images = self._images
        given: Targets = class_idx
        if targets is not None:
            given = [targets] * len(images) if callable(targets) else list(targets)
            if not all(callable(target) for target in given):
                raise TypeError("targets must be a function of the output of one image, or a list")
        hooks, self._hooks_enabled = self._hooks_enabled, False
        try:
            result = self._explainers(self.method, images, one_each(given, len(images)))
        finally:
            self._hooks_enabled = hooks
        maps = [m[:, 0] for m in result.layer_maps]
        return [unit(m, _EPS) for m in maps] if normalized else maps

    @classmethod
    def fuse_cams(
        cls, cams: Sequence[Tensor], target_shape: tuple[int, int] | None = None
    ) -> Tensor:
        """The largest of the maps (N, h, w) of several layers, at the size of the largest or at
        `target_shape`.

        Raises:
            TypeError: no list.
            ValueError: an empty one.
        """
        if not isinstance(cams, list | tuple):
            raise TypeError(f"cams must be a list of maps, got {type(cams).__name__}")
        if not cams:
            raise ValueError("cams must hold the maps of one layer at least")
        if len(cams) == 1:
            return cams[0]
        cams = [cls._scaled(cam) for cam in cams]
        size = target_shape or tuple(max(cam.shape[i] for cam in cams) for i in (1, 2))
        resized = [F.interpolate(cam[:, None], size, mode="bilinear")[:, 0] for cam in cams]
        return torch.stack(resized).amax(dim=0)

    @staticmethod
    def _scaled(cam: Tensor) -> Tensor:
        return cam


def _check_layer(model: nn.Module, layer: object) -> None:
    known = dict(unwrap(model).named_modules())
    if layer is not None and not isinstance(layer, str | nn.Module):
        raise TypeError(f"target_layer must be a module or a name, got {type(layer).__name__}")
    inside = layer is None or layer in known or any(layer is m for m in known.values())
    if not inside:
        raise ValueError(f"the model has no layer {layer!r}")


class CAM(_Extractor):
    """Class activation maps (arXiv 1512.04150), of pooled linear heads; no ReLU.

    Args:
        model: an image classifier.
        target_layer: one module or name; None: found by running.
        fc_layer: not needed, the classifier's weights are found; checked to be a module or a name.
        input_shape: not needed.
        enable_hooks: remember the next forward passes.
        reshape_transform: from what the layers return to (N, C, h, w).
    """

    method = "cam"
    relu = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | Sequence[Layer] | None = None,
        fc_layer: Layer | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Reshape | None = None,
    ) -> None:
        _check_layer(model, fc_layer)
        if isinstance(target_layer, list) and len(target_layer) > 1:
            raise ValueError("CAM takes one target layer")
        super().__init__(model, target_layer, input_shape, enable_hooks, reshape_transform)


class GradCAM(_Extractor):
    """Grad-CAM (arXiv 1610.02391)."""

    method = "grad_cam"


class DiffGradCAM(_Extractor):
    """DiffGradCAM (arXiv 2506.08514), against the log-odds; no class of torch-cam."""

    method = "diff_grad_cam"


class GradCAMpp(_Extractor):
    """Grad-CAM++ (arXiv 1710.11063), renormalised as by its authors."""

    method = "grad_cam_pp"


class XGradCAM(_Extractor):
    """XGrad-CAM (arXiv 2008.02312)."""

    method = "xgrad_cam"


class LayerCAM(_Extractor):
    """LayerCAM (TIP 2021)."""

    method = "layer_cam"

    @staticmethod
    def _scaled(cam: Tensor) -> Tensor:
        # Equation 9 of the paper.
        return torch.tanh(2 * cam)


class ScoreCAM(_Extractor):
    """Score-CAM (arXiv 1910.01279), masked as by pytorch-grad-cam.

    Args:
        model: an image classifier.
        target_layer: a module or name, or a list of them; None: found by running.
        batch_size: not needed: passes are bounded by memory.
        input_shape: not needed.
        enable_hooks: remember the next forward passes.
        reshape_transform: from what the layers return to (N, C, h, w).
    """

    method = "score_cam"

    def __init__(
        self,
        model: nn.Module,
        target_layer: Layer | Sequence[Layer] | None = None,
        batch_size: int = 32,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Reshape | None = None,
    ) -> None:
        super().__init__(model, target_layer, input_shape, enable_hooks, reshape_transform)
