"""Our maps on known networks, against float64 autograd on the whole network."""

from dataclasses import fields

import pytest

from diffcam_bench.families import TOLERANCE, Result, check, holds
from diffcam_bench.rows import read_rows, results_folder

pytest.importorskip("timm")
pytest.importorskip("torchvision")

NETWORKS = {
    "torchvision:resnet18": "closed form",
    "torchvision:resnet50": "closed form",
    "torchvision:densenet121": "backward",
    "torchvision:mobilenet_v2": "closed form",
    "torchvision:mobilenet_v3_small": "backward",
    "torchvision:mobilenet_v3_large": "backward",
    "torchvision:efficientnet_b0": "closed form",
    "torchvision:convnext_tiny": "backward",
    "torchvision:vgg16_bn": "backward",
    "torchvision:googlenet": "closed form",
    "torchvision:inception_v3": "closed form",
    "torchvision:squeezenet1_1": "backward",
    "torchvision:shufflenet_v2_x1_0": "closed form",
    "torchvision:regnet_y_400mf": "closed form",
    "torchvision:mnasnet0_5": "closed form",
}
FAMILIES = {row["model"]: row for row in read_rows(results_folder() / "families.csv")}


# torchvision announces another default initialisation of GoogLeNet and Inception.
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_float64_autograd_on_the_whole_network(name: str) -> None:
    result = check(name)
    assert result.supported == "yes", result.reason
    assert result.head == NETWORKS[name]
    assert float(result.error) <= TOLERANCE


def test_the_committed_table_covers_the_families_and_holds() -> None:
    supported = [row for row in FAMILIES.values() if row["supported"] == "yes"]
    assert len(FAMILIES) > 150 and len(supported) > 140
    assert all(row["reason"] for row in FAMILIES.values())
    columns = [field.name for field in fields(Result)]
    assert all(holds(Result(*(row[name] for name in columns))) for row in supported)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_explained_as_the_committed_table_says(name: str) -> None:
    row = FAMILIES[name]
    if row["reason"].startswith("not checked"):
        pytest.skip(row["reason"])
    result = check(name)
    assert (result.supported, result.layer, result.head) == (
        row["supported"],
        row["layer"],
        row["head"],
    ), result.reason
    if result.supported == "yes":
        assert holds(result), result
