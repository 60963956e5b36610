"""A folder as a source without end: the images in it, and those that come."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from diffcam_fast.images.inputs import Source, is_image_name, output_stem, walk_images
from diffcam_fast.stream.items import FLUSH, Flush

# A file counts as written when it has not changed for so long.
_SETTLED_S = 0.5
_WAKE_MS = 250


def watched(
    folder: Path,
    *,
    exclude: Path | None = None,
    known: Callable[[str], bool] = lambda path: False,
    names: Iterable[str] = (),
) -> Iterator[Source | Flush]:
    """The images of a folder, each once it is written; never ends.

    Whatever the operating system tells of changes wakes it (library `watchfiles`). A file that is
    written over after it was yielded is not yielded again.

    Args:
        folder: Watched with all folders in it.
        exclude: A folder that is left out, such as one for outputs.
        known: Whether an image needs no explanation any more, by its path.
        names: Output names that are taken.

    Yields:
        Images; and `FLUSH` whenever there is nothing to yield for the moment.
    """
    changes = _changes(folder)
    # The system tells of changes from here on; what is there is looked for after that.
    early = next(changes)
    skip = None if exclude is None else os.path.realpath(exclude)
    namer = _Names(names)
    seen: set[str] = set()
    waiting: dict[Path, tuple[int, int, float]] = {}
    for path in [*walk_images(folder, skip), *early]:
        if not _is_below(path, skip):
            waiting[path] = (-1, -1, 0.0)
    while True:
        for path in sorted(_settled(waiting)):
            key = str(path)
            if key not in seen:
                seen.add(key)
                if not known(key):
                    yield Source(path, namer.of(folder, path))
        yield FLUSH
        for path in next(changes):
            if not _is_below(path, skip) and str(path) not in seen:
                waiting.setdefault(path, (-1, -1, 0.0))


def _is_below(path: Path, folder: str | None) -> bool:
    return folder is not None and Path(os.path.realpath(path)).is_relative_to(folder)


def _changes(folder: Path) -> Iterator[list[Path]]:
    """The image files that changed since the last time; an empty list where none did."""
    from watchfiles import Change, watch

    def images(change: Any, path: str) -> bool:
        # A folder that is moved in is one change, whose images are found by walking it.
        named = is_image_name(os.path.basename(path)) or os.path.isdir(path)
        return change is not Change.deleted and named

    found: Iterator[Any] = watch(
        folder,
        watch_filter=images,
        rust_timeout=_WAKE_MS,
        yield_on_timeout=True,
        debounce=_WAKE_MS,
        raise_interrupt=False,
        # Signals are the main thread's.
        stop_event=None,
    )
    root, given = os.path.realpath(folder), str(folder)

    def as_given(path: str) -> Path:
        # Under the name that the user gave the folder, whatever links lead to it.
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return Path(given, os.path.relpath(real, root)) if real.startswith(root) else Path(path)

    def lists() -> Iterator[list[Path]]:
        for changed in found:
            paths: list[Path] = []
            for _, path in changed:
                one = as_given(path)
                paths += walk_images(one, None) if one.is_dir() else [one]
            yield paths

    return lists()


def _settled(waiting: dict[Path, tuple[int, int, float]]) -> list[Path]:
    """Takes out the files that have not changed for a while, and those that are gone."""
    now = time.monotonic()
    done = []
    for path, (size, changed, since) in list(waiting.items()):
        try:
            status = path.stat()
        except OSError:
            del waiting[path]
            continue
        if (status.st_size, status.st_mtime_ns) != (size, changed):
            old = size == -1 and time.time() - status.st_mtime > _SETTLED_S
            # A file that was there long before we looked need not be looked at twice.
            begun = now - _SETTLED_S if old else now
            waiting[path] = (status.st_size, status.st_mtime_ns, begun)
            since = begun
        if now - since >= _SETTLED_S:
            del waiting[path]
            done.append(path)
    return done


class _Names:
    """Output names, none of them twice."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {name.casefold() for name in taken}

    def of(self, folder: Path, path: Path) -> str:
        relative = os.path.relpath(path, folder)
        mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        whole = output_stem(relative)
        stem = output_stem(os.path.splitext(relative)[0])
        free = (n for n in (stem, whole, f"{whole}-{mark}") if n.casefold() not in self._taken)
        name = next(free, f"{whole}-{mark}")
        self._taken.add(name.casefold())
        return name
