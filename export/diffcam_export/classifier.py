"""The classifier that is to explain itself, from anywhere: a plain ONNX graph, analysed."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffcam_export.analysis import Found, analyse
from diffcam_export.emit import OPSET
from diffcam_export.pytorch import plain_graph
from diffcam_export.reading import read_onnx
from diffcam_fast.analysis import Inspection
from diffcam_fast.analysis.inspection import example_images
from diffcam_fast.explainer import Explainer
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models.loading import LoadedModel
from diffcam_fast.running import unwrap

Layers = str | nn.Module | Sequence[str | nn.Module] | None
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Classifier:
    """A plain classifier.

    Attributes:
        model: its graph.
        images: the input (N, C, H, W), or (N, H, W, C).
        founds: what was found out about each target layer.
        layers: their names, as the user knows them.
        source: what the user calls the model.
        preprocess: from a photograph to its input; None: not known.
        labels: its class names; None: not known.
    """

    model: ir.Model
    images: ir.Value
    founds: tuple[Found, ...]
    layers: tuple[str, ...]
    source: str
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None


def from_onnx(path: Path, *, layers: Layers, logits: str | None) -> Classifier:
    """Reads and analyses an ONNX file.

    Args:
        path: the file.
        layers: names of tensors.
        logits: name of the output with the logits; None: the one that it can only be.

    Raises:
        ValueError: it is no classifier that can be explained; the message names the node.
    """
    model = read_onnx(path)
    founds = tuple(
        analyse(model.graph, layer=_tensor(name), logits=logits) for name in _as_list(layers)
    )
    return Classifier(
        model,
        _image_input(model.graph),
        founds,
        tuple(str(found.layer.name) for found in founds),
        path.name,
        None,
        None,
    )


def from_pytorch(
    model: nn.Module | LoadedModel,
    *,
    example_inputs: Tensor | None,
    layers: Layers,
    dtype: Literal["float32", "float16"] | None,
    dynamic_size: bool,
    opset: int | None,
) -> Classifier:
    """Exports and analyses a PyTorch model; see `diffcam_export.export_onnx` for the arguments.

    Raises:
        ValueError: it cannot be loaded, analysed or exported.
    """
    given = _given(model)
    module = unwrap(given.model)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be {' or '.join(_DTYPES)}, got {dtype!r}")
    inspections = [
        _inspect(module, name, example_inputs, given.preprocess) for name in _as_list(layers)
    ]
    images = _examples(module, example_inputs, inspections[0])
    exported = module
    if dtype is not None and _DTYPES[dtype] != images.dtype:
        # The user's model stays as it is.
        exported = copy.deepcopy(module).to(_DTYPES[dtype])
        images = images.to(_DTYPES[dtype])
    names = tuple(found.layer for found in inspections)
    plain = plain_graph(exported, images, names, dynamic_size=dynamic_size, opset=opset or OPSET)
    founds = tuple(
        analyse(plain.model.graph, layer=value.name, logits=plain.output.name)
        for value in plain.layers
    )
    return Classifier(
        plain.model,
        plain.model.graph.inputs[0],
        founds,
        names,
        given.name,
        given.preprocess,
        given.labels,
    )


@dataclass(frozen=True)
class _Given:
    model: nn.Module
    name: str
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None


def _given(loaded: nn.Module | LoadedModel) -> _Given:
    if isinstance(loaded, nn.Module):
        return _Given(loaded, type(loaded).__name__, None, None)
    if loaded.batch is not None:
        raise ValueError(
            f"{loaded.name} was exported for batches of {loaded.batch} alone; export it with a"
            " dynamic batch: torch.export.export(model, (images,),"
            ' dynamic_shapes=({0: torch.export.Dim("batch")},))'
        )
    return _Given(loaded.model, loaded.name, loaded.preprocess, loaded.labels)


def _inspect(
    model: nn.Module,
    layer: str | nn.Module | None,
    example_inputs: Tensor | None,
    preprocess: Preprocess | None,
) -> Inspection:
    if example_inputs is None and preprocess is not None:
        example_inputs = example_images(model, preprocess.size)
    return Explainer(model, layer=layer, example_inputs=example_inputs).inspect()


def _examples(model: nn.Module, example_inputs: Tensor | None, found: Inspection) -> Tensor:
    """Two images: a batch axis of 1 may be taken for a constant."""
    channels, height, width = (int(size) for size in found.input_shape)
    images = example_images(model, (height, width), channels=channels)
    if example_inputs is None:
        return images
    return example_inputs[:2].to(images).expand_as(images)


def _image_input(graph: ir.Graph) -> ir.Value:
    """The one input that is no weight."""
    return graph.inputs[0]


def _tensor(layer: str | nn.Module | None) -> str | None:
    if isinstance(layer, nn.Module):
        raise ValueError("the layers of an ONNX file are named by its tensors, not by modules")
    return layer


def _as_list(layers: Layers) -> list[str | nn.Module | None]:
    if layers is None or isinstance(layers, str | nn.Module):
        return [layers]
    return list(layers)
