"""``diffcam explain -m MODEL.cam.onnx``: an explained ONNX file in the place of a network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from diffcam_fast.cli.request import Request
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.preprocess import AsItIs, Preprocess
from diffcam_fast.models.labels import imagenet_labels
from diffcam_fast.models.loading import check_device
from diffcam_fast.targets import Targets

if TYPE_CHECKING:
    from diffcam_export.explainer import OnnxExplainer


class Explains(Protocol):
    """An `Explainer`, or what is called as it is: the type above is not known here."""

    @property
    def layer(self) -> str:
        """Name of the target layer."""

    def __call__(
        self, images: Tensor, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch."""


@dataclass(frozen=True)
class Described:
    """An ONNX file, as far as a run asks the same of it as of a network.

    Attributes:
        preprocess: From a photograph to its input.
        labels: K class names, or None.
        name: What the user calls it.
        single: It takes pictures of any size, each of which is a batch of its own.
        device: Where it runs.
        choices: What was chosen when it was exported, a line each.
        assumed: What is taken for granted because the file does not tell, or None.
    """

    preprocess: Preprocess
    labels: tuple[str, ...] | None
    name: str
    single: bool
    device: str
    choices: tuple[str, ...]
    assumed: str | None = None


def open_explained(request: Request, *, threads: int | None = None) -> tuple[Described, Explains]:
    """The ONNX file that a request names, if it has what is asked for.

    Args:
        request: Of its options those that say what is explained, and where.
        threads: For the work inside an operator on the CPU; None: what ONNX Runtime takes.

    Raises:
        ValueError: no explained ONNX file, or options that only another export could meet.
    """
    # Here, not above: this package comes before the one that exports.
    from diffcam_export.explainer import OnnxExplainer
    from diffcam_export.session import CPU, CUDA, Provider

    assert request.model is not None
    if request.weights is not None:
        raise ValueError(f"{request.model} holds its own weights; leave --weights out")
    providers: list[Provider] | None = None
    if request.device is not None:
        device = check_device(request.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"an ONNX file runs on cpu or cuda, got --device {request.device}")
        on_gpu = (CUDA, {"device_id": device.index or 0})
        providers = [CPU] if device.type == "cpu" else [on_gpu]
    explainer = OnnxExplainer(
        request.model,
        layer=request.layer,
        providers=providers,
        strict=request.device is not None,
        threads=threads,
    )
    temperature = explainer.inspect().contrast.temperature
    for option, asked, has in (
        ("--method", request.method, explainer.method),
        ("--contrast", request.contrast, explainer.contrast),
        ("--temperature", request.temperature, temperature),
    ):
        if asked is not None and asked != has:
            raise ValueError(
                f"{option} is {asked}, but {request.model} was exported with {has}; "
                "leave it out, or export the model again"
            )
    if request.targets and not explainer.takes_targets:
        raise ValueError(
            f"{request.model} explains the prediction alone; for --target, export it with "
            "targets as an input"
        )
    enough = explainer.takes_targets or (request.topk or 1) <= explainer.maps_per_image
    if not enough:
        raise ValueError(
            f"--topk is {request.topk}, but {request.model} has maps of the best "
            f"{explainer.maps_per_image}; export it with more"
        )
    return describe(explainer, request.model), explainer


def describe(explainer: "OnnxExplainer", name: str) -> Described:
    """What a run asks of an explained ONNX file.

    Args:
        explainer: of the file.
        name: what the user calls it.
    """
    facts = explainer.inspect()
    known = facts.preprocess or Preprocess(size=(224, 224))
    if facts.baked:
        known = AsItIs(known.size, known.crop_pct, known.interpolation, known.mean, known.std)
    else:
        height, width = explainer.size
        known = known.with_size((height or known.size[0], width or known.size[1]))
    assumed = None
    if facts.preprocess is None:
        assumed = (
            f"{name} does not tell how photographs are prepared for it; as for ImageNet's"
            " networks: short side, centre crop, ImageNet's mean and deviation. To have it told,"
            " export with --preprocess"
        )
    labels = facts.labels
    if labels is None and explainer.classes == len(imagenet_labels()):
        labels = imagenet_labels()
    choices = (
        f"layer: {explainer.layer}, of {facts.source or 'a model without a name'}",
        f"maps: {', '.join(facts.heads)}, as diffcam-fast {facts.version} exported it",
    )
    device = str(explainer.device)
    return Described(known, labels, name, facts.baked, device, choices, assumed)
