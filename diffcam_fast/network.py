"""A model with its target layers, as methods run it; what they are asked, and what they give."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.analysis import Inspection
from diffcam_fast.running import tensor_named
from diffcam_fast.split import Explained, Output, Split, forward, head_gradients
from diffcam_fast.targets import Asked, Target


@dataclass(frozen=True)
class Network:
    """A model with what was found out about it, one inspection for each target layer.

    Attributes:
        model: an image classifier, unwrapped.
        founds: of one layer or more.
        output: what finds the logits (N, K) in what the model returns.
    """

    model: nn.Module
    founds: tuple[Inspection, ...]
    output: Output

    @property
    def found(self) -> Inspection:
        """The inspection of the only layer."""
        [found] = self.founds
        return found

    @property
    def layers(self) -> dict[str, Any]:
        """The layouts of the layers, by their names."""
        return {found.layer: found.layout for found in self.founds}

    def head_weight(self) -> Tensor | None:
        """W (K, C) of a pooled linear head, as it is now; None where the head is another one."""
        if not self.found.closed_form:
            return None
        assert self.found.weight is not None
        return tensor_named(self.model, self.found.weight).detach().flatten(1)

    def forward(self, images: Tensor) -> Split:
        """A plain forward pass that keeps the activations."""
        return forward(self.model, images, self.layers, output=self.output)

    def head_gradients(self, images: Tensor, explained: Explained) -> Split:
        """A forward pass, and the vector-Jacobian products of the head."""
        return head_gradients(
            self.model,
            images,
            self.layers,
            explained,
            output=self.output,
            probabilities=self.founds[0].probabilities,
        )


@dataclass(frozen=True)
class Call:
    """One batch to be explained.

    Attributes:
        network: the model at its target layers.
        images: (N, C, H, W), on the device and in the dtype of the model.
        asked: what is explained.
        relu: clip negative cells of the maps to 0.
        memory: bytes that passes over masked images or activations may take.
        progress: show a bar over such passes; None: where they take long and a person looks on.
        fitted: what `Explainer.fit` found, W' (K, C) of each layer.
    """

    network: Network
    images: Tensor
    asked: Asked
    relu: bool = True
    memory: int = 1 << 29
    progress: bool | None = None
    fitted: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Maps:
    """What a method gives.

    Attributes:
        logits: (N, K).
        target: what was explained.
        maps: of each layer (N, T, h, w).
        how: the way to them, in a few words.
        tensors: what was given to operators that have kernels; none where there were no such.
    """

    logits: Tensor
    target: Target
    maps: tuple[Tensor, ...]
    how: str
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)


@contextmanager
def plain_float32(tensor: Tensor) -> Iterator[None]:
    """Contrasts and maps are float32 work on ordinary tensors, whatever modes the caller is in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(tensor.device.type, enabled=False),
    ):
        yield
