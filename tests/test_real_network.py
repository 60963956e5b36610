"""The default network on real photographs: the maps sit where a person would point."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffcam_fast import Contrast, Explainer
from diffcam_fast.models.loading import LoadedModel, load_model

data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")

ESPRESSO, TIGER_CAT = 967, 282


@pytest.fixture(scope="module")
def network() -> LoadedModel:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the default network is an extra")
    return load_model(None)


@pytest.fixture(scope="module")
def cat_and_coffee() -> Image.Image:
    """A cat on the left, a cup of coffee on the right, as large as each other."""
    pictures = (Image.fromarray(p) for p in (data.chelsea(), data.coffee()))
    cat, coffee = (
        p.resize((round(p.width * 300 / p.height), 300)).crop((60, 0, 360, 300)) for p in pictures
    )
    both = Image.new("RGB", (600, 600), "grey")
    both.paste(cat, (0, 150))
    both.paste(coffee, (300, 150))
    return both


def test_predictions_are_the_known_ones(network: LoadedModel) -> None:
    pictures = [Image.fromarray(p) for p in (data.coffee(), data.chelsea())]
    batch = torch.stack([network.preprocess(p) for p in pictures])
    result = Explainer(network.model)(batch)
    assert result.backend == "torch (cpu), closed form"
    assert result.targets[:, 0].tolist() == [ESPRESSO, TIGER_CAT]
    assert result.probabilities[0, ESPRESSO] == pytest.approx(0.95, abs=0.02)
    assert result.probabilities[1, TIGER_CAT] == pytest.approx(0.39, abs=0.02)


@pytest.mark.parametrize("contrast", ["mean", "log_odds"])
def test_two_classes_in_one_picture_are_told_apart(
    network: LoadedModel, cat_and_coffee: Image.Image, contrast: str
) -> None:
    batch = network.preprocess(cat_and_coffee)[None]
    explainer = Explainer(network.model, contrast=contrast)
    cat, coffee = explainer(batch, [[TIGER_CAT, ESPRESSO]]).heatmaps((224, 224))[0].numpy()
    assert cat[:, :112].sum() > 2 * cat[:, 112:].sum()
    assert coffee[:, 112:].sum() > 2 * coffee[:, :112].sum()


def test_runner_up_tells_apart_what_it_compares(
    network: LoadedModel, cat_and_coffee: Image.Image
) -> None:
    batch = network.preprocess(cat_and_coffee)[None]
    # The best class beside tiger cat is another cat, which is no reason to look at the cat at all.
    against_coffee = Contrast(0.0, reference=(ESPRESSO,))
    cat = Explainer(network.model, contrast=against_coffee)(batch, TIGER_CAT).heatmaps((224, 224))
    assert cat[..., :112].sum() > 2 * cat[..., 112:].sum()


def test_contrasts_agree_with_grad_cam_on_an_honest_network(network: LoadedModel) -> None:
    pictures = [Image.fromarray(p) for p in (data.coffee(), data.chelsea(), data.rocket())]
    batch = torch.stack([network.preprocess(p) for p in pictures])
    single = Explainer(network.model, method="grad_cam")(batch).heatmaps((224, 224)).flatten(1)
    correlations = {}
    for contrast in ("mean", "log_odds", "runner_up"):
        maps = Explainer(network.model, contrast=contrast)(batch).heatmaps((224, 224)).flatten(1)
        pairs = zip(maps.numpy(), single.numpy(), strict=True)
        correlations[contrast] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    # The mean of 999 other classes hardly has a gradient of its own; the nearest class has.
    assert correlations["mean"] > 0.99
    assert correlations["mean"] > correlations["log_odds"] > correlations["runner_up"] > 0.5
