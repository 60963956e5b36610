"""The network of the fidelity study as ONNX Runtime runs it: most of its passes need no maps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch import Tensor, nn

from diffcam_bench.onnx_files import CPU, write_plain
from diffcam_export.running import run
from diffcam_export.session import open_session

Score = Callable[[Tensor], Tensor]
"""From images (N, C, H, W) to logits (N, K)."""

_TOLERANCE = 1e-4


@contextmanager
def scorer(model: nn.Module, images: Tensor, *, runtime: str, threads: int) -> Iterator[Score]:
    """The logits of a model.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), N at least 2, to export it with and to compare on.
        runtime: `torch`, or `onnxruntime`, some times as fast on a CPU.
        threads: of ONNX Runtime.

    Raises:
        click.ClickException: the probabilities are not those of PyTorch.
    """
    if runtime == "torch":
        yield model
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_plain(model, images[:2], path, torchscript=False)
        opened = open_session(path, providers=CPU, threads=threads)
        [value], [logits] = opened.session.get_inputs(), opened.session.get_outputs()

        def score(batch: Tensor) -> Tensor:
            [result] = run(opened, {value.name: batch.contiguous()}, [logits.name])
            return result

        with torch.inference_mode():
            theirs, ours = (f(images[:8]).softmax(dim=1) for f in (score, model))
        error = float((theirs - ours).abs().max())
        if not error < _TOLERANCE:
            raise click.ClickException(
                f"ONNX Runtime's probabilities differ from PyTorch's by {error:.1e}; "
                "--runtime torch does without it"
            )
        yield score
