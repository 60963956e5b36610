"""`diffcam bench endurance`: memory and speed of one long run, tenth by tenth."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffcam_bench.photographs import cut_out
from diffcam_bench.rows import provenance

# What one run may grow by: the line of each image that the ledger and the summary keep.
BYTES_PER_IMAGE = 1024
SLOWER = 1.1


@dataclass(frozen=True)
class Tenth:
    """The state of the process when so many images were explained.

    Attributes:
        images: explained so far.
        memory_mib: resident memory of the process.
        images_per_s: over the last tenth.
    """

    images: int
    memory_mib: float
    images_per_s: float


@dataclass(frozen=True)
class Endurance:
    """One run.

    Attributes:
        images: how many there were.
        tenths: what was seen on the way.
        backend: what explained them.
    """

    images: int
    tenths: tuple[Tenth, ...]
    backend: str

    @property
    def growth_bytes(self) -> float:
        """Memory an image, between the first tenth, when all is warm, and the last."""
        first, last = self.tenths[0], self.tenths[-1]
        return (last.memory_mib - first.memory_mib) * 2**20 / max(1, last.images - first.images)

    @property
    def slowdown(self) -> float:
        """The median speed of the first half over that of the second."""
        speeds = [tenth.images_per_s for tenth in self.tenths[1:]]
        half = len(speeds) // 2
        return sorted(speeds[:half])[half // 2] / sorted(speeds[-half:])[half // 2]

    def verdicts(self) -> list[str]:
        """Whether memory and time an image are flat."""
        grows = self.growth_bytes <= BYTES_PER_IMAGE
        slows = self.slowdown <= SLOWER
        return [
            f"memory grows by {self.growth_bytes:.0f} bytes an image, at most {BYTES_PER_IMAGE}: "
            f"{'holds' if grows else 'LOST'}",
            f"the first half is {self.slowdown:.2f} times as fast as the second, at most {SLOWER}: "
            f"{'holds' if slows else 'LOST'}",
        ]

    def rows(self) -> list[dict[str, object]]:
        """One row for each tenth."""
        source = provenance("onnxruntime", threads=os.cpu_count() or 1)
        return [
            {
                "images": self.images,
                "explained": tenth.images,
                "memory_mib": round(tenth.memory_mib, 1),
                "images_per_s": round(tenth.images_per_s, 1),
                "backend": self.backend,
                **source,
            }
            for tenth in self.tenths
        ]


def endure(images: int, *, pictures: int = 500, progress: Callable[[int], object]) -> Endurance:
    """Explains so many JPEG files by the command line, into Parquet, and looks at the process.

    The files are links to a few hundred pictures, so that they need no space; each is read and
    decoded all the same.

    Args:
        images: how many; a multiple of ten is best.
        pictures: different ones among them.
        progress: called with how many are done.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock, photos = folder / "stock", folder / "photos"
        stock.mkdir()
        photos.mkdir()
        for number, picture in enumerate(cut_out(min(pictures, images))):
            picture.save(stock / f"{number}.jpg", quality=90)
        for number in range(images):
            os.link(stock / f"{number % min(pictures, images)}.jpg", photos / f"{number:07d}.jpg")
        return _watch(folder, images, progress)


def _watch(folder: Path, images: int, progress: Callable[[int], object]) -> Endurance:
    command = [sys.executable, "-m", "diffcam_fast.cli", "explain", "photos", "-o", "out"]
    # The ledger grows by shards, and is what is looked at.
    shard = max(1, min(1024, images // 50))
    command += ["--format", "parquet", "--shard-size", str(shard)]
    command += ["--backend", "onnxruntime", "-v"]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process,
    ):
        tenths: list[Tenth] = []
        before = (0, time.monotonic())
        while process.poll() is None:
            done = _lines(folder / "out" / "ledger.jsonl")
            goal = (len(tenths) + 1) * images // 10
            if done >= goal and done > before[0]:
                now = time.monotonic()
                speed = (done - before[0]) / max(now - before[1], 1e-9)
                tenths.append(Tenth(done, _resident_mib(process.pid), speed))
                before = (done, now)
                progress(done)
            time.sleep(0.02)
    told = (folder / "log").read_text(errors="replace")
    if process.returncode or len(tenths) < 4:
        raise RuntimeError(f"the run failed or was too short to be watched: {told[-2000:]}")
    backend = next(line for line in told.splitlines() if line.startswith("backend: "))
    return Endurance(images, tuple(tenths), backend.removeprefix("backend: "))


def _lines(path: Path) -> int:
    """Images in a ledger."""
    try:
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) - 1
    except FileNotFoundError:
        return 0


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
