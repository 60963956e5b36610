"""Killed and stopped runs: whole files, and every image exactly once after ``--resume``."""

from __future__ import annotations

import hashlib
import json
import shutil
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

COUNT = 24
_FORMATS = [f"--format={name}" for name in ("overlay", "npz", "jsonl", "parquet")]
_EXPLAIN = ["explain", "photos", "-m", MODEL, "-o", "out", "--batch-size", "2", "--json"]
# Rows of two batches wait for each other: a kill strikes between a shard and the ledger too.
_EXPLAIN += ["--shard-size", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path)
    paths = write_images(tmp_path / "photos", COUNT - 1)
    paths[1].with_name("001-broken.png").write_bytes(b"")
    return tmp_path


def start(folder: Path, *more: str, sleep: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*_EXPLAIN, *_FORMATS, *more),
        cwd=folder,
        env=environment(TINY_SLEEP=str(sleep)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    process = start(folder, *more)
    out, err = process.communicate(timeout=120)
    assert out, err
    return process.returncode, json.loads(out)


def wait_for(folder: Path, images: int, process: subprocess.Popen[str]) -> None:
    """Until the ledger holds that many images."""
    path = folder / "out" / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if path.exists() and path.read_bytes().count(b"\n") > images:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not begin")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_whole(folder: Path) -> None:
    """Every image is accounted once, and every output holds it once."""
    names = sorted(f"photos/{path.name}" for path in (folder / "photos").iterdir())
    good = [name for name in names if "broken" not in name]
    out = folder / "out"
    entries = lines(out / "ledger.jsonl")[1:]
    assert Counter(entry["path"] for entry in entries) == Counter(names)
    assert Counter(line["path"] for line in lines(out / "explanations.jsonl")) == Counter(good)
    rows = pq.read_table(out / "maps.parquet").column("path").to_pylist()
    assert Counter(rows) == Counter(good)
    check_pictures(out, len(good))
    check_manifest(out, len(good))
    assert list(out.rglob("*.tmp")) == []


def check_manifest(out: Path, count: int) -> None:
    """It names the shards that are there, as they are."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["images"], manifest["failed"]) == (count, 1)
    shards = sorted((out / "maps.parquet").iterdir())
    assert [shard["file"] for shard in manifest["shards"]] == [path.name for path in shards]
    for shard, path in zip(manifest["shards"], shards, strict=True):
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size
        assert shard["rows"] == shard["images"] == pq.read_metadata(path).num_rows


def check_pictures(out: Path, count: int | None = None) -> None:
    """Every file that is there is whole."""
    pictures = sorted(out.glob("*.overlay.png"))
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
    for path in out.glob("*.npz"):
        with np.load(path) as arrays:
            assert arrays["maps"].shape == (1, 8, 8)
    assert count is None or len(pictures) == count


def test_a_killed_run_resumes_with_every_image_once(folder: Path) -> None:
    for images in (5, 13):
        process = start(folder, "--resume", sleep=0.08)
        wait_for(folder, images, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        check_pictures(folder / "out")
    before = {entry["path"] for entry in lines_so_far(folder) if entry["status"] == "done"}
    kept = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.npz")}
    status, told = finish(folder, "--resume")
    assert status == 3
    assert told["complete"]
    assert told["counts"] == {
        "found": COUNT,
        "explained": COUNT - 1,
        "failed": 1,
        "resumed": len(before),
        "not_finite": 0,
    }
    assert 12 <= len(before) < COUNT - 1
    check_whole(folder)
    # What was finished before was not made again.
    done = {folder / "out" / f"{Path(path).stem}.npz" for path in before}
    assert all(path.stat().st_mtime_ns == kept[path] for path in done)


def lines_so_far(folder: Path) -> list[dict[str, Any]]:
    """The ledger of a killed run, without a torn last line."""
    text = (folder / "out" / "ledger.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n")].splitlines()[1:]]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_whole_files_and_says_how_to_go_on(
    folder: Path, sent: signal.Signals
) -> None:
    process = start(folder, "--report", sleep=0.08)
    wait_for(folder, 6, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command with --resume" in err
    told = json.loads(out)
    assert not told["complete"]
    assert told["counts"]["explained"] == len(lines(folder / "out" / "ledger.jsonl")) - 2
    check_pictures(folder / "out")
    status, told = finish(folder, "--report", "--resume")
    assert status == 3
    check_whole(folder)
    page = (folder / "out" / "report.html").read_text()
    assert all(f"{index:03d}-" in page for index in range(COUNT - 1))


def test_resume_with_other_settings_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(folder, monkeypatch)
    assert run(*_FORMATS).exit_code == 3
    before = (folder / "out" / "ledger.jsonl").read_bytes()
    refused = run(*_FORMATS, "--resume", "--contrast", "mean")
    assert refused.exit_code == 2
    assert 'contrast was "log_odds", is "mean"' in refused.stderr
    assert "report was false, is true (leave --report off)" in run("--report", "--resume").stderr
    assert (folder / "out" / "ledger.jsonl").read_bytes() == before
    # Nothing is left to do but the broken image, and all of it is still told.
    again = json.loads(run(*_FORMATS, "--resume").stdout)
    assert (again["counts"]["resumed"], again["counts"]["failed"]) == (COUNT - 1, 1)
    check_whole(folder)
    # Without --resume the new run takes the old one's place.
    anew = run(*_FORMATS, "--contrast", "mean")
    assert json.loads(anew.stdout)["counts"]["resumed"] == 0
    check_whole(folder)


def test_a_repaired_image_is_explained_by_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(folder, monkeypatch)
    assert run(*_FORMATS, "--report").exit_code == 3
    assert "report was true, is false (add --report)" in run(*_FORMATS, "--resume").stderr
    repaired = folder / "photos" / "001-broken.png"
    repaired.write_bytes((folder / "photos" / "000-red.png").read_bytes())
    result = run(*_FORMATS, "--report", "--resume")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["counts"]["explained"], told["counts"]["resumed"]) == (COUNT, COUNT - 1)
    assert told["failed"] == []
    assert (folder / "out" / "001-broken.overlay.png").is_file()
    assert "empty file" not in (folder / "out" / "report.html").read_text()
    # Its last line counts, and the tables are still in the order of the ledger.
    assert run(*_FORMATS, "--report", "--resume").exit_code == 0


def test_outputs_that_were_deleted_are_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(folder, monkeypatch)
    assert run(*_FORMATS, "--report").exit_code == 3
    out = folder / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "000-red.overlay.png").unlink()
    (out / "004-green.npz").unlink()
    (out / ".diffcam-report" / "005-blue.json").unlink()
    # Other images would give these other names by now; their outputs keep the old ones.
    (folder / "photos" / "004-green.jpg").write_bytes(b"")
    result = run(*_FORMATS, "--report", "--resume")
    assert result.exit_code == 3, result.output
    assert "images explained again, whose outputs are gone: 3" in result.stderr
    told = json.loads(result.stdout)
    assert (told["counts"]["explained"], told["counts"]["resumed"]) == (COUNT - 1, COUNT - 4)
    assert set(told["outputs"]) == {
        str(path.relative_to(folder))
        for path in before
        if path.suffix in (".png", ".npz", ".jsonl", ".parquet") and path.name != "ledger.jsonl"
    }
    assert len(lines(out / "ledger.jsonl")) == 1 + COUNT + 1
    for path, data in before.items():
        if path.suffix in (".png", ".parquet") or path.name == "explanations.jsonl":
            assert path.read_bytes() == data, path
    # The whole folder of the report's parts too; and an image that is no longer there is failed,
    # while the tables keep what they hold of it.
    shutil.rmtree(out / ".diffcam-report")
    (folder / "photos" / "000-red.png").write_bytes(b"")
    told = json.loads(run(*_FORMATS, "--report", "--resume").stdout)
    assert (told["counts"]["explained"], told["counts"]["failed"]) == (COUNT - 2, 3)
    assert (out / "explanations.jsonl").read_bytes() == before[out / "explanations.jsonl"]
    assert len(list((out / ".diffcam-report").iterdir())) == COUNT - 2


def test_a_new_run_removes_what_an_earlier_one_wrote_over_all_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(folder, monkeypatch)
    out = folder / "out"
    for name in ("report.html", "explanations.jsonl"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("of the user's own")
    assert run("--format", "npz").stderr == "photos/001-broken.png: empty file\n"
    assert (out / "report.html").read_text() == "of the user's own"
    (out / "explanations.jsonl").unlink()
    run(*_FORMATS, "--report")
    for path in sorted((folder / "photos").glob("0*"))[2:]:
        path.unlink()
    # The archives of both runs and the overlays of the second stay, one of each made anew.
    result = run("--format", "overlay")
    assert result.stderr.splitlines() == [
        "photos/001-broken.png: empty file",
        f"out still holds outputs of an earlier run: {(COUNT - 1) + (COUNT - 2)} files",
    ]
    assert sorted(path.name for path in out.iterdir() if path.suffix not in (".npz", ".png")) == [
        "ledger.jsonl"
    ]
    # Tables that are asked for hold the new images alone.
    run(*_FORMATS)
    assert [line["path"] for line in lines(out / "explanations.jsonl")] == ["photos/000-red.png"]
    assert pq.read_table(out / "maps.parquet").column("path").to_pylist() == ["photos/000-red.png"]


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1}',
        '{"version": 1, "settings": ["npz"]}',
        '{"version": 1, "settings": {"formats": null}}',
        '{"version": 1, "settings": {"formats": 1}}',
        '{"version": 1, "settings": {}}\n{"files": 3}\n{"files": [[], null]}\n{"files": null}',
    ],
)
def test_a_new_run_takes_the_place_of_a_damaged_ledger(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    in_this_process(folder, monkeypatch)
    (folder / "out").mkdir()
    (folder / "out" / "ledger.jsonl").write_text(text + "\n")
    result = run("--format", "npz")
    assert (result.exit_code, result.stderr) == (3, "photos/001-broken.png: empty file\n")
    assert len(lines(folder / "out" / "ledger.jsonl")) == 1 + COUNT


def in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``run`` work in the folder and import its network."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)


def run(*more: str) -> Result:
    """The same command in this process."""
    return CliRunner().invoke(main, [*_EXPLAIN, *more])
