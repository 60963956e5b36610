"""The targets of pytorch-grad-cam: functions of the output of one image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassifierOutputTarget:
    """The logit of a class, from (K,) or (N, K)."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output[..., self.category]


@dataclass(frozen=True)
class ClassifierOutputSoftmaxTarget:
    """The probability of a class, from logits (K,) or (N, K)."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output.softmax(dim=-1)[..., self.category]


@dataclass(frozen=True)
class ClassifierOutputReST:
    """z_c + log p_c (arXiv 2501.06261), from logits (K,) or (N, K)."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        log_probability = model_output.log_softmax(dim=-1)
        return model_output[..., self.category] + log_probability[..., self.category]


@dataclass(frozen=True)
class BinaryClassifierOutputTarget:
    """The single logit of a binary classifier, negative for category 0."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output if self.category == 1 else -model_output


@dataclass(frozen=True)
class RawScoresOutputTarget:
    """The output itself, which must be one number an image."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output


@dataclass(frozen=True)
class SoftmaxOutputTarget:
    """The softmax of the output, which must be one number an image."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        return model_output.softmax(dim=-1)


@dataclass(frozen=True, eq=False)
class SemanticSegmentationTarget:
    """The sum of a class's scores over the pixels of a mask (H, W), from (K, H, W)."""

    category: int
    mask: np.ndarray

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        mask = torch.as_tensor(self.mask, device=model_output.device)
        return (model_output[self.category] * mask).sum()


@dataclass(frozen=True, eq=False)
class FinerWeightedTarget:
    """sum_d p_d (z_c - alpha z_d) / sum_d p_d over comparison classes d, p not held fixed."""

    main_category: int
    comparison_categories: Sequence[int]
    alpha: float

    def __call__(self, model_output: Tensor) -> Tensor:
        """The score."""
        others = list(self.comparison_categories)
        p = model_output.softmax(dim=-1)[..., others]
        differences = (
            model_output[..., [self.main_category]] - self.alpha * model_output[..., others]
        )
        return (p * differences).sum(dim=-1) / (p.sum(dim=-1) + 1e-9)
