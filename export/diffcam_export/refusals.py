"""What is refused before a file is written: a classifier, or a place, that does not fit."""

import math
import os
from pathlib import Path

import onnx_ir as ir
import torch

from diffcam_export.cam import HEATMAP, MAP, TARGET, CamOptions
from diffcam_export.classifier import Classifier
from diffcam_export.contrast import TARGETS_INPUT
from diffcam_export.flow import subgraphs
from diffcam_export.function import DOMAIN
from diffcam_export.methods import check_heads
from diffcam_export.plain import PREFIX
from diffcam_fast.contrast import Contrast

# Elements of one batch: a gigabyte in float32, and an image of some 9000 x 9000 pixels.
_LARGEST_BATCH = 2**28


def check_classifier(classifier: Classifier, options: CamOptions, *, bake_preprocess: bool) -> None:
    """Refuses a classifier that cannot be explained as asked.

    Raises:
        ValueError: the reason, and what to do.
    """
    check_heads(options.method, classifier.founds, classifier.layers)
    _check_names(classifier, options)
    _check_size(classifier)
    if bake_preprocess and classifier.preprocess is None:
        raise ValueError(
            f"it is not known how photographs are prepared for {classifier.source}; give preprocess"
        )
    shape = classifier.founds[0].logits.shape
    classes = shape[1] if shape is not None else None
    if not isinstance(classes, int):
        raise ValueError(f"the number of classes is not known from the file: logits are {shape}")
    k = options.targets if isinstance(options.targets, int) else 1
    if k > classes:
        raise ValueError(f"topk must be from 1 to the {classes} classes, got {k}")
    labels = classifier.labels
    if labels is not None and len(labels) != classes:
        raise ValueError(f"there are {len(labels)} labels for {classes} classes")
    _check_contrast(options.contrast, classes)


def check_output(out: Path, classifier: Classifier) -> None:
    """Refuses to write over what the classifier was read from.

    Raises:
        ValueError: the file is one of these.
    """
    for path in classifier.files:
        if _same(out, path):
            raise ValueError(f"{out} is part of the model that is exported; write another file")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        # One of them does not exist.
        return False


def _check_names(classifier: Classifier, options: CamOptions) -> None:
    graph = classifier.model.graph
    ends = {str(value.name) for value in [*graph.inputs, *graph.outputs]}
    if MAP in ends or DOMAIN in classifier.model.opset_imports:
        raise ValueError(f"{classifier.source} explains itself already; export the plain model")
    inner = _names(graph)
    # An input of that name would be taken for the one that is added.
    if TARGETS_INPUT in ends or (options.targets == "input" and TARGETS_INPUT in inner):
        raise ValueError(f"the model has a tensor {TARGETS_INPUT!r} of its own; rename it")
    ours = {TARGET, *(name for name in ends if name.startswith(PREFIX))}
    for index in range(len(classifier.founds)):
        ours |= {f"{name}_{index}" if index else name for name in (MAP, HEATMAP)}
    clashing = sorted(
        name for name in ends | inner if name in ours or name.startswith(f"{DOMAIN}/")
    )
    if clashing:
        raise ValueError(
            f"the model has a tensor {clashing[0]!r}, as the added outputs and nodes are called; "
            "rename it"
        )


def _names(graph: ir.Graph) -> set[str]:
    """Of all values of a graph and of the graphs in it."""
    found: set[str] = set()
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        found |= {str(value.name) for value in graph.inputs} | set(graph.initializers)
        for node in graph:
            found |= {str(value.name) for value in node.outputs}
            waiting += subgraphs(node)
    return found


def _check_size(classifier: Classifier) -> None:
    sizes = [size for size in classifier.images.shape or () if isinstance(size, int)]
    if math.prod(sizes) > _LARGEST_BATCH:
        raise ValueError(
            f"the images of {classifier.source} have {' x '.join(map(str, sizes))} numbers, more "
            f"than the {_LARGEST_BATCH:,} that can be checked"
        )


def _check_contrast(contrast: Contrast, classes: int) -> None:
    """Tries it on logits, with a target that it allows where there is one."""
    taken = set(contrast.reference or ())
    if contrast.weights is not None:
        taken = {c for c, weight in enumerate(contrast.weights.tolist()) if weight}
    target = min(set(range(classes)) - taken, default=0)
    contrast.gradient(torch.zeros(1, classes), torch.tensor([[target]]))
