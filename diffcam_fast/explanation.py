"""The result of an explanation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffcam_kernels import ops


@dataclass(frozen=True, eq=False)
class Explanation:
    """Maps of where a classifier looked, with what it said, for N images and T targets each.

    Attributes:
        logits: (N, K), in the model's dtype.
        targets: (N, T) int64, the explained classes.
        scores: (N, T) float32, the explained score S of each target, in units of the logits.
        maps: (N, T, h, w) float32 at the resolution of the layer, unnormalised, in units of S per
            cell; at least 0 unless the explainer was made with `relu=False`.
        backend: what computed it, e.g. `torch (cpu), closed form`.
        layer: dotted name of the target layer.
        method: name of the method.
        contrast: name of the contrast.
        layer_maps: of each layer its maps (N, T, h, w), before they were fused; of views before
            they were averaged, those of the images themselves.

    Example:
        >>> import torch
        >>> one = Explanation(
        ...     logits=torch.zeros(1, 2),
        ...     targets=torch.zeros(1, 1, dtype=torch.int64),
        ...     scores=torch.zeros(1, 1),
        ...     maps=torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]]),
        ...     backend="torch (cpu)",
        ...     layer="layer4",
        ...     method="grad_cam",
        ...     contrast="none",
        ... )
        >>> one.heatmaps((2, 2))
        tensor([[[[0.0000, 0.2500],
                  [0.5000, 1.0000]]]])
    """

    logits: Tensor
    targets: Tensor
    scores: Tensor
    maps: Tensor
    backend: str
    layer: str
    method: str
    contrast: str
    layer_maps: tuple[Tensor, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        n, t, h, w = self.maps.shape
        return (
            f"Explanation(N={n} images, T={t} targets each, maps {h} x {w}, layer={self.layer!r}, "
            f"method={self.method!r}, contrast={self.contrast!r}, backend={self.backend!r})"
        )

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.maps)

    def __getitem__(self, images: int | slice) -> "Explanation":
        """The explanation of some of the images: of one by its place, or of a slice of them.

        Raises:
            IndexError: there is no image at this place.
        """
        if isinstance(images, int):
            if not -len(self) <= images < len(self):
                raise IndexError(f"there is no image {images}, there are {len(self)}")
            start = images % len(self)
            images = slice(start, start + 1)
        return self._each(lambda tensor: tensor[images])

    def cpu(self, *, non_blocking: bool = False) -> "Explanation":
        """The same in host memory.

        Args:
            non_blocking: from a GPU, return while the copies are under way; they may be read once
                the current stream has come to here.
        """
        return self._each(lambda tensor: tensor.to("cpu", non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Explanation":
        return replace(
            self,
            logits=change(self.logits),
            targets=change(self.targets),
            scores=change(self.scores),
            maps=change(self.maps),
            layer_maps=tuple(change(maps) for maps in self.layer_maps),
        )

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, (N, K) float32."""
        return self.logits.float().softmax(dim=1)

    @property
    def finite(self) -> Tensor:
        """(N, T) bool: False where a map holds NaN or infinity, which are passed on and never
        replaced.
        """
        return self.maps.isfinite().all(dim=3).all(dim=2)

    def heatmaps(self, size: tuple[int, int]) -> Tensor:
        """The maps as pictures: min-max to [0, 1] map by map, then bilinear upsampling.

        Args:
            size: (H, W) in pixels.

        Returns:
            (N, T, H, W) float32. A constant map is all 0; a map with NaN is all NaN.
        """
        heatmaps: Tensor = ops.heatmap(self.maps, *size)
        return heatmaps

    def overlay(
        self, images: Tensor | np.ndarray, *, alpha: float = 0.5, cmap: str = "turbo"
    ) -> np.ndarray:
        """The heatmaps in colour, blended over the images.

        Args:
            images: uint8 (N, H, W, 3) or (N, 3, H, W), or float (N, 3, H, W) in [0, 1]: pictures,
                not the normalised input.
            alpha: weight of the colours, in [0, 1].
            cmap: name of a matplotlib colour map.

        Returns:
            uint8 (N, T, H, W, 3).

        Raises:
            ValueError: the images have another shape, count, dtype or range.
        """
        from diffcam_fast.images.colour import alpha_share, colour_table

        pictures = _pictures(images)
        if pictures.shape[0] != self.maps.shape[0]:
            raise ValueError(f"{pictures.shape[0]} images for {self.maps.shape[0]} explanations")
        device = self.maps.device
        overlays: Tensor = ops.overlay(
            self.maps,
            torch.tensor(pictures, device=device),
            torch.tensor(colour_table(cmap), device=device),
            alpha_share(alpha),
        )
        return overlays.cpu().numpy()

    def to_numpy(self) -> dict[str, np.ndarray]:
        """`logits`, `targets`, `scores` and `maps` as arrays in host memory; bfloat16 logits become
        float32.
        """
        logits = self.logits.float() if self.logits.dtype == torch.bfloat16 else self.logits
        tensors = {
            "logits": logits,
            "targets": self.targets,
            "scores": self.scores,
            "maps": self.maps,
        }
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _pictures(images: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        array = images.float().numpy() if images.is_floating_point() else images.numpy()
    else:
        array = images
    if array.dtype == np.uint8 and array.ndim == 4 and 3 in (array.shape[1], array.shape[3]):
        return array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)
    if np.issubdtype(array.dtype, np.floating) and array.ndim == 4 and array.shape[1] == 3:
        if array.size and (array.min() < 0 or array.max() > 1):
            raise ValueError(
                f"float images must be pictures in [0, 1], got {array.min():.3g} to "
                f"{array.max():.3g}; "
                "undo the normalisation first"
            )
        pictures: np.ndarray = np.rint(array.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
        return pictures
    raise ValueError(
        "images must be uint8 (N, H, W, 3) or (N, 3, H, W), or float (N, 3, H, W) in [0, 1]; got "
        f"{array.dtype} {array.shape}"
    )
