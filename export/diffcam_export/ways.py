"""`--preprocess`: how photographs become a network's input, in a word or in a file."""

import json
from pathlib import Path

from diffcam_export.facts import preprocess_of
from diffcam_fast.images.preprocess import Preprocess

_HALF = (0.5, 0.5, 0.5)


def read_preprocess(text: str) -> Preprocess:
    """The preparation that a text names.

    Args:
        text: `imagenet`, with the usual mean and deviation of each colour, or `tf`, from -1 to 1,
            which may be followed by the input size, 224 without: `tf:299`, `imagenet:256x320`; or
            the path of a JSON file with what `diffcam.preprocess` holds, of which `size` must be
            there.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> read_preprocess("tf:299")
        Preprocess(size=(299, 299), crop_pct=0.875, interpolation='bilinear', mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5))
    """
    if text.endswith(".json"):
        return _from_file(Path(text))
    name, _, size = text.partition(":")
    sides = (size or "224").split("x")
    if (
        name not in ("imagenet", "tf")
        or len(sides) > 2
        or not all(s.isascii() and s.isdigit() for s in sides)
    ):
        raise ValueError(
            f"preprocess is {text!r}; give imagenet, tf, either with a size such as tf:299 or "
            "tf:256x320 (height x width), or a FILE.json"
        )
    prepared = Preprocess((int(sides[0]), int(sides[-1])))
    if name == "imagenet":
        return prepared
    return Preprocess(prepared.size, mean=_HALF, std=_HALF)


def _from_file(path: Path) -> Preprocess:
    try:
        preprocess, _ = preprocess_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no preprocessing ({error}); expected JSON such as "
            f"{json.dumps({'size': [224, 224], 'mean': _HALF, 'std': _HALF})}"
        ) from error
    assert preprocess is not None
    return preprocess
