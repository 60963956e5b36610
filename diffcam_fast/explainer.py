"""The engine: images and targets in, maps out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffcam_fast.analysis import Inspection
from diffcam_fast.contrast import Contrast
from diffcam_fast.explanation import Explanation
from diffcam_fast.fusion import Augment, Fuse, fuse
from diffcam_fast.inspections import Inspections, Layer
from diffcam_fast.layout import Layout
from diffcam_fast.methods import FittedCAM, Method, get_method
from diffcam_fast.network import Call, Maps, Network, plain_float32
from diffcam_fast.running import pick_logits, unwrap
from diffcam_fast.split import Output
from diffcam_fast.streaming import Streaming
from diffcam_fast.targets import Asked, Checked, Targets
from diffcam_kernels.settings import uses_kernels

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Setup:
    """What an explainer was made of: see `Explainer`, whose arguments these are.

    Attributes:
        model: unwrapped.
        layers: dotted names of the target layers.
        method: with its settings.
        contrast: as it was parsed.
        relu: negative cells are clipped.
        fuse: how maps of several layers become one.
        augment: views of each image, or None.
        output: what finds the logits; `pick_logits` where none was given.
        layout: of the layers, as it was given.
        examples: shape (C, H, W) of the images that the layers were found with.
    """

    model: nn.Module
    layers: tuple[str, ...]
    method: Method
    contrast: Contrast
    relu: bool
    fuse: Fuse
    augment: Augment | None
    output: Output
    layout: Layout | None
    examples: tuple[int, ...]


class Explainer(Streaming):
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
            activation before the classifier, or in a network of tokens the last ones whose whole
            grid the logits are computed from. Of several layers the maps are fused.
        method: a name in `diffcam_fast.methods.METHODS`, which docs/methods.md describes, or a
            `Method` of your own.
        contrast: `mean`, `log_odds`, `runner_up`, `none`, or a `Contrast`; None: what the method
            takes by default.
        temperature: another temperature for `log_odds`, at least 0, in units of the logits.
        relu: clip negative cells of the maps to 0. Recipro-CAM never does.
        fuse: `mean` or `max`, how maps of several layers become one.
        augment: views of each image whose maps are averaged; None: the image alone.
        output: from what the model returns to logits (N, K), where it returns something else: the
            mean over the pixels of a segmentation, say.
        layout: where in the output of the layers the channels and the cells are; None: found out.
        memory: bytes that a method may take for passes over masked images or activations.
        progress: show a bar over such passes; None: on a terminal, after two seconds.
        example_inputs: (N, C, H, W), the kind of input the model takes; None: random images of a
            usual size.

    Raises:
        AnalysisError: no layer fits, or not the one given; the message lists candidates.
        ValueError: an unknown method or contrast, settings that exclude each other, or a head that
            the method is not defined for.

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
        layer: Layer | Sequence[Layer] | None = None,
        method: str | Method = "diff_grad_cam",
        contrast: str | Contrast | None = None,
        temperature: float | None = None,
        relu: bool = True,
        fuse: Fuse = "mean",
        augment: Augment | None = None,
        output: Output | None = None,
        layout: Layout | None = None,
        memory: int = 1 << 29,
        progress: bool | None = None,
        example_inputs: Tensor | None = None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "a TorchScript model cannot be split at a layer; give the nn.Module it was "
                "made from"
            )
        if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
            raise ValueError(
                "the model was made under inference_mode, and its tensors can take part in no "
                "gradient; give a copy.deepcopy of it that is made outside"
            )
        if fuse not in ("mean", "max"):
            raise ValueError(f"fuse must be 'mean' or 'max', got {fuse!r}")
        if memory <= 0:
            raise ValueError(f"memory must be a positive number of bytes, got {memory}")
        self._model = unwrap(model)
        self._method, self._contrast = method_and_contrast(method, contrast, temperature)
        self._relu, self._fuse, self._augment = relu, fuse, augment
        self._output = pick_logits if output is None else output
        self._layout = layout
        self._memory, self._progress = memory, progress
        self._fitted: tuple[Tensor, ...] = ()
        self._inspections = Inspections(
            self._model,
            layer,
            output=self._output,
            layout=layout,
            examples=None if example_inputs is None else self.prepare(example_inputs),
        )

    @property
    def layer(self) -> str:
        """Dotted module name of the target layer, as `get_submodule` takes it; several are joined
        by commas.

        Raises:
            AnalysisError: the model took no random image of a usual size, and has not been called
                yet.
        """
        return ", ".join(self._inspections.names)

    def inspect(self) -> Inspection:
        """What was found out about the model: layer, head, closed form or backward, and why; of
        several layers, about the first.

        Raises:
            AnalysisError: as for `layer`.
        """
        return self._inspections.first[0]

    @property
    def setup(self) -> Setup:
        """What the explainer was made of.

        Raises:
            AnalysisError: as for `layer`.
        """
        return Setup(
            model=self._model,
            layers=self._inspections.names,
            method=self._method,
            contrast=self._contrast,
            relu=self._relu,
            fuse=self._fuse,
            augment=self._augment,
            output=self._output,
            layout=self._layout,
            examples=tuple(int(side) for side in self.inspect().input_shape),
        )

    @property
    def fitted(self) -> tuple[Tensor, ...]:
        """What `fit` found, W' (K, C) of each layer; may be stored, and set again later.

        Raises:
            ValueError: nothing was fitted; or what is set does not fit the layers.
        """
        if not self._fitted:
            raise ValueError(
                f"{self._method.name} has to be fitted: call fit with labelled images first"
            )
        return self._fitted

    @fitted.setter
    def fitted(self, weights: Sequence[Tensor]) -> None:
        if len(weights) != len(self._inspections.names):
            raise ValueError(
                f"{len(weights)} weights for the layers {', '.join(self._inspections.names)}"
            )
        self._fitted = tuple(weights)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> "Explainer":
        """Fits a method that learns from labelled images: `broad_cam`, `re_cam`.

        Args:
            batches: images (N, C, H, W), as in a call, with labels: (N,) int64, or (N, K) with 1
                for each class that an image shows. A `DataLoader`, say; all of one image size.

        Returns:
            The explainer itself.

        Raises:
            ValueError: the method is not fitted, there are no images, or the labels do not fit.
        """
        if not isinstance(self._method, FittedCAM):
            raise ValueError(f"{self._method.name} is not fitted; it explains as it is")
        founds = self._inspections.first
        check_head(self._method, founds)
        networks = [Network(self._model, (found,), self._output) for found in founds]
        self.fitted = [self._method.fit(n, batches, self._progress) for n in networks]
        return self

    def __call__(
        self, images: Tensor, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch.

        Args:
            images: (N, C, H, W) float, normalised as the model takes it. It is moved to the model's
                device and cast to its dtype.
            targets: the classes to explain. None or "predicted": the predicted class of each image.
                An int: this class for every image. N ints, or an int64 tensor (N,): one class an
                image. N rows of T ints, or a tensor (N, T): T classes an image. Or a function of
                what the model returns, to scores (N,) or (N, T), or N functions of the output of
                one image each to one number; they are explained as they are, without a contrast.
            topk: the k classes of the largest logits instead, best first.

        Returns:
            An `Explanation` of N images and T targets, on the model's device, free of any graph.

        Raises:
            ValueError: the images, the targets or k do not fit.
            TypeError: a wrong type, or a model that returns no logits.
            AnalysisError: no layer of the model fits this input.
        """
        images = self.prepare(images)
        if targets is not None and topk is not None:
            raise ValueError("give targets or topk, not both")
        asked = Asked(targets, topk, self._contrast)
        if asked.function is not None and self._method.needs_contrast:
            asked = replace(asked, contrast=Contrast(None))
        made, maps = self._maps(images, asked)
        if self._augment is not None:
            fixed = asked
            if asked.function is None:
                fixed = replace(asked, targets=Checked(made.target.classes), topk=None)
            maps = self._augment.averaged(
                images, lambda view: maps if view is images else self._maps(view, fixed)[1]
            )
        names = ", ".join(found.layer for found in self._inspections.at(images))
        kernels = "triton" if made.tensors and uses_kernels(*made.tensors) else "torch"
        return Explanation(
            logits=made.logits,
            targets=made.target.classes,
            scores=made.target.scores,
            maps=maps,
            backend=f"{kernels} ({maps.device}), {made.how}",
            layer=names,
            method=self._method.name,
            contrast=made.target.contrast,
            layer_maps=tuple(m.float() for m in made.maps),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, and of the images that need no cast."""
        first = next((p for p in self._model.parameters() if p.is_floating_point()), None)
        return torch.float32 if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        first = next(self._model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the model takes them: a call does this itself.

        Args:
            images: (N, C, H, W) float.

        Raises:
            TypeError: they are no floating-point tensor.
            ValueError: they have another shape.
        """
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

    def _maps(self, images: Tensor, asked: Asked) -> tuple[Maps, Tensor]:
        network = Network(self._model, self._inspections.at(images), self._output)
        check_head(self._method, network.founds)
        fitted = self.fitted if self._method.needs_fit else ()
        call = Call(
            network,
            images,
            asked,
            relu=self._relu,
            memory=self._memory,
            progress=self._progress,
            fitted=fitted,
        )
        if len(network.founds) == 1:
            made = self._method.maps(call)
            return made, made.maps[0].float()
        made = self._method.maps_of_layers(call)
        with plain_float32(images):
            return made, fuse(made.maps, self._fuse)


def method_and_contrast(
    method: str | Method, contrast: str | Contrast | None, temperature: float | None
) -> tuple[Method, Contrast]:
    """The method of this name, or the one given, and its contrast, as `Explainer` reads them.

    Raises:
        ValueError: an unknown method or contrast, or settings that exclude each other.
    """
    found = get_method(method) if isinstance(method, str) else method
    default = "log_odds" if temperature is not None else found.contrast
    parsed = Contrast.parse(default if contrast is None else contrast, temperature=temperature)
    if found.needs_contrast and parsed.name == "none":
        plain = found.name.removeprefix("diff_")
        raise ValueError(f"{found.name} is defined by its contrast; without one it is {plain}")
    return found, parsed


def check_head(method: Method, founds: Sequence[Inspection]) -> None:
    """Refuses a method whose definition asks for another head.

    Raises:
        ValueError: it needs a pooled linear head, and this is none; the message says why.
    """
    if not method.needs_pooled_head:
        return
    other = next((found for found in founds if not found.closed_form), None)
    if other is not None:
        raise wrong_head(method, other.layer, other.head, other.reason)


def wrong_head(method: Method, layer: str, head: str, reason: str) -> ValueError:
    """The error for a method that is not defined for the head behind a layer.

    Args:
        method: the method.
        layer: name of the layer.
        head: the operators behind it, in one line.
        reason: why that is no pooled linear head.
    """
    return ValueError(
        f"{method.name} is defined for a pooled linear head only; behind layer {layer!r} there is "
        f"{head}: {reason}. grad_cam is the same there, and defined everywhere"
    )
