"""Compiles a launch for a GPU that is not there, and reads what the compiler made of it."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffcam_kernels.gpu.launch import Launch

_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spills: instructions that move registers to or from local memory.
        shared: bytes of shared memory of a program.
        load_bytes: the widest load from global memory of a thread.
        store_bytes: the widest store to it.
    """

    registers: int
    spills: int
    shared: int
    load_bytes: int
    store_bytes: int


def compile_launch(launch: Launch, capability: int, *, aligned: bool = True) -> Resources:
    """Compiles a launch as Triton would when it runs.

    Args:
        launch: its tensors may be on the `meta` device.
        capability: compute capability, 90 for sm_90.
        aligned: tensors begin at a multiple of 16 bytes.
    """
    signature, constants, attributes = _specialised(launch, aligned)
    kernel = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "launch_cooperative_grid": launch.cooperative,
        },
    )
    sass = _disassembled(kernel.asm["cubin"])
    return Resources(
        registers=_registers(kernel.asm["cubin"]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=int(kernel.metadata.shared),
        load_bytes=_widest(re.findall(r"\bLDG(?:STS)?\.E(\S*)", sass)),
        store_bytes=_widest(re.findall(r"\bSTG\.E(\S*)", sass)),
    )


def _specialised(launch: Launch, aligned: bool) -> tuple[dict[str, str], dict[Any, Any], Any]:
    """Types, constants and divisibility of the arguments, by the rules of Triton's launcher."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name, launch.constants.get(name))
        # An integer of 1 is compiled in, as is an operand that is not there.
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTER[value.dtype]
            if aligned:
                attributes[(position,)] = _DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = _DIVISIBLE
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _registers(cubin: bytes) -> int:
    found = re.search(r"\bREG:(\d+)", _cuobjdump("--dump-resource-usage", cubin))
    assert found is not None
    return int(found[1])


def _disassembled(cubin: bytes) -> str:
    return _cuobjdump("-sass", cubin)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(_CUOBJDUMP), option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def _widest(suffixes: Iterable[str]) -> int:
    """The widest access in bytes: `.128` of `LDG.E.128`, 4 where no width stands."""
    return max((_bytes(suffix) for suffix in suffixes), default=0)


def _bytes(suffix: str) -> int:
    found = re.search(r"\.(?:[USF])?(8|16|64|128|256)\b", suffix)
    return int(found[1]) // 8 if found else 4
