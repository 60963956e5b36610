"""What every actor explains with: checked on the driver, sent to the actors, opened there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from diffcam_fast.cli.onnx import Described, Explains, open_explained
from diffcam_fast.cli.opening import (
    DEFAULT_METHOD,
    make_explainer,
    parse_size,
    parse_weights,
    resized,
    try_out,
)
from diffcam_fast.cli.request import Request
from diffcam_fast.contrast import Contrast
from diffcam_fast.explainer import method_and_contrast
from diffcam_fast.formats import names_onnx
from diffcam_fast.models.labels import find_target, read_labels
from diffcam_fast.models.loading import LoadedModel, load_model

Model: TypeAlias = str | os.PathLike[str] | Callable[[], object] | None
Target: TypeAlias = int | str


@dataclass(frozen=True)
class Opened:
    """A network that has explained its first image.

    Attributes:
        loaded: The network, or an ONNX file, with its preprocessing.
        explainer: Of it.
        labels: K class names, or None.
        targets: Class indices to explain for every image; empty: the predicted class.
        single: It takes one picture at a time.
    """

    loaded: LoadedModel | Described
    explainer: Explains
    labels: tuple[str, ...] | None
    targets: tuple[int, ...]
    single: bool


@dataclass(frozen=True)
class Settings:
    """The options of `diffcam_fast.distributed.explain` that say what is explained, and with what.

    Attributes are named as the options; `make` checks them.
    """

    model: str | Callable[[], object] | None
    weights: str | None
    method: str | None
    contrast: str | Contrast | None
    temperature: float | None
    layer: str | None
    targets: tuple[Target, ...]
    topk: int | None
    size: str | None
    labels: tuple[str, ...] | None

    @classmethod
    def make(
        cls,
        *,
        model: Model,
        weights: str | os.PathLike[str] | None,
        method: str | None,
        contrast: str | Contrast | None,
        temperature: float | None,
        layer: str | None,
        targets: Target | Sequence[Target] | None,
        topk: int | None,
        size: int | str | tuple[int, int] | None,
        labels: Sequence[str] | os.PathLike[str] | None,
    ) -> Settings:
        """Checks what can be checked without the network.

        Raises:
            ValueError: Unknown names, or options that exclude each other.
            TypeError: A network in place of what makes one; another wrong type.
        """
        if isinstance(model, nn.Module | LoadedModel):
            raise TypeError(
                f"model is a {type(model).__name__}; give its name or a function that makes it,"
                " which each actor calls once: a network would be copied with every batch"
            )
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if not (model is None or isinstance(model, str) or callable(model)):
            raise TypeError(
                f"model is a {type(model).__name__}; give a name as load_model takes it, the path"
                " of an explained ONNX file, or a function that returns a network"
            )
        if not (isinstance(model, str) and names_onnx(model)):
            found, _ = method_and_contrast(method or DEFAULT_METHOD, contrast, temperature)
            if found.needs_fit:
                raise ValueError(f"{found.name} is fitted on labelled images; actors have none")
        elif isinstance(contrast, Contrast):
            raise ValueError(f"{model} was exported with its contrast; leave contrast out")
        chosen = _sequence(targets)
        if chosen and topk is not None:
            raise ValueError("give targets or topk, not both")
        if topk is not None and topk < 1:
            raise ValueError(f"topk is {topk}; give at least 1")
        if isinstance(size, tuple):
            size = "x".join(map(str, size))
        elif size is not None:
            size = str(size)
        if size is not None:
            parse_size(size)
        if isinstance(labels, str | os.PathLike):
            labels = read_labels(Path(labels))
        return cls(
            model=model,
            weights=None if weights is None else os.fspath(weights),
            method=method,
            contrast=contrast,
            temperature=temperature,
            layer=layer,
            targets=chosen,
            topk=topk,
            size=size,
            labels=None if labels is None else tuple(labels),
        )

    def open(self, device: str, *, threads: int | None = None) -> Opened:
        """Makes the network and explains a blank image, after which nothing is left to be found.

        Args:
            device: ``cpu`` or ``cuda``.
            threads: For the work inside an operator of an ONNX file; None: what it takes.

        Raises:
            ValueError: No such model, weights, layer, class or label; or it does not run.
            TypeError: It is no image classifier.
        """
        loaded: LoadedModel | Described
        explainer: Explains
        if isinstance(self.model, str) and names_onnx(self.model):
            described, explainer = open_explained(self._request(device), threads=threads)
            loaded = resized(described, self.size)
        else:
            loaded = network = resized(self._load(device), self.size)
            explainer = make_explainer(
                network,
                layer=self.layer,
                method=self.method or DEFAULT_METHOD,
                contrast=self.contrast,
                temperature=self.temperature,
            )
        classes = try_out(loaded, explainer).logits.shape[1]
        if self.topk is not None and self.topk > classes:
            raise ValueError(f"topk is {self.topk}, but the model has {classes} classes")
        labels = loaded.labels if self.labels is None else self.labels
        if labels is not None and len(labels) != classes:
            if self.labels is not None:
                raise ValueError(f"{len(labels)} labels for a model of {classes} classes")
            # The names that were found do not belong to these logits.
            labels = None
        targets = (find_target(str(t), labels, classes=classes) for t in self.targets)
        return Opened(
            loaded=loaded,
            explainer=explainer,
            labels=labels,
            targets=tuple(dict.fromkeys(targets)),
            single=isinstance(loaded, Described) and loaded.single,
        )

    def _load(self, device: str) -> LoadedModel:
        # Where weights are drawn, every actor must draw the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_model(self.model, weights=parse_weights(self.weights), device=device)

    def _request(self, device: str) -> Request:
        assert isinstance(self.model, str)
        assert not isinstance(self.contrast, Contrast)
        return Request(
            inputs=(),
            model=self.model,
            weights=self.weights,
            targets=tuple(map(str, self.targets)),
            topk=self.topk,
            contrast=self.contrast,
            temperature=self.temperature,
            method=self.method,
            layer=self.layer,
            device=device,
        )


def _sequence(targets: Target | Sequence[Target] | None) -> tuple[Target, ...]:
    if targets is None:
        return ()
    if isinstance(targets, int | str):
        return (targets,)
    wrong = next((t for t in targets if not isinstance(t, int | str)), None)
    if wrong is not None:
        raise TypeError(
            f"targets hold a {type(wrong).__name__}; give class indices or labels, which are"
            " explained for every image"
        )
    return tuple(targets)
