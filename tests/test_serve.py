"""The HTTP service: its answers are the engine's, and nothing that is sent to it ends it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from torch import Tensor

import networks
from commandline import MODEL, command, environment, write_images, write_network
from diffcam_fast import Explainer
from diffcam_fast.cli.serve import _listen
from diffcam_fast.images.inputs import Source
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.outputs.writers import OverlayWriter, Record
from diffcam_fast.serve import Limits, create_app

PREPROCESS = Preprocess(size=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
LABELS = ("ant", "bee", "cat", "dog", "eel")
JPEG = {"Content-Type": "image/jpeg"}


def picture(seed: int = 0, size: tuple[int, int] = (30, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Counting:
    """An explainer that notes its batches, waits on request, and raises at dark images."""

    def __init__(self, inner: Explainer) -> None:
        self._inner = inner
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    @property
    def layer(self) -> str:
        return self._inner.layer

    def __call__(self, images: Tensor, targets: Any = None, *, topk: int | None = None) -> Any:
        assert self.go.wait(30)
        self.sizes.append(len(images))
        if (images.mean(dim=(1, 2, 3)) < -1.5).any():
            raise KeyError("dark")
        return self._inner(images, targets, topk=topk)


@pytest.fixture(scope="module")
def inner() -> Explainer:
    return Explainer(networks.with_mlp(), example_inputs=torch.rand(2, 3, 16, 16))


@pytest.fixture
def explainer(inner: Explainer) -> Counting:
    return Counting(inner)


def app_of(explainer: Any, **limits: Any) -> FastAPI:
    return create_app(
        explainer, PREPROCESS, classes=5, labels=LABELS, name="five", limits=Limits(**limits)
    )


@pytest.fixture
def client(explainer: Counting) -> Iterator[TestClient]:
    with TestClient(app_of(explainer)) as made:
        yield made


def check(answer: dict[str, Any], inner: Explainer, image: Image.Image, targets: Any) -> None:
    expected = inner(PREPROCESS(image)[None], targets)
    assert [one["target"] for one in answer["explanations"]] == expected.targets[0].tolist()
    for index, one in enumerate(answer["explanations"]):
        assert one["label"] == LABELS[one["target"]]
        assert one["finite"]
        torch.testing.assert_close(
            torch.tensor(one["map"]), expected.maps[0, index], rtol=1e-5, atol=1e-6
        )
        chance = float(expected.probabilities[0, one["target"]])
        assert one["probability"] == pytest.approx(chance, rel=1e-5)
        assert one["score"] == pytest.approx(float(expected.scores[0, index]), rel=1e-4)


def test_maps_are_the_engines(client: TestClient, inner: Explainer) -> None:
    image = picture()
    answer = client.post("/v1/explain", content=png(image)).json()
    assert (answer["model"], answer["method"], answer["contrast"], answer["layer"]) == (
        "five",
        "diff_grad_cam",
        "log_odds",
        inner.layer,
    )
    assert tuple(answer["box"]) == PREPROCESS.box(image.size)
    check(answer, inner, image, None)
    named = client.post("/v1/explain?target=cat&target=0", content=png(image)).json()
    check(named, inner, image, [[2, 0]])
    best = client.post("/v1/explain?topk=3", content=png(image)).json()
    order = inner(PREPROCESS(image)[None], topk=3).targets.tolist()
    check(best, inner, image, order)


@pytest.mark.parametrize("mode", ["side", "blend"])
def test_an_overlay_is_what_the_command_line_writes(
    client: TestClient, inner: Explainer, tmp_path: Path, mode: Any
) -> None:
    image = picture(1)
    response = client.post(f"/v1/overlay?mode={mode}&target=dog", content=png(image))
    assert response.headers["content-type"] == "image/png"
    result = inner(PREPROCESS(image)[None], 3)
    record = Record(
        source=Source(Path("a.png"), "a"),
        targets=[3],
        labels=["dog"],
        probabilities=[0.0],
        scores=[0.0],
        maps=result.maps[0].numpy(),
        heatmaps=None,
        view=PREPROCESS.view(image, 1024),
        finite=[True],
    )
    [path] = OverlayWriter(tmp_path, mode=mode).write([record])
    with Image.open(path) as expected, Image.open(io.BytesIO(response.content)) as made:
        assert np.array_equal(np.asarray(made), np.asarray(expected))


async def post_all(app: FastAPI, bodies: list[bytes], path: str = "/v1/explain") -> list[Any]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await asyncio.gather(*(client.post(path, content=body) for body in bodies))


def test_requests_that_meet_share_a_batch(explainer: Counting, inner: Explainer) -> None:
    images = [picture(seed) for seed in range(12)]
    app = app_of(explainer, batch_size=4, max_wait=0.5)
    answers = asyncio.run(post_all(app, [png(image) for image in images]))
    assert sum(explainer.sizes) == 12 and len(explainer.sizes) < 6
    assert max(explainer.sizes) == 4
    # Each gets its own, whatever it shared a batch with.
    for answer, image in zip(answers, images, strict=True):
        check(answer.json(), inner, image, None)


def test_an_image_that_the_network_raises_at_fails_alone(explainer: Counting) -> None:
    images = [picture(seed) for seed in range(6)]
    images[2] = Image.new("RGB", (20, 20))
    app = app_of(explainer, batch_size=8, max_wait=0.5)
    answers = asyncio.run(post_all(app, [png(image) for image in images]))
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200, 200, 200]
    assert answers[2].json() == {"detail": "the network raised KeyError: 'dark'"}


def test_more_than_may_wait_are_refused(explainer: Counting) -> None:
    explainer.go.clear()
    app = app_of(explainer, queue=3, batch_size=1, max_wait=0)

    async def run() -> list[Any]:
        async def let_go() -> None:
            await asyncio.sleep(0.5)
            explainer.go.set()

        made, _ = await asyncio.gather(post_all(app, [png(picture())] * 8), let_go())
        return made

    answers = asyncio.run(run())
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 3 + [503] * 5
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert "too many requests wait" in refused.json()["detail"]


def test_what_takes_too_long_is_given_up(explainer: Counting) -> None:
    explainer.go.clear()
    app = app_of(explainer, timeout=0.3, batch_size=1, max_wait=0)
    answers = asyncio.run(post_all(app, [png(picture())] * 3))
    assert [answer.status_code for answer in answers] == [504] * 3
    explainer.go.set()
    # Those that had not begun are not run at all.
    assert asyncio.run(post_all(app, [png(picture())]))[0].status_code == 200
    assert len(explainer.sizes) <= 2


@pytest.mark.parametrize(
    ("body", "path", "status", "detail"),
    [
        (b"", "/v1/explain", 400, "the image empty file"),
        (b"no picture", "/v1/explain", 400, "the image not an image"),
        (png(picture())[:200], "/v1/explain", 400, "the image truncated PNG image"),
        (png(picture()), "/v1/explain?target=unicorn", 400, "no class is called"),
        (png(picture()), "/v1/explain?target=7", 400, "class 7 is out of range"),
        (png(picture()), "/v1/explain?target=1&topk=2", 400, "exclude each other"),
        (png(picture()), "/v1/explain?topk=17", 400, "17 classes, the limit is 16"),
        (png(picture()), "/v1/explain?topk=6", 400, "topk is 6, but the model has 5 classes"),
        (png(picture(size=(200, 200))), "/v1/explain", 413, "too large: 200 x 200"),
        (bytes(60_000) * 3, "/v1/explain", 413, "the limit is 150000 bytes"),
    ],
)
def test_errors(inner: Explainer, body: bytes, path: str, status: int, detail: str) -> None:
    app = app_of(inner, max_pixels=20_000, max_bytes=150_000)
    [answer] = asyncio.run(post_all(app, [body], path))
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


def test_too_many_bytes_are_not_read(inner: Explainer) -> None:
    """Whoever sends without end is stopped at the limit."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield bytes(1000)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(inner, max_bytes=5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/explain", content=endless())

    assert asyncio.run(run()).status_code == 413
    assert sent <= 8000


