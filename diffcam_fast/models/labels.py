"""Class names: the ImageNet list, a user's file, and from a name back to a class index."""

import difflib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 ImageNet-1k class names in the order of the logits, as torchvision spells them.

    Example:
        >>> imagenet_labels()[967]
        'espresso'
    """
    text = resources.files("diffcam_fast.models").joinpath("imagenet.txt").read_text("utf-8")
    return tuple(text.splitlines())


def read_labels(path: Path) -> tuple[str, ...]:
    """Reads class names from a file.

    Args:
        path: Text with one name a line in class order, or JSON: a list of names, or an object from
            class index to a name (or to ``[id, name]``, as Keras and older tools write it).

    Raises:
        ValueError: The file cannot be read, is empty, or is JSON of another form.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the labels file {path}: {error}") from None
    names = _from_json(text, path) if path.suffix == ".json" else text.rstrip().splitlines()
    if not names:
        raise ValueError(f"the labels file {path} is empty; it should hold one class name a line")
    return tuple(name.strip() for name in names)


def _from_json(text: str, path: Path) -> list[str]:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            value = [value[str(index)] for index in range(len(value))]
        if isinstance(value, list):
            return [str(v[-1]) if isinstance(v, list) else str(v) for v in value]
    except (KeyError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(
            f"cannot read the labels file {path}: {error!r}; expected a list of names,"
            ' or an object {"0": name, "1": name, ...} without gaps'
        ) from None
    raise ValueError(f"the labels file {path} holds a {type(value).__name__}, expected a list")


def label_of(index: int, labels: Sequence[str] | None) -> str:
    """The name of a class; its number where there is no name."""
    return labels[index] if labels is not None and index < len(labels) else f"class {index}"


def find_target(target: str, labels: Sequence[str] | None, *, classes: int) -> int:
    """Turns what a user typed for a class into its index in ``[0, classes)``.

    A number is an index, anything else is a label (upper and lower case alike).

    Raises:
        ValueError: The index is out of range; there are no labels; no label, or several, match.
    """
    try:
        index = int(target)
    except ValueError:
        return _index_of(target, labels)
    if not 0 <= index < classes:
        raise ValueError(f"class {index} is out of range: the model has classes 0 to {classes - 1}")
    return index


def _index_of(label: str, labels: Sequence[str] | None) -> int:
    if labels is None:
        raise ValueError(
            f"cannot look up the class {label!r}: the model came without class names;"
            " give a number, or the names by --labels FILE"
        )
    folded = [name.casefold() for name in labels]
    found = [index for index, name in enumerate(folded) if name == label.strip().casefold()]
    if len(found) > 1:
        numbers = " and ".join(map(str, found))
        raise ValueError(f"{label!r} is the name of classes {numbers}; give one of the numbers")
    if not found:
        names = [labels[folded.index(name)] for name in _close(label.casefold(), folded)]
        hint = f"; did you mean {', '.join(map(repr, names))}?" if names else ""
        raise ValueError(f"no class is called {label!r} among the {len(labels)} labels{hint}")
    return found[0]


def _close(label: str, names: Sequence[str]) -> list[str]:
    """Five names like ``label``: those that hold it as words before those that merely hold it."""
    words = re.compile(rf"(?<!\w){re.escape(label)}(?!\w)")
    holding = sorted(
        (name for name in names if label in name), key=lambda name: words.search(name) is None
    )
    return holding[:5] or difflib.get_close_matches(label, names, n=5)
