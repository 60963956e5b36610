"""head_cam: all of a pooled linear head, from activations to maps.

    z = W mean_p(A) + b,   w = (e_c - q) W / P,   M[n, t, p] = sum_c w[n, t, c] A[n, c, p]

Plan: the mean of each channel, the matrix product with W (PyTorch's: nothing of ours belongs
there), the channel weights as `contrast` plans them, and `pooled_cam`: four launches for a
single row, each of which reads its operand once, and some more for several rows or where W is in
half precision, of which the products take a float32 copy. The maps need every weight, a weight all
logits, and a logit all channels: one launch would have to wait for the whole device three times, or
read W once for each image, 8 MB for ResNet-50 where an image's A has 0.4 MB.

Images go in runs whose A fits in half of the L2 cache: A crosses device memory once, and
`pooled_cam` finds it in the cache. So does the second launch that reads W.

Bytes: A, W and the logits once, the maps once. FLOP: 2 N K C + 2 N T K C + N C P + 2 N T C P.
"""

import torch
from torch import Tensor

from diffcam_kernels.gpu.contrast import class_by_class, fill_channel_weights
from diffcam_kernels.gpu.launch import image_chunks
from diffcam_kernels.gpu.means import plan_channel_means
from diffcam_kernels.gpu.pooled import fill_pooled_cam


def head_cam(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    reference: Tensor | None,
    blend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `diffcam_kernels.reference.head_cam`."""
    n, c, height, width = activations.shape
    t, k = 1 if targets is None else targets.shape[1], weight.shape[0]
    maps = activations.new_empty((n, t, height, width), dtype=torch.float32)
    logits, scores = maps.new_empty((n, k)), maps.new_empty((n, t))
    chosen = maps.new_empty((n, t), dtype=torch.int64)
    means, w = maps.new_empty((n, c)), maps.new_empty((n, t, c))
    product = weight.detach().to(torch.float32).mT
    shift = maps.new_zeros(k) if bias is None else bias.detach().to(torch.float32)
    targets = None if targets is None else targets.contiguous()
    reference, blend = class_by_class(reference, blend)
    for run in image_chunks(activations):
        plan_channel_means(activations[run], means[run]).run()
        torch.addmm(shift, means[run], product, out=logits[run])
        fill_channel_weights(
            logits[run],
            weight,
            height * width,
            None if targets is None else targets[run],
            temperature,
            None if reference is None else reference[run],
            None if blend is None else blend[run],
            w[run],
            chosen[run],
            scores[run],
        )
        fill_pooled_cam(activations[run], w[run], maps[run], relu)
    return maps, logits, chosen, scores
