"""Explained ONNX files, run as the engine runs a PyTorch model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffcam_export.facts import Facts
from diffcam_export.image_input import ImageInput
from diffcam_export.running import run
from diffcam_export.session import Opened, Provider, open_session
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.preprocess import AsItIs, Preprocess
from diffcam_fast.running import filled
from diffcam_fast.streaming import Streaming
from diffcam_fast.targets import Targets, resolve_targets
from diffcam_kernels import ops, reference

TARGETS = "targets"
_SMALLEST = torch.finfo(torch.float32).tiny


class OnnxExplainer(Streaming):
    """Explains images with an ONNX file that `diffcam export` wrote: call and result are those of
    `diffcam_fast.Explainer`.

    Args:
        path: the file.
        layer: whose maps, of a file with several layers; None: those of the first.
        providers: of ONNX Runtime, the preferred first: names, or names with options; None: CUDA
            where it is there, else the CPU.
        strict: a provider that was asked for and is not there is an error; otherwise another runs
            in its place, a warning says so, and `backend` names both.
        threads: for the work inside an operator on the CPU; None: what ONNX Runtime takes.

    Raises:
        ValueError: no explained ONNX file, a layer that it has no maps of, or a provider that is
            not known, or with `strict` not there.

    Example:
        >>> explainer = OnnxExplainer("m.cam.onnx")              # doctest: +SKIP
        >>> explainer(torch.rand(2, 3, 224, 224)).backend        # doctest: +SKIP
        'onnxruntime (CPUExecutionProvider), closed form'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layer: str | None = None,
        providers: Sequence[Provider] | None = None,
        strict: bool = False,
        threads: int | None = None,
    ) -> None:
        self._path = path
        self._opened: Opened = open_session(
            path, providers=providers, strict=strict, threads=threads
        )
        session = self._opened.session
        self._facts = Facts.read(session.get_modelmeta().custom_metadata_map, path=path)
        self._layer = self._facts.layers[0] if layer is None else layer
        if self._layer not in self._facts.layers:
            raise ValueError(
                f"{path} has maps of {', '.join(self._facts.layers)}, none of {layer}; "
                "export it again for that layer"
            )
        index = self._facts.layers.index(self._layer)
        self._maps = "diffcam_map" if index == 0 else f"diffcam_map_{index}"
        self._head = self._facts.heads[index]
        self._takes_targets = any(
            value.name == TARGETS
            for value in [*session.get_inputs(), *session.get_overridable_initializers()]
        )
        shapes = {value.name: value.shape for value in session.get_outputs()}
        for name in (self._facts.output, self._maps, "diffcam_target"):
            if name not in shapes:
                raise ValueError(f"{path} has no output {name!r}; export it again")
        maps = shapes[self._maps]
        self._count = maps[1] if len(maps) == 4 and isinstance(maps[1], int) else 1
        classes = shapes[self._facts.output][1]
        # Where the file does not say, classes that are out of range are left to ONNX Runtime.
        self._classes = classes if isinstance(classes, int) else None
        labels = self._facts.labels
        if labels is not None and self._classes not in (None, len(labels)):
            raise ValueError(
                f"{path} names {len(labels)} classes and has {self._classes}; export it again"
            )
        self._input = ImageInput.of(session, self._facts.input, path=path)

    @property
    def layer(self) -> str:
        """Name of the target layer: of a module, or of a value of the ONNX file it came from."""
        return self._layer

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._facts.method

    @property
    def contrast(self) -> str:
        """Name of the contrast."""
        return self._facts.contrast_name

    @property
    def labels(self) -> tuple[str, ...] | None:
        """K class names, or None where the file has none."""
        return self._facts.labels

    @property
    def preprocess(self) -> Preprocess | None:
        """From a photograph to the input, or None where the file does not tell."""
        return self._facts.preprocess

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width that the file takes, each None where any will do."""
        return self._input.size

    @property
    def classes(self) -> int | None:
        """K, or None where the file does not say."""
        return self._classes

    @property
    def device(self) -> str:
        """Where the results are: `cpu`, or `cuda:0`."""
        return str(self._opened.device)

    @property
    def backend(self) -> str:
        """What computes the maps, as it stands in every result."""
        return f"{self._opened.backend}, {self._head}"

    @property
    def input(self) -> ImageInput:
        """How the file takes images."""
        return self._input

    @property
    def takes_targets(self) -> bool:
        """Whether classes may be asked for, beside the predicted ones."""
        return self._takes_targets

    @property
    def maps_per_image(self) -> int:
        """How many of the best classes are explained, where no targets are given."""
        return self._count

    def inspect(self) -> Facts:
        """What the file says about itself."""
        return self._facts

    def __call__(
        self, images: Tensor | np.ndarray, targets: Targets = None, *, topk: int | None = None
    ) -> Explanation:
        """Explains a batch.

        Args:
            images: (N, C, H, W) float, normalised as the model takes it, also (N, H, W, C) where
                the model takes that; or uint8 (N, H, W, 3) where preprocessing was baked in. Cast
                to the dtype of the file; on a GPU they are read where they are.
            targets: as `Explainer` takes them, where the file was exported with targets='input';
                otherwise None or "predicted".
            topk: the k best classes, where the file was exported with as many; or, by a run more,
                with targets='input'.

        Returns:
            An `Explanation` of N images and T targets, on the device of the provider. A file that
            returns probabilities has their logarithms as logits, which are equal to the logits
            but for a number that is common to all classes of an image.

        Raises:
            ValueError: images, targets or k that the file does not take; the message says what it
                takes.
            TypeError: a wrong type.
            RuntimeError: ONNX Runtime failed, because memory ran out for example.
        """
        images = self._prepare(images)
        asked = self._asked(targets, len(images))
        if topk is not None:
            if targets is not None:
                raise ValueError("give targets or topk, not both")
            if topk > self._count and self._takes_targets:
                return self(images, resolve_targets(None, topk, self(images).logits))
            if not 1 <= topk <= self._count:
                raise ValueError(
                    f"{self._path} has maps of the best {self._count} classes, topk is {topk}; "
                    f"export it with topk={topk}"
                )
        n = len(images)
        if n == 0:
            # Nothing is asked of the file, but it alone knows the shapes of the results.
            images = images.new_zeros(1, *images.shape[1:])
            asked = None if asked is None else asked.new_zeros(1, asked.shape[1])
        logits, classes, maps = (value[:n] for value in self._in_batches(images, asked))
        if asked is None:
            # The classes stand in the file best first, so that the prediction is the first.
            classes, maps = classes[:, : topk or 1], maps[:, : topk or 1]
        return self._explanation(logits, classes, maps)

    def _of_stream(
        self, preprocess: Preprocess | None, batch_size: int | None
    ) -> tuple[Preprocess | None, int | None]:
        if self.input.dtype == torch.uint8:
            # It prepares pictures itself and takes them one by one, since their sizes differ.
            return AsItIs((1, 1)), 1
        return preprocess or self.preprocess, batch_size

    def _explanation(self, logits: Tensor, classes: Tensor, maps: Tensor) -> Explanation:
        if self._facts.probabilities:
            logits = logits.float().clamp_min(_SMALLEST).log()
        operands = self._facts.contrast.operands(logits, classes)
        if logits.device.type == "cpu":
            # The definition itself: the operator would import PyTorch's compiler, for a second.
            gradient = reference.contrast_gradient(logits, classes, *operands)
            scores = reference.contrast_score(logits, gradient)
        else:
            _, _, scores = ops.contrast_gradient(logits, classes, *operands)
        return Explanation(
            logits=logits,
            targets=classes,
            scores=scores.float(),
            maps=maps,
            backend=self.backend,
            layer=self._layer,
            method=self._facts.method,
            contrast=self._facts.contrast_name,
        )

    def _prepare(self, images: Tensor | np.ndarray) -> Tensor:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.ascontiguousarray(images))
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor or an array, got {type(images).__name__}")
        takes = self._input
        as_pixels = takes.dtype == torch.uint8
        axes = "(N, H, W, 3)" if as_pixels else "(N, C, H, W)"
        if images.ndim != 4:
            hint = "; add the batch axis, images[None]" if images.ndim == 3 else ""
            raise ValueError(f"images must be {axes}, got {tuple(images.shape)}{hint}")
        if as_pixels and images.dtype != torch.uint8:
            raise TypeError(
                f"{self._path} prepares images itself and takes uint8 {axes}, got {images.dtype}"
            )
        if not as_pixels and not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, normalised as the model takes them; got "
                f"{images.dtype}"
            )
        images = takes.arranged(images)
        self._check_shape(images)
        return images.detach().to(device=self._opened.device, dtype=takes.dtype).contiguous()

    def _check_shape(self, images: Tensor) -> None:
        takes = self._input
        height, width, channels = takes.sides(images)
        if takes.channels not in (None, channels):
            raise ValueError(
                f"{self._path} takes images of {takes.channels} channels, got {channels}"
            )
        fixed = [
            side is not None and side != got
            for side, got in zip(takes.size, (height, width), strict=True)
        ]
        if any(fixed):
            shown = " x ".join("any" if side is None else str(side) for side in takes.size)
            raise ValueError(
                f"{self._path} takes images of {shown} pixels (height x width), got "
                f"{height} x {width}; resize them, or export with a dynamic size"
            )

    def _asked(self, targets: Targets, n: int) -> Tensor | None:
        """Targets as (N, T) int64, or None for the prediction."""
        if targets is None or (isinstance(targets, str) and targets == "predicted"):
            return None
        if not self._takes_targets:
            raise ValueError(
                f"{self._path} explains the prediction alone; to choose classes, export it with "
                "targets='input'"
            )
        # Only the shape is read, so that the classes are checked as the engine checks them.
        logits = torch.empty((), device=self._opened.device).expand(n, self._classes or 2**31)
        return resolve_targets(targets, None, logits)

    def _in_batches(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), classes (N, T) and maps (N, T, h, w), in batches of the file's size."""
        size = self._input.batch or len(images)
        parts = []
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            rows = len(chunk)
            feeds = {self._input.name: filled(chunk, size)}
            if targets is not None:
                feeds[TARGETS] = filled(targets[start : start + size], size)
            names = [self._facts.output, "diffcam_target", self._maps]
            parts.append([value[:rows] for value in run(self._opened, feeds, names)])
        logits, classes, maps = (torch.cat(values) for values in zip(*parts, strict=True))
        return logits.flatten(1), classes, maps
