"""The runtimes that an explainer may be asked to run in."""

from typing import Literal, get_args

Backend = Literal["auto", "torch", "onnxruntime", "compiled"]
"""`auto`: the fastest that is worth finding out about; `torch`: PyTorch as it is; `onnxruntime`: an
exported file, on the CPU; `compiled`: `torch.compile`, on CUDA in a graph.
"""

BACKENDS: tuple[Backend, ...] = get_args(Backend)
