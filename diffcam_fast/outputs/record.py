"""One explained image on its way to the disk, and what every output format does with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffcam_fast.images.inputs import Source
from diffcam_fast.models.labels import label_of
from diffcam_fast.outputs.ledger import Entry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diffcam_fast.explanation import Explanation


@dataclass(frozen=True, kw_only=True)
class Values:
    """What an explanation says of one image and its T targets.

    Attributes:
        targets: T explained classes.
        labels: T class names.
        probabilities: T softmax values.
        scores: T contrasts.
        maps: (T, h, w) float32, unnormalised.
        finite: T flags: the map is free of NaN and infinity.
    """

    targets: Sequence[int]
    labels: Sequence[str]
    probabilities: Sequence[float]
    scores: Sequence[float]
    maps: NDArray[np.float32]
    finite: Sequence[bool]


def values_of(result: Explanation, labels: Sequence[str] | None) -> Iterator[Values]:
    """Each image of a batch by itself, on the CPU.

    Args:
        result: Of N images.
        labels: K class names, or None.
    """
    rows = zip(
        result.targets.cpu().tolist(),
        result.probabilities.gather(1, result.targets).cpu().tolist(),
        result.scores.cpu().tolist(),
        result.maps.cpu().numpy(),
        result.finite.cpu().tolist(),
        strict=True,
    )
    for targets, probabilities, scores, maps, finite in rows:
        yield Values(
            targets=targets,
            labels=[label_of(target, labels) for target in targets],
            probabilities=probabilities,
            scores=scores,
            maps=maps,
            finite=finite,
        )


@dataclass(frozen=True, kw_only=True)
class Record(Values):
    """One explained image with its T targets: its values, and what pictures are made from.

    Attributes:
        source: Where the image came from.
        heatmaps: (T, H, W) in [0, 1] or None, when only pictures need them and make their own.
        view: What the network saw, at the resolution that pictures shall have.
    """

    source: Source
    heatmaps: NDArray[np.float32] | None
    view: Image.Image

    def __post_init__(self) -> None:
        counts = [
            len(self.targets),
            len(self.labels),
            len(self.probabilities),
            len(self.scores),
            len(self.maps),
            len(self.finite),
        ]
        if len(set(counts)) != 1 or self.maps.ndim != 3:
            raise ValueError(
                f"{self.source.path}: targets, labels, probabilities, scores, maps, finite hold "
                f"{counts} items, maps are {self.maps.shape}; give T of each and maps (T, h, w)"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view."""
        return self.view.height, self.view.width

    def pictures(self) -> NDArray[np.float32]:
        """The heatmaps at the size of the view, (T, H, W) in [0, 1]."""
        if self.heatmaps is not None and self.heatmaps.shape[1:] == self.size:
            return self.heatmaps
        import torch

        # The engine's own definition, so that a picture shows what Explanation.heatmaps holds. Not
        # the operator around it, which would import PyTorch's compiler, for a second.
        from diffcam_kernels import reference

        maps = torch.tensor(self.maps, dtype=torch.float32)
        pictures: NDArray[np.float32] = reference.heatmap(maps[None], *self.size)[0].numpy()
        return pictures

    def entry(self, files: Iterable[str]) -> Entry:
        """The ledger's line for this image with its ``files`` (relative to the output folder)."""
        return Entry(
            path=str(self.source.path),
            status="done",
            name=self.source.name,
            files=tuple(files),
            targets=tuple(int(target) for target in self.targets),
            labels=tuple(self.labels),
            probabilities=tuple(float(value) for value in self.probabilities),
            scores=tuple(float(value) for value in self.scores),
            finite=tuple(bool(flag) for flag in self.finite),
        )


class Writer:
    """What every format does; a format that writes files per image gives ``_write_one``.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, records: Sequence[Record]) -> list[Path]:
        """Writes a batch; returns the files when they are whole and in place.

        Raises:
            OSError: A file cannot be written; nothing of that file is left behind.
        """
        return list(dict.fromkeys(path for paths in self.write_each(records) for path in paths))

    def write_each(self, records: Sequence[Record]) -> list[list[Path]]:
        """As :meth:`write`, but the files of each record; records may share a file."""
        return [self._write_one(record) for record in records]

    def restore(self, done: Sequence[Entry]) -> None:
        """Removes what a killed run wrote without finishing; call it once, before :meth:`write`.

        Args:
            done: The finished images of the ledger in its order; empty for a new run.

        Raises:
            ValueError: An output lacks images that the ledger holds.
        """

    def close(self) -> None:
        """Releases what the writer holds; the files are complete before."""

    def _write_one(self, record: Record) -> list[Path]:
        raise NotImplementedError
