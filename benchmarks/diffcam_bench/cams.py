"""`diffcam bench cams`: each method beside the same method of other libraries.

Nothing of a method is timed before its maps were held against ours: the same to a tolerance, the
same up to the sign of an image's map, or, where a library computes something else on purpose or by
mistake, correlated with ours; the row says which, and why.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from diffcam_bench.cam_peers import RIVALS, SLOW, Rival, rivals_of
from diffcam_bench.measure import Timing, alternate
from diffcam_bench.methods import BASELINE, ParityError, min_max, predicted, rounded, upsampled
from diffcam_bench.rows import provenance
from diffcam_bench.zoo import build, size_of
from diffcam_fast import Explainer

OURS = "diffcam-fast"
# Untrained networks have maps of a small range, in which float32 has lost some digits.
SAME = 1e-4
CLOSE = 0.8


@dataclass(frozen=True)
class Gate:
    """What was found when maps were compared.

    Attributes:
        rule: `same`, `sign` or `close`.
        value: the largest difference in [0, 1], or the correlation.
        why: why the maps are not the same.
    """

    rule: str
    value: float
    why: str


@dataclass(frozen=True)
class Contest:
    """One method, ours and theirs in turn.

    Attributes:
        method: its name.
        timings: of ours, of theirs and of a plain forward pass; the ratio is over ours.
        gates: library -> how its maps compare.
        backend: how ours came to its maps.
    """

    method: str
    timings: Sequence[Timing]
    gates: dict[str, Gate]
    backend: str


def contest(
    method: str,
    network: nn.Module,
    images: Tensor,
    *,
    rounds: int,
    warmup: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> Contest:
    """Checks one method against its rivals, then times all in turn.

    Raises:
        ParityError: maps do not agree; nothing was timed.
    """
    explainer = Explainer(network, method=method, example_inputs=images, progress=False)
    signed = Explainer(network, method=method, relu=False, example_inputs=images, progress=False)
    targets = predicted(network, images)
    size = (images.shape[2], images.shape[3])
    peers = rivals_of(method, network, explainer.layer)
    # Their CAM keeps what speaks against the class.
    plain = signed if method == "cam" else explainer
    result = plain(images, targets)
    gates = {
        rival.library: gate(rival, peer(images, targets), result.maps[:, 0], images)
        if rival.like != "sign"
        else gate(rival, peer(images, targets), signed(images, targets).maps[:, 0], images)
        for rival, peer in peers.items()
    }

    def forward() -> Tensor:
        with torch.inference_mode():
            return network(images)  # type: ignore[no-any-return]

    cases: dict[str, Callable[[], object]] = {
        OURS: lambda: explainer(images, targets).heatmaps(size),
        BASELINE: forward,
    }
    for rival, peer in peers.items():
        cases[rival.library] = lambda peer=peer: peer(images, targets)  # type: ignore[misc]
    timings = alternate(cases, baseline=OURS, rounds=rounds, warmup=warmup, progress=progress)
    return Contest(method, timings, gates, result.backend)


def gate(rival: Rival, theirs: Tensor, maps: Tensor, images: Tensor) -> Gate:
    """Holds heatmaps of another library (N, H, W) against our maps (N, h, w).

    Raises:
        ParityError: they are not what they are to be.
    """
    if not theirs.isfinite().all() or float(theirs.amax()) == 0:
        raise ParityError(f"the maps of {rival.library} are constant or not finite")
    if rival.like == "sign":
        each = torch.stack([_difference(theirs, sign * maps, images) for sign in (1, -1)])
        value = float(each.amin(dim=0).max())
    elif rival.like == "close":
        pairs = torch.stack([_heatmaps(maps.relu(), images).flatten(), theirs.flatten()])
        value = float(torch.corrcoef(pairs.double())[0, 1])
    else:
        value = float(_difference(theirs, maps, images, relu=False).max())
    good = value >= CLOSE if rival.like == "close" else value <= SAME
    if not good:
        raise ParityError(
            f"{rival.library}: maps are to be {rival.like}, and read {value:.2g}; no speed is "
            "compared"
        )
    return Gate(rival.like, value, rival.why)


def _difference(theirs: Tensor, maps: Tensor, images: Tensor, *, relu: bool = True) -> Tensor:
    """Of each image (N,), under either library's order of scaling and upsampling."""
    ours = _heatmaps(maps.relu() if relu else maps, images)
    each = [(theirs - h).abs().amax(dim=(1, 2)) for h in (ours, min_max(ours))]
    # A map that one sign leaves nothing of is no map of theirs.
    return torch.stack(each).nan_to_num(nan=torch.inf).amin(dim=0)


def _heatmaps(maps: Tensor, images: Tensor) -> Tensor:
    return upsampled(min_max(maps), images)


def rows(
    found: Contest, *, model: str, layer: str, batch_size: int, size: tuple[int, int], threads: int
) -> list[dict[str, object]]:
    """One row for each candidate; `ratio` is its time over ours, above 1 where ours is faster."""
    source = provenance("torchvision", "timm", "grad-cam", "torchcam", "captum", threads=threads)
    made = []
    for timing in found.timings:
        gate = found.gates.get(timing.name)
        made.append(
            {
                "model": model,
                "layer": layer,
                "batch_size": batch_size,
                "size": f"{size[0]} x {size[1]}",
                "method": found.method,
                **{key: rounded(value) for key, value in asdict(timing).items()},
                "maps": "" if gate is None else gate.rule,
                "maps_value": "" if gate is None else rounded(gate.value),
                "why": "" if gate is None else gate.why,
                "backend": found.backend if timing.name == OURS else "",
                **source,
            }
        )
    return made


def chosen(methods: str | None, slow: bool) -> list[str]:
    """The methods to run, of names that commas part; None: all that are quick, or the slow ones.

    Raises:
        ValueError: a name that no other library has.
    """
    if methods is None:
        return [name for name in RIVALS if (name in SLOW) == slow]
    names = methods.split(",")
    unknown = [name for name in names if name not in RIVALS]
    if unknown:
        raise ValueError(f"no rival has {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    return names


def prepared(model: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and a batch for it."""
    network = build(model)
    size = size_of(model, network)
    generator = torch.Generator().manual_seed(1)
    return network, torch.randn(batch_size, 3, *size, generator=generator)
