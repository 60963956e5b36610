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
from diffcam_export.pytorch import ExportError, check_opset, plain_graph
from diffcam_export.reading import read_onnx
from diffcam_fast.analysis import Inspection
from diffcam_fast.analysis.inspection import example_images
from diffcam_fast.explainer import Explainer
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models.loading import LoadedModel
from diffcam_fast.running import is_out_of_memory, unwrap

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
        files: that it was read from.
    """

    model: ir.Model
    images: ir.Value
    founds: tuple[Found, ...]
    layers: tuple[str, ...]
    source: str
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    files: tuple[Path, ...] = ()


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
    names = tuple(str(found.layer.name) for found in founds)
    _check_once(names)
    return Classifier(
        model=model,
        # The one input that is no weight.
        images=model.graph.inputs[0],
        founds=founds,
        layers=names,
        source=path.name,
        preprocess=None,
        labels=None,
        files=(path, *_external(model)),
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
        ValueError: it cannot be loaded, analysed or exported, or the layer returns tokens.
    """
    given = _given(model)
    module = unwrap(given.model)
    opset = OPSET if opset is None else opset
    check_opset(opset)
    if example_inputs is not None and len(example_inputs) == 0:
        raise ValueError(f"example_inputs must hold an image, got {tuple(example_inputs.shape)}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be {' or '.join(_DTYPES)}, got {dtype!r}")
    inspections = [
        _inspect(module, name, example_inputs, given.preprocess) for name in _as_list(layers)
    ]
    names = tuple(found.layer for found in inspections)
    _check_once(names)
    _check_spatial(inspections)
    images = _examples(module, example_inputs, inspections[0])
    exported = module
    if dtype is not None and _DTYPES[dtype] != images.dtype:
        # The user's model stays as it is.
        exported = copy.deepcopy(module).to(_DTYPES[dtype])
        images = images.to(_DTYPES[dtype])
    if images.dtype not in _DTYPES.values():
        raise ValueError(
            f"ONNX Runtime does not run models of {images.dtype} everywhere; "
            "give dtype='float32' or 'float16'"
        )
    plain = plain_graph(exported, images, names, dynamic_size=dynamic_size, opset=opset)
    founds = tuple(
        analyse(plain.model.graph, layer=value.name, logits=plain.output.name)
        for value in plain.layers
    )
    return Classifier(
        model=plain.model,
        images=plain.model.graph.inputs[0],
        founds=founds,
        layers=names,
        source=given.name,
        preprocess=given.preprocess,
        labels=given.labels,
        files=(Path(given.name),) if isinstance(model, LoadedModel) else (),
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
    if not isinstance(loaded, LoadedModel):
        raise TypeError(
            "model must be an nn.Module, a LoadedModel, or the name or path of a model; got "
            f"{loaded!r}"
        )
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
    try:
        return Explainer(model, layer=layer, example_inputs=example_inputs).inspect()
    except (ValueError, TypeError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The user's code may raise anything.
        images = "random images" if example_inputs is None else tuple(example_inputs.shape)
        raise ExportError(
            f"the model cannot run on {images}: {type(error).__name__}: {error}"
        ) from error


def _examples(model: nn.Module, example_inputs: Tensor | None, found: Inspection) -> Tensor:
    """Two images: a batch axis of 1 may be taken for a constant."""
    channels, height, width = (int(size) for size in found.input_shape)
    images = example_images(model, (height, width), channels=channels)
    if example_inputs is None:
        return images
    return example_inputs[:2].to(images).expand_as(images)


def _external(model: ir.Model) -> list[Path]:
    """The files with the data of tensors."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    return [Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _tensor(layer: str | nn.Module | None) -> str | None:
    if isinstance(layer, nn.Module):
        raise ValueError("the layers of an ONNX file are named by its tensors, not by modules")
    return layer


def _as_list(layers: Layers) -> list[str | nn.Module | None]:
    if layers is None or isinstance(layers, str | nn.Module):
        return [layers]
    if not layers:
        raise ValueError(f"layer names no layer, got {layers!r}; None takes the last spatial one")
    return list(layers)


def _check_spatial(inspections: Sequence[Inspection]) -> None:
    tokens = next((found for found in inspections if found.layout.grid is not None), None)
    if tokens is not None:
        raise ValueError(
            f"layer {tokens.layer!r} returns tokens, and an exported file explains spatial layers"
            " alone; name a spatial one as layer, or use Explainer, which explains tokens"
        )


def _check_once(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the layer {twice[0]!r} is given twice; its map would be, too")
