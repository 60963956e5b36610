"""`diffcam bench kernels`: each operator over layers of real networks, against PyTorch.

Baselines are the definition of the operator in eager PyTorch, the same under `torch.compile`, and
the bandwidth of a plain copy, all measured in the same run, in turn. Nothing is timed unless the
operator agrees with float64. On a GPU each candidate is a CUDA graph of calls that go round a ring
of operands larger than the L2 cache, so that none finds its own in it.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from diffcam_bench.rows import provenance
from diffcam_kernels import cost, ops, reference
from diffcam_kernels.cost import Cost

LAYERS = {
    "resnet50": (2048, 7),
    "efficientnet_b0": (1280, 7),
    "convnext_tiny": (768, 7),
    "densenet121": (1024, 7),
    "vgg16": (512, 7),
    "resnet50.layer2": (512, 28),
    "resnet50.layer1": (256, 56),
}
BATCHES = (1, 8, 64, 256)
CLASSES = (10, 1000, 21841)
TARGETS = (1, 5)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZE = 224
# Error over the largest value, above that of eager PyTorch; half precision only enters as operands.
TOLERANCE = 1e-5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Operands = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        op: name of the operator, with the reduction of a gradient method.
        layer: a key of `LAYERS`; empty where none matters.
        n: images.
        t: targets an image.
        k: classes; 0 where none matter.
        dtype: a key of `DTYPES`.
        layout: `nchw` or `nhwc`.
    """

    op: str
    layer: str
    n: int
    t: int
    k: int
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """All of it in one line."""
        sizes = f"N={self.n} T={self.t} K={self.k}"
        return " ".join(filter(None, (self.op, self.layer, sizes, self.dtype, self.layout)))


@dataclass(frozen=True)
class Measured:
    """What one candidate took for one case.

    Attributes:
        name: `diffcam`, `eager` or `compile`.
        ms: median, in milliseconds.
        ms_p20: 20th percentile.
        ms_p80: 80th percentile.
        launches: kernels on the device for one call.
        method: `graph`, the replay of a CUDA graph, or `events`, of calls that no graph can hold.
    """

    name: str
    ms: float
    ms_p20: float
    ms_p80: float
    launches: int
    method: str


def cases(*only: str) -> list[Case]:
    """All cases, or those whose name holds all of these texts."""
    return [case for case in _all_cases() if all(text in f" {case.name} " for text in only)]


def is_among(case: Case, rows: Sequence[dict[str, object]]) -> bool:
    """Whether rows hold this case already."""
    wanted = {name: str(value) for name, value in asdict(case).items()}
    return any(all(str(row[name]) == wanted[name] for name in wanted) for row in rows)


def _all_cases() -> Iterator[Case]:
    both = ("nchw", "nhwc")
    for layer, n, dtype, layout in product(LAYERS, BATCHES, DTYPES, both):
        for t in TARGETS:
            yield Case("pooled_cam", layer, n, t, 0, dtype, layout)
        for reduction in reference.REDUCTIONS:
            yield Case(f"gradient_cam {reduction}", layer, n, 1, 0, dtype, layout)
        yield Case("gradient_cam grad_cam", layer, n, 5, 0, dtype, layout)
        if LAYERS[layer][1] == 7:
            yield Case("eigen_cam", layer, n, 1, 0, dtype, layout)
    for layer, n, k, t, dtype in product(("resnet50",), BATCHES, CLASSES, TARGETS, DTYPES):
        yield Case("contrast_gradient", "", n, t, k, dtype, "")
        yield Case("contrast_channel_weights", layer, n, t, k, dtype, "")
        yield Case("head_cam", layer, n, t, k, dtype, "nhwc")
    for n, dtype in product(BATCHES, DTYPES):
        yield Case("heatmap", "resnet50", n, 1, 0, dtype, "")
        for layout in both:
            yield Case("preprocess", "", n, 1, 0, dtype, layout)
    for n in BATCHES:
        yield Case("overlay", "resnet50", n, 1, 0, "float32", "")


