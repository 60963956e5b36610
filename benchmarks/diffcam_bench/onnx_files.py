"""Plain ONNX files of PyTorch models, and what can be measured of files."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffcam_bench.measure import Timing, alternate
from diffcam_export.running import run
from diffcam_export.session import Opened, Provider, open_session

CPU = ("CPUExecutionProvider",)
# What the exporter takes where nothing is asked, so that the conversion to 18 runs as well.
_TORCHSCRIPT_OPSET = 17
_BATCH = torch.export.Dim("batch", min=1)


def write_plain(model: nn.Module, images: Tensor, path: Path, *, torchscript: bool) -> None:
    """Exports a model as anyone would, with a dynamic batch axis.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), N at least 2.
        path: the ONNX file; its weights may lie beside it.
        torchscript: by PyTorch's former exporter.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if torchscript:
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=False,
                opset_version=_TORCHSCRIPT_OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
        else:
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                dynamic_shapes=({0: _BATCH},),
                verbose=False,
            )


def value_of(path: Path, name: str, images: Tensor, *, threads: int) -> np.ndarray:
    """What a file computes for one of the values of its main graph.

    Args:
        path: the file.
        name: of the value.
        images: (N, C, H, W) for its first input.
        threads: of ONNX Runtime.
    """
    model = ir.load(path)
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    model.graph.outputs[:] = [value]
    changed = path.with_suffix(".value.onnx")
    ir.save(model, changed, external_data=f"{changed.name}.data")
    opened = open_session(changed, providers=CPU, threads=threads)
    [result] = run(opened, _feeds(opened, images), [name])
    values: np.ndarray = result.numpy()
    return values


def latencies(
    explained: Path,
    plain: Path | bytes,
    images: Tensor,
    *,
    rounds: int,
    threads: int,
    providers: Sequence[Provider] = CPU,
) -> list[Timing]:
    """Of a plain file and of the explained one, all outputs of each, alternating.

    Args:
        explained: the file with maps.
        plain: the file without, or its bytes, whose external data lies beside the explained file.
        images: (N, C, H, W).
        rounds: timed rounds.
        threads: of ONNX Runtime.
        providers: of ONNX Runtime; on CUDA images and outputs stay on the device.

    Returns:
        `plain` and `explained`; ratios are over `plain`.
    """
    beside = {"session.model_external_initializers_file_folder_path": str(explained.parent)}
    cases: dict[str, Callable[[], object]] = {}
    for name, model in (("plain", plain), ("explained", explained)):
        opened = open_session(
            model,
            providers=providers,
            strict=True,
            threads=threads,
            settings=beside if isinstance(model, bytes) else None,
        )
        cases[name] = runner(opened, images)
    return alternate(cases, baseline="plain", rounds=rounds)


def runner(opened: Opened, images: Tensor) -> Callable[[], Sequence[Tensor]]:
    """A call that computes all outputs of a session."""
    feeds = _feeds(opened, images.to(opened.device))
    names = [value.name for value in opened.session.get_outputs()]
    return lambda: run(opened, feeds, names)


def _feeds(opened: Opened, images: Tensor) -> dict[str, Tensor]:
    return {opened.session.get_inputs()[0].name: images.contiguous()}