@pytest.mark.parametrize("topk", ["0", "many"])
def test_options_out_of_range(client: TestClient, topk: str) -> None:
    assert client.post(f"/v1/explain?topk={topk}", content=png(picture())).status_code == 422


def test_a_model_that_makes_nan() -> None:
    network = networks.pooled()
    with torch.no_grad():
        network[2].bias[1] = torch.nan
    explainer = Explainer(network, example_inputs=torch.rand(2, 3, 16, 16))
    [answer] = asyncio.run(post_all(app_of(explainer), [png(picture())], "/v1/explain?target=1"))
    [one] = json.loads(answer.content)["explanations"]
    assert one["probability"] is None and not one["finite"]
    assert {value for row in one["map"] for value in row} == {None}
    [shown] = asyncio.run(post_all(app_of(explainer), [png(picture())], "/v1/overlay?target=1"))
    assert shown.status_code == 200


def test_metrics_move(client: TestClient) -> None:
    client.post("/v1/explain", content=png(picture()))
    client.post("/v1/explain", content=b"no picture")
    client.get("/nowhere")
    text = client.get("/metrics").text
    for line in (
        'diffcam_requests_total{path="/v1/explain",status="200"} 1.0',
        'diffcam_requests_total{path="/v1/explain",status="400"} 1.0',
        'diffcam_requests_total{path="other",status="404"} 1.0',
        'diffcam_batch_size_bucket{le="1.0"} 1.0',
        "diffcam_images_total 1.0",
        "diffcam_queue_length 0.0",
    ):
        assert line in text.splitlines()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ok"}


