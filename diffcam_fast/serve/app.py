"""The service itself: its addresses, its limits, and what it answers."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from torch import Tensor

from diffcam_fast import __version__
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.colour import blend, side_by_side
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import ImageError, decode_image
from diffcam_fast.models.labels import find_target
from diffcam_fast.serve.answers import Answer, Problem, State, answer_of
from diffcam_fast.serve.batching import Batcher, Kind, QueueFull, Refusal
from diffcam_fast.serve.metrics import Metrics
from diffcam_fast.stream import Explains, NetworkStage, OutOfMemory, Preparation, normalises_on
from diffcam_kernels import reference

T = TypeVar("T")

_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The image file itself: JPEG, PNG, WebP, BMP, TIFF or GIF.",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _TYPES},
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "No image that can be read, or a class that the model does not have.",
        413: "The image has too many bytes or pixels.",
        500: "The network did not take the image.",
        503: "Too many requests wait, or memory ran out; try again later.",
        504: "It took too long.",
    }.items()
}
_VIEW = 1024

Targets = Annotated[
    list[str] | None,
    Query(description="Class to explain, by index or label; may be repeated. None: the predicted."),
]
TopK = Annotated[int | None, Query(ge=1, description="The k most probable classes instead.")]


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        batch_size: images that are explained at once.
        max_wait: seconds that a request waits for others to share a batch with.
        queue: requests that may be under way; more are refused.
        max_bytes: of an image file.
        max_pixels: of an image.
        timeout: seconds from a request to its answer.
        max_targets: classes that one request may ask for.
    """

    batch_size: int = 16
    max_wait: float = 0.005
    queue: int = 256
    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    timeout: float = 30.0
    max_targets: int = 16

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "queue",
            "max_bytes",
            "max_pixels",
            "timeout",
            "max_targets",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_wait < 0:
            raise ValueError(f"max_wait must be 0 or more seconds, got {self.max_wait}")


