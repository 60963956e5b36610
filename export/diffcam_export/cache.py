"""Exported files that are kept, so that a model is exported once."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast import __version__
from diffcam_fast.outputs.atomic import atomic_write
from diffcam_kernels.settings import cache_folder

# Of all files together; those that were not used for longest go first.
MAX_BYTES = 8 * 2**30
_SUFFIX = ".cam.onnx"


@dataclass(frozen=True)
class Kept:
    """An exported file in the cache, with what is known of it.

    Attributes:
        path: the file.
        facts: what was found when it was made, as JSON values.
    """

    path: Path
    facts: Mapping[str, Any]


class Cache:
    """A folder of exported files, each named by what went into it.

    Args:
        folder: made where it is missing; None: as `DIFFCAM_CACHE` says, or the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder

    def get(self, key: Mapping[str, Any]) -> Kept | None:
        """What was kept under a key, if its file is whole."""
        path = self._path(key)
        try:
            facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = facts["key"] == _plain(key) and facts["bytes"] == _size(path)
        except (OSError, ValueError, LookupError, TypeError):
            return None
        if not whole:
            return None
        with contextlib.suppress(OSError):
            path.with_suffix(".json").touch()
        return Kept(path, facts)

    def put(self, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Kept:
        """Makes a file and keeps it, in place of what was there.

        Args:
            key: what goes into the file.
            make: writes it to the path it is given, or writes nothing, and returns what to note;
                where it raises, nothing is kept.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._path(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drop(key)
        # Files appear whole or not at all: of two processes that make the same one, one is kept.
        facts = {**make(path), "key": _plain(key), "bytes": _size(path)}
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(facts, indent=1).encode())
        self._prune()
        return Kept(path, facts)

    def drop(self, key: Mapping[str, Any]) -> None:
        """Forgets what was kept under a key."""
        self._remove(self._path(key))

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps(_plain(key), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{_SUFFIX}"

    def _prune(self) -> None:
        notes = sorted(
            self.folder.glob("*.cam.json"), key=lambda note: note.stat().st_mtime, reverse=True
        )
        total = 0
        for place, note in enumerate(notes):
            total += _size(note.with_suffix(".onnx"))
            if place > 0 and total > MAX_BYTES:
                self._remove(note.with_suffix(".onnx"))

    @staticmethod
    def _remove(path: Path) -> None:
        # The note first: what has none is not used.
        path.with_suffix(".json").unlink(missing_ok=True)
        for file in _files(path):
            file.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions on which an exported file depends."""
    names = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
    found = {"diffcam-fast": __version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def digest_of(model: nn.Module) -> str:
    """What a model is: its modules, their settings and code, and all of its weights.

    A function that a module takes from elsewhere may change unseen: whoever opens a kept file
    compares it with the model once.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}|{type(module).__qualname__}|{module.extra_repr()}|".encode())
    digest.update(_code(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_images(images: Tensor) -> str:
    """What a batch of images holds."""
    values = images.detach().cpu().contiguous().float()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def _code(model: nn.Module) -> str:
    texts = []
    for kind in sorted({type(m) for m in model.modules()}, key=lambda kind: kind.__qualname__):
        with contextlib.suppress(OSError, TypeError):
            texts.append(inspect.getsource(kind))
    return "\n".join(texts)


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(key), sort_keys=True, default=str))


def _files(path: Path) -> list[Path]:
    """A file, and the weights beside it where they are too large for one."""
    return [file for file in [path, *path.parent.glob(f"{path.name}.*")] if file.exists()]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))
