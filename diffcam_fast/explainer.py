"""The engine: images and targets in, maps out."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffcam_fast.analysis import AnalysisError, Inspection, analyse
from diffcam_fast.analysis.inspection import example_images
from diffcam_fast.contrast import Contrast
from diffcam_fast.explanation import Explanation
from diffcam_fast.methods import Method, get_method
from diffcam_fast.running import OutputError, tensor_named, unwrap
from diffcam_fast.split import Split, forward, head_gradients
from diffcam_kernels import ops
from diffcam_kernels.settings import uses_kernels

# The sizes that image classifiers are made for, tried in this order where the model does not tell
# its own.
_USUAL_SIZES = (224, 299, 384, 256, 128, 64, 32, 28)

Targets = None | str | int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class Explainer:
    """Explains an image classifier: for each image and target class, a map of where the network
    looked.

    The target layer is found by running the model once and following its data. Behind it a pooled
    linear head is explained in closed form, in inference mode and without a backward pass; any
    other head by a backward of the head alone. The model is left as it was: training flags,
    `requires_grad`, `.grad` and hooks. Several threads may share one explainer.

    Args:
        model: returns logits (N, K), or an object or mapping with `logits`. It may be frozen, in
            half precision, on any device, or wrapped by `torch.compile` or `DataParallel`, whose
            inner module runs then.
        layer: the target layer, a module of the model or its dotted name; None: the last spatial
            activation before the classifier.
        method: `diff_grad_cam`, `grad_cam` or `hires_cam`.
        contrast: `mean`, `log_odds`, `runner_up`, `none`, or a `Contrast`; None: what the method
            takes by default.
        temperature: another temperature for `log_odds`, at least 0, in units of the logits.
        relu: clip negative cells of the maps to 0.
        example_inputs: (N, C, H, W), the kind of input the model takes; None: random images of a
            usual size.

    Raises:
        AnalysisError: no layer fits, or not the one given; the message lists candidates.
        ValueError: an unknown method or contrast, or settings that exclude each other.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explainer = Explainer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head))
        >>> explainer.layer
        '1'
        >>> explainer(torch.rand(2, 3, 8, 8)).maps.shape
        torch.Size([2, 1, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | nn.Module | None = None,
        method: str = "diff_grad_cam",
        contrast: str | Contrast | None = None,
        temperature: float | None = None,
        relu: bool = True,
        example_inputs: Tensor | None = None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "a TorchScript model cannot be split at a layer; give the nn.Module it was "
                "made from"
            )
        self._model = unwrap(model)
        if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
            raise ValueError(
                "the model was made under inference_mode, and its tensors can take part in no "
                "gradient; give a copy.deepcopy of it that is made outside"
            )
        self._method, self._contrast = method_and_contrast(method, contrast, temperature)
        self._relu = relu
        self._lock = threading.Lock()
        self._inspections: dict[tuple[int, ...], Inspection] = {}
        self._layer = _dotted_name(self._model, layer)
        self._found_at: Inspection | None = None
        self._why_not: str = ""
        if example_inputs is not None:
            examples = self._prepare(example_inputs)[:2]
            self._inspect(
                _size(examples),
                channels=examples.shape[1],
                examples=examples.repeat(2 // len(examples), 1, 1, 1),
            )
        else:
            self._inspect_usual_sizes()

    @property
    def layer(self) -> str:
        """Dotted module name of the target layer, as `get_submodule` takes it.

        Raises:
            AnalysisError: the model took no random image of a usual size, and has not been called
                yet.
        """
        if self._layer is None:
            raise AnalysisError(
                "the layer is not known before the first call, or give example_inputs: "
                f"{self._why_not}"
            )
        return self._layer

    def inspect(self) -> Inspection:
        """What was found out about the model: layer, head, closed form or backward, and why.

        Raises:
            AnalysisError: as for `layer`.
        """
        if self._found_at is None:
            raise AnalysisError(
                f"nothing is known before the first call, or give example_inputs: {self._why_not}"
            )
        return self._found_at

    def __call__(
        self, images: Tensor, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch.

        Args:
            images: (N, C, H, W) float, normalised as the model takes it. It is moved to the model's
                device and cast to its dtype.
            targets: the classes to explain. None or "predicted": the predicted class of each image.
                An int: this class for every image. N ints, or an int64 tensor (N,): one class an
                image. N rows of T ints, or a tensor (N, T): T classes an image.
            topk: the k classes of the largest logits instead, best first.

        Returns:
            An `Explanation` of N images and T targets, on the model's device, free of any graph.

        Raises:
            ValueError: the images, the targets or k do not fit.
            TypeError: a wrong type, or a model that returns no logits.
            AnalysisError: no layer of the model fits this input.
        """
        images = self._prepare(images)
        if targets is not None and topk is not None:
            raise ValueError("give targets or topk, not both")
        inspection = self._inspect(_size(images), channels=images.shape[1])
        if inspection.closed_form and self._method.pooled:
            return self._closed_form(images, targets, topk, inspection)
        return self._backward(images, targets, topk, inspection)

    def _closed_form(
        self, images: Tensor, targets: Targets, topk: int | None, found: Inspection
    ) -> Explanation:
        assert found.weight is not None
        split = forward(self._model, images, found.layer, channel_axis=found.channel_axis)
        with _plain_float32(images):
            asked = resolve_targets(targets, topk, split.logits)
            weight = tensor_named(self._model, found.weight).detach().flatten(1)
            cells = split.activations.shape[2] * split.activations.shape[3]
            weights, classes, scores = ops.contrast_channel_weights(
                split.logits, weight, cells, asked, *self._contrast.operands(split.logits, asked)
            )
            maps = ops.pooled_cam(split.activations, weights, self._relu)
        return self._explanation(split, classes, scores, maps, found, "closed form")

    def _backward(
        self, images: Tensor, targets: Targets, topk: int | None, found: Inspection
    ) -> Explanation:
        chosen: list[tuple[Tensor, Tensor]] = []

        def cotangents(logits: Tensor) -> Tensor:
            with _plain_float32(logits):
                asked = resolve_targets(targets, topk, logits)
                d: Tensor
                d, classes, scores = ops.contrast_gradient(
                    logits, asked, *self._contrast.operands(logits, asked)
                )
            chosen.append((classes, scores))
            return d

        split = head_gradients(
            self._model,
            images,
            found.layer,
            cotangents,
            channel_axis=found.channel_axis,
            probabilities=found.probabilities,
        )
        [(classes, scores)] = chosen
        with _plain_float32(images):
            maps = ops.gradient_cam(
                split.activations, split.gradients, self._method.reduction, self._relu
            )
        return self._explanation(split, classes, scores, maps, found, "backward of the head")

    def _explanation(
        self,
        split: Split,
        classes: Tensor,
        scores: Tensor,
        maps: Tensor,
        found: Inspection,
        how: str,
    ) -> Explanation:
        kernels = "triton" if uses_kernels(split.logits, split.activations) else "torch"
        return Explanation(
            logits=split.logits,
            targets=classes,
            scores=scores.float(),
            maps=maps.float(),
            backend=f"{kernels} ({maps.device}), {how}",
            layer=found.layer,
            method=self._method.name,
            contrast=self._contrast.name,
        )

    def _prepare(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (N, C, H, W), got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(
                "images must be floating point, normalised as the model takes them; got "
                f"{images.dtype}"
            )
        if images.ndim != 4:
            hint = "; add the batch axis, images[None]" if images.ndim == 3 else ""
            raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}{hint}")
        images = images.detach()
        first = next((p for p in self._model.parameters() if p.is_floating_point()), None)
        return images if first is None else images.to(device=first.device, dtype=first.dtype)

    def _inspect(
        self, size: tuple[int, int], *, channels: int, examples: Tensor | None = None
    ) -> Inspection:
        """The analysis at this input size: a pooling window of fixed size is global at one only.

        It runs on random images: what a caller's images hold, NaN say, must not decide how they
        are explained.
        """
        with self._lock:
            found = self._inspections.get((channels, *size))
            if found is None:
                if examples is None:
                    examples = example_images(self._model, size, channels=channels)
                found = analyse(self._model, examples, layer=self._layer)
                self._inspections[channels, *size] = found
                self._adopt(found, size)
        return found

    def _adopt(self, found: Inspection, size: tuple[int, int]) -> None:
        if self._found_at is None:
            self._found_at, self._layer = found, found.layer
        elif found.shape[1:] == (1, 1):
            warnings.warn(
                f"at {size[0]} x {size[1]} pixels layer {found.layer!r} has a single cell, "
                "and its maps say nothing; "
                "give an earlier layer, or example_inputs of this size",
                stacklevel=4,
            )

    def _inspect_usual_sizes(self) -> None:
        refused: list[str] = []
        for channels, *size in _own_sizes(self._model) or _usual_sizes(self._model):
            try:
                self._inspect((size[0], size[1]), channels=channels)
                return
            except (AnalysisError, OutputError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever a model raises at a size it does not take
                refused.append(f"{size[0]} x {size[1]}: {error}")
        self._why_not = f"the model takes no random images of the usual sizes ({refused[0]})"


def method_and_contrast(
    method: str, contrast: str | Contrast | None, temperature: float | None
) -> tuple[Method, Contrast]:
    """The method of this name and the contrast that it takes, as `Explainer` reads them.

    Raises:
        ValueError: an unknown method or contrast, or settings that exclude each other.
    """
    found = get_method(method)
    default = "log_odds" if temperature is not None else found.contrast
    parsed = Contrast.parse(default if contrast is None else contrast, temperature=temperature)
    if found.needs_contrast and parsed.name == "none":
        raise ValueError(f"{method} is defined by its contrast; without one it is grad_cam")
    return found, parsed


def _dotted_name(model: nn.Module, layer: str | nn.Module | None) -> str | None:
    if layer is None or isinstance(layer, str):
        return layer
    layer = unwrap(layer)
    name: str | None = next((n for n, module in model.named_modules() if module is layer), None)
    if not name:
        raise AnalysisError(
            f"the given layer, a {type(layer).__name__}, is no module inside the model"
        )
    return name


def _usual_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """(C, H, W) with the channels of the first convolution, and with 3: it may see patches."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = [3] if convolution is None else list(dict.fromkeys([convolution.in_channels, 3]))
    return [(c, size, size) for size in _USUAL_SIZES for c in channels]


def _own_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """The input size (C, H, W) that a timm model carries."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return (
        [(int(size[0]), int(size[1]), int(size[2]))] if size is not None and len(size) == 3 else []
    )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def resolve_targets(targets: Targets, topk: int | None, logits: Tensor) -> Tensor | None:
    """Targets as (N, T) int64 on the device of the logits, checked against their classes; None is
    the prediction, which the operators find themselves.
    """
    n, k = logits.shape
    if topk is not None:
        if not 1 <= topk <= k:
            raise ValueError(f"topk must be from 1 to the {k} classes, got {topk}")
        return logits.topk(topk, dim=1).indices
    if targets is None or (isinstance(targets, str) and targets == "predicted"):
        return None
    if isinstance(targets, str):
        raise ValueError(f"targets must be classes or 'predicted', got {targets!r}")
    classes = torch.as_tensor(targets)
    if classes.dtype.is_floating_point or classes.dtype.is_complex or classes.dtype == torch.bool:
        raise TypeError(
            f"targets must be whole numbers, the indices of classes; got {classes.dtype}"
        )
    if classes.ndim == 0:
        classes = classes.expand(n)
    if classes.ndim == 1:
        classes = classes[:, None]
    if classes.ndim != 2 or classes.shape[0] != n or classes.shape[1] == 0:
        raise ValueError(
            f"targets must be one class, N = {n} classes, or (N, T) classes; got the shape "
            f"{tuple(classes.shape)}"
        )
    if classes.numel() and not (int(classes.min()) >= 0 and int(classes.max()) < k):
        raise ValueError(
            f"targets must be from 0 to {k - 1}, got {int(classes.min())} to {int(classes.max())}"
        )
    return classes.to(device=logits.device, dtype=torch.int64)


@contextmanager
def _plain_float32(tensor: Tensor) -> Iterator[None]:
    """Contrasts and maps are float32 work on ordinary tensors, whatever modes the caller is in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(tensor.device.type, enabled=False),
    ):
        yield
