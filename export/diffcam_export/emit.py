"""Writing nodes: what the passes add to a graph goes through an `Emitter`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from diffcam_export import apart

OPSET = apart.OPSET
"""The operator set that added nodes are written in; older files are converted to it first."""


class Emitter:
    """A list of nodes in the making, in topological order.

    Values carry their element type where it is known, so that constants match their partners.

    Args:
        prefix: what the names of new values begin with; it must not occur in the model.

    Example:
        >>> emit = Emitter("doc")
        >>> x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2, 3])
        >>> y = emit("Mul", x, emit.like(x, 2.0))
        >>> [node.op_type for node in emit.nodes], y.dtype
        (['Constant', 'Mul'], FLOAT)
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names: Iterator[int] = iter(range(2**31))

    def __call__(
        self,
        operator: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node with one output, and returns that.

        Args:
            operator: of the default domain.
            *inputs: its operands; None leaves an optional one out.
            dtype: element type of the result; None: that of the first operand.
            **attributes: Python numbers, texts, lists, tensors or graphs.
        """
        [value] = self.several(operator, *inputs, outputs=1, dtype=dtype, **attributes)
        return value

    def several(
        self,
        operator: str,
        *inputs: ir.Value | None,
        outputs: int,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Adds a node with several outputs, all given the same element type."""
        node = ir.node(
            operator,
            inputs=list(inputs),
            attributes=attributes or None,
            num_outputs=outputs,
            name=f"{self.prefix}/{operator}_{len(self.nodes)}",
        )
        first = next((value for value in inputs if value is not None), None)
        for value in node.outputs:
            value.name = f"{self.prefix}/{next(self._names)}"
            found = dtype or (None if first is None else first.dtype)
            if found is not None:
                value.dtype = found
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """A tensor that is written into the graph; equal ones are written once."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(array)
            value = self("Constant", dtype=tensor.dtype, value=tensor)
            value.shape = ir.Shape(array.shape)
            value.const_value = tensor
            self._constants[key] = value
        return self._constants[key]

    def like(self, value: ir.Value, number: float) -> ir.Value:
        """A scalar of the element type of a value.

        Raises:
            ValueError: the element type of the value is not known.
        """
        if value.dtype is None:
            raise ValueError(f"the element type of {value.name} is not known")
        return self.constant(np.array(number, dtype=value.dtype.numpy()))

    def ints(self, *numbers: int) -> ir.Value:
        """Whole numbers as an int64 tensor of one axis: axes, sizes, a shape."""
        return self.constant(np.array(numbers, dtype=np.int64))
