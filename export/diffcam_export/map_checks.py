"""Checks of the maps: against PyTorch, against a CAM head made anew, against their heatmaps."""

import math

import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffcam_export.analysis import analyse
from diffcam_export.attach import attach
from diffcam_export.cam import HEATMAP, MAP, CamOptions, cam_head
from diffcam_export.checking import Failed, Skipped, relative, within, worst
from diffcam_export.contrast import Targets
from diffcam_export.exact import exactness
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.plain import plain_model
from diffcam_export.running import run
from diffcam_export.samples import Sample
from diffcam_export.subject import Subject
from diffcam_fast.explainer import Explainer
from diffcam_fast.methods import METHODS
from diffcam_kernels import reference

# Bytes of a resized photograph that are near a half differ by 1 from Pillow's, two in a thousand
# (`test_photographs_are_prepared_as_pillow_does`). One byte is 0.02 of a normalised pixel.
_BAKED = 2e-2
_HEATMAP = 1e-5


def runs(subject: Subject, shape: tuple[int, ...]) -> str:
    """Whether images of a shape give maps of the right classes, signs and shapes."""
    explainer, sample = subject.explainer, subject.samples.explained(shape)
    result = explainer(sample.given, sample.targets, topk=_topk(explainer, sample.targets))
    n, t, h, w = result.maps.shape
    if not bool(result.finite.all()) or not bool(result.logits.isfinite().all()):
        raise Failed("the maps or the logits of random images hold NaN or infinity")
    if (n, t) != result.targets.shape or n != shape[0]:
        raise Failed(f"maps {tuple(result.maps.shape)}, targets {tuple(result.targets.shape)}")
    if subject.facts.relu and bool((result.maps < 0).any()):
        raise Failed("the maps hold negative cells, which diffcam.relu says are clipped")
    chosen = result.logits.gather(1, result.targets)
    if sample.targets is None and not chosen.equal(result.logits.topk(t, dim=1).values):
        raise Failed(f"the explained class is not that of the largest logit, of {t}")
    if explainer.takes_targets:
        asked = [subject.samples.asked()] * n
        found = explainer(sample.given, asked)
        if found.targets.tolist() != asked or not bool(found.finite.all()):
            raise Failed(f"asked for the classes {asked[0]}, the maps are of others, or hold NaN")
    return f"maps {t} x {h} x {w}"


def maps(subject: Subject, layer: str) -> str:
    """Whether the maps of a layer are those of the model that the file was made from."""
    if subject.facts.method not in METHODS:
        raise Skipped(f"{subject.facts.method} is no method of the PyTorch engine")
    if isinstance(subject.model, nn.Module):
        return _as_in_pytorch(subject, layer, subject.model)
    return _as_made_anew(subject, layer)


def heatmaps(subject: Subject, layer: str) -> str:
    """Whether the heatmaps are the maps, stretched and enlarged as they are defined."""
    heat_name, map_name = (_output(subject, layer, name) for name in (HEATMAP, MAP))
    off = 0.0
    for shape in subject.samples.usable:
        feeds = subject.feeds(subject.samples.explained(shape))
        found, small = (t.cpu() for t in run(subject.opened, feeds, [heat_name, map_name]))
        baked = subject.facts.preprocess if subject.facts.baked else None
        [images] = (t for name, t in feeds.items() if name == subject.facts.input)
        sides = subject.explainer.input.sides(images)[:2] if baked is None else baked.size
        expected = reference.heatmap(small, *sides, found.dtype)
        if found.shape != expected.shape:
            raise Failed(f"they are {tuple(found.shape)}, and not {tuple(expected.shape)}")
        off = worst([off, float((found.double() - expected.double()).abs().max())])
    # A value half way between two bytes may go either way.
    bound = 1.0 if found.dtype == torch.uint8 else _HEATMAP
    detail = f"off by {off:.1e} of at most {bound:.0e}"
    if not off <= bound:
        raise Failed(detail)
    return detail


def has_heatmaps(subject: Subject, layer: str) -> bool:
    """Whether the file makes them for this layer."""
    name = _output(subject, layer, HEATMAP)
    return any(value.name == name for value in subject.opened.session.get_outputs())


def _output(subject: Subject, layer: str, name: str) -> str:
    index = subject.facts.layers.index(layer)
    return f"{name}_{index}" if index else name


def _topk(explainer: OnnxExplainer, targets: object) -> int | None:
    return explainer.maps_per_image if targets is None and not explainer.takes_targets else None


