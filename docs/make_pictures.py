"""Makes the pictures of the README: a real network on real photographs.

python docs/make_pictures.py        # needs the demo extra; writes docs/images/
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data

from diffcam_fast import Contrast, Explainer
from diffcam_fast.images.colour import blend
from diffcam_fast.models.loading import load_model

ESPRESSO, TIGER_CAT = 967, 282
SIZE = 300


def cat_and_coffee() -> Image.Image:
    """A cat on the left, a cup of coffee on the right."""
    both = Image.new("RGB", (2 * SIZE, 2 * SIZE), "grey")
    for left, photograph in ((0, data.chelsea()), (SIZE, data.coffee())):
        picture = Image.fromarray(photograph)
        picture = picture.resize((round(picture.width * SIZE / picture.height), SIZE))
        both.paste(picture.crop((60, 0, 60 + SIZE, SIZE)), (left, SIZE // 2))
    return both


def main() -> None:
    """Writes docs/images/two-classes.png."""
    loaded = load_model(None)
    picture = cat_and_coffee()
    view = np.asarray(loaded.preprocess.view(picture))
    batch = loaded.preprocess(picture)[None]
    contrasts = {
        "Grad-CAM": lambda other: Contrast(None),
        "DiffGradCAM, mean": lambda other: Contrast(math.inf),
        "DiffGradCAM, log-odds": lambda other: Contrast(),
        "DiffGradCAM, against the other": lambda other: Contrast(reference=(other,)),
    }
    figure, axes = plt.subplots(2, 5, figsize=(12.5, 5.2), layout="constrained")
    pairs = (("tiger cat", TIGER_CAT, ESPRESSO), ("espresso", ESPRESSO, TIGER_CAT))
    for (name, target, other), (first, *others) in zip(pairs, axes, strict=True):
        first.imshow(view)
        first.set_ylabel(f"why {name}?", fontsize=11)
        for axis, (title, contrast) in zip(others, contrasts.items(), strict=True):
            explainer = Explainer(loaded.model, method="grad_cam", contrast=contrast(other))
            heatmap = explainer(batch, target).heatmaps(view.shape[:2])[0, 0].numpy()
            axis.imshow(blend(view, heatmap, alpha=0.5, cmap="turbo"))
            axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "two-classes.png", dpi=72)


if __name__ == "__main__":
    main()
