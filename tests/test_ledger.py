"""Exactly once: after any cut of the ledger, and any kill, each image is there one time."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffcam_fast.images.inputs import Source
from diffcam_fast.outputs.atomic import atomic_write
from diffcam_fast.outputs.ledger import Entry, Ledger
from diffcam_fast.outputs.writers import (
    JsonlWriter,
    NpzWriter,
    OverlayWriter,
    ParquetWriter,
    Record,
    files_of,
)

SETTINGS = {"method": "diff_grad_cam", "topk": 2, "size": [8, 8]}


def source(number: int) -> Source:
    return Source(Path(f"photos/{number:03d}.jpg"), f"{number:03d}")


def record(number: int) -> Record:
    maps = np.full((2, 2, 3), number, dtype=np.float32)
    maps[:, 0, 0] = -1
    return Record(
        source=source(number),
        targets=[number, number + 1],
        labels=["cat", "dog"],
        probabilities=[0.75, 0.25],
        scores=[1.5, -2.5],
        maps=maps,
        # Given, so that the processes that are to be killed need not import torch.
        heatmaps=np.full((2, 4, 6), 0.5, dtype=np.float32),
        view=Image.new("RGB", (6, 4), (number, 0, 0)),
        finite=[True, True],
    )


def run(
    out: Path,
    count: int,
    *,
    resume: bool,
    batch: int = 3,
    only: int | None = None,
    broken: int | None = 4,
) -> int:
    """Explains ``count`` images as the command does, one being broken; returns how many."""
    writers = [OverlayWriter(out), NpzWriter(out), JsonlWriter(out), ParquetWriter(out)]
    work = 0
    with Ledger(out, SETTINGS, resume=resume) as ledger:
        for writer in writers:
            writer.restore(ledger.done)
        pending = ledger.pending([source(number) for number in range(count)])
        for start in range(0, len(pending), batch):
            if only is not None and start >= only * batch:
                break
            numbers = [int(item.name) for item in pending[start : start + batch]]
            records = [record(number) for number in numbers if number != broken]
            files = files_of(writers, records)
            entries = [item.entry(names) for item, names in zip(records, files, strict=True)]
            failed = [source(number) for number in numbers if number == broken]
            entries += [Entry(str(s.path), "failed", s.name, reason="empty file") for s in failed]
            ledger.append(entries)
            work += len(records)
    return work


def check(out: Path, count: int) -> None:
    """Every image exactly once in every output, no file too many, all of them readable."""
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    everything = [str(source(number).path) for number in range(count)]
    good = [path for path in everything if path != str(source(4).path)]
    assert lines[0] == {"version": 1, "settings": SETTINGS}
    assert sorted(line["path"] for line in lines[1:]) == everything
    named = {file for line in lines[1:] for file in line.get("files", ())}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == named | {"ledger.jsonl"}
    rows = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert sorted(row["path"] for row in rows) == good
    shards = [pq.ParquetFile(path).read() for path in (out / "maps.parquet").iterdir()]
    pairs = [
        (row["path"], row["target"], row["map"][1]) for table in shards for row in table.to_pylist()
    ]
    assert sorted(pairs) == [
        (str(source(n).path), target, n) for n in range(count) if n != 4 for target in (n, n + 1)
    ]
    for number in range(count):
        if number != 4:
            with np.load(out / f"{number:03d}.npz") as arrays:
                assert (arrays["maps"] == record(number).maps).all()
            for label in ("cat", "dog"):
                with Image.open(out / f"{number:03d}.{label}.overlay.png") as picture:
                    picture.load()


def test_whole_run(tmp_path):
    assert run(tmp_path, 7, resume=False) == 6
    check(tmp_path, 7)
    assert run(tmp_path, 7, resume=True) == 0
    check(tmp_path, 7)


def test_an_image_that_was_repaired_is_explained(tmp_path):
    run(tmp_path, 6, resume=False)
    assert run(tmp_path, 6, resume=True, broken=None) == 1
    # The tables hold it last, as the ledger does: the next run finds them in order.
    for _ in range(2):
        with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
            assert [entry.name for entry in ledger.done] == [f"{n:03d}" for n in (0, 1, 2, 3, 5, 4)]
            assert ledger.entries == ledger.done
        rows = [json.loads(line) for line in (tmp_path / "explanations.jsonl").open()]
        assert [row["name"] for row in rows] == [entry.name for entry in ledger.done]
        assert run(tmp_path, 6, resume=True) == 0


def test_more_images_may_join(tmp_path):
    run(tmp_path, 5, resume=False)
    assert run(tmp_path, 8, resume=True) == 3
    check(tmp_path, 8)


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_cut_at_every_byte_of_the_last_line(tmp_path, monkeypatch):
    # Hundreds of runs; nothing here loses power.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # One batch of three: the shard of number 2 holds the two before it, which stay.
    run(tmp_path, 3, resume=False)
    files = snapshot(tmp_path)
    ledger = files["ledger.jsonl"]
    last = ledger[:-1].rindex(b"\n") + 1
    assert b"002" in ledger[last:]
    for size in range(last, len(ledger) + 1):
        put(tmp_path, files | {"ledger.jsonl": ledger[:size]})
        assert run(tmp_path, 3, resume=True) == (0 if size == len(ledger) else 1)
        check(tmp_path, 3)


def test_cut_after_every_line(tmp_path):
    run(tmp_path, 8, resume=False)
    files = snapshot(tmp_path)
    lines = files["ledger.jsonl"].splitlines(keepends=True)
    for count in range(len(lines) + 1):
        put(tmp_path, files | {"ledger.jsonl": b"".join(lines[:count])})
        assert run(tmp_path, 8, resume=True) == 7 - sum(b'"done"' in line for line in lines[:count])
        check(tmp_path, 8)


def test_tail_of_zeros_after_a_loss_of_power(tmp_path):
    run(tmp_path, 4, resume=False)
    for tail in (b"\0" * 50, b"\0" * 50 + b"\n", b'{"path": "x"}\n', b"[1]\n"):
        with open(tmp_path / "ledger.jsonl", "ab") as file:
            file.write(tail)
        assert run(tmp_path, 4, resume=True) == 0
        check(tmp_path, 4)


def test_jsonl_and_shards_ahead_of_the_ledger_are_cut_back(tmp_path):
    run(tmp_path, 6, resume=False, only=1)
    JsonlWriter(tmp_path).write([record(3)])
    with open(tmp_path / "explanations.jsonl", "ab") as file:
        file.write(b'{"path": "torn')
    ParquetWriter(tmp_path).write([record(3), record(5)])
    (tmp_path / ".diffcam-0123456789abcdef.tmp").write_bytes(b"left by a kill")
    assert run(tmp_path, 6, resume=True) == 2
    check(tmp_path, 6)


WORKER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_ledger
test_ledger.run(Path({out!r}, "imports"), 1, resume=False)
print("ready", flush=True)
sys.stdin.readline()
test_ledger.run(Path({out!r}, "out"), {count}, resume=True, batch=2)
print("finished", flush=True)
"""


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(tmp_path):
    count, rng, out = 80, random.Random(0), tmp_path / "out"
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    script = WORKER.format(paths=paths, out=str(tmp_path), count=count)
    ledger, progress = out / "ledger.jsonl", [0]
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(b"go\n")
            process.stdin.flush()
            # By the work done, not by the clock: then slow machines see the same.
            goal = progress[-1] + rng.randrange(10)
            while lines_of(ledger) < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.02))
            process.send_signal(signal.SIGKILL)
        progress.append(lines_of(ledger))
    # The kills struck in the middle, and no run lost what those before it had finished.
    assert any(1 < lines <= count for lines in progress), progress
    assert progress == sorted(progress)
    run(out, count, resume=True)
    check(out, count)


