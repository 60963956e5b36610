"""`diffcam bench engine`: images a second, explained, beside plain inference and other libraries.

All of a case take turns on the same images, from memory or from JPEG files, and nothing is timed
before the maps were compared.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffcam_bench.cam_peers import Rival, rivals_of
from diffcam_bench.cams import SAME, gate
from diffcam_bench.measure import Timing, alternate
from diffcam_bench.methods import ParityError, Peer, predicted, rounded
from diffcam_bench.onnx_flops import flops
from diffcam_bench.photographs import write_jpegs
from diffcam_bench.rows import provenance
from diffcam_bench.zoo import build, size_of
from diffcam_export.candidate import Fastest
from diffcam_export.fastest import accelerate
from diffcam_export.plain import plain_part
from diffcam_export.running import run
from diffcam_export.session import CPU, open_session
from diffcam_fast import Explainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import read_image
from diffcam_fast.stream import Explains, stream

OURS, PLAIN, READING = "diffcam-fast", "plain inference", "reading and decoding alone"
HEATMAPS = f"{OURS}, heatmaps of the images' size"
METHOD = "grad_cam"
TARGETS = 5
# What the issue of throughput asks for, as our rate over theirs at least.
LEAST = {PLAIN: 0.97, "torch-cam": 1.7, "pytorch-grad-cam": 5.0}
LEAST_TARGETS, MOST_OVER_FLOPS = 0.95, 1.2
# A layer before the last one, of the networks that have a usual one.
EARLIER = {"torchvision:resnet50": "layer3"}

Case = Callable[[], object]


@dataclass(frozen=True)
class Contest:
    """One network on images of one kind.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`, random weights.
        source: `memory` or `files`.
        images: how many a round.
        batch_size: at once.
        runtime: what ran ours, and why.
        timings: the ratio is the time over that of ours.
        flop_ratio: multiplications of the earlier layer's file over the plain model's; 0 where it
            was not run.
        threads: of all.
    """

    model: str
    source: str
    images: int
    batch_size: int
    runtime: str
    timings: Sequence[Timing]
    flop_ratio: float
    threads: int

    def rate(self, milliseconds: float) -> float:
        """Images a second."""
        return self.images / milliseconds * 1000

    def rows(self) -> list[dict[str, object]]:
        """One row for each candidate."""
        packages = ("torchvision", "onnxruntime", "grad-cam", "torchcam", "captum")
        source = provenance(*packages, threads=self.threads)
        return [
            {
                "model": self.model,
                "source": self.source,
                "images": self.images,
                "batch_size": self.batch_size,
                "name": timing.name,
                "rounds": timing.rounds,
                "images_per_s": rounded(self.rate(timing.median_ms)),
                "slow_p20": rounded(self.rate(timing.p80_ms)),
                "fast_p80": rounded(self.rate(timing.p20_ms)),
                "ours_over": rounded(timing.ratio),
                "ours_over_p20": rounded(timing.ratio_p20),
                "ours_over_p80": rounded(timing.ratio_p80),
                "flop_ratio": rounded(self.flop_ratio) if "layer" in timing.name else "",
                "runtime": self.runtime if timing.name == OURS else "",
                **source,
            }
            for timing in self.timings
        ]

    def verdicts(self) -> list[str]:
        """Each thing that was asked for, and whether it holds."""
        ratios = {timing.name: timing.ratio for timing in self.timings}
        found = [
            verdict(f"over {name}", ratios[name], least)
            for name, least in LEAST.items()
            if name in ratios
        ]
        for name, ratio in ratios.items():
            if name.endswith("targets"):
                found.append(verdict(f"{name} over one", 1 / ratio, LEAST_TARGETS))
            if "layer" in name and self.flop_ratio:
                over = ratio / ratios[PLAIN] / self.flop_ratio
                mark = "holds" if over <= MOST_OVER_FLOPS else "LOST"
                found.append(
                    f"{name}: {over:.3f} of its share of the multiplications, at most "
                    f"{MOST_OVER_FLOPS}: {mark}"
                )
        return found


def verdict(what: str, ratio: float, least: float) -> str:
    """Whether a ratio holds, in a line."""
    return f"{what}: {ratio:.3f}, at least {least}: {'holds' if ratio >= least else 'LOST'}"


class PlainInference:
    """A classifier without maps, called as an explainer is."""

    layer = ""

    def __init__(self, logits: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        self.logits = logits
        first = next(network.parameters())
        self.device, self.dtype = first.device, first.dtype

    def __call__(
        self, images: Tensor, targets: object = None, *, topk: int | None = None
    ) -> Explanation:
        """The logits, and a map of one zero."""
        return _nothing(self.logits(images))


class Reading:
    """What takes no time at all, called as an explainer is."""

    layer = ""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(
        self, images: Tensor, targets: object = None, *, topk: int | None = None
    ) -> Explanation:
        """A map of one zero."""
        return _nothing(images.new_zeros(len(images), 1))


def _nothing(logits: Tensor) -> Explanation:
    n = len(logits)
    return Explanation(
        logits=logits,
        targets=torch.zeros(n, 1, dtype=torch.int64),
        scores=logits[:, :1],
        maps=logits.new_zeros(n, 1, 1, 1),
        backend="",
        layer="",
        method="",
        contrast="",
    )


def contest(
    model: str,
    *,
    source: str,
    images: int,
    batch_size: int,
    rounds: int,
    threads: int,
    peers: bool = True,
    progress: Callable[[int], object] = lambda done: None,
) -> Contest:
    """Compares maps, then times all in turn.

    Args:
        model: `timm:NAME` or `torchvision:NAME`.
        source: `memory`: images as the network takes them; `files`: JPEG files.
        images: how many a round.
        batch_size: at once.
        rounds: timed rounds.
        threads: of PyTorch and ONNX Runtime.
        peers: time other libraries too.
        progress: called after each round.

    Raises:
        ParityError: maps do not agree; nothing was timed.
    """
    torch.set_num_threads(threads)
    network = build(model)
    size = size_of(model, network)
    batch = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(1))
    settle(network, batch[:batch_size])
    with tempfile.TemporaryDirectory() as folder:
        made = _Candidates(model, network, batch, batch_size, threads, Path(folder))
        made.check(peers=peers)
        with made.cases(source, peers=peers) as cases:
            timings = alternate(cases, baseline=OURS, rounds=rounds, warmup=1, progress=progress)
        runtime = made.ours.reason
        return Contest(
            model, source, images, batch_size, runtime, timings, made.flop_ratio, threads
        )


def settle(network: nn.Module, images: Tensor) -> None:
    """Gives the batch norms of a network with random weights the statistics of images.

    As they are made, activations shrink or grow from layer to layer, until float32 has few digits
    left to compare maps by. What is computed, and how long it takes, stays the same.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        network(images)
    for norm in norms:
        norm.eval()


class _Candidates:
    """All that take part, for one network."""

    def __init__(
        self,
        model: str,
        network: nn.Module,
        batch: Tensor,
        batch_size: int,
        threads: int,
        folder: Path,
    ) -> None:
        self._network, self._batch, self._size = network, batch, batch_size
        self._threads, self._folder = threads, folder
        self._explainer = self._made(None)
        self.ours = self._fast(self._explainer)
        self._several = self._fast(self._explainer, topk=TARGETS)
        self._earlier = EARLIER.get(model)
        self._early = None if self._earlier is None else self._fast(self._made(self._earlier))
        assert self.ours.path is not None, "what is timed here can be exported"
        plain = plain_part(self.ours.path).model
        self._plain_file = folder / "plain.onnx"
        assert isinstance(plain, bytes)
        self._plain_file.write_bytes(plain)
        self._plain = PlainInference(self._runtime(), network)
        self.flop_ratio = self._flop_ratio()

    def _runtime(self) -> Callable[[Tensor], Tensor]:
        """The classifier without maps, in the runtime that is the faster."""
        if isinstance(self.ours.explainer, Explainer):
            return torch.inference_mode()(self._network)
        opened = open_session(self._plain_file, providers=[CPU], threads=self._threads)
        images, logits = opened.session.get_inputs()[0].name, opened.session.get_outputs()[0].name
        return lambda batch: run(opened, {images: batch.contiguous()}, [logits])[0]

    def _made(self, layer: str | None) -> Explainer:
        return Explainer(self._network, layer=layer, method=METHOD, example_inputs=self._batch[:2])

    def _fast(self, explainer: Explainer, topk: int | None = None) -> Fastest:
        return accelerate(
            explainer,
            topk=topk,
            batch_size=self._size,
            threads=self._threads,
            cache=self._folder,
        )

    def _flop_ratio(self) -> float:
        if self._early is None or self._early.path is None:
            return 0.0
        first = self._batch[:1]
        ours = flops(self._early.path, first, threads=self._threads)
        return ours / flops(self._plain_file, first, threads=self._threads)

    def check(self, *, peers: bool) -> None:
        """Holds all maps, and the plain model's logits, against those of the engine in PyTorch."""
        images = self._batch[: min(4, len(self._batch))]
        expected = self._explainer(images)
        made = self.ours.explainer(images)
        _agree("ours, accelerated", made.maps, expected.maps)
        _agree("plain inference", self._plain.logits(images), expected.logits)
        if peers:
            targets = predicted(self._network, images)
            maps = self._explainer(images, targets).maps[:, 0]
            for rival, peer in self._rivals().items():
                gate(rival, peer(images, targets), maps, images)

    def _rivals(self) -> dict[Rival, Peer]:
        return rivals_of(METHOD, self._network, self._explainer.layer)

    @contextmanager
    def cases(self, source: str, *, peers: bool) -> Iterator[dict[str, Case]]:
        """What is timed, by its name; each explains all images once. Other libraries make heatmaps
        of the images' size, as the first one always does.
        """
        if source == "memory":
            cases = self._streams(self._batch, None)
            cases[f"{OURS}, {TARGETS} targets"] = lambda: drain(
                self._several.explainer, self._batch, self._size, topk=TARGETS
            )
            if self._early is not None:
                early = self._early.explainer
                name = f"{OURS}, {self._earlier}"
                cases[name] = lambda: drain(early, self._batch, self._size)
            chunks: Any = torch.split(self._batch, self._size)
        else:
            paths = write_jpegs(self._folder, len(self._batch))
            preprocess = Preprocess(size=(self._batch.shape[2], self._batch.shape[3]))
            cases = self._streams(paths, preprocess)
            cases[READING] = lambda: drain(Reading(), paths, self._size, preprocess)
            chunks = DataLoader(
                _Files(paths, preprocess),
                batch_size=self._size,
                num_workers=self._threads,
                persistent_workers=True,
            )
        if peers:
            for rival, peer in self._rivals().items():
                cases[rival.library] = lambda peer=peer: _explained(peer, chunks, self._threads)  # type: ignore[misc]
        yield cases

    def _streams(self, source: Any, preprocess: Preprocess | None) -> dict[str, Case]:
        ours, size = self.ours.explainer, self._size
        sides = (self._batch.shape[2], self._batch.shape[3])
        return {
            OURS: lambda: drain(ours, source, size, preprocess),
            HEATMAPS: lambda: drain(ours, source, size, preprocess, heatmaps=sides),
            PLAIN: lambda: drain(self._plain, source, size, preprocess),
        }


class _Files(Dataset[Tensor]):
    """The files as users of the other libraries read them."""

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess) -> None:
        self._paths, self._preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._preprocess(read_image(self._paths[index]))


def drain(
    explainer: Explains,
    source: Any,
    batch_size: int,
    preprocess: Preprocess | None = None,
    *,
    topk: int | None = None,
    heatmaps: tuple[int, int] | None = None,
    workers: int | None = None,
) -> None:
    """Explains all of a source.

    Raises:
        ParityError: an image could not be explained.
    """
    made = stream(
        explainer,
        source,
        preprocess=preprocess,
        batch_size=batch_size,
        topk=topk,
        heatmaps=heatmaps,
        workers=workers,
    )
    for one in made:
        if one.error is not None:
            raise ParityError(f"{one.key}: {one.error}")


def _explained(peer: Peer, chunks: Any, threads: int) -> None:
    """Of a class that is given: to find the predicted one they would need nothing more, or a
    forward pass more.
    """
    torch.set_num_threads(threads)
    for chunk in chunks:
        peer(chunk, [0] * len(chunk))


def _agree(name: str, made: Tensor, expected: Tensor) -> None:
    error = float((made - expected).abs().max() / expected.abs().max())
    if not error <= SAME:
        raise ParityError(f"{name}: off by {error:.1e}, more than {SAME:.0e}; nothing is timed")
