"""Streams: every image once and in order, whatever the source, the reader or the network does."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import networks
from diffcam_fast import Explainer
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.stream import FLUSH, OutOfMemory, Profile, Streamed, stream
from diffcam_fast.stream.channel import Channel, Closed, TookTooLong, Workers

PREPROCESS = Preprocess(size=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(networks.with_mlp(), example_inputs=torch.rand(2, 3, 16, 16))


def pictures(count: int = 7) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8))
        for i in range(count)
    ]


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def maps_of(streamed: list[Streamed]) -> Tensor:
    assert [one.index for one in streamed] == list(range(len(streamed)))
    parts = []
    for one in streamed:
        assert one.error is None and one.explanation is not None and len(one.explanation) == 1
        parts.append(one.explanation.maps)
    return torch.cat(parts)


def check(explainer: Explainer, streamed: list[Streamed], images: list[Image.Image]) -> None:
    """The maps are those of the explainer itself, in order."""
    expected = explainer(torch.stack([PREPROCESS(image) for image in images])).maps
    torch.testing.assert_close(maps_of(streamed), expected, rtol=1e-5, atol=1e-6)
    # Images in another order have other maps.
    assert not torch.allclose(expected, expected.flip(0), rtol=1e-2)


# What a source may be.


def paths(folder: Path, images: list[Image.Image]) -> list[Path]:
    made = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(made, images, strict=True):
        image.save(path)
    return made


class ByIndex(Dataset[Any]):
    """A map-style dataset, which Python's own iteration would not end."""

    def __init__(self, values: list[Any], broken: int | None = None) -> None:
        self.values, self.broken = values, broken

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise OSError("the disk has a scratch")
        return self.values[index % len(self.values)]


def hugging_face(folder: Path, images: list[Image.Image]) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": images, "label": list(range(len(images)))}
    return datasets.Dataset.from_dict(rows, features=features)


def hugging_face_undecoded(folder: Path, images: list[Image.Image]) -> Any:
    import datasets

    made = hugging_face(folder, images)
    return made.cast_column("image", datasets.Image(decode=False))


def web_dataset(folder: Path, images: list[Image.Image]) -> Any:
    import webdataset

    with webdataset.TarWriter(str(folder / "shard.tar")) as sink:
        for i, image in enumerate(images):
            sink.write({"__key__": f"sample{i}", "png": encoded(image), "cls": i})
    return webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False)


