"""Pictures and maps side by side."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def grid(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a PNG file: a column for each title, uint8 (H, W, 3) as it is and maps (h, w) by their
    own maximum in a colour map.
    """
    from matplotlib.figure import Figure

    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.1 * len(columns), 1.05 * count + 0.5))
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            cell = axes[row][column]
            cell.set_axis_off()
            limits = {} if image.ndim == 3 else {"vmin": 0, "vmax": float(image.max()) or 1.0}
            cell.imshow(image, cmap="viridis", interpolation="nearest", **limits)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
