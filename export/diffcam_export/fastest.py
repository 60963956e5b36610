"""The fastest way to run an explainer on this machine, found once and kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffcam_export.cache import Cache, versions
from diffcam_export.candidate import Candidate, Fastest
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.session import CPU
from diffcam_export.trial import allowed_target
from diffcam_fast.backends import BACKENDS, Backend
from diffcam_fast.explainer import Explainer
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.methods import METHODS
from diffcam_fast.running import pick_logits

# int8 is fitted to the ranges of these: what a few images did not fill would be clipped.
LEAST_IMAGES = 8


def accelerate(
    explainer: Explainer,
    *,
    backend: Backend = "auto",
    targets: Literal["predicted", "input"] = "predicted",
    topk: int | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    cache: Path | None = None,
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] | None = None,
    precision: Literal["float32", "int8"] = "float32",
    calibration: Tensor | None = None,
) -> Fastest:
    """The same explanations from the fastest runtime of this machine.

    On the CPU the model is exported once, with its maps in the graph, compared with the explainer,
    timed beside it, and kept in the user's cache under its weights, its code and the options. On
    CUDA the whole step is recorded once, as a CUDA graph with the kernels in it: see
    `CompiledExplainer`.

    Args:
        explainer: to make faster; it stays as it is.
        backend: `auto`: the faster of both; `onnxruntime` or `torch`: this one; `compiled`: with
            `torch.compile`, which compiles first.
        targets: `predicted`: calls explain the predicted class alone; `input`: any classes, which
            costs time where the head has no closed form.
        topk: calls explain the k best classes of each image instead.
        batch_size: that both are timed with.
        threads: for the work inside an operator; None: all processors.
        cache: folder of exported files; None: `DIFFCAM_CACHE`, or `diffcam-fast` in the user's
            cache.
        preprocess: from a photograph to the input, kept in the file.
        labels: K class names, kept in the file.
        precision: `int8`: the features in whole numbers, the head and the maps in float32. Never
            chosen unless it is asked for: maps are other ones, and `agreement` says how near.
        calibration: (N, C, H, W), images as the network takes them, 8 at least, such as it will
            see; int8 is fitted to three of four, and the rest tells how well it agrees.

    Returns:
        What to call, and why.

    Raises:
        ValueError: an unknown backend or precision, `onnxruntime` or `compiled` where the maps
            would not be the same, or int8 that cannot be had.

    Example:
        >>> fast = accelerate(Explainer(model))                  # doctest: +SKIP
        >>> fast.reason                                          # doctest: +SKIP
        'onnxruntime takes 0.52 of the time of torch (16 images at a time)'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _check_precision(precision, calibration, backend, explainer)
    if backend == "torch":
        return Fastest(explainer, "torch was asked for")
    if topk is not None and targets == "input":
        raise ValueError(f"topk={topk} excludes targets='input'; leave one out")
    on_cuda = explainer.device.type == "cuda"
    if backend == "compiled" or (on_cuda and backend == "auto" and precision == "float32"):
        return _replayed(explainer, backend, targets, topk, batch_size)
    reason = _obstacle(explainer)
    if reason is None and allowed_target(explainer.setup.contrast) is not None:
        # The check on random images needs a class that is none of the contrast's own.
        targets = "input"
        reason = None if topk is None else "the best classes may be those of the contrast"
    if reason is None:
        candidate = Candidate(explainer, targets, topk, batch_size, threads, preprocess, labels)
        found = candidate.opened(Cache(cache))
        if isinstance(found, Fastest) and calibration is not None and precision == "int8":
            return candidate.quantised(calibration, candidate.forced(found), Cache(cache))
        if isinstance(found, Fastest):
            return candidate.forced(found) if backend == "onnxruntime" else found
        reason = found
    if backend == "onnxruntime" or precision == "int8":
        raise ValueError(f"onnxruntime cannot run this explainer: {reason}")
    return Fastest(explainer, f"torch, because {reason}")


def _replayed(
    explainer: Explainer, backend: Backend, targets: str, topk: int | None, batch_size: int
) -> Fastest:
    """The explainer, recorded, or as it is.

    Raises:
        ValueError: it cannot be compiled, and was asked for so.
    """
    from diffcam_export.replayed import Replayed

    compile = backend == "compiled"
    found = Replayed(explainer, targets == "input", topk, batch_size, compile).opened()
    if isinstance(found, Fastest):
        return found
    if compile:
        raise ValueError(f"this explainer cannot be compiled: {found}")
    return Fastest(explainer, f"torch, because {found}")


def _obstacle(explainer: Explainer) -> str | None:
    """What an exported file could not do as the explainer does it."""
    setup = explainer.setup
    if explainer.device.type != "cpu":
        return f"the model is on {explainer.device}, where PyTorch runs the kernels"
    if len(setup.layers) > 1:
        return "the maps of several layers are fused"
    if METHODS.get(setup.method.name) != setup.method:
        return f"the method {setup.method.name} has settings of the caller's own"
    if setup.augment is not None:
        return "the maps of several views are averaged"
    if setup.output is not pick_logits:
        return "the logits are found by a function of the caller's"
    return None


def _check_precision(
    precision: str, calibration: Tensor | None, backend: str, explainer: Explainer
) -> None:
    if precision not in ("float32", "int8"):
        raise ValueError(f"precision must be 'float32' or 'int8', got {precision!r}")
    if precision == "float32":
        return
    if backend in ("torch", "compiled"):
        raise ValueError(f"int8 runs in onnxruntime; leave backend={backend!r} out")
    shape = explainer.setup.examples
    if calibration is None or len(calibration) < LEAST_IMAGES or calibration.shape[1:] != shape:
        given = "none" if calibration is None else str(tuple(calibration.shape))
        raise ValueError(
            f"int8 needs {LEAST_IMAGES} images (N, {', '.join(map(str, shape))}) at least as "
            f"calibration=, such as the network will see, better 50; got {given}"
        )


def remember(name: Mapping[str, Any], fastest: Fastest, *, cache: Path | None = None) -> None:
    """Keeps a file under a further name, that can be known without the model.

    Args:
        name: all that the file depends on, versions of packages aside.
        fastest: what `accelerate` found; where PyTorch runs, nothing is kept.
        cache: as in `accelerate`.
    """
    if isinstance(fastest.explainer, OnnxExplainer) and fastest.path is not None:
        path = fastest.path
        with suppress(OSError):
            Cache(cache).put(
                {**name, "versions": versions()},
                lambda _: {"file": path.name, "reason": fastest.reason, "whole": _bytes(path)},
            )


def recall(
    name: Mapping[str, Any], *, threads: int | None = None, cache: Path | None = None
) -> Fastest | None:
    """What `remember` kept under this name, opened without the model; None where nothing is."""
    store = Cache(cache)
    kept = store.get({**name, "versions": versions()})
    if kept is None:
        return None
    path = store.folder / str(kept.facts.get("file"))
    with suppress(OSError):
        # It is in use, and not the first to make room.
        os.utime(path.with_suffix(".json"))
    if _bytes(path) != kept.facts.get("whole"):
        return None
    try:
        explainer = OnnxExplainer(path, providers=[CPU], threads=threads)
    except ValueError:
        return None
    return Fastest(explainer, str(kept.facts["reason"]), path)


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
