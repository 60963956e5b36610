"""DecomCAM: what the network says of the image under each component of the weighted activations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_fast.methods.base import Method, rectified
from diffcam_fast.methods.gradient import differentiate
from diffcam_fast.network import Call, Maps, plain_float32
from diffcam_fast.passes import ImagePasses, bar, in_pieces, row_bytes

_CHANNELS, _COMPONENTS = 500, 10
_SIGMA = 10.0
_LEAST = 1e-3


@dataclass(frozen=True)
class DecomCAM(Method):
    """sum_i a_i relu(X_i), X_i the first ten principal components of w_k A_k (arXiv 2405.18882).

    w = mean_ij G; the 500 channels of the largest weights take part. Each component, positive where
    it is largest, masks the image as max(x m, blur(x) (1 - m)), m its min-max upsampled, and a_i is
    the score of that over the best of them, 0 where the score is under 0.001. Read from the
    authors' code.
    """

    def maps(self, call: Call) -> Maps:
        """As `Method.maps`."""
        split, target = differentiate(call)
        [activations], [gradients] = split.activations, split.gradients
        n, t = gradients.shape[:2]
        h, w = activations.shape[2:]
        with plain_float32(activations):
            weights = gradients.float().mean(dim=(3, 4))
            components = _components(activations.float(), weights)
            blurred = blur(call.images, _SIGMA)
        count = components.shape[2]
        pairs = torch.cartesian_prod(torch.arange(n), torch.arange(t), torch.arange(count))
        pairs = pairs.to(activations.device)
        passes = ImagePasses(call.network)
        scores = target.scores.new_zeros((n, t, count))
        with bar(len(pairs), "components", call.progress) as shown:
            for piece in in_pieces(len(pairs), row_bytes(call.network, call.images), call.memory):
                rows, targets, which = pairs[piece].unbind(1)
                with plain_float32(activations):
                    shape = components[rows, targets, which].view(-1, 1, h, w)
                    masked = _masked(call.images[rows], blurred[rows], shape)
                logits, output = passes(masked)
                with plain_float32(activations):
                    values = target.values(logits.clone(), output, rows)
                    scores[rows, targets, which] = values.gather(1, targets[:, None])[:, 0].float()
                shown.update(len(rows))
        with plain_float32(activations):
            scores = torch.where(scores < _LEAST, 0.0, scores)
            best = scores.amax(dim=2, keepdim=True)
            shares = scores / torch.where(best == 0, 1.0, best)
            maps = torch.einsum("nti,ntip->ntp", shares, components).view(n, t, h, w)
        how = f"{t * count} passes an image and a backward of the head"
        return Maps(split.logits, target, (rectified(maps, call.relu),), how)


def _components(activations: Tensor, weights: Tensor) -> Tensor:
    """The first components (N, T, I, P) of the weighted channels, negative cells clipped to 0."""
    _, c, h, w = activations.shape
    kept = weights.topk(min(c, _CHANNELS), dim=2)
    index = kept.indices.flatten(1)[..., None].expand(-1, -1, h * w)
    x = activations.flatten(2).gather(1, index).view(*kept.indices.shape, h * w)
    x = (x * kept.values[..., None]).mT.double()
    x = x - x.mean(dim=2, keepdim=True)
    count = min(_COMPONENTS, h * w, x.shape[3])
    # NaN passes through; LAPACK would refuse the whole batch for it.
    broken = ~x.isfinite().flatten(2).all(dim=2)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(broken, 0.0, x @ x.mT))
    size = values[..., -count:].flip(-1).clamp_min(0).sqrt()
    found = (vectors[..., -count:].flip(-1) * size[..., None, :]).mT
    peak = found.gather(3, found.abs().argmax(dim=3, keepdim=True))
    found = torch.where(peak < 0, -found, found).relu()
    return torch.where(broken, torch.nan, found).float()


def _masked(images: Tensor, blurred: Tensor, components: Tensor) -> Tensor:
    """max(x m, blur(x) (1 - m)) of images (M, C, H, W), m made of components (M, 1, h, w)."""
    up = F.interpolate(components, images.shape[2:], mode="bicubic", align_corners=False)
    low, high = up.amin(dim=(2, 3), keepdim=True), up.amax(dim=(2, 3), keepdim=True)
    span = torch.where(high == low, 1.0, high - low)
    mask = ((up - low) / span).to(images.dtype)
    return torch.maximum(images * mask, blurred * (1 - mask))


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images (N, C, H, W) under a Gaussian filter of sigma pixels, edges reflected."""
    for axis in (2, 3):
        reach = min(round(4 * sigma), images.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
        kernel = (-(offsets**2) / (2 * sigma**2)).exp()
        kernel = (kernel / kernel.sum()).to(images.dtype)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded = F.pad(images.flatten(0, 1)[:, None], pad, mode="reflect")
        images = F.conv2d(padded, kernel.view(shape)).view(images.shape)
    return images
