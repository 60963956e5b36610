"""What a target class is held against.

A softmax sees only differences of logits, so the explained score is a difference,
`S = z_c - sum_{j != c} q_j z_j`, with q a softmax of the other logits at temperature T, held fixed.
Its gradient in the logits, `d = e_c - q`, is all that a contrast changes; every method takes it in
place of the one-hot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_kernels import ops, reference

_NAMED: dict[str, float | None] = {
    "mean": math.inf,
    "log_odds": 1.0,
    "runner_up": 0.0,
    "none": None,
}


@dataclass(frozen=True, eq=False)
class Contrast:
    """A contrast: which other classes a target is compared with, and how they are weighed.

    Attributes:
        temperature: T in [0, inf], in units of the logits: inf takes the plain mean of the other
            classes, 1 gives the gradient of the log-odds log(p_c / (1 - p_c)), 0 takes the best
            other class alone. None: no contrast, the score is the logit of the target.
        reference: class indices to contrast with, for every image; None: all classes but the
            target.
        weights: q itself, (K,) or (N, K), each row summing to 1 with 0 at the target; replaces the
            temperature.

    Raises:
        ValueError: a temperature below 0, an empty or repeated reference, or two of the settings
            that exclude each other.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
        >>> Contrast.parse("runner_up").gradient(logits, torch.tensor([[0]]))
        tensor([[[ 1., -1.,  0.]]])
    """

    temperature: float | None = 1.0
    reference: tuple[int, ...] | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(
                "temperature must be 0 (the best other class), positive, or inf (their "
                f"mean); got {self.temperature}"
            )
        if self.weights is not None and self.reference is not None:
            raise ValueError("give reference classes or weights, not both")
        if self.reference is not None:
            object.__setattr__(self, "reference", tuple(int(c) for c in self.reference))
            if not self.reference or len(set(self.reference)) < len(self.reference):
                raise ValueError(
                    f"reference must name each class once, and one at least; got {self.reference}"
                )
            if self.temperature is None:
                raise ValueError(
                    "reference classes need a temperature; got None, which means no contrast"
                )

    @classmethod
    def parse(
        cls,
        contrast: "str | Contrast",
        *,
        temperature: float | None = None,
        reference: Sequence[int] | None = None,
    ) -> "Contrast":
        """A contrast from its name (`mean`, `log_odds`, `runner_up`, `none`), or the one given.

        Args:
            contrast: a name, or a contrast, which is returned as it is.
            temperature: replaces the temperature of `log_odds`; no other name takes one.
            reference: class indices to contrast with.

        Raises:
            ValueError: an unknown name, or a setting that this contrast does not take.
        """
        if isinstance(contrast, Contrast):
            if temperature is not None or reference is not None:
                raise ValueError(
                    "a Contrast carries its own temperature and reference; give them there"
                )
            return contrast
        if contrast not in _NAMED:
            raise ValueError(f"unknown contrast {contrast!r}; there are {', '.join(_NAMED)}")
        if temperature is not None and contrast != "log_odds":
            raise ValueError(
                f"contrast {contrast!r} has its own temperature; only log_odds takes another"
            )
        chosen = _NAMED[contrast] if temperature is None else temperature
        return cls(chosen, None if reference is None else tuple(reference))

    @property
    def name(self) -> str:
        """`mean`, `log_odds`, `runner_up`, `none`, `temperature=T` or `weights`, with the reference
        classes.
        """
        if self.weights is not None:
            return "weights"
        named = {value: name for name, value in _NAMED.items()}
        name = named.get(self.temperature) or f"temperature={self.temperature:g}"
        return (
            name
            if self.reference is None
            else f"{name} against {','.join(map(str, self.reference))}"
        )

    @property
    def is_linear(self) -> bool:
        """Whether `value` is linear in the logits: d is the same whatever they are."""
        t = self.temperature
        return self.weights is not None or t is None or t > torch.finfo(torch.float32).max

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """d = dS/dz, (N, T, K) float32 (float64 for float64 logits), from logits (N, K) and targets
        (N, T) int64.

        Raises:
            ValueError: one class only; a reference class that is out of range or is a target;
                weights that do not fit the logits, do not sum to 1, or are not 0 at a target.
        """
        gradient: Tensor
        gradient, _, _ = ops.contrast_gradient(logits, targets, *self.operands(logits, targets))
        return gradient

    def rows(self, rows: Tensor) -> "Contrast":
        """The contrast of a batch whose images are these rows (M,) of another one."""
        if self.weights is None or self.weights.ndim == 1:
            return self
        return Contrast(self.temperature, weights=self.weights[rows.to(self.weights.device)])

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What a method that compares values, not gradients, takes as the score of a target.

        F = z_c - T (LSE_j(z_j / T) - log J) over the J classes that c is held against, whose
        gradient is that of S: at T = 1 the log-odds plus log J, at T = infinity and 0, with weights
        and without a contrast S itself.

        Args:
            logits: (N, K).
            targets: (N, T) int64.

        Returns:
            (N, T) float32 (float64 for float64 logits), in units of the logits.

        Raises:
            ValueError: as for `gradient`.
        """
        z = logits.to(reference.accumulate_dtype(logits))
        t = self.temperature
        limits = torch.finfo(z.dtype)
        if self.weights is not None or t is None or not limits.tiny <= t <= limits.max:
            return reference.contrast_score(z, self.gradient(z, targets))
        others = z[:, None, :].repeat(1, targets.shape[1], 1)
        others.scatter_(2, targets[:, :, None], -math.inf)
        mask = self._reference_mask(z, targets)
        if mask is not None:
            others = others.masked_fill(~mask, -math.inf)
        largest = others.amax(dim=2)
        taken = (others > -math.inf).sum(dim=2)
        mean = ((others - largest[:, :, None]) / t).exp().sum(dim=2) / taken
        score: Tensor = z.gather(1, targets) - largest - t * mean.log()
        return score

    def operands(
        self, logits: Tensor, targets: Tensor | None
    ) -> tuple[float | None, Tensor | None, Tensor | None]:
        """What the operators `diffcam_kernels.ops.contrast_*` take beside logits (N, K) and targets
        (N, T), None for the prediction: temperature, reference (N, T, K) and weights (N, K).

        Raises:
            ValueError: as for `gradient`.
        """
        if self.reference is None and self.weights is None:
            return self.temperature, None, None
        known = reference.predicted(logits) if targets is None else targets
        return (
            self.temperature,
            self._reference_mask(logits, known),
            self._weights(logits, known),
        )

    def _reference_mask(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        if self.reference is None:
            return None
        classes = torch.tensor(self.reference, device=logits.device)
        if min(self.reference) < 0 or max(self.reference) >= logits.shape[1]:
            raise ValueError(
                f"reference {self.reference} leaves the classes 0 to {logits.shape[1] - 1}"
            )
        if torch.isin(targets, classes).any():
            raise ValueError(f"a target is itself among the reference classes {self.reference}")
        mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        mask[classes] = True
        return mask.expand(*targets.shape, -1)

    def _weights(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        if self.weights.shape not in (logits.shape, logits.shape[1:]):
            n, k = logits.shape
            raise ValueError(
                f"weights must be ({k},) or ({n}, {k}), got {tuple(self.weights.shape)}"
            )
        weights = self.weights.to(logits.device).expand(logits.shape)
        if not torch.allclose(
            weights.double().sum(dim=1), weights.new_ones((), dtype=torch.double), atol=1e-5
        ):
            raise ValueError(
                "weights must sum to 1 for each image; a common shift of the logits would "
                "count otherwise"
            )
        if (weights.gather(1, targets) != 0).any():
            raise ValueError("weights must be 0 at the target class")
        return weights


def contrast_score(
    logits: Tensor, targets: Tensor, contrast: str | Contrast = "log_odds"
) -> Tensor:
    """The explained score S = z_c - sum_{j != c} q_j z_j, with q held fixed.

    Its value exceeds the log-odds by the entropy of q at T = 1; the gradients are the same.

    Args:
        logits: (N, K).
        targets: (N, T), int64 in [0, K).
        contrast: a name or a `Contrast`.

    Returns:
        (N, T), in units of the logits; differentiable in the logits.

    Raises:
        ValueError: a target that is no class, or what the contrast does not take.

    Example:
        >>> import torch
        >>> contrast_score(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0]]), "mean")
        tensor([[2.5000]])
    """
    classes = range(logits.shape[1])
    if any(int(target) not in classes for target in targets.flatten()):
        raise ValueError(f"targets must be from 0 to {logits.shape[1] - 1}, got {targets.tolist()}")
    d = Contrast.parse(contrast).gradient(logits.detach(), targets)
    return reference.contrast_score(logits, d)
