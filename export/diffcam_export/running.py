"""Running an ONNX Runtime session on PyTorch's tensors."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffcam_export.session import Opened
from diffcam_fast.running import first_line

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.uint8: np.uint8,
    torch.int64: np.int64,
}


def run(opened: Opened, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Runs a session on tensors, on the device where they are.

    Args:
        opened: the session.
        feeds: contiguous tensors on the session's device, by input.
        names: of the outputs that are wanted.

    Returns:
        The outputs, on the same device, in memory of their own.

    Raises:
        RuntimeError: ONNX Runtime failed.
    """
    try:
        if opened.device.type == "cpu":
            arrays = opened.session.run(names, {name: t.numpy() for name, t in feeds.items()})
            return [torch.from_numpy(array) for array in arrays]
        return _run_bound(opened, feeds, names)
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime failed: {first_line(error)}") from error


def _run_bound(opened: Opened, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    binding = opened.session.io_binding()
    index = opened.device.index
    for name, tensor in feeds.items():
        binding.bind_input(
            name, "cuda", index, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
        )
    for name in names:
        binding.bind_output(name, "cuda", index)
    stream = torch.cuda.current_stream(opened.device)
    # ONNX Runtime works on a stream of its own, which must not begin before the images are there.
    stream.synchronize()
    opened.session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    # Copies on the device: the outputs lie in memory that the session takes back.
    tensors = [torch.utils.dlpack.from_dlpack(value).clone() for value in binding.get_outputs()]
    stream.synchronize()
    return tensors
