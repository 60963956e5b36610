"""Where in the image the elements of a value stand, followed through one forward pass.

Every element of a value gets a position, a point of the image, or none. The images give each pixel
its own, and each operator hands positions on in the way in which it handles data:

- a view shares them as it shares memory; concatenation, indexing, padding and the like are done to
  positions as to data; an element that was added, a class token say, has none;
- pointwise operators and normalisation keep them, and so a residual stream keeps the position of
  each token, whatever is added to it: what has a position wins over what has none, and two
  different ones are none;
- a product of matrices keeps the position that all elements of a row, or else of a column, share;
  the mean over a patch is its centre, and what reads tokens from all over the image has none;
- attention gives its result the positions of the queries;
- convolution and pooling make a coarser grid over the same part of the image.

An operator that is not known gives no positions. So the order of tokens is proven, not guessed: it
does not matter whether a model has class tokens, how many, before or behind the others, or whether
it rolls its tokens, sorts them into windows or drops some. Perturbing a patch and looking where the
network changes would say the same only where the change stays largest at its own token, and a
perturbation of weights that happen to be 0 says nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Sides of the image are 1 long.
SAME = 1e-4
# What spans half of the image or more is no patch of it.
_PATCH = 0.5
_NOWHERE = complex("nan+nanj")
# Zeros that an operator adds can be told from positions that are moved by this.
_AWAY = 2.0
# A pass over a large network lets go of values by the hundred.
_PURGE_EVERY = 64

_REARRANGING = frozenset(
    {
        *("cat", "stack", "clone", "copy_", "copy", "roll", "flip", "index", "index_select"),
        *("gather", "repeat", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"),
        *("index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_"),
        *("slice_scatter", "select_scatter", "as_strided_scatter", "im2col", "pixel_shuffle"),
        *("pixel_unshuffle", "channel_shuffle", "split_copy", "unbind_copy", "masked_select"),
    }
)
# Pointwise ones, too, that PyTorch does not call so.
_LIKE_THE_FIRST = (
    *("_norm", "softmax", "transformer_encoder_layer_fwd", "native_dropout", "masked_fill"),
    *("hardswish", "mish", "prelu", "log_sigmoid"),
)
_BY_QUERY = ("scaled_dot_product", "native_multi_head_attention")
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "linear": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_REDUCING = frozenset({"mean", "sum", "amax", "amin", "max", "min"})
_COARSENING = ("convolution", "pool2d", "upsample_")


class Positions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    """Follows positions, as complex numbers `row + i column` in [0, 1], NaN where there are none.

    Args:
        images: (N, C, H, W), the very tensor that the model will be given.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 1, 2, 2)
        >>> with Positions(images) as positions:
        ...     tokens = images.flatten(2).mT.roll(1, dims=1)
        >>> positions.of(tokens)[0, :, 0]
        tensor([0.7500+0.7500j, 0.2500+0.2500j, 0.2500+0.7500j, 0.7500+0.2500j])
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[StorageWeakRef, Tensor] = {}
        self._steps = 0
        rows, columns = (
            (torch.arange(size, device=images.device, dtype=torch.float32) + 0.5) / size
            for size in images.shape[2:]
        )
        self._write(images, _grid(rows, columns, images.shape))

    def of(self, tensor: Tensor) -> Tensor | None:
        """Positions of the elements, complex and of the shape of the tensor; None: of no element.

        A view of what is kept, which later operators may overwrite.
        """
        flat = self._known.get(_key(tensor))
        if flat is None or flat.numel() != _elements(tensor):
            return None
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _write(self, tensor: Tensor, positions: Tensor | None) -> None:
        key = _key(tensor)
        flat = self._known.get(key)
        if flat is None or flat.numel() != _elements(tensor):
            if positions is None:
                self._known.pop(key, None)
                return
            size, kind = (_elements(tensor),), torch.complex64
            flat = torch.full(size, _NOWHERE, dtype=kind, device=tensor.device)
            self._known[key] = flat
        view = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        view.copy_(view.new_tensor(_NOWHERE) if positions is None else positions)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._steps += 1
        if self._steps % _PURGE_EVERY == 0:
            self._known = {key: kept for key, kept in self._known.items() if not _expired(key)}
        outputs = [t for t in tree_leaves(output) if _counts(t)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        shared = {t.untyped_storage()._cdata for t in given}
        writes = func._schema.is_mutable
        new = [t for t in outputs if writes or t.untyped_storage()._cdata not in shared]
        if not new:
            return output
        for tensor, positions in zip(new, self._handed_on(func, args, kwargs, new), strict=False):
            self._write(tensor, positions)
        return output

    def _handed_on(
        self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]
    ) -> Sequence[Tensor | None]:
        nothing = [None] * len(outputs)
        if all(self.of(t) is None for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            return nothing
        name, shape = func._schema.name.split("::")[1], outputs[0].shape
        bare = name.strip("_")
        if name in _REARRANGING:
            return self._rearranged(func, args, kwargs) or nothing
        found: Tensor | None = None
        if name == "_to_copy":
            own = self.of(args[0])
            found = None if own is None else own.to(outputs[0].device)
        elif bare in _PRODUCTS:
            first, second = _PRODUCTS[bare]
            found = _product(self.of(args[first]), self.of(args[second]), bare == "linear")
        elif any(kind in name for kind in _BY_QUERY):
            own = self.of(args[0])
            found = None if own is None else _common(own, (-1,))
        elif any(kind in name for kind in _COARSENING):
            found = self._coarser(args[0], shape)
        elif bare in _REDUCING:
            found = self._reduced(args, kwargs, shape)
        elif any(kind in name for kind in _LIKE_THE_FIRST):
            found = self.of(args[0])
        elif torch.Tag.pointwise in func.tags:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            found = _agreed([p for t in tensors if (p := self.of(t)) is not None], shape)
        return [_fitting(found, shape), *nothing[1:]]

    def _rearranged(self, func: Any, args: Any, kwargs: Any) -> list[Tensor | None] | None:
        """What the operator does to data, done to positions."""

        def part(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
            def given(value: Any) -> Any:
                if not _counts(value):
                    return value
                own = self.of(value)
                if own is None:
                    shape, kind = value.shape, torch.float32
                    return torch.full(shape, torch.nan, dtype=kind, device=value.device)
                return of(own) + _AWAY

            done = func(*tree_map(given, args), **tree_map(given, kwargs))
            return [t for t in tree_leaves(done) if isinstance(t, Tensor)]

        try:
            rows, columns = part(torch.real), part(torch.imag)
        except (RuntimeError, TypeError, ValueError):
            # Data of a kind that positions are not: of another dtype, say.
            return None
        return [
            torch.complex(_back(row), _back(column))
            for row, column in zip(rows, columns, strict=True)
        ]

    def _coarser(self, source: Tensor, shape: torch.Size) -> Tensor | None:
        own = self.of(source)
        if own is None or own.ndim != 4 or len(shape) != 4:
            return None
        if own.shape[2:] == shape[2:]:
            return _common(own, (1,)).expand(shape)
        rows, columns = _sides(own[0, 0])
        there = torch.where(own[0, 0].isnan(), _NOWHERE, _grid(rows, columns, own.shape))
        if not same_positions(own, there):
            return None
        made = [_resampled(p, size) for p, size in zip((rows, columns), shape[2:], strict=True)]
        return None if made[0] is None or made[1] is None else _grid(made[0], made[1], shape)

    def _reduced(self, args: Any, kwargs: Any, shape: torch.Size) -> Tensor | None:
        own = self.of(args[0])
        axes = args[1] if len(args) > 1 else kwargs.get("dim")
        if own is None or axes is None or axes == [] or isinstance(axes, Tensor):
            return None
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        found = _common(own, axes, loose=True)
        return found.reshape(shape) if found.numel() == shape.numel() else None


def _counts(value: Any) -> bool:
    """A tensor whose elements can have positions."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _expired(key: StorageWeakRef) -> bool:
    return bool(key.expired())  # type: ignore[no-untyped-call]


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _grid(rows: Tensor, columns: Tensor, shape: Sequence[int]) -> Tensor:
    size = (len(rows), len(columns))
    return torch.complex(rows[:, None].expand(size), columns.expand(size)).expand(tuple(shape))


def _back(moved: Tensor) -> Tensor:
    return torch.where(moved < _AWAY / 2, torch.nan, moved) - _AWAY


def same_positions(positions: Tensor, expected: Tensor) -> bool:
    """The same everywhere, and missing at the same places."""
    there = positions.isnan() == expected.isnan()
    apart = torch.view_as_real(positions - expected).nan_to_num(0.0).abs()
    return bool(there.all()) and bool((apart <= SAME).all())


def _sides(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of rows and columns of cells (h, w), infinite where no cell has one."""
    rows = cells.real.nan_to_num(-torch.inf).amax(dim=1)
    return rows, cells.imag.nan_to_num(-torch.inf).amax(dim=0)


def _common(positions: Tensor, axes: tuple[int, ...], *, loose: bool = False) -> Tensor:
    """The position that all elements along the axes share, which are kept with size 1; loose: the
    middle of those that lie in one patch.
    """
    low, high = (
        torch.complex(bound(positions.real, axes, keepdim=True), bound(positions.imag, axes, True))
        for bound in (torch.amin, torch.amax)
    )
    span = high - low
    allowed = _PATCH - SAME if loose else SAME
    apart = ~((span.real <= allowed) & (span.imag <= allowed))
    return torch.where(apart, _NOWHERE, (low + high) / 2)


def _product(left: Tensor | None, right: Tensor | None, transposed: bool) -> Tensor | None:
    """Of a product (..., M, K) @ (..., K, N), broadcastable to it."""
    if transposed and right is not None:
        right = right.mT
    if left is not None:
        rows = _common(left, (-1,), loose=right is None)
        if right is None or not rows.isnan().all():
            return rows
    return None if right is None else _common(right, (-2,), loose=left is None)


def _agreed(known: list[Tensor], shape: torch.Size) -> Tensor | None:
    found: Tensor | None = None
    for positions in known:
        try:
            new = positions.expand(shape)
        except RuntimeError:
            return None
        if found is None:
            found = new
            continue
        same = (found - new).abs() <= SAME
        either = torch.where(same | new.isnan(), found, _NOWHERE)
        found = torch.where(found.isnan(), new, either)
    return found


def _fitting(positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    if positions is None:
        return None
    try:
        return positions.expand(shape)
    except RuntimeError:
        return None


def _resampled(places: Tensor, size: int) -> Tensor | None:
    """The middles of as many equal parts of what even places take up, padding not counted."""
    known = places.isfinite().nonzero()[:, 0]
    count = len(known)
    # One cell for all stands nowhere.
    if count < 2 or size == 1 or int(known[-1] - known[0]) + 1 != count:
        return None
    places = places[known]
    step = (places[-1] - places[0]) / (count - 1)
    if not bool(((places.diff() - step).abs() <= SAME).all()):
        return None
    parts = torch.arange(size, dtype=places.dtype, device=places.device) + 0.5
    return places[0] - step / 2 + parts * (step * count / size)
