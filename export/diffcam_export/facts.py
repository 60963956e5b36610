"""What an explained ONNX file says about itself in its metadata."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffcam_fast.contrast import Contrast
from diffcam_fast.images.preprocess import Preprocess


@dataclass(frozen=True)
class Facts:
    """The metadata of an explained file, read.

    Attributes:
        version: of diffcam-fast, that exported it.
        layers: one for each output `diffcam_map`, `diffcam_map_1`, ...
        method: name of the method.
        contrast: what the target class is held against.
        contrast_name: as a Python `Explainer` names it.
        relu: negative cells are clipped.
        heads: `closed form`, `backward of the head` or `principal component`, one for each layer.
        input: name of the images.
        output: name of the model's own output with logits or probabilities.
        probabilities: that output is the result of a softmax.
        preprocess: from a photograph to the input, or None.
        baked: the file prepares images itself, from uint8 (N, H, W, 3).
        labels: K class names, or None.
        source: what the user called the model.
    """

    version: str
    layers: tuple[str, ...]
    method: str
    contrast: Contrast
    contrast_name: str
    relu: bool
    heads: tuple[str, ...]
    input: str
    output: str
    probabilities: bool = False
    preprocess: Preprocess | None = None
    baked: bool = False
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    source: str = ""

    def texts(self) -> dict[str, str]:
        """The metadata as a file holds it."""
        contrast = self.contrast
        texts = {
            "version": self.version,
            "source": self.source,
            "layer": _joined(self.layers),
            "method": self.method,
            "contrast": self.contrast_name,
            "temperature": "none" if contrast.temperature is None else repr(contrast.temperature),
            "relu": _truth(self.relu),
            "head": ",".join(self.heads),
            "input": self.input,
            "output": self.output,
            "probabilities": _truth(self.probabilities),
        }
        if contrast.reference is not None:
            texts["reference"] = json.dumps(list(contrast.reference))
        if contrast.weights is not None:
            texts["weights"] = json.dumps(contrast.weights.tolist())
        if self.preprocess is not None:
            baked = {"baked": True} if self.baked else {}
            texts["preprocess"] = json.dumps(asdict(self.preprocess) | baked)
        if self.labels is not None:
            texts["labels"] = json.dumps(list(self.labels), ensure_ascii=False)
        return {f"diffcam.{key}": text for key, text in texts.items()}

    @classmethod
    def read(cls, metadata: Mapping[str, str], *, path: object) -> "Facts":
        """From the metadata of a file, all of it texts.

        Args:
            metadata: `metadata_props` of the ONNX model.
            path: of the file, for messages.

        Raises:
            ValueError: the file holds no explanation, or its metadata is damaged.

        Example:
            >>> Facts.read({}, path="cat.onnx")
            Traceback (most recent call last):
            ValueError: cat.onnx is a plain ONNX model without maps; make one that explains itself:
            diffcam export cat.onnx -o cat.cam.onnx
        """
        if "diffcam.version" not in metadata:
            name = str(Path(str(path)).with_suffix(""))
            raise ValueError(
                f"{path} is a plain ONNX model without maps; make one that explains itself: "
                f"diffcam export {path} -o {name}.cam.onnx"
            )
        try:
            return cls._read(metadata)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the metadata of {path} is damaged ({type(error).__name__}: {error}); "
                "export the file again"
            ) from error

    @classmethod
    def _read(cls, metadata: Mapping[str, str]) -> "Facts":
        contrast, name = _contrast(metadata), metadata["diffcam.contrast"]
        if name != contrast.name:
            raise ValueError(f"diffcam.contrast is {name}, the rest of it means {contrast.name}")
        preprocess, baked = preprocess_of(metadata.get("diffcam.preprocess"))
        labels = metadata.get("diffcam.labels")
        return cls(
            version=metadata["diffcam.version"],
            layers=_split(metadata["diffcam.layer"]),
            method=metadata["diffcam.method"],
            contrast=contrast,
            contrast_name=name,
            relu=metadata.get("diffcam.relu", "true") == "true",
            heads=tuple(metadata["diffcam.head"].split(",")),
            input=metadata["diffcam.input"],
            output=metadata["diffcam.output"],
            probabilities=metadata.get("diffcam.probabilities") == "true",
            preprocess=preprocess,
            baked=baked,
            labels=None if labels is None else tuple(str(label) for label in json.loads(labels)),
            source=metadata.get("diffcam.source", ""),
        )


def _joined(names: tuple[str, ...]) -> str:
    """By commas; as a JSON list where a name has a comma itself, or looks like such a list."""
    plain = ",".join(names)
    return plain if _split(plain) == names else json.dumps(list(names), ensure_ascii=False)


def _split(text: str) -> tuple[str, ...]:
    if text.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            return tuple(str(name) for name in json.loads(text))
    return tuple(text.split(","))


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _contrast(metadata: Mapping[str, str]) -> Contrast:
    if "diffcam.weights" in metadata:
        return Contrast(weights=torch.tensor(json.loads(metadata["diffcam.weights"])))
    text = metadata["diffcam.temperature"]
    classes = metadata.get("diffcam.reference")
    temperature = None if text == "none" else float(text)
    if temperature is not None and math.isnan(temperature):
        raise ValueError("diffcam.temperature is not a number")
    return Contrast(
        temperature, None if classes is None else tuple(int(c) for c in json.loads(classes))
    )


def preprocess_of(text: str | None) -> tuple[Preprocess | None, bool]:
    """What `diffcam.preprocess` says, and whether the file does it itself; None: it is absent.

    Raises:
        ValueError, TypeError, AttributeError: it is no JSON, or says something else.
    """
    if text is None:
        return None, False
    values: dict[str, Any] = json.loads(text)
    baked = bool(values.pop("baked", False))
    for name in ("size", "mean", "std"):
        if name in values:
            values[name] = tuple(values[name])
    return Preprocess(**values), baked
