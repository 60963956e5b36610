"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one service, apart from those of others in the process.

    Args:
        waiting: the length of the queue.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "diffcam_requests_total",
            "Requests that were answered.",
            ("path", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "diffcam_request_seconds",
            "From a request to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batches = Histogram(
            "diffcam_batch_size",
            "Images that were explained at once.",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.images = Counter(
            "diffcam_images_total", "Images that were explained.", registry=self._registry
        )
        self.failures = Counter(
            "diffcam_failures_total",
            "Images that the network did not take.",
            registry=self._registry,
        )
        queue = Gauge("diffcam_queue_length", "Requests that wait.", registry=self._registry)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self._registry)