def test_mounted_in_another_service(inner: Explainer) -> None:
    outer = FastAPI()
    outer.mount("/cam", app_of(inner))
    [answer] = asyncio.run(post_all(outer, [png(picture())], "/cam/v1/explain"))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size must be positive"), ({"max_wait": -1}, "max_wait must be 0")],
)
def test_limits_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**options)


for _kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
    # Images, and what is none.
    schemathesis.openapi.media_type(
        _kind, st.sampled_from([png(picture(seed)) for seed in range(3)]) | st.binary()
    )


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/explain", "/v1/overlay", "/health", "/ready", "/metrics"])
def test_the_description_holds(inner: Explainer, path: str, mode: GenerationMode) -> None:
    """Schemathesis: what the schema allows is answered as it says, what it does not is refused."""
    if mode is GenerationMode.NEGATIVE and not path.startswith("/v1"):
        pytest.skip("it takes nothing that could be wrong")
    schema = schemathesis.openapi.from_asgi("/openapi.json", app_of(inner))
    names = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
    checks = [CHECKS.get_one(name) for name in names]
    operation = schema[path]["POST" if path.startswith("/v1") else "GET"]
    statuses = []

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case: Any) -> None:
        statuses.append(case.call_and_validate(checks=checks).status_code)

    conforms()
    assert set(statuses) <= {200, 400, 413, 422}
    assert (200 in statuses) or mode is GenerationMode.NEGATIVE


# The process itself.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path)
    write_images(tmp_path / "photos", 3)
    return tmp_path


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its address; it ends with the test, whatever that finds."""
    arguments = command("serve", "-m", MODEL, "--port", "0", "--backend", "torch")
    with subprocess.Popen(
        arguments, cwd=folder, env=environment(**settings), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line
            yield process, line.split()[2].rstrip(",")
        finally:
            process.kill()


def test_who_reads_the_address_is_taken(folder: Path) -> None:
    """Nobody is refused between the line and the server's first turn, however short that is."""
    with serving(folder) as (_, address):
        assert httpx.get(f"{address}/health", timeout=30).status_code == 200


def test_it_listens_before_it_says_so() -> None:
    import socket

    with _listen("127.0.0.1", 0) as listening, socket.socket() as client:
        client.connect(listening.getsockname())


def test_diffcam_serve_answers_what_it_accepted(folder: Path) -> None:
    with serving(folder, TINY_SLEEP="1.0") as (process, address):
        data = (folder / "photos" / "000-red.png").read_bytes()
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{address}/v1/explain", content=data, timeout=30))

        thread = threading.Thread(target=ask)
        wait_for(lambda: httpx.get(f"{address}/ready").status_code == 200)
        thread.start()
        wait_for(lambda: 'le="1.0"} 1.0' in httpx.get(f"{address}/metrics").text)
        os.kill(process.pid, signal.SIGTERM)
        thread.join(30)
        assert process.wait(30) == 0
    assert answers[0].json()["explanations"][0]["label"] == "red"
    assert answers[0].json()["explanations"][0]["probability"] > 0.3


def test_a_port_that_is_taken(folder: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command("serve", "-m", MODEL, "--port", port, "--backend", "torch"),
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
