"""`diffcam bench onnx-peers`: our file beside OpenVINO XAI's, of the same network in the same run.

OpenVINO XAI inserts Recipro-CAM into a PyTorch model: it runs the head again on the activation of
each cell alone, for the maps of all classes. Its user exports the model. It pins versions of numpy
and OpenVINO that are not ours, so it lives in an environment of its own, whose Python is started.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from diffcam_bench.measure import Timing, alternate
from diffcam_bench.onnx_files import CPU, runner
from diffcam_bench.onnx_flops import flops
from diffcam_bench.rows import provenance
from diffcam_bench.zoo import build, size_of
from diffcam_export.export import export_onnx
from diffcam_export.plain import Plain, plain_file, plain_part
from diffcam_export.session import open_session
from diffcam_fast.running import first_line

PLAIN, OURS, PEER = "plain", "diffcam-fast", "OpenVINO XAI"
# Its exporter writes batch norm into the weights.
_SAME_LOGITS = 1e-3
_TRIED = (1, 2, 3, 8)

# Runs in the peer's environment: nothing of ours is there.
_EXPORT = """
import json, sys
from importlib.metadata import version
import torch, torchvision
import openvino_xai as xai

name, weights, images, out = sys.argv[1:]
model = torchvision.models.get_model(name, weights=None)
model.load_state_dict(torch.load(weights))
model.eval()
images = torch.load(images)
explained = xai.insert_xai(model, task=xai.Task.CLASSIFICATION)
axes = {"data": {0: "batch"}, "prediction": {0: "batch"}, "saliency_map": {0: "batch"}}
with torch.no_grad():
    torch.onnx.export(
        explained, (images,), out, dynamo=False, opset_version=17, input_names=["data"],
        output_names=["prediction", "saliency_map"], dynamic_axes=axes,
    )
