"""Float64 as the judge of two maps in float32.

Where a ReLU or a maximum is nearly undecided, float32 decides it by the order of its sums, and
where positive and negative parts of a map nearly cancel, its largest cell is hardly larger than
their rounding. Two right implementations then differ by more than any fixed tolerance.
"""

import copy
from dataclasses import dataclass

from torch import Tensor

from diffcam_export.checking import relative
from diffcam_fast.explainer import Explainer

# Two libraries sum in other orders, and are off by other amounts: of ten ResNet-18 with random
# weights the exported file was off 0.2 to 1.4 times as far as PyTorch.
_FACTOR = 2.0


@dataclass(frozen=True)
class Exactness:
    """How far maps are off float64, relative to their largest value.

    Attributes:
        file: those of the exported file.
        model: those of the PyTorch model in float32.
    """

    file: float
    model: float

    def as_near(self, rounding: float) -> bool:
        """Whether the file is as near to float64 as PyTorch is, but for `rounding`."""
        # A NaN compares as false, and must not pass.
        return self.file <= _FACTOR * self.model + rounding

    def __str__(self) -> str:
        return f"off float64 by {self.file:.1e}, PyTorch's float32 by {self.model:.1e}"


def exactness(
    explainer: Explainer, images: Tensor, targets: Tensor, *, made: Tensor, expected: Tensor
) -> Exactness:
    """Holds maps of the same images and targets against the explainer's network in float64.

    Args:
        explainer: of the model in float32; its network is copied.
        images: (N, C, H, W).
        targets: classes (N, T).
        made: maps (N, T, h, w) of the exported file.
        expected: maps of the explainer.

    Raises:
        Failed: the shapes differ.
    """
    setup = explainer.setup
    exact = Explainer(
        copy.deepcopy(setup.model).double(),
        layer=setup.layers,
        method=setup.method,
        contrast=setup.contrast,
        relu=setup.relu,
        fuse=setup.fuse,
        augment=setup.augment,
        output=setup.output,
        layout=setup.layout,
        example_inputs=images.double(),
    )
    if setup.method.needs_fit:
        exact.fitted = [weights.double() for weights in explainer.fitted]
    maps = exact(images, targets).maps
    return Exactness(relative(made, maps), relative(expected, maps))
