"""The Triton kernels against the definitions in float64: in the interpreter, or on a GPU."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcam_fast import Explainer
from diffcam_kernels import ops, reference
from networks import Overwritten, images, pooled, with_mlp

launch = pytest.importorskip("diffcam_kernels.gpu.launch")
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator().manual_seed(0)
# Error of the kernels over the largest value, above that of PyTorch in the same dtype. float32 sums
# of some thousand terms are good to 1e-6; half-precision operands are exact in float32.
TOLERANCE = 2e-6
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(0, 3, 7, 7), (1, 37, 7, 7), (2, 5, 13, 9), (3, 64, 1, 1), (1, 70, 2, 9)]
# Channels of more than one span, of few cells and of many; rows at multiples of 16 in both layouts.
POOLED_SHAPES = [*SHAPES, (2, 150, 7, 7), (1, 144, 10, 13), (1, 80, 16, 12)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator runs its kernel, into memory that holds NaN."""
    monkeypatch.setenv("DIFFCAM_KERNELS", "triton")
    # Plans for a small device have few programs, which the interpreter runs one after the other.
    monkeypatch.setattr(launch, "TYPICAL", launch.Device(processors=4, cache=50 * 2**20))
    with poisoned():
        yield


class poisoned:
    """New tensors are full of NaN, or of the largest integer."""

    def __enter__(self) -> None:
        self.flags = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.flags)


def test_new_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty((3, 2)).isnan().all()


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Normal numbers; an activation (..., C, h, w) in one of `LAYOUTS`."""
    if layout == "sliced":
        wide = (*shape[:-3], shape[-3] + 2, 2 * shape[-2], shape[-1] + 3)
        found = torch.randn(*wide, generator=GENERATOR)[..., 1:-1, ::2, 2:-1]
    elif layout == "expanded":
        found = torch.randn(1, *shape[1:], generator=GENERATOR).expand(shape)
    else:
        found = torch.randn(*shape, generator=GENERATOR)
    found = found.to(device=DEVICE, dtype=dtype)
    return (
        found.movedim(-3, -1).contiguous().movedim(-1, -3) if layout == "channels_last" else found
    )


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR, dtype=dtype).to(DEVICE)


def check(
    found: Tensor, expected: Tensor, eager: Tensor | None = None, tolerance: float = TOLERANCE
) -> None:
    """Same shape and NaN; as close to float64 as PyTorch comes, and `tolerance` more."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    if not found.numel():
        return
    assert torch.equal(found.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max().clamp_min(1e-30)

    def error(values: Tensor) -> float:
        return float(((values.double() - expected).nan_to_num().abs() / scale).max())

    assert error(found) <= (0.0 if eager is None else error(eager)) + tolerance


def double(*operands: Tensor | None) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in operands]


