"""Methods that weigh activations with gradients of the score."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffcam_fast.methods.base import Method, principal
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_fast.split import Split
from diffcam_fast.targets import ClassTarget, Target, resolve_targets
from diffcam_kernels import ops


@dataclass(frozen=True)
class GradientMethod(Method):
    """A reduction of activations A and gradients G to a map.

    Attributes:
        reduction: key of `diffcam_kernels.reference.REDUCTIONS`.
        pooled: what its map is under a gradient that is the same at every cell, that of a pooled
            linear head: the channels weighted by the gradient, or by its positive part. Such a
            head is explained in closed form then. None: neither, and it gets a backward too.
    """

    reduction: str = "grad_cam"
    pooled: Literal["signed", "positive"] | None = "signed"

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        weight = call.network.head_weight()
        if (
            weight is None
            or self.pooled is None
            or self.eigen_smooth
            or call.asked.function is not None
        ):
            return self.maps_of_layers(call)
        return self._closed_form(call, weight)

    def _closed_form(self, call: Call, weight: Tensor) -> Maps:
        split = call.network.forward(call.images)
        [activations] = split.activations
        asked = call.asked
        with plain_float32(activations):
            classes = resolve_targets(asked.targets, asked.topk, split.logits)
            operands = asked.contrast.operands(split.logits, classes)
            cells = activations.shape[2] * activations.shape[3]
            weights, classes, scores = ops.contrast_channel_weights(
                split.logits, weight, cells, classes, *operands
            )
            if self.pooled == "positive":
                weights = weights.relu()
            maps = ops.pooled_cam(activations, weights, call.relu)
            target = ClassTarget(classes, scores.float(), asked.contrast)
        return Maps(split.logits, target, (maps,), "closed form", (split.logits, activations))

    def maps_of_layers(self, call: Call) -> Maps:
        """As `Method.maps_of_layers`: one forward pass and one backward of the head for all."""
        split, target = differentiate(call)
        with plain_float32(call.images):
            maps = tuple(
                self.reduced(a, g, call.relu)
                for a, g in zip(split.activations, split.gradients, strict=True)
            )
        tensors = (split.logits, *split.activations)
        return Maps(split.logits, target, maps, "backward of the head", tensors)

    def reduced(self, activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
        """The map (N, T, h, w) of A (N, C, h, w) and G (N, T, C, h, w)."""
        if self.eigen_smooth:
            return principal(self.terms(activations, gradients), relu)
        maps: Tensor = ops.gradient_cam(activations, gradients, self.reduction, relu)
        return maps

    def terms(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """(N, T, C, h, w), what each channel adds to the map: the map of that channel alone."""
        n, t, c, h, w = gradients.shape
        alone = gradients.transpose(1, 2).reshape(n * c, t, 1, h, w)
        each: Tensor = ops.gradient_cam(
            activations.reshape(n * c, 1, h, w), alone, self.reduction, False
        )
        return each.view(n, c, t, h, w).transpose(1, 2)


@dataclass(frozen=True)
class EigenGradCAM(GradientMethod):
    """The first principal component of the products of A and G (pytorch-grad-cam)."""

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        # The component of A times a constant has no shorter form.
        return self.maps_of_layers(call)

    def reduced(self, activations: Tensor, gradients: Tensor, relu: bool) -> Tensor:
        """As `GradientMethod.reduced`."""
        return principal(gradients * activations[:, None], relu)


def differentiate(call: Call) -> tuple[Split, Target]:
    """The gradients of what is asked for, and what that turned out to be."""
    targets: list[Target] = []
    asked = call.asked

    def explained(logits: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        if asked.function is not None:
            scores = asked.scores(output, len(logits))
            targets.append(asked.of_function(scores))
            t = scores.shape[1]
            return scores, torch.eye(t, device=scores.device).expand(len(scores), t, t)
        with plain_float32(logits):
            z = logits.detach()
            classes = resolve_targets(asked.targets, asked.topk, z)
            d: Tensor
            d, classes, scores = ops.contrast_gradient(
                z, classes, *asked.contrast.operands(z, classes)
            )
            targets.append(ClassTarget(classes, scores.float(), asked.contrast))
        return logits, d

    split = call.network.head_gradients(call.images, explained)
    return split, targets[-1]
