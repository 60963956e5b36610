"""Random images for the checks of a file: of the sizes that it takes, and with a contrast."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcam_export.checking import Skipped, shown
from diffcam_export.explainer import OnnxExplainer
from diffcam_fast.images.preprocess import Preprocess

# Numbers in a batch; networks take some hundred times that, and hostile files ask for more.
_LARGEST = 2**24
# Batches of random images in which those with a contrast are looked for.
_DRAWS = 16


@dataclass(frozen=True)
class Sample:
    """Images to try a file with.

    Attributes:
        given: as `OnnxExplainer` takes them: (N, C, H, W), or uint8 (N, H, W, 3).
        targets: (N, T) classes to ask for; None: the file chooses.
    """

    given: Tensor
    targets: list[list[int]] | None = None

    def planes(self, preprocess: Preprocess | None) -> Tensor:
        """(N, C, H, W) as the network takes them: photographs prepared by Pillow."""
        if self.given.dtype != torch.uint8 or preprocess is None:
            return self.given
        return torch.stack([preprocess(Image.fromarray(one.numpy())) for one in self.given])


class Samples:
    """Random images, the same at every call.

    Args:
        explainer: of the file.
        classes: the classes (N, T) that the file explains of a sample.
    """

    def __init__(self, explainer: OnnxExplainer, classes: Callable[[Sample], Tensor]) -> None:
        self._explainer, self._classes = explainer, classes
        self._found: dict[tuple[int, ...], Sample] = {}
        contrast = explainer.inspect().contrast
        self._reserved = set(contrast.reference or ())
        if contrast.weights is not None:
            self._reserved = set(contrast.weights.nonzero()[:, 0].tolist())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """At two batch sizes and two resolutions, as far as the file takes them."""
        takes = self._explainer.input
        preprocess = self._explainer.preprocess
        usual = (224, 224) if preprocess is None else preprocess.size
        height, width = (side or other for side, other in zip(takes.size, usual, strict=True))
        sizes = [(height, width)]
        if None in takes.size:
            # Not square, where both are free.
            sizes.append((takes.size[0] or height + 32, takes.size[1] or width + 64))
        counts = [takes.batch] if takes.batch else [1, 3]
        if takes.dtype == torch.uint8:
            return [(n, h, w, 3) for n in counts for h, w in sizes]
        return [(n, takes.channels or 3, h, w) for n in counts for h, w in sizes]

    @property
    def usable(self) -> list[tuple[int, ...]]:
        """The shapes that are not too large to try.

        Raises:
            Skipped: all are.
        """
        shapes = [shape for shape in self.shapes if self._too_large(shape) is None]
        if not shapes:
            raise Skipped(str(self._too_large(self.shapes[0])))
        return shapes

    def any(self, shape: tuple[int, ...]) -> Sample:
        """Images of a shape.

        Raises:
            Skipped: it is too large to try.
        """
        return Sample(self._drawn(shape, 0))

    def explained(self, shape: tuple[int, ...]) -> Sample:
        """Images of a shape whose explained classes have a contrast: none is a reference itself.

        Raises:
            Skipped: it is too large to try, or no such images were found.
        """
        if shape not in self._found:
            self._found[shape] = self._with_contrast(shape) if self._reserved else self.any(shape)
        return self._found[shape]

    def asked(self) -> list[int]:
        """Classes that have a contrast, two where there are as many."""
        count = self._explainer.classes or max(self._reserved, default=0) + 2
        return [c for c in range(count) if c not in self._reserved][:2]

    def _with_contrast(self, shape: tuple[int, ...]) -> Sample:
        reserved = torch.tensor(sorted(self._reserved))
        rows: list[Tensor] = []
        for seed in range(_DRAWS):
            images = self._drawn(shape, seed)
            held = torch.isin(self._classes(Sample(images)), reserved).any(dim=1)
            rows += list(images[~held])
            if len(rows) >= len(images):
                break
        if rows:
            # Too few are repeated.
            return Sample(torch.stack([rows[i % len(rows)] for i in range(shape[0])]))
        if self._explainer.takes_targets and self.asked():
            return Sample(self._drawn(shape, 0), [self.asked()] * shape[0])
        raise Skipped(
            "the classes of all random images that were tried are among those that the contrast "
            f"holds others against ({', '.join(map(str, sorted(self._reserved)[:5]))}, ...)"
        )

    def _drawn(self, shape: tuple[int, ...], seed: int) -> Tensor:
        reason = self._too_large(shape)
        if reason is not None:
            raise Skipped(reason)
        if self._explainer.input.dtype == torch.uint8:
            return _photographs(shape, seed)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(shape, generator=generator)
        if seed == 0:
            return images
        # Colours change more predictions than other noise does.
        colours = torch.randn((*shape[:2], 1, 1), generator=generator)
        return images / seed + 2 * colours

    def _too_large(self, shape: tuple[int, ...]) -> str | None:
        preprocess = self._explainer.preprocess
        prepared = 0 if preprocess is None else shape[0] * 3 * math.prod(preprocess.size)
        count = max(math.prod(shape), prepared)
        if count <= _LARGEST:
            return None
        return f"images of {shown(shape)} are {count:,} numbers, over the {_LARGEST:,} tried here"


def _photographs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Smooth as photographs are, uint8 (N, height, width, 3)."""
    n, height, width, _ = shape
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 7, 9, 3), dtype=np.uint8)
    large = [
        Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in coarse
    ]
    return torch.from_numpy(np.stack([np.array(one) for one in large]))
