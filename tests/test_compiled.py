"""Explainers without Python on the way: the same answers for any batch, or the explainer's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import Contrast, Explainer
from diffcam_fast.compiled import CompiledExplainer
from diffcam_fast.explanation import Explanation
from diffcam_fast.methods import METHODS
from networks import Overwritten, images, pooled, with_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECORDED = "CUDA graph" if DEVICE == "cuda" else "recorded"
ROUNDING = 1e-5


def same(made: Explanation, expected: Explanation) -> None:
    assert torch.equal(made.targets, expected.targets)
    for name in ("logits", "scores", "maps"):
        torch.testing.assert_close(
            getattr(made, name), getattr(expected, name), rtol=1e-4, atol=ROUNDING
        )
    assert len(made.layer_maps) == len(expected.layer_maps)
    assert (made.layer, made.method, made.contrast) == (
        expected.layer,
        expected.method,
        expected.contrast,
    )


@pytest.mark.parametrize("model", [pooled(), with_mlp(), Overwritten()])
@pytest.mark.parametrize("n", [0, 1, 4, 9])
def test_any_number_of_images(model: nn.Module, n: int) -> None:
    explainer = Explainer(model.to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=4)
    fast(images(4) + 1.0)
    made = fast(images(n))
    same(made, explainer(images(n)))
    assert len(made) == n
    assert n == 0 or made.backend == f"{explainer(images(n)).backend}, {RECORDED}"
    assert fast.refused is None


@pytest.mark.parametrize(
    "asked",
    [
        {"targets": 2},
        {"targets": [0, 3, 1, 1, 4]},
        {"targets": [[0, 1]] * 5},
        {"targets": torch.arange(5)[:, None]},
        {"targets": "predicted"},
        {"topk": 3},
    ],
)
@pytest.mark.parametrize("method", ["diff_grad_cam", "layer_cam", "hires_cam", "eigen_cam"])
def test_what_is_asked(asked: dict[str, Any], method: str) -> None:
    explainer = Explainer(with_mlp().to(DEVICE), method=method, example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=3)
    for _ in range(2):
        same(fast(images(5), **asked), explainer(images(5), **asked))
    assert fast.refused is None


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_answers(name: str) -> None:
    """Recorded, or by the explainer where it is no graph: the answer is the same."""
    explainer = Explainer(pooled().to(DEVICE), method=name, example_inputs=images())
    if METHODS[name].needs_fit:
        explainer.fit([(images(6), torch.arange(6) % 5)])
    fast = CompiledExplainer(explainer, batch_size=3)
    for _ in range(2):
        same(fast(images()), explainer(images()))
    if name in ("diff_grad_cam", "grad_cam_pp", "cam", "eigen_cam", "xgrad_cam"):
        assert fast.refused is None


def test_layers_and_sizes() -> None:
    explainer = Explainer(pooled().to(DEVICE), layer=["0.1", "0.4"], example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=3)
    for size in (10, 12, 10):
        same(fast(images(3, size)), explainer(images(3, size)))


def test_what_looks_at_values_runs_in_the_explainer() -> None:
    explainer = Explainer(
        pooled().to(DEVICE), contrast=Contrast(reference=(0, 1)), example_inputs=images()
    )
    fast = CompiledExplainer(explainer, batch_size=3)
    same(fast(images(), 3), explainer(images(), 3))
    assert fast.refused is not None and "diff_grad_cam is no fixed graph" in fast.refused
    assert fast(images(), 3).backend == explainer(images(), 3).backend


class Branching(nn.Module):
    """Takes another way for images that are bright."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright = pooled(), pooled()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bright(x) if x.mean() > 0 else self.dark(x)
        return made


def test_a_network_that_branches_is_not_recorded() -> None:
    explainer = Explainer(
        Branching().eval().to(DEVICE), layer="bright.0", example_inputs=images() + 1
    )
    fast = CompiledExplainer(explainer, batch_size=3)
    same(fast(images() + 1), explainer(images() + 1))
    assert fast.refused is not None


def test_functions_run_in_the_explainer() -> None:
    explainer = Explainer(pooled().to(DEVICE), method="grad_cam", example_inputs=images())
    fast = CompiledExplainer(explainer)

    def second(output: Tensor) -> Tensor:
        return output[:, 1]

    same(fast(images(), second), explainer(images(), second))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((images(), 5), ValueError, "from 0 to 4"),
        ((images(), [0, 1]), ValueError, "N = 3"),
        ((images()[0],), ValueError, "add the batch axis"),
        ((images().long(),), TypeError, "floating point"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_errors_are_those_of_the_explainer(
    arguments: tuple[Any, ...], error: type[Exception], words: str, known: bool
) -> None:
    fast = CompiledExplainer(Explainer(pooled().to(DEVICE), example_inputs=images()))
    if known:
        fast(images(), 1)
    with pytest.raises(error, match=words):
        fast(*arguments)
    same(fast(images(), 1), fast.explainer(images(), 1))


def test_targets_or_topk() -> None:
    fast = CompiledExplainer(Explainer(pooled().to(DEVICE), example_inputs=images()))
    with pytest.raises(ValueError, match="targets or topk, not both"):
        fast(images(), 1, topk=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CompiledExplainer(fast.explainer, batch_size=0)


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = Explainer(pooled().to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=8)
    whole = explainer.prepare

    def short(given: Tensor) -> Tensor:
        if len(given) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return whole(given)

    monkeypatch.setattr(explainer, "prepare", short)
    with pytest.raises(torch.OutOfMemoryError):
        fast(images(3))
    assert fast.batch_size == 4
    monkeypatch.undo()
    same(fast(images(7)), explainer(images(7)))


def test_a_stream_takes_its_batch_size() -> None:
    explainer = Explainer(pooled().to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=4)
    made = [one.explanation for one in fast.stream(images(10))]
    expected = explainer(images(10)).cpu()
    for number, one in enumerate(made):
        assert one is not None
        same(one, expected[number])


def test_compiled() -> None:
    explainer = Explainer(with_mlp().to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=3, compile=True)
    same(fast(images(2)), explainer(images(2)))
    same(fast(images(5)), explainer(images(5)))
    assert "compiled" in fast(images(2)).backend
    assert fast.refused is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    model = pooled().to(DEVICE, dtype, memory_format=torch.channels_last)
    explainer = Explainer(model, example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=4)
    made, expected = fast(images(4)), explainer(images(4))
    assert torch.equal(made.maps, expected.maps)
    assert fast.refused is None


@pytest.mark.gpu
def test_threads_share_a_graph() -> None:
    from concurrent.futures import ThreadPoolExecutor

    explainer = Explainer(with_mlp().to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=3)
    batches = [images() * (1 + i) for i in range(16)]
    expected = [explainer(batch) for batch in batches]

    def explained(batch: Tensor) -> Explanation:
        with torch.cuda.stream(torch.cuda.Stream()):
            return fast(batch).cpu()

    with ThreadPoolExecutor(4) as pool:
        for made, known in zip(pool.map(explained, batches), expected, strict=True):
            same(made, known.cpu())


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    explainer = Explainer(with_mlp().to(DEVICE), example_inputs=images())
    fast = CompiledExplainer(explainer, batch_size=3)
    batch = images().to(DEVICE)
    fast(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
