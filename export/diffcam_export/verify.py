"""Is an explained ONNX file what it says it is? Each question is a check, with its answer."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx

from diffcam_export.checking import Check, Report, Skipped, ask, shown
from diffcam_export.map_checks import has_heatmaps, heatmaps, maps, runs
from diffcam_export.own_outputs import own_outputs, plain_feeds
from diffcam_export.plain import plain_file
from diffcam_export.running import run
from diffcam_export.session import CPU, Provider, name_of, why_not
from diffcam_export.subject import Against, Subject
from diffcam_fast.running import first_line

__all__ = ["Against", "Check", "Report", "verify"]

# Ten rounds or so tell 1.0 from 1.1 on a quiet machine; a network of a second each takes fewer.
_SECONDS = 20.0


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
            itself, the added ones taken away. Without a PyTorch model, maps of an ONNX tensor are
            compared with those of a CAM head made anew.
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
    """The checks of one file, in order."""

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
        yield ask("checker", self._checker)
        yield ask("shapes", self._shapes)
        for name, reason in self._missing.items():
            yield Check(f"provider {name}", "skipped", reason)
        opened = ask("opens", self._open)
        yield opened
        if opened.verdict != "ok":
            return
        subject = self._subject
        for shape in subject.samples.shapes:
            yield ask(f"runs {shown(shape)}", partial(runs, subject, shape))
        for layer in subject.facts.layers:
            yield ask(f"map of {layer}", partial(maps, subject, layer))
            if has_heatmaps(subject, layer):
                yield ask(f"heatmap of {layer}", partial(heatmaps, subject, layer))
        yield ask("own outputs", partial(own_outputs, subject))
        yield ask("placement", self._placement)
        yield ask("added", self._added)
        yield ask("latency", self._latency)

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
        self._subject = Subject(self._path, self._against, self._providers, self._threads)
        return self._subject.explainer.backend

    def _placement(self) -> str:
        placed: Counter[str] = Counter()
        elsewhere: Counter[str] = Counter()
        try:
            parts = self._subject.opened.session.get_provider_graph_assignment_info()
        except (AttributeError, RuntimeError) as error:
            raise Skipped(f"ONNX Runtime does not tell: {first_line(error)}") from error
        for part in parts:
            nodes = part.get_nodes()
            placed[part.ep_name] += len(nodes)
            if part.ep_name != self._subject.opened.provider:
                elsewhere.update(node.op_type for node in nodes)
        shown = ", ".join(f"{name} {count} nodes" for name, count in placed.most_common())
        others = ", ".join(f"{count} {name}" for name, count in elsewhere.most_common(5))
        return f"{shown}{f' ({others})' if others else ''}"

    def _added(self) -> str:
        plain = self._subject.plain
        ours = plain_file(self._path)
        return f"{ours.nodes - plain.nodes} nodes, {ours.bytes - plain.bytes:,} bytes"

    def _latency(self) -> str:
        if self._rounds == 0:
            raise Skipped("not asked for")
        subject = self._subject
        theirs = subject.session(subject.plain.model)
        shape = subject.samples.usable[0]
        sample = subject.samples.any(shape)
        both = [
            (opened, feeds, [value.name for value in opened.session.get_outputs()])
            for opened, feeds in (
                (subject.opened, subject.feeds(sample)),
                (theirs, plain_feeds(subject, theirs, sample)),
            )
        ]
        taken: tuple[list[float], list[float]] = ([], [])
        begun = time.perf_counter()
        # The first round warms up, and is left out.
        for index in range(self._rounds + 1):
            # Whoever comes second may find the processor warmer: they take turns.
            for which in (0, 1) if index % 2 else (1, 0):
                (opened, feeds, names), times = both[which], taken[which]
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
            f"medians of {len(taken[0])} at {shown(shape)}"
        )
