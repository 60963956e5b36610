"""`diffcam bench onnx-cost`: what maps cost in ONNX Runtime, beside the plain model."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffcam_bench.families import relative_error
from diffcam_bench.onnx_files import CPU, latencies
from diffcam_bench.onnx_flops import flops
from diffcam_bench.rows import provenance
from diffcam_bench.zoo import build, size_of
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.export import Exported, export_onnx
from diffcam_export.plain import Plain, plain_part
from diffcam_fast import Explainer

CASES = (
    ("torchvision:resnet50", None),
    ("torchvision:efficientnet_b0", None),
    ("torchvision:resnet50", "layer3"),
)
BATCHES = (1, 8, 32)
CLOSED_FORM = "closed form"
# Of a file in the closed form, over the plain model.
LARGEST_RATIO = 1.02
LARGEST_GROWTH = 20_000
# Of a file with the gradient, over the ratio of the multiplications.
LARGEST_OVER_FLOPS = 1.15
# A short run says little: so many times the rounds at batch 1.
_MORE_ROUNDS = 4
_TOLERANCE = 1e-4
# Maps are compared in float32; what is timed is what a user gets, who sets nothing.
EXACT = ("CUDAExecutionProvider", {"use_tf32": "0"})
CUDA = ("CUDAExecutionProvider",)


@dataclass(frozen=True)
class Cost:
    """One file at one batch size.

    Attributes:
        model: `torchvision:NAME`, random weights.
        layer: the target layer.
        head: `closed form` or `backward of the head`.
        batch: N.
        rounds: how often both ran, in turn.
        plain_ms: the plain model, median.
        explained_ms: the explained one, median.
        ratio: median over the rounds of explained over plain.
        ratio_p20: 20th percentile of these.
        ratio_p80: 80th percentile of these.
        flop_ratio: of the multiplications of both files.
        over_flops: ratio over flop_ratio.
        added_nodes: of the CAM head.
        added_bytes: of the file, over the plain model written the same way.
        error: of the maps, to the engine in PyTorch.
        gpu: its name; empty: it ran on the CPU.
    """

    model: str
    layer: str
    head: str
    batch: int
    rounds: int
    plain_ms: float
    explained_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    flop_ratio: float
    over_flops: float
    added_nodes: int
    added_bytes: int
    error: float
    gpu: str = ""

    def row(self, *, threads: int) -> dict[str, object]:
        """Its columns, with where they come from."""
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(self).items()}
        if not self.gpu:
            del shown["gpu"]
        return {**shown, **provenance("torchvision", "onnx", "onnxruntime", threads=threads)}

    def complaints(self) -> list[str]:
        """Where it costs more than it should."""
        name = f"{self.model} {self.layer}, batch {self.batch}"
        found = []
        if self.head == CLOSED_FORM:
            if self.ratio > LARGEST_RATIO:
                found.append(f"{name}: {self.ratio:.3f} times the plain model, not {LARGEST_RATIO}")
            if self.added_bytes >= LARGEST_GROWTH:
                found.append(f"{name}: {self.added_bytes:,} bytes more, not under {LARGEST_GROWTH}")
        elif self.over_flops > LARGEST_OVER_FLOPS:
            found.append(
                f"{name}: {self.over_flops:.3f} times what the multiplications account for, not "
                f"{LARGEST_OVER_FLOPS}"
            )
        return found


@dataclass(frozen=True)
class _Pair:
    """A file, its plain part, and what both compute."""

    done: Exported
    plain: Plain
    flop_ratio: float
    error: float


class ParityError(ValueError):
    """A file whose maps are wrong is not timed."""


def costs(
    *,
    rounds: int,
    threads: int,
    text: str | None = None,
    batches: tuple[int, ...] = BATCHES,
    cuda: bool = False,
) -> Iterator[Cost]:
    """Exports each case, compares its maps with PyTorch's, and times it beside the plain model.

    Args:
        rounds: timed rounds of a batch; four times as many at batch 1.
        threads: of ONNX Runtime.
        text: only cases whose model and layer hold it.
        batches: sizes to time.
        cuda: on the GPU, in place of the CPU.

    Raises:
        ParityError: the maps differ from PyTorch's; nothing of that file was timed.
    """
    torch.set_num_threads(threads)
    for model, layer in CASES:
        if text is not None and text not in f"{model} {layer}":
            continue
        network = build(model)
        size = size_of(model, network)
        images = torch.randn(max(batches), 3, *size, generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as folder:
            pair = _pair(network, layer, images, Path(folder, "explained.onnx"), threads, cuda)
            for batch in batches:
                yield _cost(model, pair, images[:batch], rounds, threads, cuda)


def _pair(
    network: nn.Module, layer: str | None, images: Tensor, path: Path, threads: int, cuda: bool
) -> _Pair:
    done = export_onnx(network, path, layer=layer, example_inputs=images[:2], verify=False)
    providers = [EXACT] if cuda else list(CPU)
    got = OnnxExplainer(path, providers=providers, strict=True, threads=threads)(images[:2]).cpu()
    expected = Explainer(network, layer=done.layers[0], example_inputs=images[:2])
    error = relative_error(got.maps, expected(images[:2], got.targets).maps.double())
    if not error <= _TOLERANCE:
        raise ParityError(
            f"the maps of {done.layers[0]} differ from PyTorch's by {error:.1e}, more than "
            f"{_TOLERANCE:.0e}; nothing is timed"
        )
    plain = plain_part(path)
    assert isinstance(plain.model, bytes)
    beside = path.with_name("plain.onnx")
    beside.write_bytes(plain.model)
    count: Callable[[Path], int] = lambda file: flops(file, images[:1], threads=threads)  # noqa: E731
    return _Pair(done, plain, count(path) / count(beside), error)


def _cost(model: str, pair: _Pair, images: Tensor, rounds: int, threads: int, cuda: bool) -> Cost:
    batch, path = len(images), pair.done.path
    rounds = rounds * _MORE_ROUNDS if batch == 1 else rounds
    plain, explained = latencies(
        path,
        pair.plain.model,
        images,
        rounds=rounds,
        threads=threads,
        providers=CUDA if cuda else CPU,
    )
    return Cost(
        model=model,
        layer=pair.done.layers[0],
        head=pair.done.heads[0],
        batch=batch,
        rounds=rounds,
        plain_ms=plain.median_ms,
        explained_ms=explained.median_ms,
        ratio=explained.ratio,
        ratio_p20=explained.ratio_p20,
        ratio_p80=explained.ratio_p80,
        flop_ratio=pair.flop_ratio,
        over_flops=explained.ratio / pair.flop_ratio,
        added_nodes=pair.done.added_nodes,
        added_bytes=path.stat().st_size - pair.plain.bytes,
        error=pair.error,
        gpu=torch.cuda.get_device_name() if cuda else "",
    )
