"""One step of an explainer as a graph of operators: the Python on the way to it is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffcam_fast.explainer import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.running import first_line, is_out_of_memory
from diffcam_fast.targets import Checked

Run = Callable[..., list[Tensor]]


class CannotCompile(ValueError):
    """An explainer whose step is no fixed graph of operators; the message says why."""


@dataclass(frozen=True)
class Step:
    """What an explainer does with batches of one shape.

    Attributes:
        run: from images (N, C, H, W), and classes (N, T) where some are asked for, to the tensors
            of an explanation.
        example: an explanation of such a batch.
    """

    run: Run
    example: Explanation

    def explanation(self, tensors: list[Tensor], how: str) -> Explanation:
        """The explanation that `run` returned the tensors of.

        Args:
            tensors: as `run` returns them.
            how: what ran, for `Explanation.backend`.
        """
        logits, targets, scores, maps, *layer_maps = tensors
        return replace(
            self.example,
            logits=logits,
            targets=targets,
            scores=scores,
            maps=maps,
            backend=f"{self.example.backend}, {how}",
            layer_maps=tuple(layer_maps),
        )


def trace(
    explainer: Explainer, images: Tensor, classes: Tensor | None = None, *, topk: int | None = None
) -> Step:
    """Records the operators of one call.

    The forward pass, the backward of the head where there is one, the contrast and the map: all of
    it becomes one graph, without hooks and without gradients that are recorded. It is good for
    batches of this shape, and for the weights that the model has now.

    Args:
        explainer: whose call is recorded.
        images: (N, C, H, W), on the device and in the dtype of the model.
        classes: (N, T) int64 in range, on the same device; None: the predicted ones.
        topk: the k best classes.

    Raises:
        CannotCompile: what runs depends on what the images hold.
    """
    # Here, not above: it takes a second, and most runs record nothing.
    from torch.fx.experimental.proxy_tensor import make_fx

    made: list[Explanation] = []

    def call(images: Tensor, *given: Tensor) -> list[Tensor]:
        made.append(explainer(images, *map(Checked, given), topk=topk))
        return _tensors(made[-1])

    operands = (images,) if classes is None else (images, classes)
    # What the caller did wrong is told in its own words, and not as a trace that failed.
    example = explainer(images, classes, topk=topk)
    try:
        graph = make_fx(call)(*operands)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise CannotCompile(f"{example.method} is no fixed graph of operators: {reason}") from error
    return Step(graph, example)


def compiled(step: Step) -> Step:
    """The same step, its operators fused by `torch.compile` for this machine."""
    return replace(step, run=torch.compile(step.run, fullgraph=True, dynamic=False))


def _tensors(made: Explanation) -> list[Tensor]:
    return [made.logits, made.targets, made.scores, made.maps, *made.layer_maps]
