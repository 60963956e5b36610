"""`diffcam explain --watch`: images are explained as they come, each once, over restarts too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from commandline import MODEL, command, environment, write_images, write_network
from diffcam_fast.cli.main import main

WATCH = ["explain", "--watch", "inbox", "-m", MODEL, "-o", "out", "--json"]
WATCH += ["--format", "parquet", "--format", "overlay"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path)
    write_images(tmp_path / "stock", 8)
    (tmp_path / "inbox").mkdir()
    return tmp_path


@contextmanager
def watching(folder: Path, *more: str, sleep: str = "0") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*WATCH, *more),
        cwd=folder,
        env=environment(TINY_SLEEP=sleep),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def stop(process: subprocess.Popen[str]) -> dict[str, Any]:
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 3), err
    told: dict[str, Any] = json.loads(out)
    return told


def entries(folder: Path) -> dict[str, str]:
    path = folder / "out" / "ledger.jsonl"
    if not path.exists():
        return {}
    text = path.read_text()
    found = [json.loads(line) for line in text[: text.rfind("\n")].splitlines()[1:]]
    assert len({entry["path"] for entry in found if entry["status"] == "done"}) == len(
        [entry for entry in found if entry["status"] == "done"]
    )
    return {entry["path"]: entry["status"] for entry in found}


def wait(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def put(folder: Path, number: int, name: str) -> None:
    source = sorted((folder / "stock").iterdir())[number]
    target = folder / "inbox" / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())


def test_images_are_explained_as_they_come(folder: Path) -> None:
    put(folder, 0, "before.png")
    with watching(folder, "--shard-size", "1") as process:
        wait(process, lambda: "inbox/before.png" in entries(folder))
        # One that is written bit by bit is read when it is whole.
        data = sorted((folder / "stock").iterdir())[1].read_bytes()
        with open(folder / "inbox" / "slow.png", "wb") as file:
            for start in range(0, len(data), len(data) // 8 + 1):
                file.write(data[start : start + len(data) // 8 + 1])
                file.flush()
                time.sleep(0.15)
        put(folder, 2, "below/deep.png")
        (folder / "inbox" / "no image.txt").write_text("nothing")
        (folder / "inbox" / "broken.png").write_bytes(b"")
        # Under another name first, as careful programs write.
        os.replace(folder / "stock" / sorted(os.listdir(folder / "stock"))[3], folder / "part")
        os.replace(folder / "part", folder / "inbox" / "moved.png")
        wait(process, lambda: len(entries(folder)) == 5)
        told = stop(process)
    assert entries(folder) == {
        "inbox/before.png": "done",
        "inbox/slow.png": "done",
        "inbox/below/deep.png": "done",
        "inbox/moved.png": "done",
        "inbox/broken.png": "failed",
    }
    assert told["counts"]["explained"] == 4 and told["counts"]["failed"] == 1
    assert (folder / "out" / "below" / "deep.overlay.png").is_file()
    rows = pq.read_table(folder / "out" / "maps.parquet").column("path").to_pylist()
    assert sorted(rows) == sorted(path for path, s in entries(folder).items() if s == "done")
    assert not json.loads((folder / "out" / "manifest.json").read_text())["complete"]


def test_an_image_that_comes_while_others_are_explained(folder: Path) -> None:
    """What was there keeps the network busy; what comes meanwhile is not overlooked."""
    for number in range(16):
        put(folder, number % 8, f"before-{number}.png")
    with watching(folder, "--shard-size", "1", "--batch-size", "1", sleep="0.3") as process:
        # No more than a handful are read ahead.
        wait(process, lambda: len(entries(folder)) >= 1)
        put(folder, 7, "meanwhile.png")
        wait(process, lambda: len(entries(folder)) == 17)
        stop(process)
    assert entries(folder)["inbox/meanwhile.png"] == "done"


def test_a_restart_goes_on(folder: Path) -> None:
    put(folder, 0, "one.png")
    with watching(folder) as process:
        # Rows wait for a shard to fill, and are written when it is stopped.
        wait(process, lambda: (folder / "out" / "one.overlay.png").exists())
        assert entries(folder) == {}
        stop(process)
    assert entries(folder) == {"inbox/one.png": "done"}
    made = (folder / "out" / "one.overlay.png").stat().st_mtime_ns
    put(folder, 1, "two.png")
    with watching(folder) as process:
        wait(process, lambda: (folder / "out" / "two.overlay.png").exists())
        told = stop(process)
    assert told["counts"]["resumed"] == 1 and told["counts"]["explained"] == 2
    assert (folder / "out" / "one.overlay.png").stat().st_mtime_ns == made
    assert pq.read_table(folder / "out" / "maps.parquet").num_rows == 2


def test_images_of_one_stem_have_names_of_their_own(folder: Path) -> None:
    put(folder, 0, "a.png")
    put(folder, 1, "A.PNG")
    with watching(folder, "--shard-size", "1") as process:
        wait(process, lambda: len(entries(folder)) == 2)
        stop(process)
    overlays = sorted(path.name.casefold() for path in (folder / "out").glob("*.overlay.png"))
    assert len(set(overlays)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["photo.png"], "leave other images out"),
        (["--report"], "--report is written at the end, and --watch has none"),
    ],
)
def test_what_does_not_go_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, [*WATCH, *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, ["explain", "--watch", "nowhere", "-m", MODEL])
    assert result.exit_code == 2
    assert "--watch: nowhere is no folder" in result.stderr