SOURCES: dict[str, Callable[[Path, list[Image.Image]], Any]] = {
    "paths": paths,
    "texts": lambda folder, images: [str(path) for path in paths(folder, images)],
    "bytes": lambda folder, images: [encoded(image) for image in images],
    "pictures": lambda folder, images: images,
    "a generator": lambda folder, images: (image for image in images),
    "arrays": lambda folder, images: [np.asarray(image) for image in images],
    "frames, channels first": lambda folder, images: (
        {"data": torch.from_numpy(np.array(image)).permute(2, 0, 1), "pts": i / 25}
        for i, image in enumerate(images)
    ),
    "labelled": lambda folder, images: [(image, 3) for image in images],
    "prepared": lambda folder, images: torch.stack([PREPROCESS(image) for image in images]),
    "prepared array": lambda folder, images: np.stack([PREPROCESS(i).numpy() for i in images]),
    "a dataset": lambda folder, images: ByIndex([(image, 1) for image in images]),
    "a DataLoader": lambda folder, images: DataLoader(
        TensorDataset(
            torch.stack([PREPROCESS(image) for image in images]), torch.arange(len(images))
        ),
        batch_size=3,
    ),
    "a DataLoader of mappings": lambda folder, images: DataLoader(
        ByIndex([{"pixel_values": PREPROCESS(image), "labels": 1} for image in images]),
        batch_size=2,
    ),
    "Hugging Face": hugging_face,
    "Hugging Face, undecoded": hugging_face_undecoded,
    "Hugging Face, in batches": lambda folder, images: hugging_face(folder, images).iter(3),
    "lists of pictures": lambda folder, images: [images[:4], images[4:]],
    "WebDataset": web_dataset,
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(explainer: Explainer, tmp_path: Path, name: str) -> None:
    images = pictures()
    source = SOURCES[name](tmp_path, images)
    streamed = list(explainer.stream(source, preprocess=PREPROCESS, batch_size=3))
    check(explainer, streamed, images)


def test_a_folder_of_one_size_as_an_array(explainer: Explainer) -> None:
    array = np.random.default_rng(0).integers(0, 255, (5, 20, 20, 3), dtype=np.uint8)
    streamed = list(explainer.stream(array, preprocess=PREPROCESS, batch_size=2))
    check(explainer, streamed, [Image.fromarray(a) for a in array])


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "LA"])
def test_a_picture_is_what_its_file_would_be(
    explainer: Explainer, tmp_path: Path, mode: str
) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (24, 30, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != "RGBA":
        picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        both = [tmp_path / "a.png", opened]
        maps = maps_of(list(explainer.stream(both, preprocess=PREPROCESS)))
    assert torch.equal(maps[0], maps[1])


def test_keys(explainer: Explainer, tmp_path: Path) -> None:
    images = pictures(3)

    def keys(source: Any) -> list[Any]:
        return [one.key for one in explainer.stream(source, preprocess=PREPROCESS)]

    assert keys(images) == [0, 1, 2]
    files = paths(tmp_path, images)
    assert keys(files) == files
    assert keys(web_dataset(tmp_path, images)) == ["sample0", "sample1", "sample2"]
    batches = [torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)]
    assert keys(batches) == [0, 1, 2]


def test_pictures_on_request(explainer: Explainer) -> None:
    images = pictures(2)
    kept = list(explainer.stream(images, preprocess=PREPROCESS, pictures=True))
    for one, image in zip(kept, images, strict=True):
        assert one.picture is not None
        assert one.picture.tobytes() == PREPROCESS.view(image).tobytes()
    plain = explainer.stream(images, preprocess=PREPROCESS)
    assert all(one.picture is None for one in plain)


def test_heatmaps_on_request(explainer: Explainer) -> None:
    images = torch.rand(5, 3, 16, 16)
    made = list(explainer.stream(images, topk=2, batch_size=2, heatmaps=(20, 24)))
    for one in made:
        assert one.explanation is not None and one.heatmaps is not None
        expected = one.explanation.heatmaps((20, 24))[0]
        assert one.heatmaps.shape == (2, 20, 24) and one.heatmaps.dtype == torch.uint8
        assert (one.heatmaps.float() / 255 - expected).abs().max() <= 0.5001 / 255
    assert all(one.heatmaps is None for one in explainer.stream(images))


def test_targets_and_topk(explainer: Explainer) -> None:
    images = torch.rand(4, 3, 16, 16)
    whole = explainer(images, topk=2)
    best = [one.explanation for one in explainer.stream(images, topk=2, batch_size=4)]
    assert [e.targets[0].tolist() for e in best if e is not None] == whole.targets.tolist()
    fixed = [one.explanation for one in explainer.stream(images, targets=(4, 0), batch_size=3)]
    assert [e.targets.tolist() for e in fixed if e is not None] == [[[4, 0]]] * 4


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (object(), TypeError, "is no image; a source may hold paths"),
        ({"label": 3}, ValueError, "a sample has label, and no image under one of"),
        ((), ValueError, "a sample is empty"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"must be uint8 .* got \(4, 4, 5\)"),
        (np.zeros((4, 4), np.float32), ValueError, r"must be \(C, H, W\)"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "is no image"),
    ],
)
def test_what_is_no_image(
    explainer: Explainer, sample: Any, error: type[Exception], message: str
) -> None:
    source = [torch.rand(3, 16, 16), sample]
    made = explainer.stream(source, preprocess=PREPROCESS)
    # What came before is explained all the same.
    assert next(made).index == 0
    with pytest.raises(error, match=message):
        next(made)


