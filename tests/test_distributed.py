"""More than one machine: rows and options without Ray, and a cluster of three nodes with it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from commandline import environment, write_images, write_network
from diffcam_fast import Contrast, Explainer
from diffcam_fast.cli.cluster_summary import read_outcome
from diffcam_fast.cli.main import main
from diffcam_fast.distributed import dataset_schema
from diffcam_fast.distributed.actor import ExplainBatches
from diffcam_fast.distributed.dataset import check_numbers, import_ray, most_actors
from diffcam_fast.distributed.settings import Settings
from diffcam_fast.images.inputs import Source
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import read_image
from diffcam_fast.models import LoadedModel, load_model
from diffcam_fast.outputs.parquet import ParquetWriter
from diffcam_fast.outputs.writers import Record
from explained import write_explained
from networks import pooled

PLAIN = Preprocess(size=(32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def settings(**options: Any) -> Settings:
    names = [field.name for field in fields(Settings)]
    return Settings.make(**(dict.fromkeys(names) | options))


def small() -> LoadedModel:
    return LoadedModel(pooled(), PLAIN, tuple("abcde"), "small")


def actor(batch_size: int = 4, **options: Any) -> ExplainBatches:
    made = settings(**({"model": small} | options))
    return ExplainBatches(made, batch_size=batch_size, device="cpu", threads=1)


def column(values: list[Any]) -> np.ndarray:
    held = np.empty(len(values), object)
    held[:] = values
    return held


def contents(paths: list[Path]) -> dict[str, np.ndarray]:
    """A batch as `read_binary_files` gives it."""
    return {
        "bytes": column([path.read_bytes() for path in paths]),
        "path": column([str(path) for path in paths]),
    }


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "photos", 5)


class Choosy(nn.Module):
    """Raises where it meets an image of one value, or more images than it has memory for."""

    def __init__(self, most: int = 99) -> None:
        super().__init__()
        self.most = most
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        if len(images) > self.most:
            raise MemoryError
        flat = images.flatten(1)
        if ((flat.amin(1) == flat.amax(1)) & (flat.amax(1) > 0)).any():
            raise RuntimeError("nothing to see here")
        return images


def choosy(first: Choosy) -> LoadedModel:
    return LoadedModel(nn.Sequential(first, *pooled()), PLAIN, None, "choosy")


def test_rows_are_those_of_the_parquet_writer(tmp_path: Path, photos: list[Path]) -> None:
    table = actor(topk=2)(contents(photos))
    explainer = Explainer(pooled())
    result = explainer(torch.stack([PLAIN(read_image(path)) for path in photos]), topk=2)
    chances = result.probabilities.gather(1, result.targets)
    records = [
        Record(
            source=Source(path, path.stem),
            targets=result.targets[i].tolist(),
            labels=["abcde"[k] for k in result.targets[i]],
            probabilities=chances[i].tolist(),
            scores=result.scores[i].tolist(),
            maps=result.maps[i].numpy(),
            heatmaps=None,
            view=Image.new("RGB", (1, 1)),
            finite=[True, True],
        )
        for i, path in enumerate(photos)
    ]
    (file,) = ParquetWriter(tmp_path).write(records)
    wanted = pq.ParquetFile(file).read()
    assert table.schema == dataset_schema()
    assert table.column_names == [*wanted.column_names, "error"]
    assert table.column("error").null_count == len(table) == 10
    for got, want in zip(table.to_pylist(), wanted.to_pylist(), strict=True):
        assert {name: got[name] for name in ("path", "target", "label", "h", "w")} == {
            name: want[name] for name in ("path", "target", "label", "h", "w")
        }
        assert got["score"] == pytest.approx(want["score"], abs=1e-6)
        assert got["probability"] == pytest.approx(want["probability"], abs=1e-6)
        difference = np.subtract(got["map"], want["map"], dtype=np.float64)
        assert np.abs(difference).max() <= 1e-3 * np.abs(want["map"]).max()


def test_bytes_files_and_pixels_give_the_same(photos: list[Path]) -> None:
    explain = actor()
    batch = contents(photos)
    pixels = {"path": batch["path"], "image": column([np.asarray(read_image(p)) for p in photos])}
    names = {"path": column([os.fsencode(path) for path in photos])}
    assert explain(pixels) == explain(batch)
    assert explain(names) == explain(batch)


def test_each_damaged_image_is_one_row_in_its_place(photos: list[Path]) -> None:
    batch = contents(photos)
    batch["bytes"][1] = batch["bytes"][1][:300]
    batch["bytes"][3] = b""
    table = actor(batch_size=2, topk=3)(batch)
    rows = table.to_pylist()
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert errors == {str(photos[1]): "truncated PNG image", str(photos[3]): "empty file"}
    counts = [sum(row["path"] == str(path) for row in rows) for path in photos]
    assert counts == [3, 1, 3, 1, 3]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    failed = rows[3]
    assert {name for name, value in failed.items() if value is not None} == {"path", "error"}


def test_what_cannot_be_an_image_is_a_row(photos: list[Path]) -> None:
    explain = actor()
    missing = photos[0].with_name("gone.png")
    (row,) = explain({"path": column([str(missing)])}).to_pylist()
    assert row["error"] == "no such file"
    (row,) = explain({"path": column(["a"]), "image": column([np.zeros((2, 2))])}).to_pylist()
    assert row["error"].startswith("pixels are float64 of shape (2, 2), expected uint8")
    (row,) = explain({"path": column(["a"]), "bytes": column([None])}).to_pylist()
    assert row["error"] == "no content"
    assert len(explain({"path": column([]), "bytes": column([])})) == 0


def test_a_network_that_raises_costs_one_image(photos: list[Path]) -> None:
    Image.new("RGB", (40, 40), (9, 9, 9)).save(photos[2])
    rows = actor(model=lambda: choosy(Choosy()))(contents(photos)).to_pylist()
    assert [row["error"] for row in rows] == [
        None,
        None,
        "the network raised RuntimeError: nothing to see here",
        None,
        None,
    ]


def test_batches_shrink_to_what_fits_into_memory(photos: list[Path]) -> None:
    first = Choosy(most=2)
    explain = actor(batch_size=5, model=lambda: choosy(first))
    whole = actor(batch_size=5, model=lambda: choosy(Choosy()))(contents(photos))
    assert explain(contents(photos)).column("path") == whole.column("path")
    first.calls.clear()
    table = explain(contents(photos))
    assert table.column("error").null_count == 5
    assert max(first.calls) <= 2
    first.most = 0
    rows = explain(contents(photos)).to_pylist()
    assert {row["error"] for row in rows} == {"out of memory with this image alone"}


def test_a_lost_gpu_costs_its_batch_and_the_process(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Choosy()
    explain = actor(batch_size=2, model=lambda: choosy(first))

    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(explain._stage, "device", torch.device("cuda"))
    # Only its name: there need not be one.
    monkeypatch.setattr(explain._stage, "_explain", lambda images: first(torch.stack(images)))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(first, "most", 0)
    rows = explain(contents(photos)).to_pylist()
    assert [row["error"] for row in rows] == ["the GPU was lost: out of memory"] * 5

    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        explain(contents(photos))
    assert "the GPU was lost" in capsys.readouterr().err


def test_weights_that_are_drawn_are_the_same_in_all_actors() -> None:
    def drawn() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )

    before = torch.random.get_rng_state()
    one, two = (settings(model=drawn, size=16).open("cpu").loaded for _ in range(2))
    assert isinstance(one, LoadedModel)
    assert isinstance(two, LoadedModel)
    assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_onnx_file_explains(tmp_path: Path, photos: list[Path]) -> None:
    path = tmp_path / "m.cam.onnx"
    model = write_explained(path, labels=True)
    explain = actor(model=path)
    rows = explain(contents(photos)).to_pylist()
    images = torch.stack([explain._opened.loaded.preprocess(read_image(p)) for p in photos])
    result = Explainer(model, layer="0")(images)
    assert [row["target"] for row in rows] == result.targets[:, 0].tolist()
    assert [row["label"] for row in rows] == [f"class {k}" for k in result.targets[:, 0]]
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx(result.scores[:, 0].tolist(), abs=1e-5)


def test_targets_and_labels_are_resolved_once(photos: list[Path]) -> None:
    explain = actor(targets=["d", 1, "3"], labels=list("vwxdz"))
    rows = explain(contents(photos[:1])).to_pylist()
    assert [(row["target"], row["label"]) for row in rows] == [(3, "d"), (1, "w")]
    assert pickle.loads(pickle.dumps(settings(targets="d"))).targets == ("d",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": pooled()}, TypeError, "model is a Sequential; give its name or a function"),
        ({"model": small()}, TypeError, "model is a LoadedModel"),
        ({"model": 3}, TypeError, "model is a int"),
        ({"method": "cam_cam"}, ValueError, "cam_cam"),
        ({"method": "broad_cam"}, ValueError, "broad_cam is fitted on labelled images"),
        ({"contrast": "mode"}, ValueError, "mode"),
        ({"contrast": "mean", "temperature": 2.0}, ValueError, "temperature"),
        ({"model": "m.onnx", "contrast": Contrast(1.0)}, ValueError, "exported with"),
        ({"targets": 1, "topk": 2}, ValueError, "targets or topk"),
        ({"targets": [1.5]}, TypeError, "targets hold a float"),
        ({"topk": 0}, ValueError, "topk is 0"),
        ({"size": "large"}, ValueError, "'large'"),
        ({"labels": "no-such-file.txt"}, ValueError, "cannot read the labels file"),
    ],
)
def test_options_are_checked_without_a_network(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        settings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 6}, "topk is 6, but the model has 5 classes"),
        ({"labels": ["a"]}, "1 labels for a model of 5 classes"),
        ({"targets": "cat"}, "no class is called 'cat'"),
        ({"layer": "9"}, "9"),
    ],
)
def test_options_are_checked_with_the_network(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**({"model": small} | options)).open("cpu")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, None, None), "batch_size is 0"),
        ((1, 0, None, None), "cpus_per_actor is 0"),
        ((1, 1, 2, None), "gpus_per_actor is 2; an explainer runs on one GPU"),
        ((1, 1, -0.5, None), "gpus_per_actor is -0.5"),
        ((1, 1, None, 0), "concurrency is 0"),
        ((1, 1, None, (3, 2)), r"concurrency is \(3, 2\)"),
    ],
)
def test_numbers_are_checked(numbers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers(*numbers)


def test_actors_leave_a_core_to_read_with() -> None:
    assert most_actors([{"CPU": 8.0}, {"CPU": 8.0}], 8, 0) == 1
    assert most_actors([{"CPU": 9.0}, {"CPU": 8.0}], 8, 0) == 2
    assert most_actors([{"CPU": 3.0}] * 4, 2, 0) == 4
    assert most_actors([{"CPU": 8.0, "GPU": 1.0}], 2, 0.5) == 2
    with pytest.raises(ValueError, match="do not fit into this Ray of 1 cores on 1 machines"):
        most_actors([{"CPU": 1.0}], 1, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["bytes"], "no path"), (["path", "bytes", "image"], "drop one of the columns")],
)
def test_columns_are_checked(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actor()({name: column([]) for name in names})


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[ray\]'"):
        import_ray()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--actors", "2"], "--actors is for --engine ray"),
        (["--engine", "ray"], "--engine ray writes --format parquet"),
        (["--engine", "ray", "--format", "parquet", "--format", "npz"], "nothing else"),
        (["--engine", "ray", "--format", "parquet", "--resume"], "--resume does not go with"),
        (["--engine", "ray", "--format", "parquet", "--device", "cpu"], "--actor-gpus says where"),
        (["--engine", "ray", "--format", "parquet", "-"], "no list from standard input"),
        (["--engine", "ray", "--format", "parquet", "s3://b/*.png"], "no globs in URIs"),
        (["--engine", "ray", "--format", "parquet", "-o", "."], "is there already"),
        (
            ["--engine", "ray", "--format", "parquet", "--ray-address", "127.0.0.1:1"],
            "no Ray answers at 127.0.0.1:1",
        ),
    ],
)
def test_command_line_refuses(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps.parquet").mkdir()
    result = CliRunner().invoke(main, ["explain", "photos", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_images_are_counted_by_what_was_asked(tmp_path: Path, photos: list[Path]) -> None:
    batch = contents(photos)
    batch["bytes"][1] = b"no image"
    # Two of the three targets are one class.
    table = actor(targets=["d", 1, 3])(batch)
    pq.write_table(table, tmp_path / "rows.parquet")
    outcome = read_outcome(str(tmp_path / "rows.parquet"), 3, seconds=1.0)
    assert (outcome.rows, outcome.explained) == (8, 4)
    assert [path for path, _ in outcome.failed] == [str(photos[1])]


def network_of_its_own() -> list[str]:
    """The words before a command whose network shall hold nothing but the loopback."""
    tool = shutil.which("unshare")
    if tool is None:
        pytest.skip("needs unshare, of util-linux")
    options = ["-n"] if os.geteuid() == 0 else ["-rn"]
    if subprocess.run([tool, *options, "true"], capture_output=True).returncode:
        pytest.skip("needs network namespaces, which are not allowed here")
    return [tool, *options]


def run_on_cluster(folder: Path, *arguments: str) -> Path:
    """Has on_cluster.py work in a folder of 60 photographs, three of which are damaged and one of
    which the network raises at.
    """
    pytest.importorskip("ray")
    prefix = network_of_its_own()
    write_network(folder)
    paths = write_images(folder / "photos", 60)
    paths[7].write_bytes(paths[7].read_bytes()[:200])
    paths[31].write_bytes(b"")
    paths[58].write_text("no image")
    Image.new("RGB", (40, 40), (255, 255, 255)).save(paths[22])
    env = environment(
        HOME=str(folder), RAY_USAGE_STATS_ENABLED="0", TINY_SLEEP="0.1", RAY_AUTH_MODE="disabled"
    )
    script = Path(__file__).with_name("on_cluster.py")
    env["PYTHONPATH"] = f"{folder}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run(
        [*prefix, sys.executable, str(script), str(folder), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_cluster(tmp_path_factory.mktemp("cluster"))


def rows_by_path(dataset: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pa.concat_tables(pq.ParquetFile(f).read() for f in dataset.iterdir()).to_pylist():
        rows.setdefault(Path(row["path"]).name, []).append(row)
    return rows


REASONS = {
    7: "truncated PNG image",
    31: "empty file",
    58: "not an image",
}


def test_cluster_that_loses_an_actor_explains_each_image_once(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((cluster / "facts.json").read_text())
    assert len(facts["processes"]) == 3, "two actors, and the one in the place of the killed"
    assert_each_image_once(cluster, monkeypatch)


@pytest.mark.slow
def test_cluster_that_loses_a_machine_explains_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_each_image_once(run_on_cluster(tmp_path, "machine"), monkeypatch)


def assert_each_image_once(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((cluster / "facts.json").read_text())
    assert (cluster / "killed").exists()
    assert len(facts["nodes"]) >= 2
    rows = rows_by_path(cluster / "python.parquet")
    paths = sorted((cluster / "photos").iterdir())
    assert sorted(rows) == [path.name for path in paths]
    assert {len(of_one) for of_one in rows.values()} == {1}
    reasons = REASONS | {22: "the network raised RuntimeError: white is too bright"}
    for index, path in enumerate(paths):
        (row,) = rows[path.name]
        assert str(row["error"]).startswith(reasons.get(index, "None")), row

    monkeypatch.chdir(cluster)
    loaded = load_model("tiny_network:make")
    explained = [path for index, path in enumerate(paths) if index not in reasons]
    images = torch.stack([loaded.preprocess(read_image(path)) for path in explained])
    result = Explainer(loaded.model)(images)
    for i, path in enumerate(explained):
        (row,) = rows[path.name]
        assert row["target"] == result.targets[i, 0]
        assert row["score"] == pytest.approx(result.scores[i, 0].item(), abs=1e-6)
        wanted = result.maps[i, 0].double().numpy()
        got = np.array(row["map"], np.float64).reshape(row["h"], row["w"]) * row["scale"]
        # Within 1e-6, but for the rounding to float16 that the column is written in.
        assert (np.abs(got - wanted) <= 1e-6 + 2.0**-11 * np.abs(wanted)).all()


def test_command_line_on_the_cluster(cluster: Path) -> None:
    facts = json.loads((cluster / "facts.json").read_text())
    assert facts["status"] == 3, facts["said"]
    summary = facts["summary"]
    assert summary["counts"] == {"found": 60, "explained": 57, "failed": 3}
    assert summary["rows"] == 114
    indices = {int(Path(line["path"]).name[:3]) for line in summary["failed"]}
    assert indices == set(REASONS)
    rows = rows_by_path(cluster / "cli" / "maps.parquet")
    assert sorted(map(len, rows.values())) == [1] * 3 + [2] * 57
