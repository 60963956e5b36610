"""Captum's `LayerGradCam` and `LayerAttribution.interpolate`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.explainer import Explainer
from diffcam_fast.inspections import Layer


class LayerGradCam:
    """Grad-CAM with the interface of Captum: signed maps at the resolution of the layer.

    Args:
        forward_func: an image classifier, a module.
        layer: a module of it, or a dotted name.
        method: another method of the engine.

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
        self.forward_func, self.layer = forward_func, layer
        self._method = method
        self._explainers: dict[tuple[int, ...], Explainer] = {}

    def attribute(
        self,
        inputs: Tensor,
        target: int | Tensor | Sequence[int] | None = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: object = None,
    ) -> Tensor:
        """Maps (N, 1, h, w), signed unless `relu_attributions`, unnormalised.

        Args:
            inputs: (N, C, H, W).
            target: a class, or one an image; None: the predicted class, where Captum would fail.
            additional_forward_args: not taken.
            attribute_to_layer_input: not taken: name the layer before.
            relu_attributions: clip negative cells to 0.
            attr_dim_summation: always.
            grad_kwargs: not taken.

        Raises:
            ValueError: something that is not taken.
        """
        asked = {
            "additional_forward_args": additional_forward_args is not None,
            "attribute_to_layer_input": attribute_to_layer_input,
            "attr_dim_summation=False": not attr_dim_summation,
            "grad_kwargs": grad_kwargs is not None,
        }
        if any(asked.values()):
            refused = ", ".join(name for name, given in asked.items() if given)
            raise ValueError(f"{refused}: not taken here; see docs/migrate.md")
        shape = tuple(inputs.shape[1:])
        if shape not in self._explainers:
            self._explainers[shape] = Explainer(
                self.forward_func,
                layer=self.layer,
                method=self._method,
                relu=False,
                example_inputs=inputs[:1],
            )
        maps = self._explainers[shape](inputs, target).maps
        return maps.relu() if relu_attributions else maps


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
