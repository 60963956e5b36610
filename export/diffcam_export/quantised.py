"""int8 networks with a float head: maps of quantised features."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

from diffcam_export.classifier import from_onnx, from_pytorch
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.export import write_explained
from diffcam_export.options import cam_options
from diffcam_export.save import save
from diffcam_fast.explainer import Explainer, Setup
from diffcam_fast.images.preprocess import Preprocess

# Sums and pooling between convolutions, too: in float each would be a way there and back.
_OPERATORS = ("Conv", "Add", "MaxPool", "Relu", "Clip")
_BATCH = 8


@dataclass(frozen=True)
class Agreement:
    """How near an int8 network is to its float32 original, on images that it was not made with.

    Attributes:
        images: how many.
        same_class: share of them for which both predict the same class, 0 to 1.
        correlation: of both maps of one class, Pearson's, their mean.
        worst: the smallest of these.
    """

    images: int
    same_class: float
    correlation: float
    worst: float

    def __str__(self) -> str:
        return (
            f"of {self.images} images {self.same_class:.0%} keep their class; maps correlate with "
            f"float32's by {self.correlation:.3f} in the mean, {self.worst:.3f} at worst"
        )


def write_quantised(
    setup: Setup,
    path: Path,
    calibration: Tensor,
    *,
    targets: Literal["predicted", "input"],
    topk: int | None,
    preprocess: Preprocess | None,
    labels: tuple[str, ...] | None,
) -> None:
    """Exports a classifier whose features are int8 and whose head, and CAM head, are float32.

    ONNX Runtime's static quantisation: QDQ, weights symmetric and per channel, ranges of
    activations from the images. What does not lead to the target layer stays as it is.

    Args:
        setup: of the explainer.
        path: the file to write.
        calibration: (N, C, H, W), as the network takes them.
        targets: as in `export_onnx`.
        topk: as in `export_onnx`.
        preprocess: kept in the file.
        labels: kept in the file.

    Raises:
        ValueError: the classifier cannot be exported, or its operators not be quantised.
    """
    options = cam_options(
        method=setup.method.name,
        contrast=setup.contrast,
        temperature=None,
        relu=setup.relu,
        targets=targets,
        topk=topk,
        heatmap=None,
    )
    plain = from_pytorch(
        setup.model,
        example_inputs=calibration[:2],
        layers=setup.layers[0],
        dtype=None,
        dynamic_size=False,
        opset=None,
    )
    layer, logits = plain.founds[0].layer, str(plain.founds[0].output.name)
    with tempfile.TemporaryDirectory() as folder:
        floats, made = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        excluded = _apart_from_features(plain.model.graph, layer)
        save(plain.model, floats)
        reader = _Images(str(plain.images.name), calibration)
        try:
            quantize_static(
                floats,
                made,
                reader,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(_OPERATORS),
                nodes_to_exclude=excluded,
            )
        except Exception as error:
            raise ValueError(f"it cannot be quantised: {error}") from error
        classifier = from_onnx(made, layers=_dequantised(made, str(layer.name)), logits=logits)
        classifier = dataclasses.replace(
            classifier,
            # Under the name that the module has, as everywhere.
            layers=setup.layers,
            source=f"{plain.source} in int8",
            preprocess=preprocess,
            labels=labels,
        )
        write_explained(classifier, path, options)


def agreement(
    floats: Explainer, made: OnnxExplainer, images: Tensor, target: int | None = None
) -> Agreement:
    """Compares predictions, and maps of one class.

    Args:
        floats: the float32 explainer.
        made: the int8 network.
        images: (N, C, H, W), as the network takes them.
        target: the class; None: the one that int8 predicts, a file may explain no other.
    """
    ours = made(images, target)
    theirs = floats(images, ours.targets[:, :1])
    same = ours.logits.argmax(dim=1) == theirs.logits.argmax(dim=1)
    found = torch.stack(
        [
            _correlation(one.double().flatten(), other.double().flatten())
            for one, other in zip(ours.maps[:, 0], theirs.maps[:, 0], strict=True)
        ]
    )
    return Agreement(
        images=len(images),
        same_class=float(same.double().mean()),
        correlation=float(found.mean()),
        worst=float(found.min()),
    )


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's; 1 of two constants, 0 of a constant and what is none."""
    if bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return torch.tensor(float(torch.equal(one - one[0], other - other[0])))
    return torch.corrcoef(torch.stack([one, other]))[0, 1]


def _apart_from_features(graph: ir.Graph, layer: ir.Value) -> list[str]:
    """Names of the nodes that do not lead to the layer; all nodes get a name."""
    features: set[ir.Node] = set()
    waiting = [layer]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in features:
            features.add(node)
            waiting += [value for value in node.inputs if value is not None]
    apart = []
    for number, node in enumerate(graph):
        node.name = f"node_{number}"
        if node not in features:
            apart.append(node.name)
    return apart


def _dequantised(path: Path, name: str) -> str:
    """The name of a value after quantisation: of what its readers read now."""
    graph = ir.load(path).graph
    values: Iterator[ir.Value] = (value for node in graph for value in node.outputs)
    found = next(value for value in values if value.name == name)
    for use in found.uses():
        if use.node.op_type == "QuantizeLinear":
            back = [u.node for u in use.node.outputs[0].uses()]
            return next(str(n.outputs[0].name) for n in back if n.op_type == "DequantizeLinear")
    return name


class _Images(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no annotations
    def __init__(self, name: str, images: Tensor) -> None:
        self._batches: Sequence[Tensor] = torch.split(images.float(), _BATCH)
        self._name, self._next = name, 0

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next batch, None at the end."""
        if self._next == len(self._batches):
            return None
        self._next += 1
        return {self._name: self._batches[self._next - 1].numpy()}
