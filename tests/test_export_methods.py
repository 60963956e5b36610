"""Every method that a graph can have, against the engine on the network in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_export import Exported, OnnxExplainer, export_onnx
from diffcam_export.methods import FORMS, Form
from diffcam_export.methods.component import component
from diffcam_export.verify import verify
from diffcam_fast import Contrast, Explainer
from diffcam_fast.cli.main import main
from diffcam_fast.methods import METHODS
from diffcam_kernels import reference
from networks import pooled, relative_error, with_mlp

K = 5
CPU = ["CPUExecutionProvider"]
NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"pooled": pooled, "mlp": with_mlp}
LINEAR_ONLY = ("cam", "recipro_cam", "ablation_cam")
REFUSED = ("score_cam", "decom_cam")
EXPORTED = [name for name in METHODS if name not in REFUSED]
CASES = [
    (network, method)
    for network in NETWORKS
    for method in EXPORTED
    if network == "pooled" or method not in LINEAR_ONLY
]
CONTRASTS = {
    "mean": Contrast(math.inf),
    "log_odds": Contrast(1.0),
    "temperature": Contrast(0.3),
    "runner_up": Contrast(0.0),
    "none": Contrast(None),
    "reference": Contrast(1.0, reference=(3, 4)),
    "weights": Contrast(weights=torch.tensor([0.0, 0.0, 0.0, 0.25, 0.75])),
}
# Classes that the reference and the weights allow.
ASKED = torch.tensor([[0, 2], [1, 0], [2, 1]])


def images(n: int = 3, size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain ONNX files of the networks, whose batch and size are free."""
    folder = tmp_path_factory.mktemp("plain")
    for name, network in NETWORKS.items():
        with pytest.warns(DeprecationWarning, match="legacy|removed"):
            torch.onnx.export(
                network(),
                (images(),),
                folder / f"{name}.onnx",
                dynamo=False,
                input_names=["images"],
                output_names=["logits"],
                # The pooling of the second to 2 x 2 needs a size that it divides.
                dynamic_axes={"images": {0: "n"} | ({2: "h", 3: "w"} if name == "pooled" else {})},
            )
    return {name: folder / f"{name}.onnx" for name in NETWORKS}


def exported(plain: Path, out: Path, **options: Any) -> Exported:
    return export_onnx(plain, out / "explained.cam.onnx", verify=False, **options)


def run(path: Path, **inputs: np.ndarray) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=CPU)
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, inputs)
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def engine(model: nn.Module, **options: Any) -> Explainer:
    return Explainer(copy.deepcopy(model).double(), layer="0", **options)


def allowed(method: str, contrast: str) -> bool:
    return contrast != "none" or not METHODS[method].needs_contrast


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize(("network", "method"), CASES)
def test_maps_are_those_of_the_engine(
    network: str, method: str, contrast: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    if not allowed(method, contrast):
        pytest.skip("the method is defined by its contrast")
    options: dict[str, Any] = {
        "method": method,
        "contrast": CONTRASTS[contrast],
        "relu": contrast == "mean",
    }
    expected = engine(NETWORKS[network](), **options)
    x = images()
    done = exported(plain[network], tmp_path, targets="input", **options)
    onnx.checker.check_model(str(done.path), full_check=True)
    found = run(done.path, images=x.numpy(), targets=ASKED.numpy())
    assert found["diffcam_target"].tolist() == ASKED.tolist()
    assert relative_error(found["diffcam_map"], expected(x, ASKED).maps) < 1e-5
    if contrast in ("reference", "weights"):
        return
    found = run(done.path, images=x.numpy())
    assert relative_error(found["diffcam_map"], expected(x).maps) < 1e-5
    for topk in (1, 3):
        best = exported(plain[network], tmp_path, topk=topk, **options)
        found = run(best.path, images=x.numpy())
        result = expected(x, topk=topk)
        assert found["diffcam_target"].tolist() == result.targets.tolist()
        assert relative_error(found["diffcam_map"], result.maps) < 1e-5
