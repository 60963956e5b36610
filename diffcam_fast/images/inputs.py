"""Find the images that a user names: files, folders, globs, a text list, standard input."""

from __future__ import annotations

import glob
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
)
"""What counts as an image inside a folder; a file that is named itself may be called anything."""

# What the writers add to a name: pictures of an earlier run beside the images are no images.
_WRITTEN = (".overlay.png", ".heatmap.png")
# A file name holds 255 bytes: this leaves room for a class label and a suffix.
_MAX_PART_BYTES = 120
_FORBIDDEN = frozenset('<>:"|?*\\/')


@dataclass(frozen=True)
class Source:
    """One image to explain.

    Attributes:
        path: Where it is, as the user would write it.
        name: Stem of its outputs: unique in the run, relative, parts joined by ``/``.
    """

    path: Path
    name: str

    def __fspath__(self) -> str:
        return os.fspath(self.path)


@dataclass(frozen=True)
class _Found:
    path: Path
    # The folder that the name is relative to; None for files named one by one, which share one.
    root: Path | None


def find_images(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    text_list: str | os.PathLike[str] | None = None,
    stdin: TextIO | None = None,
    exclude: str | os.PathLike[str] | None = None,
) -> list[Source]:
    """Lists the images behind the arguments of a command, in a fixed order, each once.

    Names are relative to the folder that was given (or to the fixed part of a glob, or to the
    folder that all single files share) and without suffix. Where two would be the same, both keep
    their suffix; where they still are, both get a short hash of their path.

    Args:
        inputs: Files, folders (searched recursively for image suffixes, sorted) and globs
            (``**`` crosses folders; a folder that matches is searched). ``-`` stands for ``stdin``.
            Folders and globs leave out overlays and heatmaps of earlier runs; a folder that cannot
            be listed is kept: reading it will say so.
        text_list: A text file with one path a line; relative paths are relative to the working
            folder. A path in it that does not exist is kept: reading it will say so.
        stdin: The same from a stream.
        exclude: A folder that is not searched, such as one for outputs inside an input folder.
            Inputs that are this folder or lie in it are searched, but for image suffixes alone.

    Returns:
        The images; empty only where ``text_list`` or ``stdin`` are.

    Raises:
        ValueError: A path does not exist, a folder or glob holds no image, or there is no input.

    Example:
        >>> find_images(["no-such-folder"])
        Traceback (most recent call last):
            ...
        ValueError: no-such-folder: no such file or folder, and not a glob that matches any
    """
    if not inputs and text_list is None and stdin is None:
        raise ValueError("no images were given; give files, folders, globs, a list or stdin")
    skip = None if exclude is None else os.path.realpath(exclude)
    found: list[_Found] = []
    for item in inputs:
        text = os.fspath(item)
        if text != "-":
            found.extend(_expand(text, skip))
        elif stdin is None:
            raise ValueError("'-' was given, but there is no standard input to read paths from")
    if text_list is not None:
        try:
            with open(text_list, encoding="utf-8-sig", errors="surrogateescape") as lines:
                found.extend(_listed(lines, skip))
        except OSError as error:
            raise ValueError(f"{text_list}: cannot read the list: {error.strerror}") from error
    if stdin is not None:
        found.extend(_listed(stdin, skip))
    return _named(_once(found))


def _expand(text: str, skip: str | None) -> Iterator[_Found]:
    path = Path(text)
    # Before globbing: a file may well be called "cat[1].jpg". Not Path.is_dir, which raises where a
    # name is too long.
    if os.path.isdir(path):
        yield from _some(_walk(path, path, skip), text, "folder")
    elif os.path.lexists(path):
        yield _Found(path, None)
    elif glob.has_magic(text):
        yield from _some(_glob(text, skip), text, "glob")
    else:
        raise ValueError(f"{text}: no such file or folder, and not a glob that matches any")


def _some(found: Iterator[_Found], text: str, kind: str) -> Iterator[_Found]:
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        wanted = " ".join(sorted(SUFFIXES))
        raise ValueError(
            f"{text}: this {kind} holds no image (looked for {wanted}; overlays and heatmaps of "
            "earlier runs are left out)"
        )