def _as_in_pytorch(subject: Subject, layer: str, model: nn.Module) -> str:
    ours, facts = subject.layer(layer), subject.facts
    preprocess = facts.preprocess if facts.baked else None
    samples = [subject.samples.explained(shape) for shape in subject.samples.usable]
    planes = [_as_taken(model, sample.planes(preprocess), ours) for sample in samples]
    theirs = Explainer(
        model,
        layer=layer,
        method=facts.method,
        contrast=facts.contrast,
        relu=facts.relu,
        example_inputs=planes[0].expand(max(2, len(planes[0])), -1, -1, -1)[:2],
    )
    tolerance = max(subject.tolerance, _BAKED if facts.baked else 0)
    details = [
        _compared(ours, theirs, sample, images, targets, tolerance)
        for sample, images in zip(samples, planes, strict=True)
        for targets in _choices(ours, sample, [subject.samples.asked()] * len(images))
    ]
    # The comparison that was nearest to failing speaks for all.
    return max(details)[1]


def _as_taken(model: nn.Module, planes: Tensor, ours: OnnxExplainer) -> Tensor:
    """Images as the model takes them: (N, H, W, C) where the file does, if the model does too."""
    if not ours.input.channels_last or ours.input.dtype == torch.uint8:
        return planes
    rows = planes.permute(0, 2, 3, 1)
    weight = next(model.parameters(), planes)
    try:
        with torch.no_grad():
            model(rows[:1].to(weight))
    except Exception:  # noqa: BLE001 - what a model raises on images of other axes is its own
        return planes
    return rows


def _choices(
    ours: OnnxExplainer, sample: Sample, asked: list[list[int]]
) -> list[list[list[int]] | None]:
    """The prediction, and where it takes classes, those asked for."""
    return [sample.targets, asked] if ours.takes_targets else [sample.targets]


def _compared(
    ours: OnnxExplainer,
    theirs: Explainer,
    sample: Sample,
    images: Tensor,
    targets: list[list[int]] | None,
    tolerance: float,
) -> tuple[float, str]:
    """The largest relative error of the maps, and the detail.

    Raises:
        Failed: it is larger than the tolerance, and float64 tells that the file is at fault.
    """
    got = ours(sample.given, targets, topk=_topk(ours, targets))
    # The same classes: two of almost equal logits may change places.
    expected = theirs(images, got.targets)
    error = relative(got.maps.cpu(), expected.maps.cpu())
    try:
        return error, within(error, tolerance, "PyTorch")
    except Failed:
        if images.dtype != torch.float32 or math.isnan(error):
            raise
        found = exactness(
            theirs, images, got.targets, made=got.maps.cpu(), expected=expected.maps.cpu()
        )
        if not found.as_near(tolerance):
            raise
        return error, f"relative error {error:.1e} to PyTorch; {found}"


def _as_made_anew(subject: Subject, layer: str) -> str:
    anew = subject.session(_made_anew(subject))
    names = [_output(subject, layer, MAP), "diffcam_target"]
    errors = []
    for shape in subject.samples.usable:
        sample = subject.samples.explained(shape)
        tries = [sample]
        if subject.explainer.takes_targets:
            tries.append(Sample(sample.given, [subject.samples.asked()] * shape[0]))
        for images in tries:
            feeds = subject.feeds(images)
            (got, classes), (expected, others) = (
                run(opened, feeds, names) for opened in (subject.opened, anew)
            )
            if not classes.equal(others):
                raise Failed("the explained classes are others than those of a head made anew")
            errors.append(relative(got, expected))
    return within(worst(errors), subject.tolerance, "a head made anew from the plain graph")


def _made_anew(subject: Subject) -> bytes:
    """The file without its maps, and with those that its metadata describes."""
    facts, explainer = subject.facts, subject.explainer
    model = plain_model(subject.path)
    values = {value.name for node in model.graph for value in node.outputs}
    if not values.issuperset(facts.layers):
        raise Skipped("no PyTorch model to compare with was given")
    founds = [analyse(model.graph, layer=name, logits=facts.output) for name in facts.layers]
    targets: Targets = "input"
    if not explainer.takes_targets:
        targets = explainer.maps_per_image if explainer.maps_per_image > 1 else "predicted"
    options = CamOptions(METHODS[facts.method], facts.contrast, facts.relu, targets)
    head = cam_head(founds, model.graph.inputs[0], options, prefix="diffcam/anew")
    attach(model, head, inline=True)
    serialised: bytes = ir.to_proto(model).SerializeToString()
    return serialised
