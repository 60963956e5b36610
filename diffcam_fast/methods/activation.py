"""Methods that look at activations and the weights behind them: no gradients, no further passes."""

from dataclasses import dataclass

from torch import Tensor

from diffcam_fast.methods.base import Method, rectified
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_kernels import ops


@dataclass(frozen=True)
class ClassActivationMap(Method):
    """The channels weighted as the classifier weighs them, sum_k (d W)_k A_k (arXiv 1512.04150)."""

    needs_pooled_head = True

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        if call.asked.function is not None:
            raise ValueError(f"{self.name} weighs channels for classes; a function has no weights")
        weight = call.fitted[0] if call.fitted else call.network.head_weight()
        assert weight is not None
        split = call.network.forward(call.images)
        [activations] = split.activations
        with plain_float32(activations):
            target = call.asked.of(split.logits, split.output)
            d = call.asked.contrast.gradient(split.logits, target.classes)
            read = self._activations(activations)
            maps = ops.pooled_cam(read, d @ weight.to(d), call.relu)
        return Maps(split.logits, target, (maps,), "closed form", (activations,))

    def _activations(self, activations: Tensor) -> Tensor:
        return activations


@dataclass(frozen=True)
class EigenCAM(Method):
    """The first principal component of the activations (arXiv 2008.00299), for every class the
    same.
    """

    class_agnostic = True

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        return self.maps_of_layers(call)

    def maps_of_layers(self, call: Call) -> Maps:
        """As `Method.maps_of_layers`: one forward pass for all."""
        split = call.network.forward(call.images)
        with plain_float32(call.images):
            target = call.asked.of(split.logits, split.output)
            t = target.scores.shape[1]
            maps = tuple(self._map(a, t, call.relu) for a in split.activations)
        return Maps(split.logits, target, maps, "principal component", split.activations)

    def _map(self, activations: Tensor, targets: int, relu: bool) -> Tensor:
        maps = ops.eigen_cam(activations, True)[:, None].repeat(1, targets, 1, 1)
        return rectified(maps, relu)
