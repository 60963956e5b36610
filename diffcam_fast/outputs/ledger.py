"""The account of a run: which images are finished, so that a killed run can go on exactly there."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from diffcam_fast.images.inputs import Source
from diffcam_fast.outputs.atomic import remove_leftovers, sync_folder

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed there.
    fcntl = None  # type: ignore[assignment]

LEDGER_NAME = "ledger.jsonl"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that was explained, or could not be: a line of the ledger.

    Attributes:
        path: The image, as ``str(source.path)``.
        status: ``done``, or ``failed`` with a reason.
        name: Stem of its outputs.
        reason: Why it failed.
        files: Its outputs, relative to the folder of the ledger.
        targets: Explained classes; as many as ``labels``, ``probabilities`` and ``scores``.
        labels: Their names.
        probabilities: Their softmax values; NaN where the network gave no number.
        scores: Their contrasts; NaN likewise.
        finite: Whether each map is free of NaN and infinity.
    """

    path: str
    status: Literal["done", "failed"]
    name: str = ""
    reason: str | None = None
    files: tuple[str, ...] = ()
    targets: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    finite: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        # Of many images these are the same, and a run holds the entries of all.
        for name in ("files", "labels"):
            object.__setattr__(self, name, tuple(map(sys.intern, getattr(self, name))))

    def to_line(self) -> str:
        """The entry as one line of JSON, numbers that are not finite as null."""
        fields = {key: _plain(value) for key, value in asdict(self).items()}
        kept = {key: value for key, value in fields.items() if value not in (None, [], "")}
        return json.dumps(kept, allow_nan=False) + "\n"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Entry:
        """The entry of a line that :meth:`to_line` wrote.

        Raises:
            ValueError: A field is missing, unknown or of another type.
        """
        if fields.get("status") not in ("done", "failed") or not isinstance(
            fields.get("path"), str
        ):
            raise ValueError("it has no path or no known status")
        values = {key: _tuple(value) for key, value in fields.items()}
        for key in ("probabilities", "scores"):
            values[key] = tuple(math.nan if v is None else float(v) for v in values.get(key, ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


class Ledger:
    """Append-only account in ``OUT/ledger.jsonl``; holds each explained image once.

    The first line holds the settings of the run, every further line one image, written and synced
    only after all of the image's files are in place. A failed image may get another line when it
    is tried again: the last one counts. What a kill leaves behind is a torn last line, which
    opening cuts, and files that no line names, which
    :meth:`diffcam_fast.outputs.writers.Writer.restore` removes.

    Args:
        folder: The output folder; made where it is missing.
        settings: What the results depend on, as JSON values.
        resume: Go on with the ledger that is there; without it an old one is replaced.

    Attributes:
        replaced_settings: Settings of the run whose ledger this one takes the place of; empty where
            there is none.
        replaced_files: The outputs that its lines name.

    Raises:
        ValueError: The settings differ from those of the run to resume, the ledger is damaged
            other than at its end, or another process is writing to the folder.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp())
        >>> with Ledger(out, {"method": "grad_cam"}) as ledger:
        ...     ledger.append([Entry("cat.jpg", "done", files=("cat.overlay.png",))])
        >>> with Ledger(out, {"method": "grad_cam"}, resume=True) as ledger:
        ...     "cat.jpg" in ledger
        True
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LEDGER_NAME
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings), allow_nan=False))
        self.replaced_settings: Mapping[str, Any] = {}
        self.replaced_files: frozenset[str] = frozenset()
        self._entries: dict[str, Entry] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - lives with the ledger
        try:
            self._lock()
            if resume:
                self._size = self._load()
            else:
                self._note_replaced()
                self._size = 0
            self._file.truncate(self._size)
            if self._size == 0:
                self._write(json.dumps({"version": _VERSION, "settings": self.settings}) + "\n")
            sync_folder(self.folder)
            remove_leftovers(self.folder)
        except BaseException:
            self._file.close()
            raise

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All images, in the order of their last lines."""
        return tuple(self._entries.values())

    @property
    def done(self) -> tuple[Entry, ...]:
        """The entries without the failed ones."""
        return tuple(entry for entry in self._entries.values() if entry.status == "done")

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: object) -> bool:
        """Whether the image was explained; one that failed is not finished."""
        entry = self._entries.get(str(path))
        return entry is not None and entry.status == "done"

    def pending(self, sources: Iterable[Source]) -> list[Source]:
        """The sources that are not explained yet, those that failed among them.

        Raises:
            ValueError: An output name belongs to another image of the ledger already.
        """
        rest = [source for source in sources if source.path not in self]
        owners = {entry.name: entry.path for entry in self.done if entry.name}
        for source in rest:
            if source.name in owners:
                raise ValueError(
                    f"{source.path} would overwrite the outputs {source.name!r} of "
                    f"{owners[source.name]} from the run to resume; use another output folder"
                )
        return rest

    def append(self, entries: Sequence[Entry]) -> None:
        """Adds images; returns when they are on the disk.

        Raises:
            ValueError: An image was explained already, or is in ``entries`` twice.
            OSError: The lines cannot be written; then none of them is in the ledger.
        """
        paths = [entry.path for entry in entries]
        twice = [path for path in paths if path in self]
        if twice or len(set(paths)) != len(paths):
            raise ValueError(f"finished twice: {twice or paths}")
        # An image that fails each time in the same way needs no line each time.
        new = [entry for entry in entries if self._entries.get(entry.path) != entry]
        if new:
            self._write("".join(entry.to_line() for entry in new))
            for entry in new:
                self._keep(entry)

    def close(self) -> None:
        """Ends the account; the file stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _keep(self, entry: Entry) -> None:
        # Behind those before it: tables hold the images in the order in which they were explained.
        self._entries.pop(entry.path, None)
        self._entries[entry.path] = entry

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.folder}: another run is writing there; wait for it or use another folder"
            ) from None

    def _note_replaced(self) -> None:
        """Reads what can be read: a ledger to be replaced may be damaged, or something else."""
        self._file.seek(0)
        header, *entries = map(_fields_or_none, self._file.read().splitlines() or [b""])
        if header is None or header.get("version") != _VERSION:
            return
        settings = header.get("settings")
        if isinstance(settings, dict):
            self.replaced_settings = settings
            files = [fields.get("files") for fields in entries if fields is not None]
            lists = [names for names in files if isinstance(names, list)]
            self.replaced_files = frozenset(
                name for name in chain.from_iterable(lists) if isinstance(name, str)
            )

    def _load(self) -> int:
        """Reads the file; returns the number of bytes that are whole lines."""
        self._file.seek(0)
        data = self._file.read()
        # What stands behind the last line break was never finished, even where it parses.
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        size = 0
        for number, line in enumerate(lines, 1):
            try:
                fields = _fields(line)
                if number > 1:
                    entry = Entry.from_fields(fields)
            except ValueError as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path}: line {number} is damaged ({error}); run without --resume"
                ) from error
            if number == 1:
                self._check_settings(fields)
            else:
                self._keep(entry)
            size += len(line)
        return size

    def _check_settings(self, header: Mapping[str, Any]) -> None:
        if header.get("version") != _VERSION or not isinstance(header.get("settings"), dict):
            raise ValueError(
                f"{self.path}: not a ledger of version {_VERSION}; run without --resume"
            )
        old = header["settings"]
        differences = [
            _difference(key, old.get(key), self.settings.get(key))
            for key in sorted(old.keys() | self.settings.keys())
            if old.get(key) != self.settings.get(key)
        ]
        if differences:
            raise ValueError(
                f"{self.folder}: cannot resume a run with other settings: "
                f"{'; '.join(differences)}. Use the old settings, another output folder, "
                "or no --resume to start anew"
            )

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._size)
            raise
        self._size += len(data)


def _difference(key: str, old: object, new: object) -> str:
    advice = ""
    if isinstance(old, bool) and isinstance(new, bool):
        # Of a flag the value does not tell what to type.
        advice = f" (add --{key})" if old else f" (leave --{key} off)"
    return f"{key} was {json.dumps(old)}, is {json.dumps(new)}{advice}"


def _fields(line: bytes) -> dict[str, Any]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    return fields


def _fields_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        return _fields(line)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