def create_app(
    explainer: Explains,
    preprocess: Preprocess,
    *,
    classes: int,
    labels: Sequence[str] | None = None,
    name: str = "model",
    limits: Limits | None = None,
    cmap: str = "turbo",
) -> FastAPI:
    """The service for one explainer, to be run by any ASGI server, or mounted in another service.

    It has no authentication, and belongs behind what has.

    Args:
        explainer: an `Explainer`, an `OnnxExplainer`, or what is called as they are.
        preprocess: from a photograph to the network's input.
        classes: K, the number of logits.
        labels: K class names.
        name: what answers call the model.
        limits: None: the usual ones.
        cmap: name of a matplotlib colour map, for overlays.

    Raises:
        ValueError: labels that do not fit the classes.
    """
    if labels is not None and len(labels) != classes:
        raise ValueError(f"there are {len(labels)} labels for {classes} classes")
    service = _Service(explainer, preprocess, classes, labels, name, limits or Limits(), cmap)
    app = FastAPI(
        title="diffcam-fast",
        version=__version__,
        description="Where an image classifier looked.",
        lifespan=service.lifespan,
    )
    app.middleware("http")(service.measured)

    @app.post("/v1/explain", openapi_extra=_BODY, responses=_PROBLEMS)
    async def explain(request: Request, target: Targets = None, topk: TopK = None) -> Answer:
        """The maps of an image, as numbers."""

        def answer(seen: Seen, explanation: Explanation) -> Answer:
            return answer_of(explanation, model=name, box=seen.box, labels=labels)

        return await service.explained(request, target, topk, answer)

    @app.post(
        "/v1/overlay",
        openapi_extra=_BODY,
        response_class=Response,
        responses={**_PROBLEMS, 200: {"content": {"image/png": {}}, "description": "A picture."}},
    )
    async def overlay(
        request: Request,
        target: Annotated[
            str | None, Query(description="Class to explain, by index or label.")
        ] = None,
        mode: Annotated[
            Literal["side", "blend"], Query(description="Beside the image, or blended into it.")
        ] = "blend",
        alpha: Annotated[float, Query(ge=0, le=1, description="Share of the colours.")] = 0.5,
    ) -> Response:
        """What the network saw, with the heatmap over it, as PNG."""

        def picture(seen: Seen, explanation: Explanation) -> bytes:
            return service.picture(seen.view, explanation, mode, alpha)

        targets = None if target is None else [target]
        data = await service.explained(request, targets, None, picture)
        return Response(data, media_type="image/png")

    @app.get("/health")
    async def health() -> State:
        """The process answers."""
        return State(status="ok")

    @app.get("/ready", responses={503: {"model": Problem, "description": "Not now."}})
    async def ready() -> State:
        """Images can be explained."""
        if not service.ready:
            raise HTTPException(503, "the network is not running")
        return State(status="ok")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "For Prometheus."}},
    )
    async def metrics() -> Response:
        """Counters and histograms, in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


@dataclass(frozen=True)
class Seen:
    """What is kept of an image once it is prepared.

    Attributes:
        pixels: as the network takes them.
        box: the part of the image that it sees, in pixels.
        view: that part, 1024 pixels on its longer side at most.
    """

    pixels: Tensor
    box: tuple[float, float, float, float]
    view: Image.Image


class _Service:
    """What the addresses share."""

    def __init__(
        self,
        explainer: Explains,
        preprocess: Preprocess,
        classes: int,
        labels: Sequence[str] | None,
        name: str,
        limits: Limits,
        cmap: str,
    ) -> None:
        self._explainer, self._preprocess = explainer, preprocess
        self._classes, self._labels, self._limits, self._cmap = classes, labels, limits, cmap
        self._device = torch.device(getattr(explainer, "device", "cpu"))
        self._raw = normalises_on(self._device, preprocess)
        self._preparation = Preparation(preprocess, raw=self._raw)
        self._under_way = 0
        # A decoded image may take a gigabyte for a moment: not all of them at once.
        self._decoding = asyncio.Semaphore(os.cpu_count() or 1)
        self._batcher: Batcher | None = None
        self.metrics = Metrics(lambda: len(self._batcher or ()))

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        batcher = self._started()
        yield
        self._batcher = None
        await run_in_threadpool(batcher.close)

    def _started(self) -> Batcher:
        """Where the service is mounted in another one, nobody tells it that it begins."""
        if self._batcher is None:
            self._batcher = Batcher(
                self._stage,
                batch_size=self._limits.batch_size,
                max_wait=self._limits.max_wait,
                waiting=self._limits.queue,
                seen=self.metrics.batches.observe,
            )
        return self._batcher

    @property
    def ready(self) -> bool:
        return self._started().alive

    def _stage(self, kind: Kind) -> NetworkStage:
        return NetworkStage(
            self._explainer,
            targets=kind.targets,
            topk=kind.topk,
            normalise=self._preprocess if self._raw else None,
            device=self._device,
            batch_size=self._limits.batch_size,
        )

    async def measured(
        self, request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start, status = time.perf_counter(), 500
        try:
            response = await answer(request)
            status = response.status_code
            return response
        finally:
            # Of the route, not of the address: anybody can ask for addresses without end.
            path = getattr(request.scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def explained(
        self,
        request: Request,
        targets: list[str] | None,
        topk: int | None,
        finish: Callable[[Seen, Explanation], T],
    ) -> T:
        """What is made of the image of a request and its explanation.

        Raises:
            HTTPException: there is none; with the reason.
        """
        kind = self._kind(targets, topk)
        with self._admitted():
            try:
                async with asyncio.timeout(self._limits.timeout):
                    seen, explanation = await self._answered(request, kind)
                    return await run_in_threadpool(finish, seen, explanation)
            except TimeoutError:
                raise HTTPException(504, f"took more than {self._limits.timeout:g} s") from None

    def _kind(self, targets: list[str] | None, topk: int | None) -> Kind:
        if targets and topk is not None:
            raise HTTPException(400, "target and topk exclude each other")
        count = topk or len(targets or ())
        if count > self._limits.max_targets:
            raise HTTPException(400, f"{count} classes, the limit is {self._limits.max_targets}")
        if topk is not None and topk > self._classes:
            raise HTTPException(400, f"topk is {topk}, but the model has {self._classes} classes")
        try:
            found = [find_target(t, self._labels, classes=self._classes) for t in targets or ()]
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return Kind(tuple(dict.fromkeys(found)), topk)

    @contextmanager
    def _admitted(self) -> Any:
        """Counts the requests under way: each holds an image in memory."""
        if self._under_way >= self._limits.queue:
            raise _busy()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _answered(self, request: Request, kind: Kind) -> tuple[Seen, Explanation]:
        data = await self._body(request)
        try:
            async with self._decoding:
                seen = await run_in_threadpool(self._seen, data)
        except ImageError as error:
            status = 413 if str(error).startswith("too large") else 400
            raise HTTPException(status, f"the image {error}") from None
        try:
            explanation = await asyncio.wrap_future(self._started().ask(seen.pixels, kind))
        except QueueFull:
            raise _busy() from None
        except OutOfMemory as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except Refusal as error:
            self.metrics.failures.inc()
            raise HTTPException(500, str(error)) from None
        self.metrics.images.inc()
        return seen, explanation

    def _seen(self, data: bytes) -> Seen:
        image = decode_image(data, max_pixels=self._limits.max_pixels)
        pixels = self._preparation.of(image).values
        return Seen(pixels, self._preprocess.box(image.size), self._preprocess.view(image, _VIEW))

    async def _body(self, request: Request) -> bytes:
        """The bytes of a request, no more of them than the limit."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._limits.max_bytes:
                raise HTTPException(413, f"the limit is {self._limits.max_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def picture(
        self, view: Image.Image, explanation: Explanation, mode: str, alpha: float
    ) -> bytes:
        heat = reference.heatmap(explanation.maps, view.height, view.width)[0, 0].numpy()
        picture = Image.fromarray(blend(np.asarray(view), heat, alpha=alpha, cmap=self._cmap))
        if mode == "side":
            picture = side_by_side(view, picture)
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=3)
        return file.getvalue()


def _busy() -> HTTPException:
    return HTTPException(503, "too many requests wait; try again", {"Retry-After": "1"})
