"""What each format puts on the disk, read back with other tools, and what a full disk leaves."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from diffcam_fast.images.inputs import Source
from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.rows import table_rows
from diffcam_fast.outputs.writers import (
    HeatmapWriter,
    JsonlWriter,
    NpzWriter,
    OverlayWriter,
    ParquetWriter,
    Record,
    Writer,
    files_of,
)

VIEW = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


def record(
    name: str = "sub/cat",
    maps: np.ndarray | None = None,
    labels: tuple[str, ...] = ("Egyptian cat",),
) -> Record:
    count = len(labels)
    if maps is None:
        maps = np.random.default_rng(1).normal(size=(count, 3, 5)).astype(np.float32)
    return Record(
        source=Source(Path(f"photos/{name}.jpg"), name),
        targets=[285 + index for index in range(count)],
        labels=labels,
        probabilities=[0.5 / (index + 1) for index in range(count)],
        scores=[2.25 - index for index in range(count)],
        maps=maps,
        heatmaps=None,
        view=VIEW,
        finite=[bool(np.isfinite(plane).all()) for plane in maps],
    )


def heatmap(plane: np.ndarray) -> np.ndarray:
    """The documented rule: min-max first, bilinear after."""
    import torch

    unit = (plane - plane.min()) / (plane.max() - plane.min())
    grown = torch.nn.functional.interpolate(
        torch.tensor(unit, dtype=torch.float64)[None, None], size=(12, 20), mode="bilinear"
    )
    return grown[0, 0].numpy()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_overlay_beside_the_view(tmp_path):
    one = record()
    (path,) = OverlayWriter(tmp_path).write([one])
    assert path == tmp_path / "sub" / "cat.overlay.png"
    found = pixels(path)
    assert found.shape == (12, 40, 3)
    assert (found[:, :20] == np.asarray(VIEW)).all()
    # The steepest colour maps move by a few levels from one of 256 bins to the next.
    colours = matplotlib.colormaps["turbo"](heatmap(one.maps[0]), bytes=True)[..., :3]
    assert np.abs(found[:, 20:] - (np.asarray(VIEW) * 0.5 + colours * 0.5)).max() <= 3


def test_overlay_blended_with_options(tmp_path):
    one = record()
    (path,) = OverlayWriter(tmp_path, mode="blend", alpha=1.0, cmap="gray").write([one])
    found = pixels(path)
    assert found.shape == (12, 20, 3)
    # One level for the 256 bins, one because matplotlib cuts its own colours to whole bytes.
    assert np.abs(found - heatmap(one.maps[0])[..., None] * 255).max() <= 2


def test_given_heatmaps_are_used(tmp_path):
    given = np.zeros((1, 12, 20), np.float32)
    given[0, 3, 4] = 1
    one = dataclasses.replace(record(), heatmaps=given)
    (path,) = HeatmapWriter(tmp_path).write([one])
    assert (pixels(path) == given[0] * 255).all()


def test_heatmap_png(tmp_path):
    one = record()
    (path,) = HeatmapWriter(tmp_path).write([one])
    assert path == tmp_path / "sub" / "cat.heatmap.png"
    with Image.open(path) as image:
        assert image.mode == "L"
    assert np.abs(pixels(path) - heatmap(one.maps[0]) * 255).max() <= 0.51


def test_nan_is_grey_and_constant_is_zero(tmp_path):
    maps = np.stack([np.full((3, 5), np.nan), np.full((3, 5), 7.0)]).astype(np.float32)
    paths = HeatmapWriter(tmp_path).write([record(maps=maps, labels=("a", "b"))])
    assert (pixels(paths[0]) == 128).all()
    assert (pixels(paths[1]) == 0).all()


@pytest.mark.parametrize(
    ("labels", "infixes"),
    [
        (("Egyptian cat",), [""]),
        (("Egyptian cat", "tabby, tabby cat"), [".egyptian-cat", ".tabby-tabby-cat"]),
        (("crane", "crane", "heron"), [".crane-285", ".crane-286", ".heron"]),
        (("", "\u732b"), [".285", ".286"]),
        (("caf\u00e9/../x", "A" * 90), [".cafe-x", f".{'a' * 40}"]),
    ],
)
def test_names_of_pictures(tmp_path, labels, infixes):
    for writer, suffix in (
        (OverlayWriter(tmp_path), "overlay"),
        (HeatmapWriter(tmp_path), "heatmap"),
    ):
        paths = writer.write([record("cat", labels=labels)])
        assert [path.name for path in paths] == [f"cat{infix}.{suffix}.png" for infix in infixes]
        assert {path.parent for path in paths} == {tmp_path}


def test_each_target_has_its_own_map(tmp_path):
    two = record(labels=("a", "b"))
    paths = HeatmapWriter(tmp_path).write([two])
    for plane, path in zip(two.maps, paths, strict=True):
        assert np.abs(pixels(path) - heatmap(plane) * 255).max() <= 0.51


def test_npz(tmp_path):
    two = record(labels=("a", "b"))
    (path,) = NpzWriter(tmp_path).write([two])
    assert path == tmp_path / "sub" / "cat.npz"
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays) == {"maps", "targets", "scores", "probabilities"}
        assert (arrays["maps"] == two.maps).all()
        assert arrays["targets"].tolist() == [285, 286]
        assert arrays["targets"].dtype == np.int64
        assert arrays["scores"].tolist() == [2.25, 1.25]
        assert arrays["probabilities"].tolist() == [0.5, 0.25]
        assert arrays["maps"].dtype == arrays["scores"].dtype == np.float32


def test_npz_with_heatmaps(tmp_path):
    one = record()
    (path,) = NpzWriter(tmp_path, heatmaps=True).write([one])
    with np.load(path) as arrays:
        assert np.abs(arrays["heatmaps"][0] - heatmap(one.maps[0])).max() < 1e-6
    given = np.random.default_rng(3).random((1, 7, 9)).astype(np.float32)
    (path,) = NpzWriter(tmp_path, heatmaps=True).write([dataclasses.replace(one, heatmaps=given)])
    with np.load(path) as arrays:
        assert (arrays["heatmaps"] == given).all()


def test_jsonl(tmp_path):
    maps = np.array([[[1.5, np.nan], [np.inf, 1 / 3]]], dtype=np.float32)
    writer = JsonlWriter(tmp_path)
    assert writer.write([record("a", maps), record("b")]) == [tmp_path / "explanations.jsonl"]
    writer.write([record("c", labels=("x", "y"))])
    lines = (tmp_path / "explanations.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["path"] == "photos/a.jpg"
    assert rows[0]["targets"] == [285]
    assert rows[0]["labels"] == ["Egyptian cat"]
    assert rows[0]["probabilities"] == [0.5]
    assert rows[0]["scores"] == [2.25]
    assert rows[0]["finite"] == [False]
    assert rows[0]["maps"][0][0] == [1.5, None]
    assert rows[0]["maps"][0][1][0] is None
    # Every float32 comes back exactly.
    assert np.float32(rows[0]["maps"][0][1][1]) == maps[0, 1, 1]
    assert (np.array(rows[2]["maps"], np.float32) == record(labels=("x", "y")).maps).all()


def test_parquet(tmp_path):
    writer = ParquetWriter(tmp_path)
    one, two = record("a"), record("b", labels=("x", "y"))
    assert writer.write([one, two]) == [tmp_path / "maps.parquet" / "part-00000.parquet"]
    assert writer.write([record("c")]) == [tmp_path / "maps.parquet" / "part-00001.parquet"]
    assert writer.write([]) == []
    table = pyarrow.dataset.dataset(tmp_path / "maps.parquet").to_table()
    assert table.schema.field("map").type == pa.list_(pa.float16())
    rows = table.to_pylist()
    assert [(row["path"], row["target"], row["label"]) for row in rows] == [
        ("photos/a.jpg", 285, "Egyptian cat"),
        ("photos/b.jpg", 285, "x"),
        ("photos/b.jpg", 286, "y"),
        ("photos/c.jpg", 285, "Egyptian cat"),
    ]
    assert [row["probability"] for row in rows] == [0.5, 0.5, 0.25, 0.5]
    assert [row["score"] for row in rows] == [2.25, 2.25, 1.25, 2.25]
    for row, plane in zip(rows[:3], [*one.maps, *two.maps], strict=True):
        assert (row["h"], row["w"], row["scale"]) == (3, 5, 1.0)
        found = np.array(row["map"], np.float32).reshape(3, 5)
        assert np.abs(found - plane).max() <= np.abs(plane).max() * 2**-11


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e-3, 1.0, 60_000.0, 1e5, 1e30])
def test_parquet_holds_maps_of_any_unit(tmp_path, unit):
    plane = (np.array([[[0.0, 0.01, -0.5, 1.0]]]) * unit).astype(np.float32)
    ParquetWriter(tmp_path).write([record("a", plane)])
    (row,) = pyarrow.dataset.dataset(tmp_path / "maps.parquet").to_table().to_pylist()
    found = np.array(row["map"], np.float64) * row["scale"]
    np.testing.assert_allclose(found, plane.ravel().astype(float), rtol=2**-10)
    assert np.log2(row["scale"]) % 1 == 0
    if 1 <= unit <= 60_000:
        assert row["scale"] == 1.0


def test_parquet_keeps_nan_and_infinity(tmp_path):
    plane = np.array([[[np.nan, np.inf, 1.0, 2.0]]], dtype=np.float32)
    ParquetWriter(tmp_path).write([record("a", plane)])
    (row,) = pyarrow.dataset.dataset(tmp_path / "maps.parquet").to_table().to_pylist()
    np.testing.assert_array_equal(row["map"], plane.ravel())
    assert row["scale"] == 1.0


@given(
    hnp.arrays(
        np.float32,
        (1, 3, 4),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_uint8_is_right_to_half_a_step(plane):
    (row,) = table_rows("a", record("a", plane), map_type="uint8")
    found = row["map"] * row["scale"] + row["offset"]
    span = float(plane.max()) - float(plane.min())
    assert row["map"].dtype == np.uint8
    assert np.abs(found - plane.ravel().astype(float)).max() <= span / 255 * 0.5001 + span * 1e-12
    assert {0} <= set(row["map"]) and (span == 0 or 255 in row["map"])


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_uint8_says_where_a_map_is_not_finite(odd):
    (row,) = table_rows("a", record("a", np.array([[[1.0, odd]]], np.float32)), map_type="uint8")
    assert np.isnan(row["map"] * np.float32(row["scale"]) + row["offset"]).all()


def test_uint8_shards(tmp_path):
    writer = ParquetWriter(tmp_path, map_type="uint8")
    writer.write([record("a")])
    table = pyarrow.dataset.dataset(tmp_path / "maps.parquet").to_table()
    assert table.schema.field("map").type == pa.list_(pa.uint8())
    (row,) = table.to_pylist()
    plane = record("a").maps[0].ravel()
    step = np.ptp(plane) / 255
    found = np.array(row["map"]) * row["scale"] + row["offset"]
    assert np.abs(found - plane).max() <= step * 0.51


def test_a_shard_waits_until_it_is_full(tmp_path, monkeypatch):
    writer = ParquetWriter(tmp_path, shard_images=3)
    first = tmp_path / "maps.parquet" / "part-00000.parquet"
    assert writer.write_each([record("a"), record("b")]) == [[first], [first]]
    assert (writer.waiting, first.exists()) == (2, False)
    # A batch is not taken apart.
    assert writer.write_each([record("c"), record("d")]) == [[first], [first]]
    assert writer.waiting == 0 and pq.read_metadata(first).num_rows == 4
    second = first.with_name("part-00001.parquet")
    assert writer.write_each([record("e")]) == [[second]]
    assert not writer.due
    monkeypatch.setattr("diffcam_fast.outputs.parquet._SECONDS", -1.0)
    assert writer.due
    writer.flush()
    assert pq.read_metadata(second).num_rows == 1
    writer.publish(complete=True, facts={"failed": 2})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [(shard["file"], shard["images"]) for shard in manifest["shards"]] == [
        (first.name, 4),
        (second.name, 1),
    ]
    assert (manifest["images"], manifest["rows"], manifest["failed"]) == (5, 5, 2)
    writer.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_written_waits_on(tmp_path):
    (tmp_path / "maps.parquet").write_text("in the way")
    writer = ParquetWriter(tmp_path, shard_images=8)
    writer.write_each([record("a")])
    with pytest.raises(FileExistsError):
        writer.flush()
    (tmp_path / "maps.parquet").unlink()
    writer.flush()
    assert pyarrow.dataset.dataset(tmp_path / "maps.parquet").count_rows() == 1


def test_paths_that_are_no_utf8(tmp_path):
    odd = dataclasses.replace(record(), source=Source(Path("caf\udce9.jpg"), "caf_"))
    writers: list[Writer] = [JsonlWriter(tmp_path), ParquetWriter(tmp_path)]
    files = files_of(writers, [odd])
    line = json.loads((tmp_path / "explanations.jsonl").read_text())
    assert line["path"] == "caf\udce9.jpg"
    (row,) = pyarrow.dataset.dataset(tmp_path / "maps.parquet").to_table().to_pylist()
    assert row["path"] == "caf\ufffd.jpg"
    for writer in writers:
        writer.restore([odd.entry(files[0])])
    assert pyarrow.dataset.dataset(tmp_path / "maps.parquet").count_rows() == 1


def test_files_of_names_each_records_own(tmp_path):
    writers = [
        OverlayWriter(tmp_path),
        NpzWriter(tmp_path),
        JsonlWriter(tmp_path),
        ParquetWriter(tmp_path),
    ]
    files = files_of(writers, [record("a"), record("sub/b", labels=("x", "y"))])
    shared = ["explanations.jsonl", "maps.parquet/part-00000.parquet"]
    assert files == [
        ["a.overlay.png", "a.npz", *shared],
        ["sub/b.x.overlay.png", "sub/b.y.overlay.png", "sub/b.npz", *shared],
    ]
    for names in files:
        assert all((tmp_path / name).is_file() for name in names)
    assert record("a").entry(files[0]) == Entry(
        path="photos/a.jpg",
        status="done",
        name="a",
        files=tuple(files[0]),
        targets=(285,),
        labels=("Egyptian cat",),
        probabilities=(0.5,),
        scores=(2.25,),
        finite=(True,),
    )


def test_bad_options_fail_at_once(tmp_path):
    with pytest.raises(ValueError, match="known are 'side' and 'blend'"):
        OverlayWriter(tmp_path, mode="both")
    with pytest.raises(ValueError, match="colour map 'x' is unknown"):
        OverlayWriter(tmp_path, cmap="x")
    with pytest.raises(ValueError, match="alpha is 2"):
        OverlayWriter(tmp_path, alpha=2)
    with pytest.raises(ValueError, match="give T of each"):
        dataclasses.replace(record(), scores=[1.0, 2.0])


WRITERS = [OverlayWriter, HeatmapWriter, NpzWriter, JsonlWriter, ParquetWriter]


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_is_an_error_and_leaves_the_old_files(tmp_path, monkeypatch, kind):
    writer = kind(tmp_path)
    writer.write([record("a")])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write([record("a", labels=("other",)), record("b")])
    monkeypatch.undo()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    # Once there is room again, the run may go on.
    (path, *_) = writer.write([record("b")])
    assert path.stat().st_size > 0


SMALL_DISK = """
import resource, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import numpy as np
import test_writers as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
maps = np.random.default_rng(0).normal(size=(1, 200, 200)).astype(np.float32)
item = t.record("a", maps)
heatmaps = np.random.default_rng(0).random((1, 300, 300)).astype(np.float32)
item = t.dataclasses.replace(item, view=t.VIEW.resize((300, 300)), heatmaps=heatmaps)
for kind in t.WRITERS:
    kind(Path({out!r}, "imports")).write([item])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for kind in t.WRITERS:
    try:
        kind({out!r} + "/out").write([item])
    except OSError as error:
        print(kind.__name__, error.errno)
"""


def test_write_that_stops_in_the_middle(tmp_path):
    """The system itself refuses bytes beyond 4096: not at the end, but in the midst of a write."""
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK.format(paths=paths, out=str(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{kind.__name__} 27" for kind in WRITERS]
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.name == "explanations.jsonl" and path.stat().st_size == 0 for path in left)
