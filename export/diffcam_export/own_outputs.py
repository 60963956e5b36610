"""The check of the model's own outputs, which an export must leave as they are."""

from collections.abc import Mapping

from torch import Tensor

from diffcam_export.checking import Failed, relative, same_bits, worst
from diffcam_export.image_input import ImageInput
from diffcam_export.running import run
from diffcam_export.samples import Sample
from diffcam_export.session import Opened
from diffcam_export.subject import Subject

# The CPU computes float16 in float32, and rounds where a value is read: at the layer as well, once
# more than without maps. Ten such roundings are 5e-3.
_HALF_ON_CPU = 5e-3
# Photographs are prepared by the graph on one side, by Pillow on the other; see `map_checks`.
_BAKED = 2e-2


def own_outputs(subject: Subject) -> str:
    """Whether they are those of the plain model, and where not, what became of them."""
    plain = subject.plain
    theirs = subject.session(plain.model)
    farthest = _farthest(subject, subject.opened, theirs)
    if farthest == 0:
        return f"those of {plain.name}, bit for bit"
    detail = f"they differ from those of {plain.name} by {farthest:.1e} of the largest"
    if _prepares_alone(subject, theirs):
        if farthest <= _BAKED:
            return f"{detail}: it prepares photographs itself, the plain model's came from Pillow"
        raise Failed(f"{detail}, more than the {_BAKED:.0e} of photographs prepared by Pillow")
    if plain.half and subject.on_cpu:
        if farthest <= _HALF_ON_CPU:
            return f"{detail}: the CPU computes float16 in float32, and rounds what is read"
        raise Failed(f"{detail}, more than the {_HALF_ON_CPU:.0e} of float16 on the CPU")
    bare = _farthest(
        subject,
        subject.session(subject.path, optimise=False),
        subject.session(plain.model, optimise=False),
    )
    if bare == 0 and (farthest <= subject.tolerance or plain.quantized):
        lost = " (maps read a value that it would keep in whole numbers)" if plain.quantized else ""
        return f"{detail}, and bit for bit not at all where ONNX Runtime fuses no operators{lost}"
    raise Failed(f"{detail}, by {bare:.1e} without fused operators")


def _prepares_alone(subject: Subject, theirs: Opened) -> bool:
    """The file takes photographs, and the plain model does not."""
    name = subject.facts.input
    [value] = [v for v in theirs.session.get_inputs() if v.name == name]
    return subject.facts.baked and value.type != "tensor(uint8)"


def _farthest(subject: Subject, ours: Opened, theirs: Opened) -> float:
    names = [value.name for value in theirs.session.get_outputs()]
    here = {value.name for value in ours.session.get_outputs()}
    lacking = [name for name in names if name not in here]
    if lacking:
        raise Failed(f"outputs of the plain model are missing: {', '.join(lacking)}")
    far = [0.0]
    for shape in subject.samples.usable:
        sample = subject.samples.any(shape)
        got = run(ours, subject.feeds(sample), names)
        expected = run(theirs, plain_feeds(subject, theirs, sample), names)
        far += [
            relative(one, other)
            for one, other in zip(got, expected, strict=True)
            if not same_bits(one, other)
        ]
    return worst(far)


def plain_feeds(subject: Subject, theirs: Opened, sample: Sample) -> Mapping[str, Tensor]:
    """The inputs of the plain model for the images of a sample."""
    if not _prepares_alone(subject, theirs):
        return subject.feeds(sample)
    takes = ImageInput.of(theirs.session, subject.facts.input, path=subject.plain.name)
    planes = takes.arranged(sample.planes(subject.facts.preprocess))
    return {takes.name: planes.to(device=theirs.device, dtype=takes.dtype).contiguous()}