@pytest.mark.parametrize("shape", POOLED_SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [1, 5, 9])
def test_pooled_cam(shape: tuple[int, ...], layout: str, targets: int) -> None:
    a, w = random(*shape, layout=layout), random(shape[0], targets, shape[1])
    expected = reference.pooled_cam(a.double(), w.double(), False)
    check(ops.pooled_cam(a, w, False), expected, reference.pooled_cam(a, w, False))
    check(ops.pooled_cam(a, w, True), expected.relu(), reference.pooled_cam(a, w, True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("size", [(5, 7), (12, 16)])
def test_pooled_cam_of_what_is_not_finite(
    dtype: torch.dtype, layout: str, targets: int, size: tuple[int, int]
) -> None:
    a, w = random(2, 144, *size, dtype=dtype, layout=layout), random(2, targets, 144)
    a[0, 3, 1, 1], a[0, 5, 4, 5], a[1, 143, 2, 2] = math.inf, math.nan, -math.inf
    w[1, -1, 2] = math.inf
    expected = reference.pooled_cam(a.double(), w.double(), False)
    found = ops.pooled_cam(a, w, False)
    infinite = expected.isinf()
    assert infinite.any() and torch.equal(found[infinite].double(), expected[infinite])
    check(found.masked_fill(infinite, 0), expected.masked_fill(infinite, 0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weights_of_any_magnitude(dtype: torch.dtype, layout: str) -> None:
    a, w = random(1, 304, 3, 3, dtype=dtype, layout=layout), random(1, 5, 304)
    magnitudes = torch.tensor([0.0, 1e-40, 1e-20, 1e20, 1e35], device=DEVICE)
    found = ops.pooled_cam(a, w * magnitudes[:, None], False)
    for t in range(5):
        expected = reference.pooled_cam(
            a.double(), (w * magnitudes[:, None])[:, t : t + 1].double(), False
        )
        check(found[:, t : t + 1], expected)
    # A channel far below the largest counts as float32 counts it.
    w[0, 0], w[0, 0, :2] = 0, torch.tensor([1.0, 2.0**-18 * 1.2345], device=DEVICE)
    a[:, 0] = 0
    expected = reference.pooled_cam(a.double(), w.double(), False)[:, :1]
    found = ops.pooled_cam(a, w, False)[:, :1]
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", [*zip(LAYOUTS, LAYOUTS, strict=True), LAYOUTS[:2]])
def test_gradient_cam(reduction: str, shape: tuple[int, ...], layouts: tuple[str, str]) -> None:
    # XGrad-CAM divides by sums of A. Signed, they come near 0, and no precision is enough.
    a = random(*shape, layout=layouts[0]).relu()
    g = random(shape[0], 3, *shape[1:], layout=layouts[1])
    expected = reference.gradient_cam(a.double(), g.double(), reduction, False)
    eager = reference.gradient_cam(a, g, reduction, False)
    check(ops.gradient_cam(a, g, reduction, False), expected, eager)
    check(ops.gradient_cam(a, g, reduction, True), expected.relu(), eager.relu())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision(dtype: torch.dtype, layout: str) -> None:
    a, w = random(2, 70, 5, 6, dtype=dtype, layout=layout), random(2, 3, 70)
    check(ops.pooled_cam(a, w, False), reference.pooled_cam(a.double(), w.double(), False))
    g = random(2, 2, 70, 5, 6, dtype=dtype, layout=layout)
    for reduction in reference.REDUCTIONS:
        positive = a.abs()
        expected = reference.gradient_cam(positive.double(), g.double(), reduction, False)
        check(ops.gradient_cam(positive, g, reduction, False), expected)
    check(
        ops.eigen_cam(a, True),
        reference.eigen_cam(a.double(), True),
        reference.eigen_cam(a.float(), True),
    )
    z, weight = random(3, 40, dtype=dtype), random(40, 70, dtype=dtype)
    d = reference.contrast_gradient(z.double(), reference.predicted(z), 1.0)
    w, _, _ = ops.contrast_channel_weights(z, weight, 30, None, 1.0)
    check(w, reference.channel_weights(d, weight.double(), 30))


@pytest.mark.parametrize(
    "shape", [(1, 3, 40, 41), (1, 2, 65, 64), (1, 2080, 2, 2), (17, 130, 3, 3)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_cells_than_a_tile_and_many_spans(shape: tuple[int, ...], layout: str) -> None:
    a, g = random(*shape, layout=layout).relu(), random(shape[0], 1, *shape[1:], layout=layout)
    for reduction in reference.REDUCTIONS:
        expected = reference.gradient_cam(a.double(), g.double(), reduction, False)
        eager = reference.gradient_cam(a, g, reduction, False)
        check(ops.gradient_cam(a, g, reduction, False), expected, eager)


@pytest.mark.parametrize("reduction", ["layer_cam", "hires_cam"])
def test_rows_that_begin_anywhere_are_read_as_runs(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffcam_kernels.gpu import cellwise

    # So many maps that a program walks over several tiles; or a device that is that small.
    monkeypatch.setattr(launch, "TYPICAL", launch.Device(processors=1, cache=0))
    n = 2 if DEVICE == "cpu" else 2 * torch.cuda.get_device_properties(0).multi_processor_count
    a, g = random(n, 260, 7, 7), random(n, 2, 260, 7, 7)
    assert cellwise.plan_cellwise(a, g, reduction).kernel is cellwise.cellwise_runs_kernel
    expected = reference.gradient_cam(a.double(), g.double(), reduction, True)
    eager = reference.gradient_cam(a, g, reduction, True)
    check(ops.gradient_cam(a, g, reduction, True), expected, eager)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 20, 40, 41)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_means(shape: tuple[int, ...], layout: str) -> None:
    from diffcam_kernels.gpu.means import plan_channel_means

    a = random(*shape, layout=layout)
    found = a.new_empty(a.shape[:2])
    plan_channel_means(a, found).run()
    check(found, a.double().mean(dim=(2, 3)), a.mean(dim=(2, 3)))


def test_runs_of_images_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random(5, 4, 3, 3)
    monkeypatch.setattr(
        launch, "device_of", lambda tensor: launch.Device(132, cache=2 * 4 * 9 * 4 * 2)
    )
    assert list(launch.image_chunks(whole)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    weight = random(7, 4)
    found = ops.head_cam(whole, weight, None, None, 1.0, True)
    exact = reference.head_cam(*double(whole, weight), None, None, 1.0, True)
    check(found[0], exact[0], reference.head_cam(whole, weight, None, None, 1.0, True)[0])


TEMPERATURES = [None, 0.0, 1e-39, 1e-30, 0.3, 1.0, 1e39, math.inf]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "t", "k", "c"), [(1, 1, 1000, 37), (3, 2, 10, 5), (0, 2, 5, 3)])
@pytest.mark.parametrize("asked", [True, False])
def test_contrast(temperature: float | None, n: int, t: int, k: int, c: int, asked: bool) -> None:
    z, weight = 3 * random(n, k), random(k, c)
    targets = integers(k, n, t) if asked else None
    chosen = reference.predicted(z) if targets is None else targets
    d = reference.contrast_gradient(z.double(), chosen, temperature)
    eager = reference.contrast_gradient(z, chosen, temperature)
    scores = reference.contrast_score(z.double(), d)
    found, classes, found_scores = ops.contrast_gradient(z, targets, temperature)
    check(found, d, eager)
    check(found_scores, scores, reference.contrast_score(z, eager))
    assert torch.equal(classes, chosen)
    w, classes, found_scores = ops.contrast_channel_weights(z, weight, 49, targets, temperature)
    expected = reference.channel_weights(d, weight.double(), 49)
    check(w, expected, reference.channel_weights(eager, weight, 49))
    check(found_scores, scores, reference.contrast_score(z, eager))
    assert torch.equal(classes, chosen)


@pytest.mark.parametrize("k", [2, 21841])
@pytest.mark.parametrize("rows", [1, 3])
def test_contrast_of_few_and_of_many_classes(k: int, rows: int) -> None:
    z, weight = random(rows, k), random(k, 3)
    d = reference.contrast_gradient(z.double(), reference.predicted(z), 1.0)
    check(ops.contrast_gradient(z, None, 1.0)[0], d)
    w = ops.contrast_channel_weights(z, weight, 7, None, 1.0)[0]
    eager = reference.channel_weights(d.float(), weight, 7)
    check(w, reference.channel_weights(d, weight.double(), 7), eager)


@pytest.mark.parametrize("temperature", [0.0, 1.0, math.inf])
def test_contrast_with_chosen_classes_and_given_weights(temperature: float) -> None:
    z, targets = random(4, 6), torch.tensor([[0, 3], [5, 0], [3, 3], [2, 5]], device=DEVICE)
    mask = torch.tensor([False, True, False, False, True, False], device=DEVICE).expand(4, 2, 6)
    q = torch.rand(6, generator=GENERATOR).to(DEVICE).softmax(0).expand(4, 6)
    for operands in [(mask, None), (None, q)]:
        d = reference.contrast_gradient(z.double(), targets, temperature, *double(*operands))
        found, _, scores = ops.contrast_gradient(z, targets, temperature, *operands)
        check(found, d)
        check(scores, reference.contrast_score(z.double(), d))


@pytest.mark.parametrize("temperature", [0.0, 1.0, math.inf])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    z = random(4, 6)
    z[0, 2], z[1, :3], z[2, 1], z[3, 0] = math.nan, -math.inf, 80, -60
    targets = torch.tensor([[0, 2], [4, 5], [1, 2], [2, 2]], device=DEVICE)
    d = reference.contrast_gradient(z.double(), targets, temperature)
    found, _, scores = ops.contrast_gradient(z, targets, temperature)
    check(found, d)
    check(scores, reference.contrast_score(z.double(), d))


def test_ties_take_the_lowest_class() -> None:
    z = torch.tensor([[1.0, 2.0, 2.0, 2.0]], device=DEVICE)
    d, chosen, _ = ops.contrast_gradient(z, None, 0.0)
    assert chosen.tolist() == [[1]]
    assert d.tolist() == [[[0, 1, -1, 0]]]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_head_cam(asked: bool, biased: bool) -> None:
    a, weight = random(3, 20, 5, 4, layout="channels_last"), random(11, 20)
    bias = random(11) if biased else None
    operands = (bias, integers(11, 2, 3).T if asked else None)
    found = ops.head_cam(a, weight, *operands, 1.0, True)
    exact = reference.head_cam(*double(a, weight, *operands), 1.0, True)
    eager = reference.head_cam(a, weight, *operands, 1.0, True)
    assert torch.equal(found[2], exact[2])
    for i in (0, 1, 3):
        check(found[i], exact[i], eager[i])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 3, 11])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_product(dtype: torch.dtype, rows: int, transposed: bool, shifted: bool) -> None:
    from diffcam_kernels.gpu.product import fill_product

    x = random(rows, 300) * 10.0 ** integers(9, rows, 1).sub(4)
    matrix = random(70, 300, dtype=dtype).T if transposed else random(300, 70, dtype=dtype)
    shift = random(70, dtype=dtype) if shifted else None
    found = x.new_empty(rows, 70)
    fill_product(x, matrix, shift, found)
    # Row by row: each has a scale of its own.
    for row in range(rows):
        exact = x[row].double() @ matrix.double() + (0 if shift is None else shift.double())
        eager = x[row] @ matrix.float() + (0 if shift is None else shift.float())
        check(found[row], exact, eager)


@pytest.mark.parametrize("temperature", [None, 0.5, math.inf])
@pytest.mark.parametrize("logit", [0.0, 60.0, -math.inf, math.nan])
def test_targets_of_one_image_share_a_product(temperature: float | None, logit: float) -> None:
    z, weight = random(4, 4), random(4, 6)
    z[:, 1] = logit
    # One twice, all of the classes, a single one, and no target that is far above all others.
    targets = torch.tensor(
        [[1, 1, 2, 1], [3, 1, 0, 2], [1, 1, 1, 1], [2, 3, 3, 2]], device=z.device
    )
    found = ops.contrast_channel_weights(z, weight, 3, targets, temperature)
    d = reference.contrast_gradient(z, targets, temperature)
    exact = reference.channel_weights(*double(d, weight), 3)
    check(found[0], exact, reference.channel_weights(d, weight, 3))
    check(found[2], reference.contrast_score(z.double(), d.double()))


@pytest.mark.parametrize("terms", [33, 48, 1000])
def test_products_of_long_sums_are_in_chunks(terms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcam_kernels.gpu import product

    monkeypatch.setattr(product, "_CHUNK", 32)
    x, matrix = random(5, terms), random(terms, 6, dtype=torch.float16)
    found = x.new_empty(5, 6)
    product.fill_product(x, matrix, None, found)
    check(found, x.double() @ matrix.double(), x @ matrix.float())


@pytest.mark.parametrize("rows", [1, 11])
def test_product_of_what_is_no_number(rows: int) -> None:
    from diffcam_kernels.gpu.product import fill_product

    x, matrix = random(rows, 5), random(5, 4, dtype=torch.float16).abs() + 1
    x[0, 1], x[-1, 2] = math.inf, math.nan if rows > 1 else math.inf
    found = x.new_empty(rows, 4)
    fill_product(x, matrix, None, found)
    assert (found[0] == math.inf).all()
    assert rows == 1 or found[-1].isnan().all()
    x[:] = 0
    fill_product(x, matrix, None, found)
    assert (found == 0).all()


@pytest.fixture
def phased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CAM head of up to 80 targets goes through phases."""
    from diffcam_kernels.gpu import head

    monkeypatch.setattr(head, "PHASES_ROWS", 80)


@pytest.mark.usefixtures("phased")
@pytest.mark.parametrize(
    ("temperature", "targets"), list(zip([None, 0.0, 1.0, math.inf], [0, 1, 9, 0], strict=True))
)
def test_head_cam_in_phases(temperature: float | None, targets: int) -> None:
    a = random(2, 37, 5, 4, layout="channels_last")
    weight, bias = random(50, 37), random(50)
    operands = (bias, integers(50, 2, targets) if targets else None)
    found = ops.head_cam(a, weight, *operands, temperature, False)
    exact = reference.head_cam(*double(a, weight, *operands), temperature, False)
    eager = reference.head_cam(a, weight, *operands, temperature, False)
    assert torch.equal(found[2], exact[2])
    for i in (0, 1, 3):
        check(found[i], exact[i], eager[i])


@pytest.mark.usefixtures("phased")
@pytest.mark.parametrize("dtype", HALVES)
def test_phases_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    a = random(5, 37, 5, 4, dtype=dtype, layout="channels_last")
    weight, targets = random(50, 37, dtype=dtype), integers(50, 5, 3)
    whole = ops.head_cam(a, weight, None, targets, 1.0, True)
    check(whole[1], reference.head_cam(*double(a, weight, None, targets), 1.0, True)[1])
    alone = ops.head_cam(a[3:4], weight, None, targets[3:4], 1.0, True)
    for one, of_all in zip(alone, whole, strict=True):
        assert torch.equal(one[0], of_all[3])


def test_phases_are_for_few_images_of_small_heads(phased: None) -> None:
    from diffcam_kernels.gpu.head import in_phases

    def fits(
        n: int, k: int, c: int, reference: Tensor | None = None, *, cells_first: bool = False
    ) -> bool:
        a, weight = (torch.empty(s, device="meta") for s in ((n, 7, 7, c), (k, c)))
        a = a.mT.contiguous().mT if cells_first else a
        return in_phases(a.movedim(3, 1), weight, 10, reference, None)

    assert fits(1, 1000, 2048) and fits(8, 10, 37)
    assert not fits(9, 1000, 2048)
    assert not fits(1, 21841, 2048)
    assert not fits(1, 1000, 4096)
    assert not fits(0, 1000, 2048)
    assert not fits(1, 1000, 2048, torch.empty(1))
    assert not fits(1, 1000, 2048, cells_first=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("phased")
@pytest.mark.parametrize("n", [1, 8])
def test_programs_that_wait_for_each_other_give_the_same_each_time(n: int) -> None:
    a, weight = random(n, 2048, 7, 7, layout="channels_last"), random(1000, 2048)
    expected = reference.head_cam(*double(a, weight, None, None), 1.0, True)
    ops.head_cam(a, weight, None, None, 1.0, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.head_cam(a, weight, None, None, 1.0, True)
    graph.replay()
    first = [found.clone() for found in captured]
    for i in (0, 1, 3):
        check(first[i], expected[i])
    for _ in range(1000):
        graph.replay()
    for again in (captured, ops.head_cam(a, weight, None, None, 1.0, True)):
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("phased")
def test_two_streams_wait_apart() -> None:
    weight = random(1000, 2048)
    inputs = [random(2, 2048, 7, 7, layout="channels_last") for _ in range(2)]
    expected = [ops.head_cam(a, weight, None, None, 1.0, True) for a in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(100):
        found = []
        for stream, a in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.head_cam(a, weight, None, None, 1.0, True))
        torch.cuda.synchronize()
        for ours, alone in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, alone, strict=True))


@pytest.mark.parametrize("shape", [(2, 40, 7, 7), (1, 5, 8, 8), (2, 3, 1, 1), (1, 6, 9, 13)])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_eigen_cam(shape: tuple[int, ...], center: bool, layout: str) -> None:
    a = random(*shape, layout=layout).relu()
    expected = reference.eigen_cam(a.double(), center)
    check(ops.eigen_cam(a, center), expected, by_svd(a, center))


def by_svd(a: Tensor, center: bool) -> Tensor:
    """Eigen-CAM in float32, as PyTorch is written for it; the definition runs in float64."""
    x = a.flatten(2).mT
    x = x - x.mean(dim=1, keepdim=True) if center else x
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    m = u[:, :, 0] * s[:, :1]
    m = m * torch.where(m.gather(1, m.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    return m.view(-1, *a.shape[2:])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_eigen_cam_of_means_far_above_deviations(dtype: torch.dtype, layout: str) -> None:
    a = random(2, 300, 7, 7, layout=layout) + 10 * random(2, 300, 1, 1)
    a = a.to(dtype)
    expected, eager = reference.eigen_cam(a.double(), True), by_svd(a.float(), True)
    # Noise has no component that stands out: its eigenvectors lie close, and turn at any rounding.
    check(ops.eigen_cam(a, True), expected, eager, tolerance=1e-5)


def test_eigen_cam_of_nothing_and_of_nan() -> None:
    a = random(3, 4, 3, 3)
    a[0], a[1, 2, 0, 1] = 0, math.nan
    maps = ops.eigen_cam(a, True)
    assert (maps[0] == 0).all() and maps[1].isnan().all() and maps[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_eigen_cam_of_channels_of_one_value(dtype: torch.dtype) -> None:
    a = random(1, 20, 1, 1, dtype=dtype).expand(1, 20, 5, 5)
    assert (ops.eigen_cam(a, True) == 0).all()


@pytest.mark.parametrize("size", [((7, 7), (20, 31)), ((1, 1), (3, 3)), ((40, 30), (17, 11))])
def test_heatmap(size: tuple[tuple[int, int], tuple[int, int]]) -> None:
    small, large = size
    maps = random(2, 3, *small)
    maps[0, 0], maps[1, 1, 0, 0] = 3, math.nan
    check(
        ops.heatmap(maps, *large),
        reference.heatmap(maps.double(), *large),
        reference.heatmap(maps, *large),
    )
    half = ops.heatmap(maps, *large, torch.float16)
    expected = reference.heatmap(maps.double(), *large)
    assert half.dtype == torch.float16
    assert ((half.double() - expected).nan_to_num().abs() <= 2.5e-4).all()
    whole = ops.heatmap(maps, *large, torch.uint8).int()
    assert ((whole - (255 * expected).nan_to_num()).abs() <= 0.501).all()


def test_heatmap_takes_any_view() -> None:
    maps = random(2, 6, 7, 7)[:, ::2]
    check(ops.heatmap(maps, 9, 9), reference.heatmap(maps.double(), 9, 9))


@pytest.mark.parametrize("width", [18, 20, 32])
def test_overlay(width: int) -> None:
    maps = random(2, 2, 7, 5)
    maps[1, 1, 0, 0] = math.nan
    pictures = integers(256, 2, 23, width, 3, dtype=torch.uint8)
    colours = integers(256, 256, 3, dtype=torch.uint8)
    found = ops.overlay(maps, pictures, colours, 100)
    expected = reference.overlay(maps, pictures, colours, 100)
    # A value at the edge of two colours may take either.
    assert (found == expected).all(dim=4).float().mean() > 0.995
    assert torch.equal(found[1, 1], expected[1, 1])
    unchanged = ops.overlay(maps, pictures, colours, 0)
    assert torch.equal(unchanged, pictures[:, None].expand_as(unchanged))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("width", [14, 16])
def test_preprocess(channels_last: bool, channels: int, width: int) -> None:
    pictures = integers(256, 2, 9, width, channels, dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6, 0.1][:channels], [0.2, 0.3, 0.25, 1.0][:channels]
    for view in (pictures, pictures[:, ::2, 1:]):
        expected = reference.preprocess(view, mean, std, torch.float32, channels_last)
        found = ops.preprocess(view, mean, std, torch.float32, channels_last)
        assert torch.allclose(found, expected, atol=1e-6)
        assert channels == 1 or found.stride() == expected.stride()
        # One unit in the last place: the interpreter cuts off where a GPU rounds.
        for dtype, unit in [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)]:
            half = ops.preprocess(view, mean, std, dtype, channels_last)
            assert torch.allclose(half.float(), expected, rtol=unit, atol=1e-6)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(
        *(st.integers(0 if i == 0 else 1, most) for i, most in enumerate((3, 40, 12, 12)))
    ),
    t=st.integers(1, 4),
    step=st.integers(1, 2),
    axes=st.permutations([1, 2, 3]),
    reduction=st.sampled_from(list(reference.REDUCTIONS)),
)
def test_any_shape_and_stride(
    shape: tuple[int, int, int, int], t: int, step: int, axes: list[int], reduction: str
) -> None:
    n, *rest = shape
    order = [0, *axes]
    stored = [n, *(rest[axis - 1] * (step if axis == 2 else 1) for axis in axes)]
    a = random(*stored).permute([order.index(i) for i in range(4)])[:, :, ::step].relu()
    w, g = random(n, t, a.shape[1]), random(n, t, *a.shape[1:])
    expected = reference.pooled_cam(a.double(), w.double(), False)
    check(ops.pooled_cam(a, w, False), expected, reference.pooled_cam(a, w, False))
    expected = reference.gradient_cam(a.double(), g.double(), reduction, False)
    eager = reference.gradient_cam(a, g, reduction, False)
    check(ops.gradient_cam(a, g, reduction, False), expected, eager)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), n=st.integers(1, 3), k=st.integers(2, 70), t=st.integers(1, 3))
def test_any_classes_and_targets(data: st.DataObject, n: int, k: int, t: int) -> None:
    row = st.lists(st.integers(0, k - 1), min_size=t, max_size=t)
    targets = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)), device=DEVICE)
    targets = targets.T.contiguous().T
    temperature = data.draw(st.sampled_from([0.0, 0.1, 1.0, 7.0, math.inf]))
    c = data.draw(st.integers(1, 40))
    z, weight = random(k, n).T, random(c, k).T
    d = reference.contrast_gradient(z.double(), targets, temperature)
    eager = reference.contrast_gradient(z, targets, temperature)
    check(ops.contrast_gradient(z, targets, temperature)[0], d, eager)
    found, _, _ = ops.contrast_channel_weights(z, weight, 9, targets, temperature)
    expected = reference.channel_weights(d, weight.double(), 9)
    check(found, expected, reference.channel_weights(eager, weight, 9))


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU a target that is no class raises")
def test_targets_that_are_no_class_give_nan() -> None:
    z, weight = random(3, 5), random(5, 4)
    targets = torch.tensor([[0], [5], [-1]], device=DEVICE)
    for temperature in (None, 1.0):
        w, _, scores = ops.contrast_channel_weights(z, weight, 9, targets, temperature)
        d, _, _ = ops.contrast_gradient(z, targets, temperature)
        for found in (w, scores, d):
            assert found[0].isfinite().all() and found[1:].isnan().all()


def test_infinite_activations_stay_where_they_are() -> None:
    a, g = random(1, 3, 4, 4), random(1, 1, 3, 4, 4).abs()
    g[0, 0, 1, 2, 2] = math.inf
    found = ops.gradient_cam(a, g, "grad_cam", False)
    assert torch.equal(found, reference.gradient_cam(a, g, "grad_cam", False))


def test_programs_lie_along_the_axis_that_holds_them_all() -> None:
    from diffcam_kernels.gpu import gradient
    from diffcam_kernels.gpu import pooled as pooled_kernel

    a = torch.empty(1, device="meta").expand(70_000, 3, 300, 300)
    g, w = a[:, None], torch.empty(70_000, 1, 3, device="meta")
    maps = torch.empty(70_000, 1, 300, 300, device="meta")
    plans = pooled_kernel.plan_pooled_cam(a, w, maps, True)
    plans += gradient.plan_gradient_cam(a, g, "grad_cam", maps, True)
    plans += gradient.plan_gradient_cam(a, g, "layer_cam", maps, True)
    assert all(n < 2**16 for plan in plans for n in plan.grid[1:])


@pytest.mark.parametrize("rows", [(1, 16), (17, 1), (9, 3)])
def test_few_and_many_rows(rows: tuple[int, int]) -> None:
    z, weight = random(rows[0], 12), random(12, 20)
    targets = integers(12, *rows)
    d = reference.contrast_gradient(z.double(), targets, 1.0)
    found, _, _ = ops.contrast_channel_weights(z, weight, 4, targets, 1.0)
    check(found, reference.channel_weights(d, weight.double(), 4))


def test_no_channels_and_no_cells() -> None:
    z = random(2, 5)
    w, targets, scores = ops.contrast_channel_weights(z, random(5, 0), 4, None, 1.0)
    assert w.shape == (2, 1, 0) and torch.equal(targets, reference.predicted(z))
    assert scores.isfinite().all()
    assert (ops.pooled_cam(random(2, 0, 3, 3), random(2, 2, 0), True) == 0).all()
    assert ops.pooled_cam(random(2, 4, 3, 3), random(2, 0, 4), True).shape == (2, 0, 3, 3)
    assert (ops.eigen_cam(random(2, 0, 3, 3), True) == 0).all()
    assert ops.eigen_cam(random(2, 4, 0, 3), True).shape == (2, 0, 3)


@pytest.mark.gpu
def test_operators_can_be_captured() -> None:
    z, a, weight = random(4, 10), random(4, 20, 7, 7), random(10, 20)

    def explain() -> Tensor:
        w, _, _ = ops.contrast_channel_weights(z, weight, 49, None, 1.0)
        return ops.heatmap(ops.pooled_cam(a, w, True), 28, 28)

    explain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = explain()
    z.copy_(random(4, 10))
    graph.replay()
    assert torch.equal(found, explain())


def test_an_image_has_the_same_map_alone_and_in_a_batch_and_again() -> None:
    a, g = random(4, 32, 7, 7), random(4, 2, 32, 7, 7)
    last = torch.channels_last
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, g: ops.pooled_cam(a, g.mean(dim=(3, 4)), True),
        lambda a, g: ops.pooled_cam(a.contiguous(memory_format=last), g.mean(dim=(3, 4)), True),
        lambda a, g: ops.gradient_cam(a, g, "layer_cam", True),
        lambda a, g: ops.gradient_cam(a, g, "grad_cam_pp", True),
        lambda a, g: ops.eigen_cam(a, True)[:, None],
    ]
    for call in calls:
        whole = call(a, g)
        assert torch.equal(call(a[2:3], g[2:3])[0], whole[2])
        assert torch.equal(call(a, g), whole)


@pytest.mark.parametrize("make", [pooled, with_mlp, Overwritten])
def test_the_engine_explains_alike_with_and_without_kernels(
    make: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer = Explainer(make().to(DEVICE), example_inputs=images().to(DEVICE))
    found = explainer(images().to(DEVICE), topk=2)
    assert found.backend.startswith("triton")
    monkeypatch.setenv("DIFFCAM_KERNELS", "reference")
    expected = explainer(images().to(DEVICE), topk=2)
    assert expected.backend.startswith("torch")
    assert torch.equal(found.targets, expected.targets)
    assert torch.allclose(found.maps, expected.maps, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.scores, expected.scores, rtol=1e-5)