def _glob(pattern: str, skip: str | None) -> Iterator[_Found]:
    fixed = Path(*_before_magic(Path(pattern).parts))
    outputs, skip = skip, _skipped_in(fixed, skip)
    for match in sorted(glob.iglob(pattern, recursive=True)):
        path = Path(match)
        if os.path.isdir(path):
            # "**" names every folder below as well: what they hold comes once all the same.
            yield from _walk(path, fixed, skip)
        elif _is_inside(path, skip) or match.endswith(_WRITTEN):
            continue
        # Tables and the ledger of an earlier run are no images, whatever the pattern says.
        elif not _is_inside(path, outputs) or is_image_name(path.name):
            yield _Found(path, fixed)


def walk_images(folder: Path, skip: str | None) -> list[Path]:
    """The images in a folder and below it, sorted; ``skip`` is a folder that is left out."""
    return [item.path for item in _walk(folder, folder, skip) if item.root is not None]


def _before_magic(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _walk(folder: Path, root: Path, skip: str | None) -> Iterator[_Found]:
    skip = _skipped_in(root, skip)
    seen: set[str] = set()
    unlisted: list[OSError] = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=unlisted.append):
        real = os.path.realpath(here)
        # Links to folders are followed, but never in a circle.
        if real in seen or _is_inside(here, skip):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            if is_image_name(name):
                yield _Found(Path(here, name), root)
    for error in unlisted:
        if not _is_inside(error.filename, skip):
            path = Path(error.filename)
            yield _Found(path, None if path == root else root)


def is_image_name(name: str) -> bool:
    """Whether a file in a folder counts as an image by its name."""
    known = os.path.splitext(name)[1].lower() in SUFFIXES
    return known and not name.startswith(".") and not name.endswith(_WRITTEN)


def _skipped_in(root: Path, skip: str | None) -> str | None:
    """``skip``, unless the search begins there: then there would be nothing to find."""
    return None if _is_inside(root, skip) else skip


def _is_inside(path: str | Path, skip: str | None) -> bool:
    return skip is not None and Path(os.path.realpath(path)).is_relative_to(skip)


def _listed(lines: Iterable[str], skip: str | None) -> Iterator[_Found]:
    for line in lines:
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        path = Path(text)
        if os.path.isdir(path):
            yield from _walk(path, path, skip)
        else:
            yield _Found(path, None)


def _once(found: Iterable[_Found]) -> list[_Found]:
    first: dict[str, _Found] = {}
    for item in found:
        first.setdefault(os.path.abspath(item.path), item)
    return list(first.values())


def _named(found: Sequence[_Found]) -> list[Source]:
    paths = [os.path.abspath(item.path) for item in found]
    single = [
        os.path.dirname(path) for path, item in zip(paths, found, strict=True) if item.root is None
    ]
    shared = os.path.commonpath(single) if single else ""
    relative = [
        os.path.relpath(path, shared if item.root is None else os.path.abspath(item.root))
        for path, item in zip(paths, found, strict=True)
    ]
    stems = [output_stem(os.path.splitext(path)[0]) for path in relative]
    whole = [output_stem(path) for path in relative]
    names = _spread(stems, whole)
    marks = [hashlib.sha256(os.fsencode(path)).hexdigest()[:8] for path in paths]
    names = _spread(names, [f"{name}-{mark}" for name, mark in zip(whole, marks, strict=True)])
    return [Source(item.path, name) for item, name in zip(found, names, strict=True)]


def _spread(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """``names``, with those that meet (on some file system) replaced by their ``longer`` form."""
    count = Counter(_key(name) for name in names)
    return [
        name if count[_key(name)] == 1 else other for name, other in zip(names, longer, strict=True)
    ]


def _key(name: str) -> str:
    # macOS and Windows hold "Cat" and "cat", or two spellings of an accent, to be one name.
    return unicodedata.normalize("NFC", name).casefold()


def output_stem(relative: str) -> str:
    """A relative path as a name that every file system takes, parts joined by ``/``."""
    return "/".join(_safe_part(part) for part in Path(relative).parts)


def _safe_part(part: str) -> str:
    text = "".join(c if c.isprintable() and c not in _FORBIDDEN else "_" for c in part)
    text = text.rstrip(" .") or "_"
    if len(text.encode()) > _MAX_PART_BYTES:
        mark = hashlib.sha256(os.fsencode(part)).hexdigest()[:8]
        text = text.encode()[:_MAX_PART_BYTES].decode(errors="ignore") + f"-{mark}"
    return text
