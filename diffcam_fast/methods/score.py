"""Score-CAM: what the network says of the image under each channel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_fast.methods.base import Method, weighted
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_fast.passes import ImagePasses, bar, in_pieces, row_bytes


@dataclass(frozen=True)
class ScoreCAM(Method):
    """sum_k w_k A_k, w a softmax over channels of the scores of the masked images (arXiv
    1910.01279).

    Image x is masked by channel k as x * minmax(upsample(A_k)), with aligned corners, as
    pytorch-grad-cam does. A channel that is the same at every cell masks nothing, takes no pass and
    has weight 0.
    """

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        split = call.network.forward(call.images)
        [activations] = split.activations
        n, c = activations.shape[:2]
        with plain_float32(activations):
            target = call.asked.of(split.logits, split.output)
            flat = activations.float().flatten(2)
            # Not so for NaN, whose passes give NaN.
            constant = flat.amax(dim=2) == flat.amin(dim=2)
            pairs = (~constant).nonzero()
        passes = ImagePasses(call.network)
        scores = torch.full((n, c, target.scores.shape[1]), -torch.inf, device=activations.device)
        with bar(len(pairs), "channels", call.progress) as shown:
            for piece in in_pieces(len(pairs), row_bytes(call.network, call.images), call.memory):
                rows, channels = pairs[piece].unbind(1)
                with plain_float32(activations):
                    masked = _masked(call.images[rows], activations[rows, channels])
                logits, output = passes(masked)
                with plain_float32(activations):
                    values = target.values(logits.clone(), output, rows)
                    scores[rows, channels] = values.float()
                shown.update(len(rows))
        with plain_float32(activations):
            weights = torch.where(constant.all(dim=1)[:, None, None], 0.0, scores.softmax(dim=1))
            maps = weighted(activations, weights.mT, relu=call.relu, eigen_smooth=self.eigen_smooth)
        how = f"{len(pairs)} passes for {n} images"
        return Maps(split.logits, target, (maps,), how, (activations,))


def _masked(images: Tensor, channels: Tensor) -> Tensor:
    """Images (M, C, H, W) under masks in [0, 1] made of channels (M, h, w), none constant."""
    size = images.shape[2:]
    up = F.interpolate(channels[:, None].float(), size, mode="bilinear", align_corners=True)
    low, high = up.amin(dim=(2, 3), keepdim=True), up.amax(dim=(2, 3), keepdim=True)
    return images * ((up - low) / (high - low)).to(images.dtype)
