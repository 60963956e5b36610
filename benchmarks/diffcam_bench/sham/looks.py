"""What every method shows of a network, from its last activation on."""

import torch
from torch import Tensor, nn

from diffcam_bench.sham.networks import Classifier
from diffcam_fast import Explainer

# What is looked at: a method and its contrast.
LOOKS = (
    ("grad_cam", "none"),
    ("diff_grad_cam", "mean"),
    ("diff_grad_cam", "log_odds"),
    ("diff_grad_cam", "runner_up"),
    ("grad_cam_pp", "none"),
    ("diff_grad_cam_pp", "log_odds"),
    ("xgrad_cam", "none"),
    ("xgrad_cam", "log_odds"),
    ("layer_cam", "none"),
    ("layer_cam", "log_odds"),
    ("hires_cam", "none"),
    ("hires_cam", "log_odds"),
    ("eigen_cam", "none"),
)


def activations(network: Classifier, images: Tensor) -> Tensor:
    """The last ones (N, C, h, w), 64 images at a time."""
    with torch.no_grad():
        return torch.cat([network.features(part) for part in torch.split(images, 64)])


def explained(
    network: Classifier, seen: Tensor, classes: Tensor, method: str, contrast: str
) -> Tensor:
    """Maps (N, h, w) of our engine, on the CPU.

    Args:
        network: whose head is explained.
        seen: its activations (N, C, h, w).
        classes: (N,).
        method: of the maps.
        contrast: of the method; `none` for the logit.
    """
    behind = _behind(network, seen)
    explainer = Explainer(
        behind, layer="features", method=method, contrast=contrast, example_inputs=seen[:2]
    )
    made = []
    for part, targets in zip(torch.split(seen, 256), torch.split(classes, 256), strict=True):
        # Eigen-CAM has no target.
        made.append(explainer(part, None if method == "eigen_cam" else targets[:, None]))
    return torch.cat([one.maps[:, 0].detach() for one in made]).cpu()


def _behind(network: Classifier, seen: Tensor) -> Classifier:
    """The head behind a layer that changes nothing: a dozen looks need the features only once."""
    channels = seen.shape[1]
    same = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.ones_(same.weight)
    return Classifier(same.to(seen.device), network.head).eval()
