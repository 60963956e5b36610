"""What all tests share: tests whose hardware is missing are skipped, and say so."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Triton reads it when a kernel is defined: without a GPU the kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Exported files that tests keep are not the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="diffcam-cache-")
os.environ["DIFFCAM_CACHE"] = _CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    # imported only now: most runs have no such test, and collecting them should be quick
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
