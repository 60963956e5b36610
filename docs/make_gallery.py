"""Makes the gallery of docs/methods.md: every method on a real network and a real photograph.

python docs/make_gallery.py        # needs the demo extra, a minute or two; writes docs/images/
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from make_pictures import ESPRESSO, TIGER_CAT, cat_and_coffee

from diffcam_fast import Explainer
from diffcam_fast.images.colour import blend
from diffcam_fast.methods import METHODS
from diffcam_fast.models.loading import load_model

# Where the activation has 14 x 14 cells, and much of the network lies behind it.
EARLIER = "blocks.10"
PANELS = 2


def main() -> None:
    """Writes docs/images/methods.png."""
    loaded = load_model(None)
    picture = cat_and_coffee()
    view = np.asarray(loaded.preprocess.view(picture))
    batch = loaded.preprocess(picture)[None]
    cases = [(layer, target) for layer in (None, EARLIER) for target in (TIGER_CAT, ESPRESSO)]
    names = [name for name, method in METHODS.items() if not method.needs_fit]
    rows = -(-len(names) // PANELS)
    shape = (rows, PANELS * len(cases))
    figure, axes = plt.subplots(*shape, figsize=(12, 1.6 * rows + 0.4), layout="constrained")
    for number, name in enumerate(names):
        first = number // rows * len(cases)
        axes[number % rows, first].set_ylabel(name, fontsize=9)
        for axis, (layer, target) in zip(
            axes[number % rows, first : first + len(cases)], cases, strict=True
        ):
            axis.imshow(view)
            explainer = Explainer(loaded.model, layer=layer, method=name)
            if METHODS[name].needs_pooled_head and not explainer.inspect().closed_form:
                axis.set_xlabel("not defined there", fontsize=8)
                continue
            heatmap = explainer(batch, target).heatmaps(view.shape[:2])[0, 0].numpy()
            axis.imshow(blend(view, heatmap, alpha=0.5, cmap="turbo"))
    for axis, (layer, target) in zip(axes[0], cases * PANELS, strict=True):
        class_name = "tiger cat" if target == TIGER_CAT else "espresso"
        axis.set_title(f"{class_name}\n{layer or 'last layer'}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(Path(__file__).parent / "images" / "methods.png", dpi=70)


if __name__ == "__main__":
    main()
