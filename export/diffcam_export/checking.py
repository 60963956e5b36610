"""What a check of an explained file is, and how its figures are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffcam_fast.running import first_line

Verdict = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was checked.
        verdict: `ok`, `failed`, or `skipped` where it could not be asked.
        detail: figures, or the reason.
    """

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Report:
    """What came of all checks.

    Attributes:
        path: the file.
        checks: in the order in which they ran.

    Example:
        >>> report = Report("m.cam.onnx", (Check("checker", "ok", "opset 18"),))
        >>> report.ok, report.lines()
        (True, ['checker  ok  opset 18'])
    """

    path: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check failed; skipped ones do not count."""
        return all(check.verdict != "failed" for check in self.checks)

    def lines(self) -> list[str]:
        """A table for a person to read, a check a line."""
        name = max(len(check.name) for check in self.checks)
        verdict = max(len(check.verdict) for check in self.checks)
        return [
            f"{check.name:<{name}}  {check.verdict:<{verdict}}  {check.detail}".rstrip()
            for check in self.checks
        ]


class Failed(Exception):
    """A check has its answer, and it is no."""


class Skipped(Exception):
    """A check cannot be asked here."""


def ask(name: str, question: Callable[[], str]) -> Check:
    """The check of this name; whatever the question raises is its answer."""
    try:
        return Check(name, "ok", question())
    except Skipped as reason:
        return Check(name, "skipped", str(reason))
    except Failed as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # noqa: BLE001 - what a damaged file makes three libraries raise
        return Check(name, "failed", f"{type(error).__name__}: {first_line(error)}")


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude; NaN anywhere makes it NaN.

    Raises:
        Failed: the shapes differ.
    """
    if got.shape != expected.shape:
        raise Failed(f"the shape is {tuple(got.shape)}, not {tuple(expected.shape)}")
    largest = float(expected.double().abs().max())
    return float((got.double() - expected.double()).abs().max()) / (largest or 1.0)


def worst(errors: Sequence[float]) -> float:
    """NaN where one of them is, which `max` may pass over."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def within(error: float, tolerance: float, to: str) -> str:
    """The detail of a comparison.

    Raises:
        Failed: the error is larger than the tolerance, or NaN.
    """
    detail = f"relative error {error:.1e} of at most {tolerance:.0e}, to {to}"
    # A NaN compares as false, and must not pass.
    if not error <= tolerance:
        raise Failed(detail)
    return detail


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Of the same shape and the same bytes: NaN equals NaN, and 0 is not -0."""
    if one.shape != other.shape:
        return False
    return one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()


def shown(shape: Sequence[int]) -> str:
    """`1 x 3 x 224 x 224`."""
    return " x ".join(map(str, shape))
