"""`diffcam bench onnx`: explained ONNX files against the float64 engine, and what they cost.

A network of random weights is exported in three ways: from PyTorch, and from the plain ONNX files
that PyTorch's two exporters write. ONNX Runtime runs the files.
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_bench.bounded import OutOfBounds, Worker
from diffcam_bench.families import reason_of, relative_error, unfinished
from diffcam_bench.onnx_activations import call_that_makes, float64_maps, returned, same
from diffcam_bench.onnx_files import CPU, latencies, value_of, write_plain
from diffcam_bench.onnx_networks import ROUTES, Case
from diffcam_bench.rows import provenance, read_rows, write_rows
from diffcam_bench.zoo import build, size_of
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.export import Exported, export_onnx
from diffcam_export.plain import plain_part
from diffcam_fast import Explainer

# max|M - M64| / max|M64| of the files' float32 maps.
TOLERANCE = 1e-4
# Not the number of images that a file is exported with: another batch size must give maps too.
_IMAGES = 3
_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """How well one file explains.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`.
        asked: the module asked for; empty: none, the layer is found.
        route: see `diffcam_bench.onnx_networks.ROUTES`.
        layer: the layer that is explained, a module or a value of the plain file.
        head: `closed form` or `backward of the head`.
        error: max|M - M64| / max|M64| over three images and their predictions, M signed.
        targets_equal: the explained classes are the float64 network's predictions.
        nodes: of the plain model.
        added_nodes: of the CAM head.
        added_bytes: what the file grew by.
        latency_ratio: of the file over the plain one in ONNX Runtime on the CPU, at batch 1; the
            median of a few rounds, for orientation.
        note: where an ONNX file is explained at another activation than the PyTorch model, which.
        reason: why there is no explained file, or none that is exact; else empty.
        seconds: of all of it, exporting included.
    """

    model: str
    asked: str
    route: str
    layer: str = ""
    head: str = ""
    error: str = ""
    targets_equal: str = ""
    nodes: str = ""
    added_nodes: str = ""
    added_bytes: str = ""
    latency_ratio: str = ""
    note: str = ""
    reason: str = ""
    seconds: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells rows apart."""
        return self.model, self.asked, self.route


def holds(row: Row) -> bool:
    """The file works and is exact."""
    return not row.reason and row.targets_equal == "yes" and float(row.error) <= TOLERANCE


@dataclass(frozen=True)
class _File:
    """An explained file, not yet compared: the network is still in float32."""

    row: Row
    path: Path
    maps: Tensor
    targets: Tensor
    eager: Tensor | None
    """The float32 engine's maps of the same layer."""


def check(case: Case) -> list[Row]:
    """Exports a network in all ways and compares; an error becomes the reason of its row."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        model = build(case.model)
        size = size_of(case.model, model)
        images = torch.randn(_IMAGES, 3, *size, generator=torch.Generator().manual_seed(1))
        made = [
            _explained(model, images, Row(*key), Path(folder, f"{i}"))
            for i, key in enumerate(case.rows())
        ]
        # In place of a copy: the largest networks have a billion parameters.
        reference = _Reference(model.double(), images.double())
        return [m if isinstance(m, Row) else _compared(reference, m) for m in made]


def _explained(model: nn.Module, images: Tensor, row: Row, folder: Path) -> _File | Row:
    start = time.perf_counter()
    try:
        file = _written(model, images, row, folder)
    except Exception as error:  # noqa: BLE001 - the sweep lists whatever a network raises
        return replace(row, reason=reason_of(error), seconds=_since(start))
    return replace(file, row=replace(file.row, seconds=_since(start)))


def _written(model: nn.Module, images: Tensor, row: Row, folder: Path) -> _File:
    folder.mkdir()
    path, threads = folder / "explained.onnx", torch.get_num_threads()
    if row.route == "pytorch":
        layer, examples = row.asked or None, images[:2]
        done = export_onnx(
            model, path, example_inputs=examples, layer=layer, relu=False, verify=False
        )
        plain: Any = plain_part(path).model
    else:
        plain = folder / "plain.onnx"
        write_plain(model, images[:2], plain, torchscript=row.route == "onnx-torchscript")
        done = export_onnx(plain, path, relu=False, verify=False)
    result = OnnxExplainer(path, providers=list(CPU), threads=threads)(images)
    timed = latencies(path, plain, images[:1], rounds=_ROUNDS, threads=threads)
    row = replace(_described(row, done), latency_ratio=f"{timed[-1].ratio:.3f}")
    eager = None
    if row.route == "pytorch":
        engine = Explainer(model, layer=done.layers[0], relu=False, example_inputs=images[:2])
        eager = engine(images, result.targets).maps
    return _File(row, path, result.maps, result.targets, eager)


def _described(row: Row, done: Exported) -> Row:
    return replace(
        row,
        layer=done.layers[0],
        head=done.heads[0],
        nodes=str(done.nodes),
        added_nodes=str(done.added_nodes),
        added_bytes=str(done.added_bytes),
    )


class _Reference:
    """The float64 network."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        with torch.inference_mode():
            self.predicted = Explainer(model, example_inputs=images[:2])(images).targets

    def engine_maps(self, layer: str | None, targets: Tensor) -> tuple[str, Tensor]:
        """The name of a layer, or of the one that is found, and the engine's maps of it."""
        explainer = Explainer(self.model, layer=layer, relu=False, example_inputs=self.images[:2])
        return explainer.layer, explainer(self.images, targets).maps

    def maps(self, file: _File) -> tuple[Tensor, str]:
        """What a file should give, and a note where its activation is not the engine's.

        Raises:
            ValueError: nothing in the PyTorch model makes that activation.
        """
        layer, expected = self.engine_maps(file.row.asked or None, file.targets)
        if file.row.route == "pytorch":
            return expected, ""
        images = self.images.float()
        values = value_of(file.path, file.row.layer, images, threads=torch.get_num_threads())
        if same(values, returned(self.model, layer, self.images)):
            return expected, ""
        call = call_that_makes(self.model, self.images, values)
        if call is None:
            raise ValueError(
                f"no function that the PyTorch model calls returns {file.row.layer} "
                f"{values.shape}; PyTorch's layer is {layer}"
            )
        axis = 1 if values.shape[2:] == file.maps.shape[2:] else 3
        maps = float64_maps(self.model, self.images, file.targets, call, axis)
        shape = " x ".join(map(str, values.shape[1:]))
        return maps, f"another activation, {shape}; PyTorch's layer is {layer}"


def _compared(reference: _Reference, file: _File) -> Row:
    start = time.perf_counter()
    row = replace(
        file.row, targets_equal="yes" if file.targets.equal(reference.predicted) else "no"
    )
    try:
        expected, note = reference.maps(file)
        error = relative_error(file.maps, expected.double())
    except Exception as failure:  # noqa: BLE001 - the sweep lists whatever a network raises
        return replace(row, reason=reason_of(failure))
    reason = ""
    if not error <= TOLERANCE:
        reason = "its maps are not those of float64"
        if file.eager is not None:
            # Near-ties of a maximum or a ReLU fall either way, in PyTorch's float32 too.
            reason += (
                f"; PyTorch's in float32 are off by {relative_error(file.eager, expected):.1e}"
            )
    taken = float(row.seconds) + time.perf_counter() - start
    return replace(row, error=f"{error:.1e}", note=note, reason=reason, seconds=f"{taken:.0f}")


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.0f}"


def sweep(
    cases: Sequence[Case], path: Path | None, *, threads: int, limit_s: float, memory_gib: float
) -> Iterator[Row]:
    """Checks networks one by one in a process of their own, each bounded in time and memory.

    Args:
        cases: what to check.
        path: CSV file, written after each network; networks of which all rows are there are not
            checked again, unless they took too long. None: no file.
        threads: of torch and ONNX Runtime.
        limit_s: seconds for all rows of one network.
        memory_gib: memory for the process.

    Yields:
        The rows of each network that was checked now.
    """
    rows: dict[tuple[str, ...], dict[str, object]] = {
        (row["model"], row["asked"], row["route"]): dict(row)
        for row in (read_rows(path) if path else [])
    }
    source = provenance("torchvision", "timm", "onnx", "onnxruntime", threads=threads)
    with Worker(check, threads=threads, memory_gib=memory_gib) as worker:
        for case in cases:
            if all(key in rows and not unfinished(rows[key]) for key in case.rows()):
                continue
            found = _bounded(worker, case, limit_s)
            rows |= {row.key: {**asdict(row), **source} for row in found}
            if path is not None:
                write_rows(path, sorted(rows.values(), key=_order))
            yield from found


def _bounded(worker: Worker[list[Row]], case: Case, limit_s: float) -> list[Row]:
    try:
        return worker(case, limit_s=limit_s)
    except OutOfBounds as error:
        return [Row(*key, reason=f"not checked: {error}") for key in case.rows()]


def _order(row: Mapping[str, object]) -> tuple[str, str, int]:
    return str(row["model"]), str(row["asked"]), ROUTES.index(str(row["route"]))
