"""Is an explained ONNX file what it says it is? Each question is a check, with its answer."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from diffcam_export.explainer import OnnxExplainer, run
from diffcam_export.plain import Plain, plain_file, plain_part
from diffcam_export.session import CPU, Opened, Provider, first_line, name_of, open_session, why_not
from diffcam_fast.explainer import Explainer
from diffcam_fast.methods import METHODS
from diffcam_fast.models.loading import LoadedModel

Against = nn.Module | LoadedModel | str | Path
Verdict = Literal["ok", "failed", "skipped"]

# Rounding in another order is about 1e-6 of a map in float32; half precision has 3 digits.
_TOLERANCE = {torch.float16: 2e-2}
_USUAL = 1e-4
# Ten rounds or so tell 1.0 from 1.1 on a quiet machine; a network of a second each takes fewer.
_SECONDS = 20.0
_RECORD = {"session.record_ep_graph_assignment_info": "1"}


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was checked.
        verdict: `ok`, `failed`, or `skipped` where it could not be asked.
        detail: figures, or the reason.
    """

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Report:
    """What came of all checks.

    Attributes:
        path: the file.
        checks: in the order in which they ran.

    Example:
        >>> report = Report("m.cam.onnx", (Check("checker", "ok", "opset 18"),))
        >>> report.ok, report.lines()
        (True, ['checker  ok  opset 18'])
    """

    path: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check failed; skipped ones do not count."""
        return all(check.verdict != "failed" for check in self.checks)

    def lines(self) -> list[str]:
        """A table for a person to read, a check a line."""
        name = max(len(check.name) for check in self.checks)
        verdict = max(len(check.verdict) for check in self.checks)
        return [
            f"{check.name:<{name}}  {check.verdict:<{verdict}}  {check.detail}".rstrip()
            for check in self.checks
        ]


class _Failed(Exception):
    """A check has its answer, and it is no."""


class _Skipped(Exception):
    """A check cannot be asked here."""


def verify(
    path: str | Path,
    *,
    against: Against | None = None,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    rounds: int = 10,
) -> Report:
    """Checks a file that `diffcam export` wrote.

    Args:
        path: the file.
        against: what it was made from: the PyTorch model, whose maps are compared; or the plain
            ONNX file, whose outputs are. None: the outputs are compared with those of the file
            itself, the added ones taken away.
        providers: of ONNX Runtime, as `OnnxExplainer` takes them.
        threads: for the work inside an operator on the CPU.
        rounds: how often each of the two models is timed, in turn; 0: not at all.

    Returns:
        A report; it failed where a single check did.

    Raises:
        ValueError: ONNX Runtime knows no such provider.
    """
    return Report(
        str(path),
        tuple(_Verification(path, against, providers, threads, rounds).checks()),
    )


class _Verification:
    """The checks of one file, and what they share."""

    def __init__(
        self,
        path: str | Path,
        against: Against | None,
        providers: Sequence[Provider] | None,
        threads: int | None,
        rounds: int,
    ) -> None:
        self._path = Path(path)
        self._against = against
        reasons = {name_of(p): why_not(name_of(p)) for p in providers or ()}
        self._missing = {name: reason for name, reason in reasons.items() if reason is not None}
        self._providers: list[Provider] | None = None
        if providers is not None:
            # Those that cannot run are told once, and not asked for by each session.
            self._providers = [p for p in providers if name_of(p) not in self._missing] or [CPU]
        self._threads = threads
        self._rounds = rounds

    def checks(self) -> Iterator[Check]:
        yield _check("checker", self._checker)
        yield _check("shapes", self._shapes)
        for name, reason in self._missing.items():
            yield Check(f"provider {name}", "skipped", reason)
        opened = _check("opens", self._open)
        yield opened
        if opened.verdict != "ok":
            return
        for images in self._batches():
            yield _check(f"runs {_shape(images)}", lambda images=images: self._runs(images))  # type: ignore[misc]
        for layer in self._explainer.inspect().layers:
            yield _check(f"map of {layer}", lambda layer=layer: self._maps(layer))  # type: ignore[misc]
        yield _check("own outputs", self._own_outputs)
        yield _check("placement", self._placement)
        yield _check("added", self._added)
        yield _check("latency", self._latency)

    def _checker(self) -> str:
        onnx.checker.check_model(str(self._path), full_check=True)
        model = onnx.load(self._path, load_external_data=False)
        sets = ", ".join(f"{s.domain or 'opset'} {s.version}" for s in model.opset_import)
        return f"IR version {model.ir_version}, {sets}"

    def _shapes(self) -> str:
        model = onnx.load(self._path, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
        shown = []
        for output in inferred.graph.output:
            kind = output.type.tensor_type
            dims = [d.dim_param or str(d.dim_value or "?") for d in kind.shape.dim]
            name = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            shown.append(f"{output.name} {name} ({', '.join(dims)})")
        return "; ".join(shown)

    def _open(self) -> str:
        self._explainer = OnnxExplainer(
            self._path, providers=self._providers, threads=self._threads
        )
        self._opened = self._session(self._path)
        return self._explainer.backend

    def _session(self, model: Path | bytes, *, optimise: bool = True) -> Opened:
        # What external data is relative to; without effect where the model is a file.
        beside = {"session.model_external_initializers_file_folder_path": str(self._path.parent)}
        return open_session(
            model,
            providers=self._providers,
            threads=self._threads,
            optimise=optimise,
            settings=_RECORD | (beside if isinstance(model, bytes) else {}),
        )

    def _batches(self) -> list[Tensor]:
        """Random images at two batch sizes and two resolutions, as far as the file takes them."""
        takes = self._explainer.input
        preprocess = self._explainer.preprocess
        usual = (224, 224) if preprocess is None else preprocess.size
        height, width = (side or other for side, other in zip(takes.size, usual, strict=True))
        sizes = [(height, width)]
        if None in takes.size:
            # Not square, where both are free.
            sizes.append((takes.size[0] or height + 32, takes.size[1] or width + 64))
        counts = [takes.batch] if takes.batch else [1, 3]
        generator = torch.Generator().manual_seed(0)
        shapes = [(n, takes.channels or 3, h, w) for n in counts for h, w in sizes]
        if takes.dtype != torch.uint8:
            return [torch.randn(shape, generator=generator) for shape in shapes]
        return [
            torch.randint(0, 256, (n, h, w, c), generator=generator, dtype=torch.uint8)
            for n, c, h, w in shapes
        ]

    def _runs(self, images: Tensor) -> str:
        result = self._explainer(images)
        n, t, h, w = result.maps.shape
        if not bool(result.finite.all()) or not bool(result.logits.isfinite().all()):
            raise _Failed("the maps or the logits of random images hold NaN or infinity")
        if (n, t) != result.targets.shape or n != len(images):
            raise _Failed(f"maps {tuple(result.maps.shape)}, targets {tuple(result.targets.shape)}")
        chosen = result.logits.gather(1, result.targets[:, :1])
        if not chosen.flatten().equal(result.logits.amax(dim=1)):
            raise _Failed("the explained class is not that of the largest logit")
        return f"maps {t} x {h} x {w}"

    def _maps(self, layer: str) -> str:
        facts = self._explainer.inspect()
        against = self._against
        if isinstance(against, LoadedModel):
            against = against.model
        if not isinstance(against, nn.Module):
            raise _Skipped("no PyTorch model to compare with was given")
        if facts.method not in METHODS:
            raise _Skipped(f"{facts.method} is no method of the PyTorch engine")
        if facts.baked:
            raise _Skipped("preprocessing is in the file, and not in the PyTorch model")
        ours = OnnxExplainer(
            self._path, layer=layer, providers=self._providers, threads=self._threads
        )
        batches = self._batches()
        theirs = Explainer(
            against,
            layer=layer,
            method=facts.method,
            contrast=facts.contrast,
            relu=facts.relu,
            example_inputs=batches[0].expand(max(2, len(batches[0])), -1, -1, -1)[:2],
        )
        worst = _largest([_difference(ours, theirs, images) for images in batches])
        tolerance = _TOLERANCE.get(ours.input.dtype, _USUAL)
        detail = f"relative error {worst:.1e} of at most {tolerance:.0e}, to PyTorch"
        # A NaN compares as false, and must not pass.
        if not worst <= tolerance:
            raise _Failed(detail)
        return detail

    def _plain(self) -> Plain:
        if isinstance(self._against, str | Path):
            return plain_file(Path(self._against))
        return plain_part(self._path)

    def _own_outputs(self) -> str:
        plain = self._plain()
        model = plain.model
        farthest = self._farthest(self._opened, self._session(model))
        if farthest == 0:
            return f"those of {plain.name}, bit for bit"
        bare = self._farthest(
            self._session(self._path, optimise=False), self._session(model, optimise=False)
        )
        tolerance = _TOLERANCE.get(self._explainer.input.dtype, _USUAL)
        detail = f"they differ from those of {plain.name} by {farthest:.1e} of the largest"
        if bare == 0 and farthest <= tolerance:
            return f"{detail}, and bit for bit not at all where ONNX Runtime fuses no operators"
        raise _Failed(f"{detail}, by {bare:.1e} without fused operators")

    def _farthest(self, ours: Opened, theirs: Opened) -> float:
        names = [value.name for value in theirs.session.get_outputs()]
        here = {value.name for value in ours.session.get_outputs()}
        lacking = [name for name in names if name not in here]
        if lacking:
            raise _Failed(f"outputs of the plain model are missing: {', '.join(lacking)}")
        far = [0.0]
        for images in self._batches():
            feeds = self._feeds(images)
            pairs = zip(run(ours, feeds, names), run(theirs, feeds, names), strict=True)
            for got, expected in pairs:
                if _bits(got) != _bits(expected):
                    far.append(_relative(got, expected))
        return _largest(far)

    def _feeds(self, images: Tensor) -> dict[str, Tensor]:
        takes = self._explainer.input
        if takes.channels_last and takes.dtype != torch.uint8:
            images = images.permute(0, 2, 3, 1)
        device = self._opened.device
        return {takes.name: images.to(device=device, dtype=takes.dtype).contiguous()}

    def _placement(self) -> str:
        placed: Counter[str] = Counter()
        elsewhere: Counter[str] = Counter()
        try:
            parts = self._opened.session.get_provider_graph_assignment_info()
        except (AttributeError, RuntimeError) as error:
            raise _Skipped(f"ONNX Runtime does not tell: {first_line(error)}") from error
        for part in parts:
            nodes = part.get_nodes()
            placed[part.ep_name] += len(nodes)
            if part.ep_name != self._opened.provider:
                elsewhere.update(node.op_type for node in nodes)
        shown = ", ".join(f"{name} {count} nodes" for name, count in placed.most_common())
        others = ", ".join(f"{count} {name}" for name, count in elsewhere.most_common(5))
        return f"{shown}{f' ({others})' if others else ''}"

    def _added(self) -> str:
        plain = self._plain()
        ours = plain_file(self._path)
        return f"{ours.nodes - plain.nodes} nodes, {ours.bytes - plain.bytes:,} bytes"

    def _latency(self) -> str:
        if self._rounds == 0:
            raise _Skipped("not asked for")
        theirs = self._session(self._plain().model)
        images = self._batches()[0]
        feeds = self._feeds(images)
        both = [(o, [v.name for v in o.session.get_outputs()]) for o in (self._opened, theirs)]
        taken: tuple[list[float], list[float]] = ([], [])
        begun = time.perf_counter()
        # The first round warms up, and is left out.
        for index in range(self._rounds + 1):
            # Whoever comes second may find the processor warmer: they take turns.
            for which in (0, 1) if index % 2 else (1, 0):
                (opened, names), times = both[which], taken[which]
                start = time.perf_counter()
                run(opened, feeds, names)
                if index:
                    times.append(time.perf_counter() - start)
            if index and time.perf_counter() - begun > _SECONDS:
                break
        ratio = statistics.median(a / b for a, b in zip(*taken, strict=True))
        ours, plain = (statistics.median(times) * 1e3 for times in taken)
        return (
            f"{ratio:.2f} times the plain model: {ours:.1f} ms, {plain:.1f} ms without maps, "
            f"medians of {len(taken[0])} at {_shape(images)}"
        )


def _check(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", ask())
    except _Skipped as reason:
        return Check(name, "skipped", str(reason))
    except _Failed as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # noqa: BLE001 - what a damaged file makes three libraries raise
        return Check(name, "failed", f"{type(error).__name__}: {first_line(error)}")


def _difference(ours: OnnxExplainer, theirs: Explainer, images: Tensor) -> float:
    """The largest relative error of the maps, of the prediction and of classes asked for."""
    asked: list[list[list[int]] | None] = [None]
    if ours.takes_targets:
        asked.append([[0, 1]] * len(images))
    errors = []
    for targets in asked:
        topk = ours.maps_per_image if targets is None and not ours.takes_targets else None
        got = ours(images, targets, topk=topk)
        # The same classes: two of almost equal logits may change places.
        expected = theirs(images, got.targets)
        errors.append(_relative(got.maps.cpu(), expected.maps.cpu()))
    return _largest(errors)


def _relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude; NaN anywhere makes it NaN."""
    if got.shape != expected.shape:
        raise _Failed(f"the shape is {tuple(got.shape)}, not {tuple(expected.shape)}")
    largest = float(expected.double().abs().max())
    return float((got.double() - expected.double()).abs().max()) / (largest or 1.0)


def _largest(errors: Sequence[float]) -> float:
    """NaN where one of them is, which `max` may pass over."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _bits(tensor: Tensor) -> tuple[torch.Size, bytes]:
    return tensor.shape, tensor.numpy(force=True).tobytes()


def _shape(images: Tensor) -> str:
    return " x ".join(map(str, images.shape))
