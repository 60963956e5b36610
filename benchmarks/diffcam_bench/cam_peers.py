"""The methods of other libraries, called as their users call them, to heatmaps of the images' size.

Each gets a copy of the network of its own, for the sake of hooks that stay on and of gradients that
are written.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_bench.methods import Peer, min_max, upsampled
from diffcam_bench.rows import optional
from diffcam_fast.layout import Layout
from diffcam_fast.running import evaluating
from diffcam_fast.split import forward

PYTORCH_GRAD_CAM, TORCH_CAM, CAPTUM = "pytorch-grad-cam", "torch-cam", "captum"
MASKED_PASSES = "masked passes in PyTorch"


@dataclass(frozen=True)
class Rival:
    """A method of another library.

    Attributes:
        library: its name.
        make: from a copy of the network and the layer's name to what explains a batch.
        like: what of its maps must be ours: `same`, `sign` (the same up to the sign of each image's
            map), or `close`.
        why: why they are not the same; empty where they are.
    """

    library: str
    make: Callable[[nn.Module, str], Peer]
    like: str = "same"
    why: str = ""


def _pytorch_grad_cam(cls: str) -> Callable[[nn.Module, str], Peer]:
    def make(network: nn.Module, layer: str) -> Peer:
        library = optional("pytorch_grad_cam", distribution="grad-cam")
        targets_of = optional("pytorch_grad_cam.utils.model_targets", distribution="grad-cam")
        module = network.get_submodule(layer)
        # Ablation-CAM takes the layer away from the network that it is given.
        cam = getattr(library, cls)(network, [module])

        def explain(images: Tensor, targets: list[int]) -> Tensor:
            wanted = [targets_of.ClassifierOutputTarget(c) for c in targets]
            with torch.enable_grad():
                return torch.from_numpy(cam(images, wanted))

        return explain

    return make


def _torch_cam(cls: str, **options: Any) -> Callable[[nn.Module, str], Peer]:
    def make(network: nn.Module, layer: str) -> Peer:
        library = optional("torchcam.methods", distribution="torchcam")
        extractor = getattr(library, cls)(network, layer, **options)

        def explain(images: Tensor, targets: list[int]) -> Tensor:
            scores = network(images)
            [maps] = extractor(targets, scores)
            # Their CAM keeps negative cells.
            return upsampled(maps.detach(), images)

        return explain

    return make


def _captum(network: nn.Module, layer: str) -> Peer:
    library = optional("captum.attr", distribution="captum")
    attribution = library.LayerGradCam(network, network.get_submodule(layer))

    def explain(images: Tensor, targets: list[int]) -> Tensor:
        maps = attribution.attribute(images, target=targets, relu_attributions=True)[:, 0].detach()
        return upsampled(min_max(maps), images)

    return explain


def _masked_passes(network: nn.Module, layer: str) -> Peer:
    """Recipro-CAM as published: the head on a batch of P activations with one cell each."""

    def explain(images: Tensor, targets: list[int]) -> Tensor:
        [activations] = forward(network, images, {layer: Layout()}).activations
        h, w = activations.shape[2:]
        one_cell = torch.eye(h * w).view(h * w, 1, h, w)
        scores = []
        with torch.inference_mode(), evaluating(network):
            for activation, target in zip(activations, targets, strict=True):
                masked = activation * one_cell
                hook = network.get_submodule(layer).register_forward_hook(
                    lambda module, args, output, masked=masked: masked
                )
                try:
                    # The features are not what is measured: those of a small crop cost little.
                    logits = network(images[:1, :, :32, :32])
                finally:
                    hook.remove()
                scores.append(logits.softmax(dim=1)[:, target].view(h, w))
        return upsampled(min_max(torch.stack(scores)), images)

    return explain


_EPS = "theirs adds 1e-6 to the denominator and is not renormalised"
_LOST = "theirs loses its division, so that w = sum relu(G)^3"
_MASKS = "theirs masks by channels that are scaled before they are upsampled"
_SIGN = "the sign of theirs is LAPACK's"

RIVALS: dict[str, list[Rival]] = {
    "grad_cam": [
        Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("GradCAM")),
        Rival(TORCH_CAM, _torch_cam("GradCAM")),
        Rival(CAPTUM, _captum),
    ],
    "grad_cam_pp": [
        Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("GradCAMPlusPlus"), "close", _EPS),
        Rival(TORCH_CAM, _torch_cam("GradCAMpp"), "close", _LOST),
    ],
    "xgrad_cam": [
        Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("XGradCAM")),
        Rival(TORCH_CAM, _torch_cam("XGradCAM")),
    ],
    "layer_cam": [
        Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("LayerCAM")),
        Rival(TORCH_CAM, _torch_cam("LayerCAM")),
    ],
    "hires_cam": [Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("HiResCAM"))],
    "eigen_grad_cam": [Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("EigenGradCAM"), "sign", _SIGN)],
    "cam": [Rival(TORCH_CAM, _torch_cam("CAM"))],
    "eigen_cam": [Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("EigenCAM"), "sign", _SIGN)],
    "recipro_cam": [Rival(MASKED_PASSES, _masked_passes)],
    "score_cam": [
        Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("ScoreCAM")),
        Rival(TORCH_CAM, _torch_cam("ScoreCAM"), "close", _MASKS),
    ],
    "ablation_cam": [Rival(PYTORCH_GRAD_CAM, _pytorch_grad_cam("AblationCAM"))],
}
"""Method -> the libraries that have it too."""

SLOW = ("score_cam", "ablation_cam")
"""Methods that take theirs a pass for each channel."""


def rivals_of(method: str, network: nn.Module, layer: str) -> dict[Rival, Peer]:
    """What explains a batch in each library that has the method."""
    return {rival: rival.make(copy.deepcopy(network), layer) for rival in RIVALS[method]}