print(json.dumps({"torch": torch.__version__, "openvino_xai": version("openvino_xai")}))
"""


@dataclass(frozen=True)
class Compared:
    """One file at one batch size.

    Attributes:
        model: `torchvision:NAME`, random weights.
        name: `plain`, `diffcam-fast` or `OpenVINO XAI`.
        version: of the peer.
        maps: what the file returns beside the logits: shape and type.
        exported_batch: N of the images that the peer's file was exported with.
        batches: sizes of batch, of those tried, that the file gives maps of all images for.
        nodes: constants left out.
        bytes: of the file.
        gflops: of one image, multiplications and additions.
        logits_error: largest difference from the plain model's over the largest.
        batch: N that was timed.
        rounds: how often.
        median_ms: per batch.
        ratio: median over the rounds of its time over the plain model's.
        ratio_p20: 20th percentile of these.
        ratio_p80: 80th percentile of these.
    """

    model: str
    name: str
    version: str
    maps: str
    exported_batch: str
    batches: str
    nodes: int
    bytes: int
    gflops: str
    logits_error: str
    batch: int
    rounds: int
    median_ms: str
    ratio: str
    ratio_p20: str
    ratio_p80: str

    def row(self, *, threads: int) -> dict[str, object]:
        """Its columns, with where they come from."""
        return {**vars(self), **provenance("torchvision", "onnxruntime", threads=threads)}


class PeerError(click.ClickException):
    """The peer cannot be run, or its file is of another network."""


@dataclass(frozen=True)
class _Candidate:
    """A file, its size, and for which batches it works."""

    path: Path
    size: Plain
    version: str
    exported_batch: str
    maps: str
    batches: tuple[int, ...]
    error: float
    gflops: float


def compare(
    model: str, *, python: str, file: Path | None, rounds: int, threads: int
) -> Iterator[Compared]:
    """Exports the same network by both, and times both files beside the plain one.

    Args:
        model: `torchvision:NAME`.
        python: an interpreter that imports openvino_xai, torch and torchvision.
        file: what the peer exported, of the same network with the same seed, in place of that.
        rounds: timed rounds.
        threads: of ONNX Runtime.

    Raises:
        PeerError: openvino_xai cannot be run, or its file is of another network.
    """
    torch.set_num_threads(threads)
    network = build(model)
    size = size_of(model, network)
    images = torch.randn(max(_TRIED), 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = network(images).numpy()
    with tempfile.TemporaryDirectory() as folder:
        exported = [(file, "", "")] if file is not None else []
        if file is None:
            for n in (1, 8):
                path = Path(folder, f"peer{n}.onnx")
                versions = _export_peer(python, model, network, images[:n], path)
                exported.append((path, versions, str(n)))
        ours = Path(folder, "ours.onnx")
        export_onnx(network, ours, example_inputs=images[:2], verify=False)
        plain = Path(folder, "plain.onnx")
        part = plain_part(ours)
        assert isinstance(part.model, bytes)
        plain.write_bytes(part.model)
        common = [
            _candidate(plain, images, logits, threads),
            _candidate(ours, images, logits, threads),
        ]
        peers = [
            _candidate(path, images, logits, threads, version=version, exported_batch=n)
            for path, version, n in exported
        ]
        for batch in (1, 8):
            runs = [c for c in (*common, *peers) if batch in c.batches]
            # One file of the peer's for each size; a second would be the same again.
            runs = runs[:3]
            yield from _timed(model, runs, images[:batch], rounds, threads)


def _export_peer(python: str, model: str, network: nn.Module, images: Tensor, out: Path) -> str:
    weights, inputs = out.with_suffix(".weights"), out.with_suffix(".images")
    torch.save(network.state_dict(), weights)
    torch.save(images, inputs)
    name = model.partition(":")[2]
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _EXPORT, name, str(weights), str(inputs), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerError(
            f"{python} cannot export with OpenVINO XAI ({last}); install openvino_xai, torch and"
            " torchvision into an environment of their own, and give its Python as --python"
        )
    versions = json.loads(done.stdout.strip().splitlines()[-1])
    return f"{versions['openvino_xai']}, torch {versions['torch']}"


def _candidate(
    path: Path,
    images: Tensor,
    logits: np.ndarray,
    threads: int,
    *,
    version: str = "",
    exported_batch: str = "",
) -> _Candidate:
    session = _session(path, threads)
    works, why, error, sample = [], "other logits", 0.0, []
    for n in _TRIED:
        try:
            got = session.run(None, {session.get_inputs()[0].name: images[:n].numpy()})
        except Exception as failure:  # noqa: BLE001 - whatever ONNX Runtime raises
            why = first_line(failure)
            continue
        expected = logits[:n]
        whole = got[0].shape == expected.shape and all(len(v) == n for v in got)
        far = float(np.abs(got[0] - expected).max() / np.abs(expected).max()) if whole else 1.0
        if far <= _SAME_LOGITS:
            works.append(n)
            error, sample = max(error, far), got[1:]
    if not works:
        raise PeerError(f"{path} gives the network's logits at no batch size: {why}")
    maps = "; ".join(f"{v.dtype} (N, {', '.join(map(str, v.shape[1:]))})" for v in sample)
    gflops = flops(path, images[: works[0]], threads=threads) / works[0] / 1e9
    return _Candidate(
        path, plain_file(path), version, exported_batch, maps, tuple(works), error, gflops
    )


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # That a file does not take a batch is a result here, and nothing to log.
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=list(CPU))


def _timed(
    model: str, candidates: Sequence[_Candidate], images: Tensor, rounds: int, threads: int
) -> Iterator[Compared]:
    names = (PLAIN, OURS, PEER)
    cases: dict[str, Callable[[], object]] = {
        name: runner(open_session(c.path, providers=CPU, threads=threads), images)
        for name, c in zip(names, candidates, strict=False)
    }
    timings = alternate(cases, baseline=PLAIN, rounds=rounds)
    for timing, candidate in zip(timings, candidates, strict=True):
        yield _compared(model, timing, candidate, len(images))


def _compared(model: str, timing: Timing, candidate: _Candidate, batch: int) -> Compared:
    return Compared(
        model=model,
        name=timing.name,
        version=candidate.version,
        maps=candidate.maps,
        exported_batch=candidate.exported_batch,
        batches=" ".join(map(str, candidate.batches)),
        nodes=candidate.size.nodes,
        bytes=candidate.size.bytes,
        gflops=f"{candidate.gflops:.3f}",
        logits_error=f"{candidate.error:.1e}",
        batch=batch,
        rounds=timing.rounds,
        median_ms=f"{timing.median_ms:.4g}",
        ratio=f"{timing.ratio:.4g}",
        ratio_p20=f"{timing.ratio_p20:.4g}",
        ratio_p80=f"{timing.ratio_p80:.4g}",
    )
