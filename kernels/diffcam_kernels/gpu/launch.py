"""A kernel launch as data, and what the plans need to know of the device."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        processors: streaming multiprocessors.
        cache: bytes of the L2 cache.
    """

    processors: int
    cache: int


# What plans are made for where there is no GPU, in the interpreter and ahead of time: an H200.
TYPICAL = Device(processors=132, cache=50 * 2**20)


def device_of(tensor: Tensor) -> Device:
    """The device that holds a tensor; `TYPICAL` for one in host memory or of no memory at all."""
    if tensor.device.type != "cuda":
        return TYPICAL
    return _cuda_device(tensor.device.index)


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.multi_processor_count, found.L2_cache_size)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the Triton function.
        grid: programs along each axis; none runs where an axis is empty.
        arguments: by name, in the order of its parameters: tensors, numbers, None.
        constants: its compile-time parameters by name.
        num_warps: warps of a program.
        num_stages: how many iterations of a loop with a matrix product are in flight.
        cooperative: all programs are on the device at once, so that they can wait for each other.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    cooperative: bool = False

    def run(self) -> None:
        """Launches the kernel on the device of its operands."""
        if 0 in self.grid:
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        # Triton launches on the current device, which need not be that of the operands.
        on_cuda = tensor.device.type == "cuda"
        # The interpreter does not know the option.
        together = {"launch_cooperative_grid": True} if self.cooperative else {}
        with torch.cuda.device(tensor.device) if on_cuda else nullcontext():
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                **together,
            )


def ceil_div(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def shrunk(block: int, smallest: int, size: int, others: int, wanted: int) -> int:
    """The block along an axis of some size, halved while there are too few programs.

    Args:
        block: a power of two.
        smallest: where halving ends: below it a run in memory is too short.
        size: of the axis.
        others: programs along all other axes.
        wanted: programs that keep the device busy.
    """
    while block > smallest and others * ceil_div(size, block) < wanted:
        block //= 2
    return block


def flat_cells(activation: Tensor) -> bool:
    """Whether the cells of an activation (..., h, w) are one axis with one stride."""
    height, width = activation.shape[-2:]
    return height <= 1 or activation.stride(-2) == width * activation.stride(-1)


def cells_first(activation: Tensor) -> bool:
    """Whether neighbouring cells, not channels, lie closest in memory: NCHW rather than NHWC."""
    return activation.stride(-1) <= activation.stride(-3) or activation.shape[-3] == 1


def image_chunks(activation: Tensor) -> Iterator[slice]:
    """Runs of images whose activations fit in half of the L2 cache, at least one image each.

    A second look at the activations of a run then comes from the cache.

    Args:
        activation: (N, C, h, w).
    """
    n = activation.shape[0]
    image = activation[:1].numel() * activation.element_size()
    size = max(1, device_of(activation).cache // 2 // max(image, 1))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
