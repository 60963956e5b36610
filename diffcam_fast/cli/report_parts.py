"""What the report needs of each image, kept on the disk until the report is written.

A report shows every image of a run, also those that were finished before a kill; their pictures
would otherwise be gone with the process that made them.
"""

import base64
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffcam_fast.images.colour import blend
from diffcam_fast.outputs.atomic import atomic_write
from diffcam_fast.outputs.ledger import Entry
from diffcam_fast.outputs.record import Record
from diffcam_fast.outputs.report import ReportEntry

REPORT_NAME = "report.html"
FOLDER = ".diffcam-report"
_SIDE = 320
_JPEG_QUALITY = 82


class ReportParts:
    """One small JSON file per image in ``OUT/.diffcam-report``.

    Args:
        out: The output folder.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER

    def write(
        self, record: Record, top: Sequence[tuple[str, float]], *, files: Sequence[str], cmap: str
    ) -> None:
        """Keeps the part of one image.

        Args:
            record: The explained image.
            top: Its most probable classes as (label, probability), best first.
            files: Its outputs relative to the output folder, pictures of the T targets first.
            cmap: Name of a matplotlib colour map.

        Raises:
            OSError: It cannot be written.
        """
        thumbnail = record.view.copy()
        thumbnail.thumbnail((_SIDE, _SIDE))
        pixels = np.asarray(thumbnail)
        small = Record(
            source=record.source,
            targets=record.targets,
            labels=record.labels,
            probabilities=record.probabilities,
            scores=record.scores,
            maps=record.maps,
            heatmaps=None,
            view=thumbnail,
            finite=record.finite,
        )
        overlays = [blend(pixels, heatmap, cmap=cmap) for heatmap in small.pictures()]
        part = {
            "thumbnail": _encode(thumbnail),
            "overlays": [_encode(Image.fromarray(overlay)) for overlay in overlays],
            "top": [(label, _finite(p)) for label, p in top],
            "files": list(files),
        }
        with atomic_write(self._path(record.source.name)) as file:
            file.write(json.dumps(part, allow_nan=False).encode())

    def remove(self) -> None:
        """Deletes the parts of all images."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __contains__(self, entry: Entry) -> bool:
        """Whether the part of an image is there."""
        return self._path(entry.name).is_file()

    def entries(self, done: Sequence[Entry]) -> Iterator[ReportEntry]:
        """The cards of the report, one for each image and target, read one image at a time."""
        for entry in done:
            part = json.loads(self._path(entry.name).read_bytes())
            thumbnail = base64.b64decode(part["thumbnail"])
            top = [(label, math.nan if p is None else p) for label, p in part["top"]]
            pictures = [name for name in part["files"] if name.endswith(".png")]
            for index, target in enumerate(entry.targets):
                yield ReportEntry(
                    name=entry.path,
                    thumbnail=thumbnail,
                    overlay=base64.b64decode(part["overlays"][index]),
                    file=pictures[index] if index < len(pictures) else None,
                    label=entry.labels[index],
                    probability=entry.probabilities[index],
                    score=entry.scores[index],
                    top=top,
                    target=target,
                )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _encode(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
