"""What explainers share: a stream of images, explained while it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcam_fast.images.preprocess import Preprocess
    from diffcam_fast.stream import Profile, Streamed


class Streaming:
    """An explainer that takes streams."""

    def stream(
        self,
        source: Iterable[Any],
        *,
        preprocess: Preprocess | None = None,
        batch_size: int | None = None,
        targets: int | Sequence[int] = (),
        topk: int | None = None,
        workers: int | None = None,
        timeout: float | None = None,
        pictures: bool = False,
        heatmaps: tuple[int, int] | None = None,
        profile: Profile | None = None,
    ) -> Iterator[Streamed]:
        """Explains what a source yields, in order, while it reads on: see
        `diffcam_fast.stream.stream`, whose arguments these are.

        An exported file that knows its preprocessing takes that where `preprocess` is None; one
        that prepares pictures itself takes them one by one.
        """
        from diffcam_fast.stream import stream

        preprocess, batch_size = self._of_stream(preprocess, batch_size)
        explainer: Any = self
        return stream(
            explainer,
            source,
            preprocess=preprocess,
            batch_size=batch_size,
            targets=targets,
            topk=topk,
            workers=workers,
            timeout=timeout,
            pictures=pictures,
            heatmaps=heatmaps,
            profile=profile,
        )

    def _of_stream(
        self, preprocess: Preprocess | None, batch_size: int | None
    ) -> tuple[Preprocess | None, int | None]:
        """What this explainer takes in place of these two."""
        return preprocess, batch_size