def test_pictures_want_a_preparation(explainer: Explainer) -> None:
    with pytest.raises(ValueError, match="give preprocess="):
        list(explainer.stream(pictures(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 1, got -1"),
        ({"timeout": 0.0}, "timeout must be a positive number of seconds"),
        ({"targets": 1, "topk": 1}, "give targets or topk, not both"),
    ],
)
def test_options_are_checked_at_once(
    explainer: Explainer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explainer.stream([], **options)


# What goes wrong.


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["good", "truncated", "text", "odd size"]), max_size=24),
    batch_size=st.integers(1, 7),
    workers=st.integers(1, 4),
)
def test_every_image_once_and_in_order(kinds: list[str], batch_size: int, workers: int) -> None:
    explainer = Explainer(networks.pooled(), example_inputs=torch.rand(2, 3, 16, 16))
    good = encoded(pictures(1)[0])
    data = {"good": good, "truncated": good[: len(good) // 2], "text": b"no picture"}

    def source() -> Iterator[Any]:
        for kind in kinds:
            yield torch.rand(3, 12, 20) if kind == "odd size" else data[kind]

    made = list(
        explainer.stream(source(), preprocess=PREPROCESS, batch_size=batch_size, workers=workers)
    )
    assert [one.index for one in made] == list(range(len(kinds)))
    for one, kind in zip(made, kinds, strict=True):
        assert (one.explanation is None) == (kind in ("truncated", "text"))
        assert (one.explanation is None) == (one.error is not None)
        if one.explanation is not None:
            assert tuple(one.explanation.maps.shape[2:]) == ((6, 10) if "odd" in kind else (8, 8))


def test_a_source_that_raises(explainer: Explainer) -> None:
    def source() -> Iterator[Tensor]:
        yield from torch.rand(5, 3, 16, 16)
        raise ConnectionError("the network is down")

    made = explainer.stream(source(), batch_size=2)
    assert [next(made).index for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ConnectionError, match="the network is down"):
        next(made)


def test_a_sample_that_its_dataset_raises_at(explainer: Explainer) -> None:
    dataset = ByIndex(list(torch.rand(5, 3, 16, 16)), broken=3)
    made = list(explainer.stream(dataset, batch_size=2))
    assert [one.error for one in made if one.error] == [
        "cannot be prepared: OSError('the disk has a scratch')"
    ]
    assert [one.index for one in made if one.explanation is not None] == [0, 1, 2, 4]


def test_a_reader_that_hangs(
    explainer: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many readers hang as there are workers, and more: others take their places."""
    from diffcam_fast.stream import items

    stuck = threading.Event()
    whole = items.read_image

    def read(path: Path) -> Image.Image:
        if path.stem in "135":
            stuck.wait()
        return whole(path)

    monkeypatch.setattr(items, "read_image", read)
    source = paths(tmp_path, pictures())
    made = list(explainer.stream(source, preprocess=PREPROCESS, workers=2, timeout=0.3))
    stuck.set()
    errors = {one.index: one.error for one in made if one.error}
    assert errors == dict.fromkeys((1, 3, 5), "reading it took more than 0.3 s")
    assert [one.index for one in made] == list(range(7))


def test_a_source_that_hangs(explainer: Explainer) -> None:
    stuck = threading.Event()

    def source() -> Iterator[Tensor]:
        yield from torch.rand(3, 3, 16, 16)
        stuck.wait()

    made = explainer.stream(source(), batch_size=2, timeout=0.3)
    assert [next(made).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TimeoutError, match=r"the source gave nothing for 0\.3 s"):
        next(made)
    stuck.set()


def test_a_hanging_reader_does_not_keep_the_process(tmp_path: Path) -> None:
    script = """
import threading, torch
from torch import nn
from diffcam_fast import Explainer
def source():
    yield from torch.rand(2, 3, 8, 8)
    threading.Event().wait()
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
explainer = Explainer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head))
print(next(explainer.stream(source(), batch_size=2)).index, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "0\n"


class Picky(nn.Module):
    """Raises at images whose first value is above a limit, and at batches above a size."""

    def __init__(self, error: Exception, *, largest: int = 1000) -> None:
        super().__init__()
        self.network, self.error, self.largest = networks.pooled(), error, largest
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.largest or (images[:, 0, 0, 0] > 10).any():
            raise self.error
        self.sizes.append(len(images))
        logits: Tensor = self.network(images)
        return logits


def picky(error: Exception, **options: Any) -> tuple[Explainer, Picky]:
    model = Picky(error, **options)
    return Explainer(model, example_inputs=torch.rand(2, 3, 16, 16)), model


def test_a_strange_image_fails_alone_and_the_batch_grows_again() -> None:
    explainer, model = picky(KeyError("odd"))
    images = torch.rand(24, 3, 16, 16)
    images[5, 0, 0, 0] = 11
    model.sizes.clear()
    made = list(explainer.stream(images, batch_size=8))
    assert {one.index: one.error for one in made if one.error} == {
        5: "the network raised KeyError: 'odd'"
    }
    assert [one.index for one in made] == list(range(24))
    assert model.sizes[-2:] == [8, 8]


def test_a_largest_batch_is_found_and_kept() -> None:
    explainer, model = picky(ValueError("too many"), largest=3)
    model.sizes.clear()
    made = list(explainer.stream(torch.rand(12, 3, 16, 16), batch_size=8))
    assert all(one.error is None for one in made)
    assert model.sizes == [2] * 6


def test_memory_that_runs_out() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    explainer, model = picky(error, largest=2)
    made = list(explainer.stream(torch.rand(9, 3, 16, 16), batch_size=4))
    assert [one.index for one in made] == list(range(9))
    model.largest = 0
    with pytest.raises(OutOfMemory, match="with a single image"):
        list(explainer.stream(torch.rand(3, 3, 16, 16), batch_size=4))


def test_a_model_that_makes_nan() -> None:
    network = networks.pooled()
    explainer = Explainer(network, example_inputs=torch.rand(2, 3, 16, 16))
    images = torch.rand(4, 3, 16, 16)
    images[2] = torch.nan
    finite = [
        bool(one.explanation.finite.all())
        for one in explainer.stream(images, batch_size=4)
        if one.explanation is not None
    ]
    assert finite == [True, True, False, True]


# Side by side.


def test_a_flush_does_not_wait_for_a_whole_batch(explainer: Explainer) -> None:
    go_on = threading.Event()

    def source() -> Iterator[Any]:
        yield from torch.rand(3, 3, 16, 16)
        yield FLUSH
        assert go_on.wait(30)
        yield from torch.rand(2, 3, 16, 16)

    made = explainer.stream(source(), batch_size=16)
    # They are here although the source waits, and no batch of 16 is full.
    assert [next(made).index for _ in range(3)] == [0, 1, 2]
    go_on.set()
    assert [one.index for one in made] == [3, 4]


def test_a_slow_caller_holds_the_source_back(explainer: Explainer) -> None:
    asked = 0

    def source() -> Iterator[Tensor]:
        nonlocal asked
        for image in torch.rand(200, 3, 16, 16):
            asked += 1
            yield image

    made = explainer.stream(source(), batch_size=4, workers=2)
    for _ in range(4):
        next(made)
    time.sleep(0.5)
    # Two batches done and one on its way out, one in the network, two and the workers' decoded.
    assert asked <= 4 * (1 + 2 + 1 + 1 + 2) + 2 + 2
    made.close()


def test_a_stream_that_is_left_ends_its_threads(explainer: Explainer) -> None:
    before = threading.active_count()
    made = explainer.stream(torch.rand(100, 3, 16, 16), batch_size=2)
    next(made)
    made.close()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_stages_work_side_by_side() -> None:
    """A reader, a network and a caller that sleep 20 ms each take little more than one of them."""

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.pooled()

        def forward(self, images: Tensor) -> Tensor:
            time.sleep(0.04)
            logits: Tensor = self.network(images)
            return logits

    explainer = Explainer(Slow(), example_inputs=torch.rand(2, 3, 16, 16))
    images = torch.rand(20, 3, 16, 16)

    def source() -> Iterator[Tensor]:
        for image in images:
            time.sleep(0.04)
            yield image

    profile = Profile()
    start = time.perf_counter()
    for _ in explainer.stream(source(), batch_size=1, profile=profile):
        time.sleep(0.04)
    taken = time.perf_counter() - start
    # One after another they take 2.4 s.
    assert 0.8 < taken < 1.7
    shares = {stage.name: stage.share for stage in profile.stages}
    assert min(shares["read"], shares["network"], shares["caller"]) > 0.5
    assert shares["decode"] < 0.2


def test_a_profile_names_the_limit(explainer: Explainer) -> None:
    profile = Profile()
    assert profile.lines() == []
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = profile.limit
    for _ in explainer.stream(torch.rand(6, 3, 16, 16), batch_size=2, profile=profile):
        time.sleep(0.05)
    assert profile.limit.name == "caller"
    assert {stage.name: stage.count for stage in profile.stages} == {
        "read": 7,
        "decode": 6,
        "network": 3,
        "caller": 3,
    }
    [line] = [line for line in profile.lines() if "limit" in line]
    assert line.startswith("caller")


def test_anything_that_is_called_as_an_explainer(explainer: Explainer) -> None:
    class Mine:
        layer = "mine"

        def __call__(self, images: Tensor, targets: Any = None, *, topk: Any = None) -> Any:
            return explainer(images, targets, topk=topk)

    made = list(stream(Mine(), torch.rand(3, 3, 16, 16)))
    assert [one.index for one in made] == [0, 1, 2]


# The parts.


def test_a_channel_wakes_who_waits() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    raised: list[type[BaseException]] = []

    def put() -> None:
        try:
            channel.put(2)
        except Closed:
            raised.append(Closed)

    thread = threading.Thread(target=put)
    thread.start()
    channel.close()
    thread.join(5)
    assert raised == [Closed]
    with pytest.raises(Closed):
        channel.get()
    empty: Channel[int] = Channel(1)
    with pytest.raises(TookTooLong):
        empty.get(0.01)


def test_a_task_raises_its_own_timeout() -> None:
    workers = Workers(1)

    def own() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        workers.submit(own).result(5)
    assert workers.submit(lambda: 3).result(None) == 3
    workers.close()


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
def test_the_same_maps_from_a_gpu(recorded: bool) -> None:
    """Copies and kernels are on streams of their own; each result is whole when it is given out."""
    explainer = Explainer(networks.pooled().cuda(), example_inputs=networks.images())
    made = CompiledExplainer(explainer, batch_size=8) if recorded else explainer
    random = torch.Generator().manual_seed(3)
    pictures = torch.randint(256, (403, 64, 48, 3), generator=random, dtype=torch.uint8).numpy()
    preprocess = Preprocess(size=(32, 24))
    found = list(stream(made, pictures, preprocess=preprocess, batch_size=8, heatmaps=(32, 24)))
    assert [one.index for one in found] == list(range(403))
    for one in (found[0], found[200], found[402]):
        picture = Image.fromarray(pictures[one.index])
        expected = explainer(preprocess(picture)[None]).cpu()
        assert one.explanation is not None and one.heatmaps is not None
        # A convolution of eight images on a GPU is another kernel than one of one image, in TF32.
        torch.testing.assert_close(one.explanation.maps, expected.maps, rtol=1e-3, atol=1e-4)
        heatmaps = expected.heatmaps((32, 24))[0] * 255
        assert (one.heatmaps.float() - heatmaps).abs().max() <= 2
