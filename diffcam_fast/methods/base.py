"""What every method of the CAM family is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from diffcam_fast.network import Call, Maps
from diffcam_kernels import ops


@dataclass(frozen=True)
class Method(ABC):
    """A method of the CAM family.

    Attributes:
        name: the name in the API and on the command line.
        contrast: name of the default contrast.
        source: the paper.
        needs_contrast: the method is defined by its contrast, and `none` is refused.
        eigen_smooth: of the terms that the map is a sum of, one for each channel, take the first
            principal component in place of the sum (pytorch-grad-cam). Methods that are no such
            sum do not look at it.
    """

    name: str
    contrast: str
    source: str
    needs_contrast: bool = False
    eigen_smooth: bool = False

    # Of a class, not of its instances: what it asks for and what it knows.
    needs_pooled_head = False
    needs_fit = False
    class_agnostic = False

    @abstractmethod
    def maps(self, call: Call) -> Maps:
        """Explains a batch at one layer.

        Raises:
            ValueError: what was asked for does not fit the model's output.
        """

    def maps_of_layers(self, call: Call) -> Maps:
        """Explains a batch at each of several layers, from as few passes as the method can."""
        each = [
            self.maps(
                replace(
                    call,
                    network=replace(call.network, founds=(found,)),
                    fitted=call.fitted[i : i + 1],
                )
            )
            for i, found in enumerate(call.network.founds)
        ]
        return replace(
            each[0],
            maps=tuple(m for made in each for m in made.maps),
            tensors=tuple(t for made in each for t in made.tensors),
        )


def weighted(
    activations: Tensor, weights: Tensor, *, relu: bool, eigen_smooth: bool = False
) -> Tensor:
    """The maps (N, T, h, w) of A (N, C, h, w) and a weight for each channel (N, T, C)."""
    if eigen_smooth:
        return principal(weights[..., None, None] * activations[:, None].float(), relu)
    maps: Tensor = ops.pooled_cam(activations, weights.contiguous(), relu)
    return maps


def principal(terms: Tensor, relu: bool) -> Tensor:
    """The first principal component (N, T, h, w) of one term for each channel (N, T, C, h, w)."""
    n, t, c, h, w = terms.shape
    maps: Tensor = ops.eigen_cam(terms.reshape(n * t, c, h, w), True)
    return rectified(maps.view(n, t, h, w), relu)


def rectified(maps: Tensor, relu: bool) -> Tensor:
    """The maps as float32, negative cells clipped to 0 where that is asked for."""
    maps = maps.float()
    return maps.relu() if relu else maps
