"""Whatever goes wrong, every image is accounted for, exactly once."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from commandline import MODEL, command, environment, write_images, write_network
from diffcam_fast.cli.main import main
from diffcam_fast.outputs import parquet

EXPLAIN = ["explain", "photos", "-m", MODEL, "-o", "out", "--format", "parquet", "--json"]
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = dict(zip(KINDS, ("png", "jpg", "webp", "bmp", "tif", "gif"), strict=True))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    write_network(tmp_path)
    return tmp_path


def run(*more: str) -> Result:
    return CliRunner().invoke(main, [*EXPLAIN, *more])


def accounted(folder: Path) -> Counter[str]:
    lines = (folder / "out" / "ledger.jsonl").read_text().splitlines()[1:]
    return Counter(json.loads(line)["path"] for line in lines)


def check(folder: Path) -> dict[str, int]:
    """Each image has one line, and each explained one its row; returns the counts."""
    names = [f"photos/{name}" for name in os.listdir(folder / "photos")]
    assert accounted(folder) == Counter(names)
    entries = [
        json.loads(line) for line in (folder / "out" / "ledger.jsonl").read_text().splitlines()[1:]
    ]
    done = [entry["path"] for entry in entries if entry["status"] == "done"]
    assert all(entry.get("reason") for entry in entries if entry["status"] == "failed")
    shards = folder / "out" / "maps.parquet"
    rows = pq.read_table(shards).column("path").to_pylist() if done else []
    assert Counter(rows) == Counter(done)
    assert list(folder.rglob("*.tmp")) == []
    return {"done": len(done), "failed": len(names) - len(done)}


def fuzzed(folder: Path, count: int) -> None:
    """Images of many sizes, modes and formats; some cut off, some with bytes changed, some empty
    or nothing of the kind.
    """
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        kind = KINDS[random.integers(len(KINDS))]
        mode = ("RGB", "L", "P", "RGBA", "CMYK", "1")[random.integers(6)]
        height, width = (int(side) for side in random.integers(1, 80, 2))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        data = io.BytesIO()
        try:
            picture.convert(mode).save(data, kind)
        except (OSError, ValueError, KeyError):
            picture.save(data, kind)
        made = bytearray(data.getvalue())
        fault = random.random()
        if fault < 0.1:
            made = made[: random.integers(len(made) + 1)]
        elif fault < 0.3:
            for place in random.integers(0, len(made), random.integers(1, 9)):
                made[place] = random.integers(256)
        elif fault < 0.32:
            made = bytearray(random.bytes(random.integers(200)))
        (folder / f"{number:05d}.{SUFFIXES[kind]}").write_bytes(made)


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=pytest.mark.slow, id="ten thousand")]
)
def test_files_from_a_fuzzer(folder: Path, count: int) -> None:
    fuzzed(folder / "photos", count)
    result = run("--batch-size", "8")
    assert result.exit_code == 3, result.output
    counts = check(folder)
    told = json.loads(result.stdout)["counts"]
    assert (told["explained"], told["failed"]) == (counts["done"], counts["failed"])
    # Most are whole, and a good share is not.
    assert counts["done"] > 0.6 * count and counts["failed"] > 0.05 * count


def test_a_disk_that_is_full_at_any_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(folder / "photos", 9)
    whole = parquet._write_table
    left = [0]

    def write(path: Path, table: Any) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left[0] -= 1
        whole(path, table)

    monkeypatch.setattr(parquet, "_write_table", write)
    options = ("--batch-size", "2", "--shard-size", "2")
    for number in range(5):
        left[0] = 1
        result = run(*options, "--resume")
        assert result.exit_code == (0 if number == 4 else 1), result.output
        if number < 4:
            assert "the disk is full" in result.stderr
            assert sum(accounted(folder).values()) == 2 * (number + 1)
    check(folder)


def test_a_batch_without_end_does_not_keep_a_stopped_run(folder: Path) -> None:
    """Neither does it abort: the network is inside of PyTorch when the interpreter would end."""
    write_images(folder / "photos", 6)
    text = (folder / "tiny_network.py").read_text()
    (folder / "tiny_network.py").write_text(
        text
        + """
class Endless(nn.Module):
    def forward(self, x):
        while len(x) > 2:
            x = x + torch.ones_like(x).matmul(torch.ones(x.shape[-1], x.shape[-1])) * 0
        return x

def endless():
    loaded = make()
    loaded.model[0] = Endless()
    return loaded
"""
    )
    arguments = [*EXPLAIN[:3], "tiny_network:endless", *EXPLAIN[4:], "--batch-size", "3"]
    with subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        ledger = folder / "out" / "ledger.jsonl"
        while not ledger.exists():
            assert process.poll() is None, process.communicate()[1]
        # The network is at its first batch, and will be for ever.
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        told, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(told)["counts"]["explained"] == 0
    assert "stopped with 6 of 6 images left" in err


def test_a_model_that_makes_nan(folder: Path) -> None:
    write_images(folder / "photos", 4)
    text = (folder / "tiny_network.py").read_text()
    (folder / "tiny_network.py").write_text(
        text + "\ndef broken():\n    loaded = make()\n"
        "    loaded.model[-1].weight.data.fill_(float('nan'))\n    return loaded\n"
    )
    result = CliRunner().invoke(main, [*EXPLAIN[:3], "tiny_network:broken", *EXPLAIN[4:]])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"]["not_finite"] == 4
    assert check(folder) == {"done": 4, "failed": 0}
    table = pq.read_table(folder / "out" / "maps.parquet")
    assert all(np.isnan(row).any() for row in table.column("map").to_pylist())


def test_a_reader_that_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from diffcam_fast.stream import items

    write_images(folder / "photos", 5)
    stuck, whole = threading.Event(), items.read_image

    def read(source: Any) -> Image.Image:
        if source.path.name.startswith("002"):
            stuck.wait()
        return whole(source)

    monkeypatch.setattr(items, "read_image", read)
    result = run("--timeout", "0.5")
    stuck.set()
    assert result.exit_code == 3
    assert check(folder) == {"done": 4, "failed": 1}
    assert "reading it took more than 0.5 s" in result.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_between_shards(folder: Path, sent: signal.Signals) -> None:
    """At moments that the work done sets, not the clock."""
    write_images(folder / "photos", 40)
    options = ("--batch-size", "2", "--shard-size", "6", "--resume")
    before = 0
    for goal in (6, 18):
        with subprocess.Popen(
            command(*EXPLAIN, *options),
            cwd=folder,
            env=environment(TINY_SLEEP="0.05"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            ledger = folder / "out" / "ledger.jsonl"
            while not ledger.exists() or ledger.read_bytes().count(b"\n") <= goal:
                assert process.poll() is None, process.communicate()[1]
            process.send_signal(sent)
            process.communicate(timeout=60)
            assert process.returncode == (-9 if sent is signal.SIGKILL else 130)
        now = sum(accounted(folder).values())
        # What was committed stays; a signal that can be caught commits what waited, too.
        assert before <= now and goal <= now < 40
        before = now
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"]["resumed"] == before
    assert check(folder) == {"done": 40, "failed": 0}
