"""The launches that `diffcam bench aot` compiles: every kernel, over layers of real networks.

They are those that the plans of `diffcam_kernels.gpu` make, on tensors without memory.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_kernels.gpu import (
    cellwise,
    channel_weights,
    contrast,
    eigen,
    gradient,
    head_phases,
    heatmap,
    means,
    mixture,
    pooled,
    preprocess,
    product,
    spans,
    weighted,
)
from diffcam_kernels.gpu.launch import Launch

_LAYOUTS = ("nchw", "nhwc")


@dataclass(frozen=True)
class Case:
    """A launch to compile.

    Attributes:
        kernel: what it computes.
        variant: for which layer, dtype and layout.
        number: its place among the launches of the operator, from 0.
        aligned: its rows begin at multiples of 16 bytes, so that wide loads are possible.
    """

    kernel: str
    variant: str
    number: int
    aligned: bool


def cases() -> list[tuple[Case, Launch]]:
    """All launches of all operators, for rows of each length that has tiles of its own."""
    found = []
    for kernel, variant, aligned, launches in _operators():
        for number, launch in enumerate(launches):
            found.append((Case(kernel, variant, number, aligned), launch))
    return found


def _operators() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    yield from _means_and_eigenvectors()
    yield from _gradients()
    yield from _pooled()
    yield from _contrasts()
    yield from _products()
    yield from _heads()
    yield from _pictures()


def _means_and_eigenvectors() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    both, half = (torch.float32, torch.float16), (torch.float16,)
    for layer, n, c, side, dtypes in [
        ("resnet50", 64, 2048, 7, both),
        ("layer1", 8, 256, 56, half),
    ]:
        for dtype, layout in itertools.product(dtypes, _LAYOUTS):
            name = f"{layer} {str(dtype).removeprefix('torch.')} {layout}"
            # Rows of 49 cells begin anywhere; rows of channels, or of 56 x 56 cells, do not.
            aligned = layout == "nhwc" or side == 56
            a = _activation(n, c, side, dtype, layout)
            yield "channel_means", name, aligned, [means.plan_channel_means(a, _empty(n, c))]
            if side * side <= eigen.MAX_CELLS:
                plans = eigen.plan_eigen_cam(a, eigen.empty_parts(a), _empty(n, side, side), True)
                # The second launch reads the same from all.
                yield "eigen_cam", name, aligned, plans if "float32 nchw" in name else plans[:1]


def _gradients() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    """Rows of each length that has tiles of its own, and few and many images where they matter."""
    both, half = (torch.float32, torch.float16), (torch.float16,)
    by_cell, by_channel = list(cellwise.CELLWISE), list(weighted.WEIGHTED)
    for network, n, c, side, dtypes, layouts, reductions in [
        ("resnet50", 64, 2048, 7, both, _LAYOUTS, by_cell + by_channel),
        ("resnet50 N=256", 256, 2048, 7, both, ("nchw",), by_cell),
        ("layer3", 64, 1024, 14, half, _LAYOUTS, by_channel),
        ("layer2", 64, 512, 28, half, _LAYOUTS, by_channel),
        ("layer1", 8, 256, 56, half, _LAYOUTS, by_cell + by_channel),
        ("layer1 N=1", 1, 256, 56, half, ("nhwc",), by_channel),
    ]:
        for dtype, layout, reduction in itertools.product(dtypes, layouts, reductions):
            name = f"{network} {str(dtype).removeprefix('torch.')} {layout}"
            a, maps = _activation(n, c, side, dtype, layout), _empty(n, 1, side, side)
            plans = gradient.plan_gradient_cam(a, a[:, None], reduction, maps, True)
            # For one image, a program takes few channels of long rows.
            aligned = n > 1 if layout == "nhwc" else side > 14
            yield f"gradient_cam {reduction}", name, aligned, plans[:1]
    parts, maps = _empty(64, 1, 32, 7, 7), _empty(64, 1, 7, 7)
    yield "sum_spans", "7x7", False, [spans.plan_sum_spans(parts, maps, True)]


def _pooled() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    # Short rows of cells; long rows that begin anywhere; long rows at multiples of 16 elements.
    both, half = (torch.float32, torch.float16), (torch.float16,)
    for layer, n, c, side, dtypes in [
        ("resnet50", 64, 2048, 7, both),
        ("layer3", 64, 1024, 14, half),
        ("layer1", 8, 256, 56, both),
    ]:
        for dtype, layout in itertools.product(dtypes, _LAYOUTS):
            name = f"{layer} {str(dtype).removeprefix('torch.')} {layout}"
            a = _activation(n, c, side, dtype, layout)
            for t in (1, 5):
                w, maps = _empty(n, t, c), _empty(n, t, side, side)
                plans = pooled.plan_pooled_cam(a, w, maps, True)
                yield "pooled_cam", f"{name} T={t}", layout == "nhwc" or side == 56, plans[:1]
            if dtype == torch.float16:
                # Every other row of cells: no two rows follow each other.
                maps = _empty(n, 1, side // 2 + side % 2, side)
                plans = pooled.plan_pooled_cam(a[:, :, ::2], _empty(n, 1, c), maps, True)
                yield "pooled_cam", f"{name} sliced", False, plans[:1]


def _contrasts() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    sizes = [(1, 1, 1000, 2048), (64, 5, 1000, 2048), (1, 1, 21841, 1280), (1, 1, 10, 512)]
    for n, t, k, c in sizes:
        z, chosen, scores = _empty(n, k), _empty(n, t, dtype=torch.int64), _empty(n, t)
        asked = None if t == 1 else chosen
        mask = _empty(n, t, k, dtype=torch.bool)
        for temperature, reference, blend in [
            *((temperature, None, None) for temperature in (0.0, 1.0, float("inf"), None)),
            (1.0, mask, None),
            (None, None, z),
        ]:
            # Of many and of few classes one stands for all.
            if k != 1000 and temperature != 1.0:
                continue
            how = "reference" if reference is not None else "weights" if blend is not None else ""
            name = f"N={n} T={t} K={k} C={c} temperature={temperature} {how}".rstrip()
            operands = (asked, temperature, reference, blend)
            d, w, weight = _empty(n, t, k), _empty(n, t, c), _empty(k, c)
            plan = contrast.plan_contrast_gradient(z, *operands, d, chosen, scores)
            yield "contrast_gradient", name, False, [plan]
            if channel_weights.is_fused(z, chosen):
                plan = channel_weights.plan_contrast_channel_weights(
                    z, weight, 49, *operands, w, chosen, scores
                )
                # W is what it reads most of; 10 rows of it do not fill a program's threads.
                yield "contrast_channel_weights", name, k > 10, [plan]
                continue
            a = b = None
            if mixture.shares_rows(t, *operands[1:]):
                e, a, b = _empty(n, k), _empty(n, t), _empty(n, t, t)
                plan = mixture.plan_shared(z, asked, temperature, e, a, b, chosen, scores)
                yield "shared", name, False, [plan]
            parts = product.Parts(_empty(2, n * t if a is None else n, c), _empty(n))
            plan = mixture.plan_mixture(parts, weight, 49, chosen, a, b, w)
            yield "mixture", name, True, [plan]


def _products() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = _empty(1000, 2048, dtype=dtype)
        bias = _empty(1000, dtype=dtype)
        for rows in range(1, product.FEW_ROWS[dtype] + 1):
            name = f"R={rows} K=1000 C=2048 {str(dtype).removeprefix('torch.')}"
            for what, matrix, shift in (("logits", weight.mT, bias), ("weights", weight, None)):
                x, e = _empty(rows, len(matrix)), matrix.shape[1]
                out = _empty(product.shares_of(matrix), rows, e)
                plan = product.plan_rows_product(x, matrix, shift, out)
                yield "rows_product", f"{name} {what}", True, [plan]
        if dtype != torch.float32:
            name = f"R=320 K=1000 C=2048 {str(dtype).removeprefix('torch.')}"
            number = 2 if dtype == torch.float16 else 3
            x, pieces = _empty(320, 2048), _empty(number, 320, 2048, dtype=dtype)
            unscale = _empty(320)
            parts = product.Parts(_empty(number, 320, 1000), unscale)
            yield "split", name, True, [product.plan_split(x, pieces, unscale)]
            yield "join", name, False, [product.plan_join(parts, bias, _empty(320, 1000))]


def _heads() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    for dtype, t in itertools.product((torch.float32, torch.float16), (1, 5)):
        n, k, c, side = 2, 1000, 2048, 7
        a, weight = _activation(n, c, side, dtype, "nhwc"), _empty(k, c, dtype=dtype)
        bias, targets = _empty(k, dtype=dtype), _empty(n, t, dtype=torch.int64)
        room = head_phases.Room(
            means=_empty(n, c),
            logits=_empty(n, k),
            weights=_empty(n, t, c),
            maps=_empty(n, t, side, side),
            chosen=targets,
            scores=_empty(n, t),
            arrived=_empty(1, dtype=torch.int32),
        )
        name = f"K={k} C={c} T={t} {str(dtype).removeprefix('torch.')}"
        plans = head_phases.plan_phases(
            a, weight, bias, targets, 1.0, True, room, head_phases.TOGETHER
        )
        if t == 1:
            # The means know no targets, and take few channels a program: few images are few.
            yield "head_cam means", name, dtype == torch.float32, plans[:1]
        yield "head_cam", name, True, plans[1:]


def _pictures() -> Iterator[tuple[str, str, bool, list[Launch]]]:
    maps, size = _empty(64, 1, 7, 7), (224, 224)
    for dtype in (torch.float32, torch.float16, torch.uint8):
        plan = heatmap.plan_heatmap(maps, _empty(64, 1, *size, dtype=dtype))
        # Its stores are wide; a map is gathered, cell by cell.
        yield "heatmap", f"224 {str(dtype).removeprefix('torch.')}", False, [plan]
    images = _empty(64, *size, 3, dtype=torch.uint8)
    table = _empty(256, 3, dtype=torch.uint8)
    # Rows of 225 pixels are no whole words.
    for side in (224, 225):
        pictures = _empty(64, side, side, 3, dtype=torch.uint8)
        plan = heatmap.plan_overlay(maps, pictures, table, 128, torch.empty_like(pictures)[:, None])
        yield "overlay", f"{side}", side == 224, [plan]
    for dtype in (torch.float32, torch.float16):
        for layout in ("nchw", "nhwc"):
            name = f"{str(dtype).removeprefix('torch.')} {layout}"
            # NCHW reads three words a thread; a crop reads bytes.
            for side, view in ((224, images), (222, images[:, 1:-1, 1:-1])):
                out = _activation(64, 3, side, dtype, layout)
                plan = preprocess.plan_preprocess(view, _empty(3), _empty(3), out)
                wide = layout == "nhwc" and side == 224
                yield "preprocess", f"{side} {name}", wide, [plan]


def _activation(n: int, c: int, side: int, dtype: torch.dtype, layout: str) -> Tensor:
    a = _empty(n, c, side, side, dtype=dtype)
    return a if layout == "nchw" else a.to(memory_format=torch.channels_last)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
