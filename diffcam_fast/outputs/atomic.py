"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PREFIX, _SUFFIX = ".diffcam-", ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of ``path`` when the block ends without error.

    The bytes go to a temporary file in the same folder (made where it is missing), reach the
    disk, and are renamed: a reader, a crash or a full disk never meets half a file. On an error
    the temporary file is removed and an older file at ``path`` stays as it was.

    Args:
        path: The file to write or replace.

    Yields:
        A writable, seekable binary file.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "sub", "a.bin")
        >>> with atomic_write(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not made from the target's name, which may already be as long as a name may be.
    temporary = target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` survive a loss of power, where the system can do that."""
    # Windows cannot open folders, some network file systems cannot sync them: the file is whole.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in ``folder`` or below it."""
    for leftover in folder.rglob(f"{_PREFIX}*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)