def test_without_resume_the_old_run_is_replaced(tmp_path):
    run(tmp_path, 8, resume=False)
    assert run(tmp_path, 3, resume=False) == 3
    kept = [json.loads(line) for line in (tmp_path / "explanations.jsonl").open()]
    assert [row["name"] for row in kept] == ["000", "001", "002"]
    assert [path.name for path in (tmp_path / "maps.parquet").iterdir()] == ["part-00000.parquet"]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


def test_a_ledger_knows_what_it_replaces(tmp_path):
    run(tmp_path, 2, resume=False)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    torn = [lines[0], b"[1]\n", lines[1], lines[2][:-9]]
    for kept, count in ((lines, 2), (torn, 1), (lines[:1], 0)):
        (tmp_path / "ledger.jsonl").write_bytes(b"".join(kept))
        with Ledger(tmp_path, {"method": "grad_cam"}) as ledger:
            assert ledger.replaced_settings == SETTINGS
            own = {file for file in ledger.replaced_files if file.endswith(".npz")}
            assert own == {f"{number:03d}.npz" for number in range(count)}
    for foreign in (b"", b"no JSON", b'{"something": 1}\n'):
        (tmp_path / "ledger.jsonl").write_bytes(foreign)
        with Ledger(tmp_path, SETTINGS) as ledger:
            assert (ledger.replaced_settings, ledger.replaced_files) == ({}, frozenset())
    with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
        assert (ledger.replaced_settings, ledger.replaced_files) == ({}, frozenset())


