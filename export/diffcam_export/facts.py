"""What an explained ONNX file says about itself in its metadata."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        head: `closed form` or `backward of the head`.
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
    head: str
    input: str
    output: str
    probabilities: bool = False
    preprocess: Preprocess | None = None
    baked: bool = False
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    source: str = ""

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
            name = str(path).removesuffix(".onnx")
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
        preprocess, baked = _preprocess(metadata.get("diffcam.preprocess"))
        labels = metadata.get("diffcam.labels")
        return cls(
            version=metadata["diffcam.version"],
            layers=tuple(metadata["diffcam.layer"].split(",")),
            method=metadata["diffcam.method"],
            contrast=_contrast(metadata),
            contrast_name=metadata["diffcam.contrast"],
            relu=metadata.get("diffcam.relu", "true") == "true",
            head=metadata["diffcam.head"],
            input=metadata["diffcam.input"],
            output=metadata["diffcam.output"],
            probabilities=metadata.get("diffcam.probabilities") == "true",
            preprocess=preprocess,
            baked=baked,
            labels=None if labels is None else tuple(str(label) for label in json.loads(labels)),
            source=metadata.get("diffcam.source", ""),
        )


def _contrast(metadata: Mapping[str, str]) -> Contrast:
    if metadata["diffcam.contrast"].startswith("weights"):
        raise ValueError("its contrast has weights of its own, which the metadata does not hold")
    text = metadata["diffcam.temperature"]
    classes = metadata.get("diffcam.reference")
    temperature = None if text == "none" else float(text)
    if temperature is not None and math.isnan(temperature):
        raise ValueError("diffcam.temperature is not a number")
    return Contrast(
        temperature, None if classes is None else tuple(int(c) for c in json.loads(classes))
    )


def _preprocess(text: str | None) -> tuple[Preprocess | None, bool]:
    if text is None:
        return None, False
    values: dict[str, Any] = json.loads(text)
    baked = bool(values.pop("baked", False))
    for name in ("size", "mean", "std"):
        if name in values:
            values[name] = tuple(values[name])
    return Preprocess(**values), baked
