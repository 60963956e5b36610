"""What an explained file says of itself, so that whoever runs it needs nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from diffcam_fast.images.preprocess import Preprocess

PREFIX = "diffcam."


@dataclass(frozen=True)
class Facts:
    """The metadata of an explained file, without the prefix `diffcam.` of its keys.

    Attributes:
        version: of diffcam-fast.
        source: what the user called the model.
        layer: names of the layers, one for each map.
        method: of the CAM family.
        contrast: its name.
        temperature: of the contrast; None: it has none.
        reference: the classes to contrast with; None: all others.
        relu: negative cells are 0.
        head: `closed form` or `backward of the head`, one for each map.
        input: name of the image input.
        output: name of the output with the logits, or their softmax.
        probabilities: that output is a softmax's result.
        preprocess: from a photograph to the network's input; None: not known.
        baked: the graph does that itself, from uint8 (N, height, width, 3).
        labels: class names; None: not known.
    """

    version: str
    source: str
    layer: tuple[str, ...]
    method: str
    contrast: str
    temperature: float | None
    reference: tuple[int, ...] | None
    relu: bool
    head: tuple[str, ...]
    input: str
    output: str
    probabilities: bool
    preprocess: Preprocess | None
    baked: bool
    labels: tuple[str, ...] | None

    def texts(self) -> dict[str, str]:
        """As key and text, the way a file holds them."""
        texts = {
            "version": self.version,
            "source": self.source,
            "layer": ",".join(self.layer),
            "method": self.method,
            "contrast": self.contrast,
            "temperature": "none" if self.temperature is None else repr(self.temperature),
            "relu": _truth(self.relu),
            "head": ",".join(self.head),
            "input": self.input,
            "output": self.output,
            "probabilities": _truth(self.probabilities),
        }
        if self.reference is not None:
            texts["reference"] = json.dumps(list(self.reference))
        if self.preprocess is not None:
            texts["preprocess"] = json.dumps(_preprocess(self.preprocess, self.baked))
        if self.labels is not None:
            texts["labels"] = json.dumps(list(self.labels), ensure_ascii=False)
        return {PREFIX + key: text for key, text in texts.items()}


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _preprocess(
    preprocess: Preprocess, baked: bool
) -> dict[str, Sequence[float] | float | str | bool]:
    facts: dict[str, Sequence[float] | float | str | bool] = {
        "size": list(preprocess.size),
        "crop_pct": preprocess.crop_pct,
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }
    return facts | {"baked": True} if baked else facts