def test_resume_without_a_ledger_starts_anew(tmp_path):
    with Ledger(tmp_path / "new" / "out", SETTINGS, resume=True) as ledger:
        assert len(ledger) == 0
    assert (tmp_path / "new" / "out" / "ledger.jsonl").exists()


def test_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path, 3, resume=False)
    before = snapshot(tmp_path)
    other = {"method": "grad_cam", "size": [8, 8], "layer": "layer4"}
    with pytest.raises(ValueError, match="cannot resume") as caught:
        Ledger(tmp_path, other, resume=True)
    for part in (
        'method was "diff_grad_cam", is "grad_cam"',
        "topk was 2, is null",
        'layer was null, is "layer4"',
    ):
        assert part in str(caught.value)
    assert "size" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_tuples_equal_lists_in_settings(tmp_path):
    Ledger(tmp_path, {"size": (8, 8)}).close()
    Ledger(tmp_path, {"size": [8, 8]}, resume=True).close()


def test_damage_in_the_middle_is_an_error(tmp_path):
    run(tmp_path, 3, resume=False)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"torn\n', *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Ledger(tmp_path, SETTINGS, resume=True)
    assert path.read_bytes() == before


def test_a_foreign_file_is_not_taken_for_a_ledger(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"something": 1}\n')
    with pytest.raises(ValueError, match="not a ledger of version 1"):
        Ledger(tmp_path, SETTINGS, resume=True)


@pytest.mark.parametrize("spoil", ["cut", "other", "delete"])
def test_jsonl_that_lost_finished_lines_is_an_error(tmp_path, spoil):
    run(tmp_path, 3, resume=False)
    path = tmp_path / "explanations.jsonl"
    data = path.read_bytes()
    if spoil == "delete":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if spoil == "cut" else b"{}\n" + data)
    with pytest.raises(ValueError, match="run without --resume"):
        run(tmp_path, 3, resume=True)


