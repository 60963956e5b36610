"""`diffcam bench families`: our float32 maps against float64 autograd, on a network of each family.

The oracle shares no code with the engine but the name of the layer: a float64 copy of the network,
all of it recorded by autograd, and the contrast and the reduction written out from their
definitions.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_bench.bounded import OutOfBounds, Worker
from diffcam_bench.rows import provenance, read_rows, write_rows
from diffcam_bench.zoo import Network, build, size_of
from diffcam_fast import Explainer
from diffcam_fast.analysis import Inspection
from diffcam_fast.layout import Layout

# N = 2 images with T = 2 targets each.
TARGETS = ((1, 7), (3, 2))
# max|M - M64| / max|M64|, of float32 networks and of float64 ones with float32 maps.
TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Result:
    """How well one network is explained.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`.
        family: see `diffcam_bench.zoo.Network`.
        parameters: in millions.
        size: of the input, `H x W`.
        supported: `yes` or `no`.
        layer: the target layer found.
        shape: of its activation, `C x h x w`.
        head: `closed form` or `backward`.
        error: max|M - M64| / max|M64| over all maps, M signed.
        eager_error: the same of float32 autograd on the whole network; its conditioning sets this.
        float64_error: where the error is above the tolerance, the same of our engine on the float64
            copy, whose maps are float32 again.
        reason: why the head is what it is, or why the network is not supported or not exact.
        seconds: of all of it.
    """

    model: str
    family: str = ""
    parameters: str = ""
    size: str = ""
    supported: str = "no"
    layer: str = ""
    shape: str = ""
    head: str = ""
    error: str = ""
    eager_error: str = ""
    float64_error: str = ""
    reason: str = ""
    seconds: str = ""


def check(name: str, *, size: tuple[int, int] | None = None) -> Result:
    """Explains a network of random weights, and compares; an error becomes the reason."""
    start = time.perf_counter()
    model = build(name)
    height, width = size or size_of(name, model)
    result = Result(name, size=f"{height} x {width}")
    try:
        result = _compare(model, (height, width), result)
    except Exception as error:  # noqa: BLE001 - the sweep lists whatever a network raises
        result = replace(result, reason=reason_of(error))
    return replace(result, seconds=f"{time.perf_counter() - start:.0f}")


def _compare(model: nn.Module, size: tuple[int, int], result: Result) -> Result:
    images = torch.randn(len(TARGETS), 3, *size, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor(TARGETS)
    explainer = Explainer(model, relu=False, example_inputs=images)
    maps = explainer(images, targets).maps
    found = explainer.inspect()
    result = replace(
        result,
        layer=found.layer,
        shape=" x ".join(map(str, found.shape)),
        head="closed form" if found.closed_form else "backward",
        reason=found.reason,
    )
    double = copy.deepcopy(model).double()
    exact = autograd_maps(double, images.double(), targets, found)
    if not 0 < float(exact.abs().max()) < float("inf"):
        return replace(result, reason="its own float64 maps are zero or not finite")
    error, reason = relative_error(maps, exact), found.reason
    eager = relative_error(autograd_maps(model, images, targets, found), exact)
    if error > TOLERANCE:
        again = Explainer(double, layer=found.layer, relu=False, example_inputs=images.double())
        in_float64 = relative_error(again(images.double(), targets).maps, exact)
        result = replace(result, float64_error=f"{in_float64:.1e}")
        reason += f"; with random weights float32 autograd is off by {eager:.0e} as well"
    return replace(
        result,
        supported="yes",
        error=f"{error:.1e}",
        eager_error=f"{eager:.1e}",
        reason=reason,
    )


def holds(result: Result) -> bool:
    """Our maps are right: close to float64 autograd, or as close as float32 autograd comes.

    In the second case the engine must agree in float64, where the network's conditioning does not
    count.
    """
    if result.supported != "yes":
        return False
    if float(result.error) <= TOLERANCE:
        return True
    amplified = float(result.error) <= 3 * float(result.eager_error)
    return amplified and float(result.float64_error) <= FLOAT64_TOLERANCE


def relative_error(maps: Tensor, exact: Tensor) -> float:
    """max|M - M64| / max|M64|; NaN where M64 is zero or not finite."""
    return float((maps.double() - exact).abs().max() / exact.abs().max())


def autograd_maps(model: nn.Module, images: Tensor, targets: Tensor, found: Inspection) -> Tensor:
    """Signed DiffGradCAM maps (N, T, h, w) under the log-odds contrast, by autograd.

    Args:
        model: in evaluation mode, in the dtype of the images.
        images: (N, C, H, W).
        targets: (N, T) int64.
        found: names the layer, its channel axis, and a softmax at the end.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(output)
        # Whatever is written in place behind the layer hits the clone.
        return output.clone()

    handle = model.get_submodule(found.layer).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(images.requires_grad_())
    finally:
        handle.remove()
        images.requires_grad_(False)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    logits = logits.flatten(1).log() if found.probabilities else logits.flatten(1)
    [activation] = kept
    return differentiated_maps(logits, activation, targets, found.layout)


def differentiated_maps(
    logits: Tensor, activation: Tensor, targets: Tensor, layout: Layout
) -> Tensor:
    """Signed DiffGradCAM maps (N, T, h, w) under the log-odds contrast, by autograd.

    Args:
        logits: (N, K), with a graph that leads back to the activation.
        activation: the output of the layer.
        targets: (N, T) int64.
        layout: of the activation.
    """
    maps = []
    for column in targets.T:
        score = _log_odds(logits, column).sum()
        [gradient] = torch.autograd.grad(score, activation, retain_graph=True)
        gradient, detached = (layout.cells(t) for t in (gradient, activation.detach()))
        maps.append((gradient.mean(dim=(2, 3), keepdim=True) * detached).sum(dim=1))
    return torch.stack(maps, dim=1)


def _log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """log(p_c / (1 - p_c)), (N,)."""
    others = logits.scatter(1, target[:, None], -torch.inf)
    return logits.gather(1, target[:, None])[:, 0] - others.logsumexp(dim=1)


def reason_of(error: Exception) -> str:
    """What kept a network from being checked or explained, on one line."""
    lacks_memory = isinstance(error, MemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "bad allocation", "bad_alloc")
    )
    if lacks_memory:
        return "not checked: it takes more memory than the sweep grants"
    return f"{type(error).__name__}: {_first_sentence(str(error))}"


def _first_sentence(text: str) -> str:
    line = " ".join(text.split())
    return line.partition(". ")[0][:300]


def sweep(
    networks: Sequence[Network],
    path: Path | None,
    *,
    threads: int,
    limit_s: float,
    memory_gib: float,
) -> Iterator[Result]:
    """Checks networks one by one in a process of their own, each bounded in time and memory.

    Args:
        networks: what to check.
        path: CSV file, written after each network; networks in it are not checked again, unless
            they took too long. None: no file.
        threads: of torch.
        limit_s: seconds for one network.
        memory_gib: memory for the process.

    Yields:
        A result for each network that was checked now.
    """
    rows: dict[str, dict[str, object]] = {
        row["model"]: dict(row) for row in (read_rows(path) if path else [])
    }
    source = provenance("torchvision", "timm", threads=threads)
    with Worker(check, threads=threads, memory_gib=memory_gib) as worker:
        for network in networks:
            if network.name in rows and not unfinished(rows[network.name]):
                continue
            result = replace(
                _bounded(worker, network, limit_s),
                family=network.family,
                parameters=f"{network.parameters / 1e6:.2f}",
            )
            rows[network.name] = {**asdict(result), **source}
            if path is not None:
                write_rows(
                    path,
                    sorted(rows.values(), key=lambda row: (str(row["family"]), str(row["model"]))),
                )
            yield result


def _bounded(worker: Worker[Result], network: Network, limit_s: float) -> Result:
    start = time.perf_counter()
    try:
        return worker(network.name, limit_s=limit_s)
    except OutOfBounds as error:
        return Result(
            network.name,
            size=f"{network.size[0]} x {network.size[1]}",
            reason=f"not checked: {error}",
            seconds=f"{time.perf_counter() - start:.0f}",
        )


def unfinished(row: Mapping[str, object]) -> bool:
    """The network was given too little time or memory, and is to be tried again."""
    return str(row["reason"]).startswith("not checked")
