"""`export_onnx`: from a classifier to one ONNX file that explains itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from torch import Tensor, nn

from diffcam_export.attach import attach, bake
from diffcam_export.cam import CamOptions, cam_head
from diffcam_export.classifier import Classifier, Layers, from_onnx, from_pytorch
from diffcam_export.facts import Facts
from diffcam_export.function import DOMAIN
from diffcam_export.methods import form_of
from diffcam_export.options import cam_options
from diffcam_export.pictures import HeatmapType
from diffcam_export.plain import count_nodes
from diffcam_export.refusals import check_classifier, check_output
from diffcam_export.save import save
from diffcam_export.verify import Report
from diffcam_export.verify import verify as run_checks
from diffcam_fast import __version__
from diffcam_fast.contrast import Contrast
from diffcam_fast.formats import names_onnx
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models.loading import LoadedModel, Weights, load_model


class VerificationError(ValueError):
    """An exported file is not what it should be; the message holds all checks."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        layers: the names of the target layers.
        heads: `closed form`, `backward of the head` or `principal component` for each.
        reasons: why, for each.
        nodes: of the plain model, constants not counted.
        added_nodes: of its CAM head, those in its function and their call; constants not counted.
        added_bytes: what the file grew by, over the plain model written the same way, names of
            classes aside.
        report: what came of comparing the file with its model; None: it was not asked for.
    """

    path: Path
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    reasons: tuple[str, ...]
    nodes: int
    added_nodes: int
    added_bytes: int
    report: Report | None = None


def export_onnx(
    model: nn.Module | LoadedModel | str | Path,
    out: str | Path,
    *,
    example_inputs: Tensor | None = None,
    layer: Layers = None,
    method: str = "diff_grad_cam",
    contrast: str | Contrast | None = None,
    temperature: float | None = None,
    relu: bool = True,
    targets: Literal["predicted", "input"] = "predicted",
    topk: int | None = None,
    heatmap: HeatmapType | None = None,
    preprocess: Preprocess | None = None,
    bake_preprocess: bool = False,
    labels: Sequence[str] | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    inline: bool = False,
    weights: Weights = None,
    logits: str | None = None,
    verify: bool = True,
) -> Exported:
    """Writes one plain ONNX file whose outputs are those of the classifier and the map.

    The added outputs are `diffcam_map`, float32 (N, T, h, w), in the unit of the score per cell,
    `diffcam_target`, int64 (N, T), the explained classes, and `diffcam_heatmap`, (N, T, H, W),
    where it is asked for. With several layers the further maps are `diffcam_map_1`, ... The outputs
    of the classifier keep their names, their order and their values. The file holds no custom
    operators, and takes any batch size.

    Args:
        model: an `nn.Module`; or `torchvision:NAME`, `timm:NAME`, `package.module:factory`, the
            path of a `.pt2` file, as everywhere; or the path of an ONNX file.
        out: the file to write. It appears whole or not at all.
        example_inputs: (N, C, H, W), what the module takes; None: random images of the size that
            the model tells, or of a usual one. Not for an ONNX file.
        layer: a module or its dotted name, or several; for an ONNX file the name of a tensor.
            None: the last spatial activation before the classifier.
        method: as in `Explainer`; a graph has no passes over masked images, and those over masked
            activations only where the head has a closed form.
        contrast: as in `Explainer`.
        temperature: as in `Explainer`.
        relu: clip negative cells of the maps to 0; those of `recipro_cam` never are.
        targets: `predicted`, or `input`: the file takes classes as a further input `targets`,
            int64 (n, T) with n = N or 1, where -1 stands for the prediction; it may be left out.
        topk: explain the k classes of the largest logits instead.
        heatmap: also make heatmaps of the network's input size: `float32` in [0, 1], or `uint8`.
        preprocess: from a photograph to the network's input; None: the model's own, where it is
            known. Kept in the file.
        bake_preprocess: the file takes photographs, uint8 (N, height, width, 3) of any size.
        labels: K class names, kept in the file; None: the model's own, where they are known.
        dtype: of the exported weights; None: as they are. Not for an ONNX file.
        dynamic_size: height and width may change from call to call. Not for an ONNX file.
        opset: version of the default operator set, from 18 on; None: 18. Not for an ONNX file,
            which keeps its own, or is converted to 18.
        inline: leave the added nodes among the others; else they are one ONNX function.
        weights: as in `load_model`, for a model by name.
        logits: for an ONNX file of several outputs, the name of the one with the logits.
        verify: compare the file with the model in ONNX Runtime, as `diffcam verify` does, untimed.

    Returns:
        What was written.

    Raises:
        ValueError: an option that does not fit, a model that cannot be loaded, analysed or
            exported; the message says what to do. No file is written.
        TypeError: an argument of another type than it may have.
        OSError: the file cannot be written.
        VerificationError: a check of the file failed; the file is there, to be looked at.

    Example:
        >>> import tempfile, torch
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head)
        >>> path = Path(tempfile.mkdtemp(), "model.cam.onnx")
        >>> done = export_onnx(model, path, example_inputs=torch.rand(2, 3, 8, 8))
        >>> done.layers, done.heads
        (('1',), ('closed form',))
    """
    options = cam_options(
        method=method,
        contrast=contrast,
        temperature=temperature,
        relu=relu,
        targets=targets,
        topk=topk,
        heatmap=heatmap,
    )
    if isinstance(labels, str):
        raise TypeError(f"labels must be a sequence of names, got the text {labels!r}")
    if isinstance(model, Path):
        model = str(model)
    if isinstance(model, str) and not names_onnx(model):
        model = load_model(model, weights=weights)
    if isinstance(model, str):
        _refuse(
            "an ONNX file is taken as it is",
            example_inputs=example_inputs,
            dtype=dtype,
            dynamic_size=dynamic_size,
            opset=opset,
            weights=weights,
        )
        classifier = from_onnx(Path(model), layers=layer, logits=logits)
    else:
        _refuse("a PyTorch model returns its logits itself", logits=logits)
        classifier = from_pytorch(
            model,
            example_inputs=example_inputs,
            layers=layer,
            dtype=dtype,
            dynamic_size=dynamic_size,
            opset=opset,
        )
    classifier = dataclasses.replace(
        classifier,
        preprocess=preprocess or classifier.preprocess,
        labels=tuple(labels) if labels is not None else classifier.labels,
    )
    done = write_explained(
        classifier, Path(out), options, inline=inline, bake_preprocess=bake_preprocess
    )
    return _checked(done, model) if verify else done


def _checked(done: Exported, model: nn.Module | LoadedModel | str) -> Exported:
    report = run_checks(done.path, against=model, rounds=0)
    if not report.ok:
        raise VerificationError("\n".join([f"{done.path} failed its checks:", *report.lines()]))
    return dataclasses.replace(done, report=report)


def write_explained(
    classifier: Classifier,
    out: Path,
    options: CamOptions,
    *,
    inline: bool = False,
    bake_preprocess: bool = False,
) -> Exported:
    """Adds the CAM head to a classifier, whose graph it changes, and writes it.

    Raises:
        MissingRuleError: an operator between a layer and the logits has no derivative here.
        ValueError: the classifier does not fit, or the file is one that it was read from.
        OSError: the file cannot be written.
    """
    check_classifier(classifier, options, bake_preprocess=bake_preprocess)
    check_output(out, classifier)
    model = classifier.model
    nodes, plain_bytes = count_nodes(model), _graph_bytes(model)
    head = cam_head(classifier.founds, classifier.images, options, prefix=DOMAIN)
    form = form_of(options.method)
    heads, reasons = zip(
        *(form.way(options.method, found) for found in classifier.founds), strict=True
    )
    facts = _facts(classifier, options, heads, baked=bake_preprocess)
    attach(model, head, inline=inline)
    added_nodes = count_nodes(model) - nodes
    if bake_preprocess:
        assert classifier.preprocess is not None
        bake(model, classifier.images, classifier.preprocess)
    texts = facts.texts()
    names = {key: texts.pop(key) for key in ["diffcam.labels"] if key in texts}
    model.metadata_props.update(texts)
    added_bytes = _graph_bytes(model) - plain_bytes
    model.metadata_props.update(names)
    save(model, out)
    return Exported(
        path=out,
        layers=classifier.layers,
        heads=heads,
        reasons=reasons,
        nodes=nodes,
        added_nodes=added_nodes,
        added_bytes=added_bytes,
    )


def _refuse(why: str, **given: object) -> None:
    names = [name for name, value in given.items() if value is not None and value is not False]
    if names:
        raise ValueError(f"{why}; leave out {', '.join(names)}")


def _facts(
    classifier: Classifier, options: CamOptions, heads: tuple[str, ...], *, baked: bool
) -> Facts:
    found = classifier.founds[0]
    return Facts(
        version=__version__,
        source=classifier.source,
        layers=classifier.layers,
        method=options.method.name,
        contrast=options.contrast,
        contrast_name=options.contrast.name,
        relu=options.relu,
        heads=heads,
        input=str(classifier.images.name),
        output=str(found.output.name),
        probabilities=found.probabilities,
        preprocess=classifier.preprocess,
        baked=baked,
        labels=classifier.labels,
    )


def _graph_bytes(model: ir.Model) -> int:
    """Of the file without its weights."""
    stripped = ir.to_proto(model)
    for tensor in stripped.graph.initializer:
        tensor.ClearField("raw_data")
    return int(stripped.ByteSize())