def operands(case: Case, device: str, generator: torch.Generator) -> Operands:
    """Random operands of the operator, in the order that it takes them."""
    c, side = LAYERS.get(case.layer, (0, 0))
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def activation(*shape: int) -> Tensor:
        found = normal(*shape)
        return (
            found.movedim(-3, -1).contiguous().movedim(-1, -3) if case.layout == "nhwc" else found
        )

    def pictures() -> Tensor:
        shape = (case.n, SIZE, SIZE, 3)
        return torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)

    def targets() -> Tensor:
        return torch.randint(case.k, (case.n, case.t), generator=generator, device=device)

    op, _, reduction = case.op.partition(" ")
    if op == "pooled_cam":
        return activation(case.n, c, side, side), normal(case.n, case.t, c).float(), True
    if op == "gradient_cam":
        g = activation(case.n, case.t, c, side, side)
        # Behind a ReLU, as most layers are: sums of signed activations come near 0, and whatever
        # divides by them is right in no precision.
        return activation(case.n, c, side, side).relu(), g, reduction, True
    if op == "eigen_cam":
        return activation(case.n, c, side, side), True
    if op == "contrast_gradient":
        return normal(case.n, case.k), targets(), 1.0
    if op == "contrast_channel_weights":
        return normal(case.n, case.k), normal(case.k, c), side * side, targets(), 1.0
    if op == "head_cam":
        weight, bias = normal(case.k, c), normal(case.k)
        return activation(case.n, c, side, side), weight, bias, targets(), 1.0, True
    maps = torch.randn((case.n, case.t, side, side), generator=generator, device=device)
    if op == "heatmap":
        return maps, SIZE, SIZE, dtype
    if op == "overlay":
        # Smooth, as colour maps are: a heat on the border of two colours may take either.
        table = torch.arange(256, device=device)[:, None].expand(256, 3).to(torch.uint8)
        return maps, pictures(), table, 128
    return pictures(), _MEAN, _STD, dtype, case.layout == "nhwc"


def work(case: Case) -> Cost:
    """What the operator must move and compute."""
    c, side = LAYERS.get(case.layer, (0, 0))
    n, t, k, p = case.n, case.t, case.k, side * side
    size = DTYPES[case.dtype].itemsize
    op, _, reduction = case.op.partition(" ")
    return {
        "pooled_cam": lambda: cost.pooled_cam(n, t, c, p, size),
        "gradient_cam": lambda: cost.gradient_cam(n, t, c, p, size, reduction),
        "eigen_cam": lambda: cost.eigen_cam(n, c, p, size),
        "contrast_gradient": lambda: cost.contrast_gradient(n, t, k, size),
        "contrast_channel_weights": lambda: cost.contrast_channel_weights(n, t, k, c, size),
        "head_cam": lambda: cost.head_cam(n, t, c, p, k, size),
        "heatmap": lambda: cost.heatmap(n, t, p, SIZE, SIZE, size),
        "overlay": lambda: cost.overlay(n, t, p, SIZE, SIZE),
        "preprocess": lambda: cost.preprocess(n, 3, SIZE, SIZE, size),
    }[op]()


