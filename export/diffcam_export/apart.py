"""onnx's C++ passes in a process of their own.

They take files of unknown origin, and a strange one may crash them or fill all memory; then that
process ends, and the file is refused. One process serves many calls. It reads requests from its
standard input until that is closed, and answers on its standard output: a byte, a length, and as
many bytes.
"""

import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from select import select
from typing import BinaryIO

import onnx

# What the nodes of the CAM head are written in, as `diffcam_export.emit` says.
OPSET = 18
# Bytes, beside what the model itself takes a few times.
_MEMORY = 4 * 2**30
_TIMES = 8
# Seconds.
_LIMIT = 300.0
_HEADER = struct.Struct("<cQ")
_DONE, _FAILED = b"+", b"-"
# A list of numbers, and a size, from which on nothing is followed through the model.
_LONGEST = 2**20
_LARGEST = 2**31


class PassError(ValueError):
    """A pass of onnx refused a model, crashed, or took more than it was granted."""


def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model with its values' shapes, those included that follow from numbers in it.

    Raises:
        PassError: it could not be.
    """
    return _changed("infer", proto)


def convert(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model brought to operator set 18.

    Raises:
        PassError: it could not be.
    """
    return _changed("convert", proto)


def write_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose functions, of other operator sets too, are written out.

    Raises:
        PassError: they could not be.
    """
    return _changed("write out", proto)


def _changed(name: str, proto: onnx.ModelProto) -> onnx.ModelProto:
    changed: onnx.ModelProto = onnx.ModelProto.FromString(
        _process.ask(name, proto.SerializeToString())
    )
    return changed


class _Process:
    """The process, started with the first request and after each one that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, name: str, content: bytes) -> bytes:
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(_HEADER.pack(name[:1].encode(), len(content)))
                child.stdin.write(content)
                child.stdin.flush()
                kind, answer = self._answer(child)
            except (OSError, EOFError, PassError) as error:
                child.kill()
                child.wait()
                self._child = None
                if isinstance(error, PassError):
                    raise
                raise PassError(f"onnx crashed or ran out of memory over it ({name})") from error
        if kind == _FAILED:
            raise PassError(answer.decode("utf-8", "replace"))
        return answer

    def _running(self) -> "subprocess.Popen[bytes]":
        # A process that was forked must not share the pipes of the one that it came from.
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            # Our own interpreter, and nothing of the file's in its arguments.
            self._child = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._owner = os.getpid()
        return self._child

    @staticmethod
    def _answer(child: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
        answers = child.stdout
        assert answers is not None
        end = time.monotonic() + _LIMIT

        def read(count: int) -> bytes:
            parts, left = [], count
            while left:
                ready, _, _ = select([answers], [], [], max(0.0, end - time.monotonic()))
                if not ready:
                    raise PassError(f"onnx took more than {_LIMIT:g} s over it")
                part = os.read(answers.fileno(), min(left, 2**20))
                if not part:
                    raise EOFError
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

        kind, length = _HEADER.unpack(read(_HEADER.size))
        return kind, read(length)


_process = _Process()


def serve() -> None:
    """Answers requests until there are no more; runs in the other process."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between the answers.
    os.dup2(2, 1)
    passes = {b"i": _infer, b"c": _convert, b"w": _write_out}
    while header := requests.read(_HEADER.size):
        name, length = _HEADER.unpack(header)
        content = requests.read(length)
        _answer(answers, passes[name], content)


def _answer(
    answers: BinaryIO, change: Callable[[onnx.ModelProto], onnx.ModelProto], content: bytes
) -> None:
    limit = _MEMORY + _TIMES * len(content)
    _, granted = resource.getrlimit(resource.RLIMIT_DATA)
    if granted != resource.RLIM_INFINITY:
        limit = min(limit, granted)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, granted))
    try:
        result, kind = change(onnx.ModelProto.FromString(content)).SerializeToString(), _DONE
    except Exception as error:  # noqa: BLE001 - whatever onnx raises is told to who asked
        lines = str(error).strip() or type(error).__name__
        result, kind = lines.encode(), _FAILED
    answers.write(_HEADER.pack(kind, len(result)))
    answers.write(result)
    answers.flush()


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    plain = onnx.shape_inference.infer_shapes(proto)
    graph = plain.graph
    for info in (*graph.input, *graph.value_info, *graph.output):
        sizes = [d.dim_value for d in info.type.tensor_type.shape.dim]
        # onnx makes an object for every number of a list that it follows, known or not: a Range
        # of a trillion is sixty bytes of a file.
        if (len(sizes) == 1 and sizes[0] > _LONGEST) or any(d > _LARGEST for d in sizes):
            return plain
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _convert(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.version_converter import convert_version

    return convert_version(proto, OPSET)


def _write_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnx.inliner import inline_local_functions

    # The types of the values between the calls must be known to it.
    typed = onnx.shape_inference.infer_shapes(proto)
    return inline_local_functions(typed, convert_version=True)
