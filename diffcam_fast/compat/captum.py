"""Captum's `LayerGradCam` and `LayerAttribution.interpolate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.compat.asked import Explainers, one_each
from diffcam_fast.inspections import Layer
from diffcam_fast.methods import METHODS, GradientMethod
from diffcam_fast.targets import Targets

Place = int | tuple[int, ...]
"""Where in the output of an image the score stands: a class, or an index for each axis."""


class LayerGradCam:
    """Grad-CAM with the interface of Captum: signed maps at the resolution of the layer.

    Args:
        forward_func: an image classifier, a module.
        layer: a module of it, or a dotted name.
        method: another gradient method of the engine.

    Raises:
        TypeError: a function in place of a module.
        ValueError: a method that takes no gradients.

    Example:
        >>> import torch
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head)
        >>> LayerGradCam(model, model[1]).attribute(torch.rand(2, 3, 8, 8), target=1).shape
        torch.Size([2, 1, 6, 6])
    """

    multiplies_by_inputs = False

    def __init__(self, forward_func: nn.Module, layer: Layer, *, method: str = "grad_cam") -> None:
        if not isinstance(forward_func, nn.Module):
            raise TypeError(
                f"forward_func must be a module, got {type(forward_func).__name__}; a function "
                "cannot be cut at a layer"
            )
        found = METHODS.get(method)
        if not isinstance(found, GradientMethod):
            raise ValueError(f"method must be one that takes gradients, got {method!r}")
        self.forward_func, self.layer = forward_func, layer
        self._method = found
        self._channels = _Channels(method, found.contrast, found.source, reduction=found.reduction)
        self._explainers = Explainers(forward_func, layer, relu=False)

    def attribute(
        self,
        inputs: Tensor,
        target: Place | Tensor | Sequence[Place] | None = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: object = None,
    ) -> Tensor:
        """Maps (N, 1, h, w), signed unless `relu_attributions`, unnormalised.

        Args:
            inputs: (N, C, H, W).
            target: a class for all images, or one an image; of outputs with more axes than classes
                a tuple, or one an image. None: the only score, or the predicted class, where Captum
                would fail.
            additional_forward_args: not taken.
            attribute_to_layer_input: not taken: name the layer before.
            relu_attributions: clip negative cells to 0.
            attr_dim_summation: add up the channels; otherwise (N, C, h, w), the map of each.
            grad_kwargs: not taken.

        Raises:
            ValueError: something that is not taken.
        """
        asked = {
            "additional_forward_args": additional_forward_args is not None,
            "attribute_to_layer_input": attribute_to_layer_input,
            "grad_kwargs": grad_kwargs is not None,
        }
        if any(asked.values()):
            refused = ", ".join(name for name, given in asked.items() if given)
            raise ValueError(f"{refused}: not taken here; see docs/migrate.md")
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be one tensor (N, C, H, W), got {type(inputs).__name__}")
        method = self._method if attr_dim_summation else self._channels
        maps = self._explainers(method, inputs, _targets(target, len(inputs))).maps
        return maps.relu() if relu_attributions else maps


@dataclass(frozen=True)
class _Channels(GradientMethod):
    """What each channel adds to a map, in the place of targets: (N, C, h, w) of one target."""

    pooled: None = None

    def reduced(self, activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
        """As `GradientMethod.reduced`."""
        return self.terms(activations, gradients)[:, 0]


def _targets(target: Place | Tensor | Sequence[Place] | None, n: int) -> Targets:
    """As the engine takes targets; a tuple is no list of classes, but one place of an output."""
    if isinstance(target, Tensor):
        return target.reshape(()) if target.numel() == 1 else target
    if isinstance(target, tuple):
        return [_at(target)] * n
    if isinstance(target, Sequence):
        if any(isinstance(place, tuple) for place in target):
            return one_each([_at(place) for place in target], n)
        return one_each(list(target), n)  # type: ignore[arg-type]  # no tuples, as asked above
    return target


def _at(place: Place) -> Callable[[Tensor], Tensor]:
    def score(output: Tensor) -> Tensor:
        return output[place]

    return score


class LayerAttribution:
    """What Captum has for the attributions of layers."""

    @staticmethod
    def interpolate(
        layer_attribution: Tensor,
        interpolate_dims: tuple[int, int],
        interpolate_mode: str = "nearest",
    ) -> Tensor:
        """Maps (N, 1, h, w) at another size; `nearest` by default, as in Captum."""
        resized: Tensor = F.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)
        return resized