def _eager_preprocess(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, last: bool
) -> Tensor:
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    low, scale = (_constant(tuple(c), images.device) for c in (mean, std))
    layout = torch.channels_last if last else torch.contiguous_format
    return ((x - low) / scale).to(dtype).contiguous(memory_format=layout)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: a copy from the host is no part of a graph."""
    return torch.tensor(values, device=device)[:, None, None]


def _eager_channel_weights(
    logits: Tensor, weight: Tensor, cells: int, targets: Tensor, temperature: float
) -> Tensor:
    d = reference.contrast_gradient(logits, targets, temperature)
    return reference.channel_weights(d, weight, cells)


EAGER: dict[str, Callable[..., Any]] = {
    "contrast_gradient": reference.contrast_gradient,
    "contrast_channel_weights": _eager_channel_weights,
    "pooled_cam": reference.pooled_cam,
    "head_cam": reference.head_cam,
    "gradient_cam": reference.gradient_cam,
    "eigen_cam": reference.eigen_cam,
    "heatmap": reference.heatmap,
    "overlay": reference.overlay,
    "preprocess": _eager_preprocess,
}
# The decomposition waits for the device, which no graph can hold.
_UNCAPTURED = {"eigen_cam"}


class ParityError(click.ClickException):
    """An operator disagrees with float64; it is not timed."""


def check_parity(case: Case, arguments: Operands) -> float:
    """The error of the operator over its largest value.

    Raises:
        ParityError: it is above that of eager PyTorch and `TOLERANCE`.
    """
    name = case.op.partition(" ")[0]
    ours, eager = _first(getattr(ops, name)(*arguments)), _first(EAGER[name](*arguments))
    exact = _first(
        EAGER[name](
            *(
                a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in arguments
            )
        )
    ).double()
    scale = exact.abs().max().clamp_min(1e-30)
    error, theirs = (float((x.double() - exact).abs().max() / scale) for x in (ours, eager))
    # Results of half precision round, and a byte may go either way.
    unit = 1 / 255 if ours.dtype == torch.uint8 else torch.finfo(ours.dtype).eps
    if not error <= theirs + TOLERANCE + unit:
        raise ParityError(f"{case} is off by {error:.1e}, eager PyTorch by {theirs:.1e}")
    return error


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def measure(case: Case, *, rounds: int, compiled: bool) -> list[Measured]:
    """Times the operator and its baselines on the current CUDA device, in turn.

    Args:
        case: what to time.
        rounds: replays of each candidate's graph.
        compiled: take `torch.compile` of the definition too; it takes long.
    """
    name = case.op.partition(" ")[0]
    candidates: dict[str, Callable[..., Any]] = {
        "diffcam": getattr(ops, name),
        "eager": EAGER[name],
    }
    if compiled:
        torch._dynamo.reset()
        candidates["compile"] = torch.compile(EAGER[name], dynamic=False)
    ring = _ring(case)
    events = {who for who in candidates if who != "diffcam" and name in _UNCAPTURED}
    runs = {
        who: functools.partial(_call_all, call, ring) if who in events else _capture(call, ring)
        for who, call in candidates.items()
    }
    launches = {who: _launches(call, ring[0]) for who, call in candidates.items()}
    taken: dict[str, list[float]] = {who: [] for who in candidates}
    for number in range(rounds):
        for who in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            taken[who].append(_milliseconds(runs[who]) / len(ring))
    return [
        _measured(who, taken[who], launches[who], "events" if who in events else "graph")
        for who in candidates
    ]


def _ring(case: Case) -> list[Operands]:
    """Operands of more bytes than four L2 caches, at least two sets and at most 256.

    Cases of less than a MB stay in the cache all the same; they are bound by their launches.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = min(256, max(2, 4 * cache // max(work(case).bytes, 1) + 1))
    generator = torch.Generator("cuda").manual_seed(0)
    return [operands(case, "cuda", generator) for _ in range(sets)]


def _call_all(call: Callable[..., Any], ring: Sequence[Operands]) -> None:
    for arguments in ring:
        call(*arguments)


def _capture(call: Callable[..., Any], ring: Sequence[Operands]) -> Callable[[], None]:
    """The replay of a graph of calls, each with memory of its own for its result."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # The operands are made on the other stream.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*ring[0])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in ring]
    del kept
    replay: Callable[[], None] = graph.replay
    return replay


def _milliseconds(run: Callable[[], None]) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _launches(call: Callable[..., Any], arguments: Operands) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(*arguments)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def _measured(name: str, taken: Sequence[float], launches: int, method: str) -> Measured:
    p20, median, p80 = (float(ms) for ms in np.percentile(taken, (20, 50, 80)))
    return Measured(name, median, p20, p80, launches, method)


def copy_bandwidth(rounds: int = 20) -> float:
    """Bytes read and written a second by a copy of 1 GiB on the current CUDA device.

    The faster of the driver's copy and of a kernel that copies, each by its median.
    """
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    calls = (target.copy_, lambda values: torch.mul(values, 1.0, out=target))
    runs = [_capture(call, [(source,)]) for call in calls]
    ms = min(statistics.median(_milliseconds(run) for _ in range(rounds)) for run in runs)
    return 2 * source.numel() * 4 / (ms / 1e3)


def rows_of(case: Case, measured: Sequence[Measured], bandwidth: float) -> list[dict[str, object]]:
    """A row for each candidate, its speed over ours and over the bandwidth of a copy."""
    done, [ours] = work(case), [m for m in measured if m.name == "diffcam"]
    return [
        {
            **asdict(case),
            **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(m).items()},
            "gb_per_s": f"{done.bytes / m.ms / 1e6:.4g}",
            "share_of_copy": f"{done.bytes / (m.ms / 1e3) / bandwidth:.3f}",
            "floor_ms": f"{done.floor_seconds(bandwidth) * 1e3:.4g}",
            "speedup_of_diffcam": f"{m.ms / ours.ms:.3g}",
            "copy_gb_per_s": f"{bandwidth / 1e9:.4g}",
            "gpu": torch.cuda.get_device_name(),
            **provenance("triton", threads=torch.get_num_threads()),
        }
        for m in measured
    ]
