"""Explained ONNX files for the tests that run them, made without the exporter: whatever it makes of
a file, running one must not depend on it.
"""

import json
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from networks import pooled

METADATA = {
    "diffcam.version": "0.1.0",
    "diffcam.layer": "0",
    "diffcam.method": "diff_grad_cam",
    "diffcam.contrast": "log_odds",
    "diffcam.temperature": "1.0",
    "diffcam.relu": "true",
    "diffcam.head": "closed form",
    "diffcam.input": "images",
    "diffcam.output": "logits",
}
PREPROCESS = {
    "size": [10, 12],
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}


class Explained(nn.Module):
    """`networks.pooled` with the map of the log-odds in closed form; layer is its module "0"."""

    def __init__(
        self, model: nn.Sequential, *, topk: int = 1, wrong: float = 0.0, softmax: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.topk = topk
        self.wrong = wrong
        self.softmax = softmax

    def forward(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        activation = self.model[0](images)
        logits = self.model[2](self.model[1](activation))
        classes = logits.topk(self.topk, dim=1).indices
        if targets is not None:
            classes = torch.where(targets < 0, classes, targets)
        chosen = classes[:, :, None] == torch.arange(logits.shape[1])
        others = logits[:, None].masked_fill(chosen, -torch.inf).softmax(dim=2)
        d = chosen.to(logits.dtype) - others
        cells = activation.shape[2] * activation.shape[3]
        weights = d @ self.model[2].weight / cells
        maps = torch.einsum("ntc,nchw->nthw", weights, activation).relu().float()
        returned = logits.softmax(dim=1) if self.softmax else logits
        return returned, maps * (1 + self.wrong), classes


def write_explained(
    path: Path,
    *,
    targets: bool = False,
    topk: int = 1,
    wrong: float = 0.0,
    dtype: torch.dtype = torch.float32,
    softmax: bool = False,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    labels: bool = False,
    metadata: dict[str, str] | None = None,
) -> nn.Sequential:
    """Writes a file as the exporter writes it, and returns the network it came from."""
    model = pooled()
    module = Explained(model, topk=topk, wrong=wrong, softmax=softmax).to(dtype).eval()
    height, width = size or (10, 12)
    inputs: dict[str, Tensor] = {"images": torch.randn(batch or 3, 3, height, width, dtype=dtype)}
    n = torch.export.Dim("n")
    dims = {} if batch else {0: n}
    if size is None:
        dims |= {2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    shapes: dict[str, dict[int, object]] = {"images": dims}
    if targets:
        inputs["targets"] = torch.tensor([[0, 1]] * (batch or 3))
        shapes["targets"] = {1: torch.export.Dim("t")} | ({} if batch else {0: n})
    program = torch.onnx.export(
        module,
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=18,
        output_names=["logits", "diffcam_map", "diffcam_target"],
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    facts = METADATA | ({"diffcam.probabilities": "true"} if softmax else {})
    if labels:
        facts |= {"diffcam.labels": json.dumps([f"class {k}" for k in range(5)])}
        facts |= {"diffcam.preprocess": json.dumps(PREPROCESS)}
    onnx.helper.set_model_props(proto, facts | (metadata or {}))
    if targets:
        default = onnx.numpy_helper.from_array(torch.tensor([[-1]]).numpy(), "targets")
        proto.graph.initializer.append(default)
    onnx.save(proto, path)
    return model.float()