def test_a_lost_shard_is_an_error(tmp_path):
    run(tmp_path, 3, resume=False)
    (tmp_path / "maps.parquet" / "part-00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"part-00000.parquet missing"):
        run(tmp_path, 3, resume=True)


def test_two_runs_in_one_folder(tmp_path):
    with (
        Ledger(tmp_path, SETTINGS) as first,
        pytest.raises(ValueError, match="another run is writing there"),
    ):
        Ledger(tmp_path, SETTINGS)
    assert len(first) == 0
    Ledger(tmp_path, SETTINGS).close()


def test_entries_come_back_as_they_were(tmp_path):
    entries = [
        Entry(
            "a \u00e9\udce9\n.jpg",
            "done",
            "a",
            files=("a.npz",),
            targets=(3, 0),
            labels=("", "x"),
            probabilities=(0.1, 1e-30),
            scores=(-1.5, 2.0),
            finite=(True, False),
        ),
        Entry("b.jpg", "failed", "b", reason="empty file"),
    ]
    with Ledger(tmp_path, SETTINGS) as ledger:
        ledger.append(entries)
        assert ledger.entries == tuple(entries)
    with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
        assert ledger.entries == tuple(entries)
        assert ledger.done == (entries[0],)
        path = entries[0].path
        assert path in ledger
        assert Path(path) in ledger
        # It failed, and may be tried again.
        assert "b.jpg" not in ledger
        assert "c.jpg" not in ledger


def test_numbers_that_are_not_finite(tmp_path):
    entry = Entry("a", "done", targets=(1, 2), probabilities=(math.nan, 1.0), scores=(math.inf, 0))
    with Ledger(tmp_path, SETTINGS) as ledger:
        ledger.append([entry])
    assert "NaN" not in (tmp_path / "ledger.jsonl").read_text()
    with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
        (found,) = ledger.entries
    assert math.isnan(found.probabilities[0])
    assert math.isnan(found.scores[0])
    assert found.scores[1] == 0.0


def test_an_image_cannot_be_finished_twice(tmp_path):
    entry = Entry("a.jpg", "done")
    with Ledger(tmp_path, SETTINGS) as ledger:
        with pytest.raises(ValueError, match="finished twice"):
            ledger.append([entry, entry])
        ledger.append([entry])
        with pytest.raises(ValueError, match="finished twice"):
            ledger.append([entry])
        with pytest.raises(ValueError, match="finished twice"):
            ledger.append([Entry("a.jpg", "failed", reason="empty file")])
        assert len(ledger) == 1


def test_a_failure_is_written_again_only_where_it_changed(tmp_path):
    with Ledger(tmp_path, SETTINGS) as ledger:
        for reason in ("empty file", "empty file", "no such file", "no such file"):
            ledger.append([Entry("a.jpg", "failed", "a", reason=reason)])
        # A name that made no outputs is free for others.
        assert ledger.pending([Source(Path("b/a.jpg"), "a")])
    reasons = [json.loads(line).get("reason") for line in (tmp_path / "ledger.jsonl").open()]
    assert reasons == [None, "empty file", "no such file"]
    with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
        assert [entry.reason for entry in ledger.entries] == ["no such file"]


def test_an_output_name_belongs_to_one_image(tmp_path):
    with Ledger(tmp_path, SETTINGS) as ledger:
        ledger.append([Entry("a/cat.jpg", "done", "cat")])
        assert ledger.pending([Source(Path("a/cat.jpg"), "cat")]) == []
        with pytest.raises(ValueError, match=r"b/cat.jpg would overwrite"):
            ledger.pending([Source(Path("b/cat.jpg"), "cat")])


def failing(after: int) -> Callable[[int], None]:
    """An ``os.fsync`` that finds the disk full from its ``after``-th call on."""
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")

    return fsync


def test_full_disk_leaves_no_line(tmp_path, monkeypatch):
    with Ledger(tmp_path, SETTINGS) as ledger:
        ledger.append([Entry("a.jpg", "done")])
        before = (tmp_path / "ledger.jsonl").read_bytes()
        monkeypatch.setattr(os, "fsync", failing(0))
        with pytest.raises(OSError, match="No space left"):
            ledger.append([Entry("b.jpg", "done")])
        monkeypatch.undo()
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        assert "b.jpg" not in ledger
        ledger.append([Entry("b.jpg", "done")])
    with Ledger(tmp_path, SETTINGS, resume=True) as ledger:
        assert [entry.path for entry in ledger.entries] == ["a.jpg", "b.jpg"]


def interrupted_write(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as file:
        file.write(b"second")
        raise error


def test_atomic_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            interrupted_write(path, error)
    assert path.read_bytes() == b"first"
    assert [item.name for item in path.parent.iterdir()] == ["a.bin"]


def test_atomic_write_takes_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 255)
    with atomic_write(path) as file:
        file.write(b"long")
    assert path.read_bytes() == b"long"
