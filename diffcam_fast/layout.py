"""How the output of a layer holds a grid of cells."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where in the output of a layer the channels are, and the cells of its grid.

    Attributes:
        channel_axis: 1 for (N, C, h, w), 3 for (N, h, w, C), 2 for tokens (N, L, C).
        grid: (h, w) of tokens, which stand row by row; None where the output has four axes.
        first: how many tokens come before those of the grid: a class token, registers. Of the
            tokens behind the grid nothing is read.

    Example:
        >>> import torch
        >>> tokens = torch.arange(5.0).view(1, 5, 1)
        >>> Layout(channel_axis=2, grid=(2, 2), first=1).cells(tokens)
        tensor([[[[1., 2.],
                  [3., 4.]]]])
    """

    channel_axis: int = 1
    grid: tuple[int, int] | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if self.channel_axis not in ((1, 3) if self.grid is None else (2,)):
            raise ValueError(
                "a layer has its channels in axis 1 or 3 of four, or in axis 2 of tokens with a "
                f"grid; got axis {self.channel_axis} and the grid {self.grid}"
            )
        if self.first < 0 or min(self.grid or (1,)) < 1 or (self.first and self.grid is None):
            raise ValueError(
                "a layout takes a grid (h, w) of at least one token and first >= 0 tokens before "
                f"it; got the grid {self.grid} and first {self.first}"
            )

    @property
    def ndim(self) -> int:
        """How many axes the output has."""
        return 4 if self.grid is None else 3

    def cells(self, output: Tensor) -> Tensor:
        """The activation A, (N, C, h, w), a view of the layer's output; leading axes beside N are
        kept.
        """
        if self.grid is None:
            return output.movedim(self.channel_axis - 4, -3)
        h, w = self.grid
        tokens = output[..., self.first : self.first + h * w, :].mT
        return tokens.view(*tokens.shape[:-1], h, w)

    def with_cells(self, output: Tensor, cells: Tensor) -> Tensor:
        """The layer's output (N, ...) with these cells (N, C, h, w) in place of its own."""
        if self.grid is None:
            return cells.movedim(1, self.channel_axis)
        changed = output.clone()
        self.cells(changed).copy_(cells)
        return changed
