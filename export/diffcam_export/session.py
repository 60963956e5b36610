"""ONNX Runtime sessions: the provider that was asked for, or a stated reason why it is another."""

import contextlib
import ctypes
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from diffcam_fast.running import first_line

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

Provider = str | tuple[str, Mapping[str, Any]]

_LIBRARIES = {
    CUDA: "libonnxruntime_providers_cuda.so",
    TENSORRT: "libonnxruntime_providers_tensorrt.so",
}


@dataclass(frozen=True)
class Opened:
    """A session, and what became of the wish for a provider.

    Attributes:
        session: ready to run.
        provider: name of the first of its providers, which takes the nodes that it can.
        missing: what was asked for and is not there, by provider name, with the reason.
        device: where inputs and outputs live.
    """

    session: ort.InferenceSession
    provider: str
    missing: Mapping[str, str]
    device: torch.device

    @property
    def backend(self) -> str:
        """The provider, and instead of which one it runs."""
        instead = f" instead of {', '.join(self.missing)}" if self.missing else ""
        return f"onnxruntime ({self.provider}{instead})"


def open_session(
    model: str | Path | bytes,
    *,
    providers: Sequence[Provider] | None = None,
    strict: bool = False,
    threads: int | None = None,
    optimise: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Opened:
    """Opens an ONNX model.

    Args:
        model: a file, or its bytes.
        providers: names of ONNX Runtime, or names with their options, the preferred first; None:
            CUDA where it is there. The CPU always follows, for the nodes that others do not take.
        strict: a provider that was asked for and is not there is an error, not a warning.
        threads: for the work inside an operator; None: what ONNX Runtime takes.
        optimise: at the default level, all; False: the graph runs as it is written.
        settings: configuration entries of the session.

    Raises:
        ValueError: no such file, no model, a provider that ONNX Runtime does not know, or with
            `strict` one that cannot run here; the message says what is missing.
    """
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ValueError(f"there is no ONNX file {model}")
    if isinstance(providers, str):
        raise ValueError(f"providers must be a list such as [{providers!r}], got a text")
    if providers is not None and not providers:
        raise ValueError(f"providers is empty; name one, such as {CPU}, or give None")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, or None; got {threads}")
    asked = {name_of(p): {} if isinstance(p, str) else p[1] for p in providers or ()}
    missing = {name: reason for name in asked if (reason := why_not(name)) is not None}
    if strict:
        _report(missing, strict=True)
    if providers is None and why_not(CUDA) is None:
        asked = {CUDA: {}}
    chosen = {name: options for name, options in asked.items() if name not in missing}
    wanted = list(chosen)
    chosen.setdefault(CPU, {})
    session = _create(model, chosen, threads=threads, optimise=optimise, settings=settings or {})
    # ONNX Runtime goes on without a provider that fails when it starts, and only logs it.
    running = session.get_providers()
    failed = [name for name in wanted if name not in running]
    missing |= dict.fromkeys(failed, "it failed when it started; ONNX Runtime's log says how")
    _report(missing, strict=strict)
    return Opened(session, running[0], missing, _device(running[0], chosen))


def why_not(provider: str) -> str | None:
    """What keeps a provider from running on this machine; None where nothing is known to.

    Raises:
        ValueError: ONNX Runtime knows no provider of this name.
    """
    if provider not in ort.get_all_providers():
        known = ", ".join(ort.get_all_providers())
        raise ValueError(f"unknown provider {provider!r}; ONNX Runtime knows {known}")
    if provider not in ort.get_available_providers():
        return (
            f"this build of ONNX Runtime ({ort.__version__}) was compiled without it; "
            f"it has {', '.join(ort.get_available_providers())}"
        )
    if provider not in _LIBRARIES:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    _preload()
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / _LIBRARIES[provider]))
    except OSError as error:
        # A missing symbol comes of loading it outside of ONNX Runtime; a missing library does not.
        if "undefined symbol" not in str(error):
            return f"a library was not found: {error}"
    return None


def _preload() -> None:
    """Loads the CUDA libraries that came with PyTorch, which ONNX Runtime does not find itself."""
    if torch.version.cuda is not None:
        # It prints what it did not find; the caller is told of what is needed.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def name_of(provider: Provider) -> str:
    """The name of a provider that may stand with its options."""
    return provider if isinstance(provider, str) else provider[0]


def _create(
    model: str | Path | bytes,
    providers: Mapping[str, Mapping[str, Any]],
    *,
    threads: int | None,
    optimise: bool,
    settings: Mapping[str, str],
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Errors alone: they are raised as well, but warnings about the graph help no caller.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[(name, dict(chosen)) for name, chosen in providers.items()],
        )
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else model
        raise ValueError(f"ONNX Runtime cannot open {what}: {first_line(error)}") from error
    # A run that fails is an error, not the beginning of another session on the CPU.
    session.disable_fallback()
    return session


def _report(missing: Mapping[str, str], *, strict: bool) -> None:
    if not missing:
        return
    reasons = "; ".join(f"{name} cannot be used: {reason}" for name, reason in missing.items())
    if strict:
        raise ValueError(reasons)
    warnings.warn(f"{reasons}. Others run in its place", stacklevel=4)


def _device(provider: str, options: Mapping[str, Mapping[str, Any]]) -> torch.device:
    if provider not in _LIBRARIES:
        return torch.device("cpu")
    return torch.device("cuda", int(options.get(provider, {}).get("device_id", 0)))
