"""`diffcam bench engine-gpu`: images a second on CUDA, explained, beside the plain forward pass.

The plain forward is compiled and captured as a CUDA graph as ours is, in the same precision. Other
libraries run as their users run them: eager, in float32. All take turns, and nothing is timed
before the maps were compared.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_bench.cam_peers import RIVALS, rivals_of
from diffcam_bench.cams import gate
from diffcam_bench.engine import (
    EARLIER,
    HEATMAPS,
    METHOD,
    OURS,
    PLAIN,
    READING,
    TARGETS,
    PlainInference,
    Reading,
    drain,
    settle,
    verdict,
)
from diffcam_bench.measure import Timing, alternate
from diffcam_bench.methods import ParityError, predicted, rounded
from diffcam_bench.photographs import write_jpegs
from diffcam_bench.rows import optional, provenance
from diffcam_bench.zoo import build, size_of
from diffcam_export.fastest import accelerate
from diffcam_fast import Explainer
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.compiled.graphs import Captured, Order
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.stream import Explains

EAGER, GRAPH = f"{OURS}, eager", f"{OURS}, CUDA graph"
RESIDENT, NVJPEG = f"{PLAIN}, images on the device", "nvJPEG decoding alone"
LEAST = {PLAIN: 0.97, "torch-cam": 4.0, "pytorch-grad-cam": 10.0}
LEAST_OF_FILES, LEAST_TARGETS = 0.9, 0.95

Case = Callable[[], object]


@dataclass(frozen=True)
class GpuContest:
    """One network on images of one kind, on CUDA.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`, random weights.
        source: `device`: batches that are on the GPU; `files`: JPEG files.
        dtype: of the network, where it is not another library's.
        images: how many a round.
        batch_size: at once.
        runtime: what ran ours.
        timings: the ratio is the time over that of ours.
        workers: threads that decode.
    """

    model: str
    source: str
    dtype: str
    images: int
    batch_size: int
    runtime: str
    timings: Sequence[Timing]
    workers: int

    def rows(self) -> list[dict[str, object]]:
        """One row for each candidate."""
        packages = ("triton", "torchvision", "grad-cam", "torchcam", "captum")
        source = provenance(*packages, threads=self.workers)
        others = {rival.library for rival in RIVALS[METHOD]}
        return [
            {
                "model": self.model,
                "source": self.source,
                "images": self.images,
                "batch_size": self.batch_size,
                "name": timing.name,
                "dtype": "float32" if timing.name in others else self.dtype,
                "rounds": timing.rounds,
                "images_per_s": rounded(self.images / timing.median_ms * 1000),
                "slow_p20": rounded(self.images / timing.p80_ms * 1000),
                "fast_p80": rounded(self.images / timing.p20_ms * 1000),
                "ours_over": rounded(timing.ratio),
                "ours_over_p20": rounded(timing.ratio_p20),
                "ours_over_p80": rounded(timing.ratio_p80),
                "runtime": self.runtime if timing.name == OURS else "",
                "gpu": torch.cuda.get_device_name(),
                **source,
            }
            for timing in self.timings
        ]

    def verdicts(self) -> list[str]:
        """Each thing that was asked for, and whether it holds."""
        ratios = {timing.name: timing.ratio for timing in self.timings}
        if self.source == "files":
            slower = max(ratios[RESIDENT], ratios[READING])
            return [verdict("over the slower of decoder and backbone", slower, LEAST_OF_FILES)]
        found = [
            verdict(f"over {name}", ratios[name], least)
            for name, least in LEAST.items()
            if name in ratios
        ]
        name = f"{OURS}, {TARGETS} targets"
        return [*found, verdict(f"{name} over one", 1 / ratios[name], LEAST_TARGETS)]


def contest(
    model: str,
    *,
    source: str,
    dtype: str,
    images: int,
    batch_size: int,
    rounds: int,
    workers: int,
    peers: bool = True,
    progress: Callable[[int], object] = lambda done: None,
) -> GpuContest:
    """Compares maps, then times all in turn on the current CUDA device.

    Args:
        model: `timm:NAME` or `torchvision:NAME`.
        source: `device`: batches that are on the GPU; `files`: JPEG files.
        dtype: `float32`, `float16` or `bfloat16`, of ours and of plain inference.
        images: how many a round.
        batch_size: at once.
        rounds: timed rounds.
        workers: threads that decode.
        peers: time other libraries too, where images are on the GPU.
        progress: called after each round.

    Raises:
        ParityError: maps do not agree; nothing was timed.
    """
    made = _Candidates(model, dtype, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        if source == "device":
            cases = made.on_device(images, peers=peers)
        else:
            cases = made.from_files(write_jpegs(Path(folder), images), workers)
        timings = alternate(cases, baseline=OURS, rounds=rounds, warmup=1, progress=progress)
    return GpuContest(model, source, dtype, images, batch_size, made.reason, timings, workers)


class _Candidates:
    """All that take part, for one network."""

    def __init__(self, model: str, dtype: str, batch_size: int) -> None:
        network = build(model)
        self._model, self._size = model, batch_size
        self._sides = size_of(model, network)
        random = torch.Generator().manual_seed(1)
        batch = torch.randn(batch_size, 3, *self._sides, generator=random)
        settle(network, batch[:16])
        self._float32, self._float32_batch = network.cuda(), batch.cuda()
        self._network = build(model)
        self._network.load_state_dict(network.state_dict())
        self._network.to("cuda", getattr(torch, dtype)).to(memory_format=torch.channels_last)
        first = next(self._network.parameters())
        self._batch = self._float32_batch.to(first.dtype, memory_format=torch.channels_last)
        found = accelerate(self._made(None), backend="compiled", batch_size=batch_size)
        if not isinstance(found.explainer, CompiledExplainer):
            raise ParityError(found.reason)
        self._ours, self.reason = found.explainer, found.reason
        self._plain = self._captured()
        logits = self._plain.logits(self._batch)
        expected = self._ours(self._batch).logits
        # Half precision, in two orders of summation.
        if not torch.allclose(logits.float(), expected.float(), rtol=0.05, atol=0.05):
            raise ParityError("plain inference gives other logits; nothing is timed")

    def _made(self, layer: str | None, network: nn.Module | None = None) -> Explainer:
        return Explainer(
            network or self._network,
            layer=layer,
            method=METHOD,
            example_inputs=self._float32_batch[:2],
        )

    def _captured(self) -> PlainInference:
        forward = torch.compile(self._network, fullgraph=True, dynamic=False)
        pool = torch.cuda.graph_pool_handle()
        graph = Captured(lambda x: [forward(x)], [self._batch], pool, Order())
        return PlainInference(lambda images: graph(images)[0], self._network)

    def on_device(self, images: int, *, peers: bool) -> dict[str, Case]:
        """What is timed where the images are there, by its name."""
        count, batch = -(-images // self._size), self._batch
        graph = CompiledExplainer(self._made(None), batch_size=self._size)
        several = accelerate(
            self._made(None), backend="compiled", topk=TARGETS, batch_size=self._size
        ).explainer
        cases = {
            OURS: _repeated(count, lambda: self._ours(batch)),
            f"{OURS}, {TARGETS} targets": _repeated(count, lambda: several(batch, topk=TARGETS)),
            GRAPH: _repeated(count, lambda: graph(batch)),
            EAGER: _repeated(count, lambda: self._ours.explainer(batch)),
            PLAIN: _repeated(count, lambda: self._plain.logits(batch)),
        }
        layer = EARLIER.get(self._model)
        if layer is not None:
            early = accelerate(
                self._made(layer), backend="compiled", batch_size=self._size
            ).explainer
            cases[f"{OURS}, {layer}"] = _repeated(count, lambda: early(batch))
        return cases | (self._peers(count) if peers else {})

    def _peers(self, count: int) -> dict[str, Case]:
        batch, exact = self._float32_batch, self._made(None, self._float32)
        few = batch[:4]
        targets = predicted(self._float32, few)
        maps = exact(few, targets).maps[:, 0]
        cases: dict[str, Case] = {}
        for rival, peer in rivals_of(METHOD, self._float32, exact.layer).items():
            gate(rival, peer(few, targets).cpu(), maps.cpu(), few.cpu())
            cases[rival.library] = _repeated(
                count,
                lambda peer=peer: peer(batch, [0] * len(batch)),  # type: ignore[misc]
            )
        return cases

    def from_files(self, paths: Sequence[Path], workers: int) -> dict[str, Case]:
        """What is timed where images are read from files, by its name."""
        preprocess = Preprocess(size=self._sides)
        count = -(-len(paths) // self._size)

        def read(explainer: Explains, **options: Any) -> Case:
            return lambda: drain(
                explainer, paths, self._size, preprocess, workers=workers, **options
            )

        return {
            OURS: read(self._ours),
            HEATMAPS: read(self._ours, heatmaps=self._sides),
            PLAIN: read(self._plain),
            READING: read(Reading("cuda")),
            RESIDENT: _repeated(count, lambda: self._plain.logits(self._batch)),
            NVJPEG: lambda: _decode_on_gpu(paths, self._size),
        }


def _repeated(count: int, once: Case) -> Case:
    def run() -> None:
        for _ in range(count):
            once()
        torch.cuda.synchronize()

    return run


def _decode_on_gpu(paths: Sequence[Path], batch_size: int) -> None:
    io = optional("torchvision.io", distribution="torchvision")
    for start in range(0, len(paths), batch_size):
        encoded: list[Tensor] = [io.read_file(str(p)) for p in paths[start : start + batch_size]]
        io.decode_jpeg(encoded, device="cuda")
    torch.cuda.synchronize()
