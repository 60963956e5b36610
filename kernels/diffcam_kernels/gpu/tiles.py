"""How the kernels of gradient methods cut their maps into programs, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiles:
    """A kernel and its tiles.

    Attributes:
        kernel: the Triton function.
        constants: its compile-time parameters, but for layouts, blocks and `RELU`.
        steps: tiles of a program, along the channels.
        block_c: channels of a tile.
        block_p: cells of a tile.
        warps: of a program.
        blocks: programs that share the cells of a map.
    """

    kernel: Any
    constants: Mapping[str, Any]
    steps: int
    block_c: int
    block_p: int
    warps: int
    blocks: int = 1
