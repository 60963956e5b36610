"""How a method is written into a graph: what it is told, and what it has to say."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from diffcam_export.analysis import Found
from diffcam_export.contrast import contrast_gradient, known_classes
from diffcam_export.emit import Emitter
from diffcam_fast.contrast import Contrast
from diffcam_fast.methods import Method


@dataclass(frozen=True)
class Explained:
    """What is explained of one graph, and where its nodes go.

    Attributes:
        emit: what writes the nodes.
        method: of the CAM family.
        logits: (N, K) float32, K known.
        classes: (N, T) int64.
        contrast: what the classes are held against.
        several: T may be more than 1.
        checked: classes may be none, and get NaN then: a graph cannot raise.
    """

    emit: Emitter
    method: Method
    logits: ir.Value
    classes: ir.Value
    contrast: Contrast
    several: bool
    checked: bool

    @cached_property
    def d(self) -> ir.Value:
        """dS/dz, (N, T, K) float32, NaN for a class that is none."""
        return contrast_gradient(
            self.emit, self.logits, self.classes, self.contrast, checked=self.checked
        )

    @cached_property
    def column(self) -> ir.Value:
        """The classes as (N, T, 1)."""
        return self.emit("Unsqueeze", self.classes, self.emit.ints(2))

    def of_known(self, maps: ir.Value) -> ir.Value:
        """Maps (N, T, P) that were not made of d, with NaN for a class that is none."""
        if not self.checked:
            return maps
        known = known_classes(self.emit, self.column, self.logits)
        nan = self.emit.like(maps, math.nan)
        return self.emit("Where", known, maps, nan, dtype=maps.dtype)

    def each_target(
        self, asked: ir.Value, write: Callable[[Emitter, ir.Value], ir.Value]
    ) -> ir.Value:
        """(N, T, R) float32: for several targets a loop, whose body reads what stands outside.

        Args:
            asked: (N, T, X), what differs from target to target.
            write: makes (N, 1, R) float32 for one target, of its (N, X).
        """
        emit = self.emit
        if not self.several:
            return write(emit, emit("Squeeze", asked, emit.ints(1)))
        body = Emitter(f"{emit.prefix}/target")
        assert asked.dtype is not None
        one = ir.val(f"{body.prefix}/asked", asked.dtype, [None, None])
        single = body("Squeeze", write(body, one), body.ints(1))
        single.shape = ir.Shape([None, None])
        graph = ir.Graph([one], [single], nodes=body.nodes, name=body.prefix)
        first = emit("Transpose", asked, perm=[1, 0, 2])
        made = emit("Scan", first, dtype=single.dtype, body=graph, num_scan_inputs=1)
        return emit("Transpose", made, perm=[1, 0, 2])


def by_gradient(method: Method, found: Found) -> tuple[str, str]:
    """How the gradient of the score is had at a layer, and why."""
    if found.weight is not None and getattr(method, "pooled", "signed") is None:
        return "backward of the head", f"{method.name} of a pooled linear head has no shorter form"
    way = "closed form" if found.weight is not None else "backward of the head"
    return way, found.reason


@dataclass(frozen=True)
class Form:
    """A method as nodes.

    Attributes:
        write: makes the maps (N, T, P) float32 of a layer, before negative cells are clipped.
        way: what `Exported.heads` and `Exported.reasons` say of a layer.
        elsewhere: what the method takes behind a head that is not pooled and linear, where a graph
            cannot have that; empty: it can.
        clipped: negative cells may be clipped to 0.
    """

    write: Callable[[Explained, Found], ir.Value]
    way: Callable[[Method, Found], tuple[str, str]] = by_gradient
    elsewhere: str = ""
    clipped: bool = True
