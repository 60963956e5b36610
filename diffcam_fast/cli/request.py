"""The options of ``diffcam explain``, as the parts of the command read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffcam_fast.backends import Backend


@dataclass(frozen=True)
class Request:
    """What the user asked for; the options of ``diffcam explain`` by their names.

    Attributes:
        inputs: Files, folders, globs, or ``-`` for a list on standard input.
        text_list: A text file with one path a line.
        model: As `diffcam_fast.models.load_model` takes it.
        weights: A file, ``random``, or None.
        out: Output folder; None: beside a single image, else ``diffcam-out``.
        formats: Of ``overlay heatmap npz jsonl parquet``.
        overlay: Whether overlays stand beside the image or are blended into it.
        report: Write ``report.html``.
        targets: Class indices or labels; none: the predicted class.
        topk: Explain the k most probable classes instead.
        size: Height and width of the network's input; None: the model's own.
        batch_size: Images at once; None: as many as fit, 16 on the CPU.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None: as the weights are.
        precision: ``int8``: features in whole numbers, in ONNX Runtime on the CPU.
        labels: A file of class names in place of the model's.
        resume: Go on where an earlier run into ``out`` stopped.
        timeout: Seconds that reading one image may take.
        profile: Tell how busy each stage was.
        backend: Which runtime explains; auto: the fastest, where finding it out is worth it.
        watch: A folder whose images are explained as they come, in place of inputs.
        shard_size: Images in one file of a Parquet dataset.
        map_type: Of the maps in it.
        any_target: Classes will be asked for that are not known yet, or the best of them.
    """

    inputs: tuple[str, ...]
    text_list: Path | None = None
    model: str | None = None
    weights: str | None = None
    out: Path | None = None
    formats: tuple[str, ...] = ("overlay",)
    overlay: Literal["side", "blend"] = "side"
    report: bool = False
    targets: tuple[str, ...] = ()
    topk: int | None = None
    contrast: str | None = None
    temperature: float | None = None
    method: str | None = None
    layer: str | None = None
    size: str | None = None
    batch_size: int | None = 16
    dtype: str | None = None
    precision: Literal["float32", "int8"] = "float32"
    device: str | None = None
    labels: Path | None = None
    cmap: str = "turbo"
    resume: bool = False
    timeout: float = 60.0
    profile: bool = False
    backend: Backend = "auto"
    watch: Path | None = None
    shard_size: int = 1024
    map_type: Literal["float16", "uint8"] = "float16"
    any_target: bool = False
