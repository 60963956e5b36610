"""Situations in which a CAM library raises, gives a wrong map, or leaves something behind in the
model."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import AnalysisError, Contrast, Explainer
from diffcam_fast.analysis import analyse
from networks import Overwritten, expected_maps, images, pooled, relative_error, with_mlp

TARGETS = torch.tensor([[3], [1], [2]])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "closed": pooled,
    "backward": with_mlp,
    "overwritten": Overwritten,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    return MODELS[request.param]()


def explained(model: nn.Module, **options: object) -> Tensor:
    return Explainer(model, relu=False, **options)(images(), TARGETS).maps  # type: ignore[arg-type]


def expected(model: nn.Module) -> Tensor:
    return expected_maps(model, Explainer(model).layer, images(), TARGETS)


def test_frozen_parameters(model: nn.Module) -> None:
    truth = expected(model)
    assert relative_error(explained(model.requires_grad_(False)), truth) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_gradient_mode(model: nn.Module, mode: Callable[[], object]) -> None:
    truth, explainer = expected(model), Explainer(model, relu=False)
    with mode():  # type: ignore[attr-defined]
        given = images()
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        result = explainer(given, TARGETS)
        made_inside = Explainer(model, relu=False)(given, TARGETS)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert relative_error(result.maps, truth) < 1e-5
    assert relative_error(made_inside.maps, truth) < 1e-5


def test_a_result_is_an_ordinary_tensor(model: nn.Module) -> None:
    with torch.inference_mode():
        result = Explainer(model)(images())
    for tensor in (result.maps, result.logits, result.scores):
        assert not tensor.is_inference() and not tensor.requires_grad
        tensor += 1


def test_under_bfloat16_autocast(model: nn.Module) -> None:
    truth, explainer = expected(model), Explainer(model, relu=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = explainer(images(), TARGETS)
    assert result.maps.dtype == torch.float32
    assert relative_error(result.maps, truth) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(model: nn.Module, dtype: torch.dtype) -> None:
    truth = expected(model)
    result = Explainer(model.to(dtype), relu=False)(images(), TARGETS)
    assert result.maps.dtype == torch.float32
    assert result.logits.dtype == dtype
    assert relative_error(result.maps, truth) < (1e-6 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [24, 48])
def test_half_precision_keeps_the_closed_form(dtype: torch.dtype, size: int) -> None:
    half, given = pooled(classes=40, channels=64).to(dtype), images(size=size).to(dtype)
    result = Explainer(half, relu=False, example_inputs=given)(given, TARGETS)
    assert result.backend.endswith("closed form")
    # Exact from the activations on: what half precision does to those is the network's own.
    with torch.no_grad():
        activations = half[0](given).double()
    d = Contrast().gradient(result.logits.double(), TARGETS)
    weights = d @ half[2].weight.double() / activations[0, 0].numel()
    exact = torch.einsum("ntc,nchw->nthw", weights, activations).detach()
    assert relative_error(result.maps, exact) < 1e-5


def test_channels_last(model: nn.Module) -> None:
    truth = expected(model)
    result = Explainer(model.to(memory_format=torch.channels_last), relu=False)
    given = images().to(memory_format=torch.channels_last)
    assert relative_error(result(given, TARGETS).maps, truth) < 1e-5


@pytest.mark.parametrize("compile_", ["wrapped", "in place", "submodule", "wrapped submodule"])
def test_compiled_model_that_has_already_run(model: nn.Module, compile_: str) -> None:
    truth = expected(model)
    if compile_ == "wrapped":
        model = torch.compile(model, backend="eager")
    elif compile_ == "in place":
        model.compile(backend="eager")
    elif compile_ == "submodule":
        next(iter(model.children())).compile(backend="eager")
    else:
        name, child = next(model.named_children())
        setattr(model, name, torch.compile(child, backend="eager"))
    model(images())
    assert relative_error(explained(model), truth) < 1e-5


def test_a_compiled_model_is_compiled_afterwards(model: nn.Module) -> None:
    runs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        runs.append(graph)
        return graph.forward

    # Sequential.forward is one code object for all tests, and is compiled so many times only.
    torch.compiler.reset()
    model.compile(backend=backend)
    call = model._compiled_call_impl
    explainer = Explainer(model)
    explainer(images())
    assert not runs
    assert model._compiled_call_impl is call
    model(images())
    assert runs


def test_data_parallel(model: nn.Module) -> None:
    assert relative_error(explained(nn.DataParallel(model)), expected(model)) < 1e-5


def test_torchscript_is_refused_with_what_to_give() -> None:
    with pytest.raises(TypeError, match=r"give the nn.Module it was made from"):
        Explainer(torch.jit.trace(pooled(), images()))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("build", [pooled, with_mlp])
@pytest.mark.parametrize("part", ["0.0", "1"])
def test_a_part_in_torchscript(build: Callable[[], nn.Sequential], part: str) -> None:
    model, truth = build().train(), expected_maps(build(), "0", images(), TARGETS)
    # A module of the features, or all of the head but its last layer.
    owner, _, name = part.rpartition(".")
    scripted = torch.jit.script(model.get_submodule(part))
    setattr(model.get_submodule(owner), name, scripted)
    assert relative_error(explained(model), truth) < 1e-5
    assert scripted.training


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_layer_in_torchscript_says_what_to_do() -> None:
    model = pooled()
    model[0] = torch.jit.script(model[0])
    hint = r"takes no hooks.*nn\.Sequential"
    with pytest.raises(AnalysisError, match=hint):
        Explainer(model)
    with pytest.raises(AnalysisError, match=hint):
        Explainer(model, layer="0")
    model[0] = nn.Sequential(model[0])
    truth = expected_maps(pooled(), "0", images(), TARGETS)
    assert relative_error(explained(model), truth) < 1e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z,),
        lambda z: [z.new_zeros(3, 4, 2), z],
        lambda z: {"logits": z},
        lambda z: {"aux": z.new_zeros(3), "out": z},
        lambda z: SimpleNamespace(logits=z, loss=None),
        lambda z: z[:, :, None, None],
    ],
)
def test_outputs_that_hold_the_logits(wrap: Callable[[Tensor], object]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled()

        def forward(self, x: Tensor) -> object:
            return wrap(self.net(x))

    result = Explainer(Wrapped(), relu=False, example_inputs=images())(images(), TARGETS)
    assert torch.equal(result.maps, explained(pooled(), example_inputs=images()))


def test_an_overwritten_activation_is_the_layers_own() -> None:
    model = Overwritten()
    result = Explainer(model, relu=False, method="grad_cam")(images(), TARGETS)
    assert result.layer == "features"
    with torch.no_grad():
        own = model.features(images())
    gate = (own > 0).float()
    weights = model.classifier.weight[TARGETS[:, 0]].detach() / 120
    alpha = (weights[:, :, None, None] * gate).mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(result.maps[:, 0], (alpha * own).sum(dim=1), atol=1e-6)


def test_one_target_applies_to_every_image(model: nn.Module) -> None:
    one, each = Explainer(model)(images(), 2), Explainer(model)(images(), [2, 2, 2])
    assert torch.equal(one.maps, each.maps)
    assert (one.maps.amax(dim=(1, 2, 3)) > 0).any()


def test_a_class_out_of_range_raises_inside_a_with_block(model: nn.Module) -> None:
    explainer = Explainer(model)
    with pytest.raises(ValueError, match="from 0 to 4, got 7"), nullcontext(explainer) as inside:
        inside(images(), 7)
    assert_untouched(model, lambda: explainer(images()))


def test_nothing_is_left_behind(model: nn.Module) -> None:
    explainer = Explainer(model)
    assert_untouched(model, lambda: explainer(images(), TARGETS))
    assert_untouched(model, lambda: Explainer(model))


@pytest.mark.parametrize("break_at", ["before", "behind"])
def test_nothing_is_left_behind_when_the_model_raises(break_at: str) -> None:
    model = with_mlp()
    explainer = Explainer(model)
    part = model[0] if break_at == "before" else model[1]

    def fail(*args: object) -> None:
        raise RuntimeError("lightning")

    handle = part.register_forward_pre_hook(fail)

    def call() -> None:
        with pytest.raises(RuntimeError, match="lightning"):
            explainer(images())
        assert torch.is_grad_enabled()

    assert_untouched(model, call)
    handle.remove()
    explainer(images())


def assert_untouched(model: nn.Module, call: Callable[[], object]) -> None:
    """Flags, gradients, hooks and values of a model in a mixed state are the same after a call."""
    modules = list(model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(i)) if i % 3 == 0 else None

    def state() -> list[object]:
        flags = [m.training for m in modules]
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in modules
        ]
        grads = [
            (p.requires_grad, None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ]
        values = [v.clone() for v in model.state_dict().values()]
        return [flags, hooks, grads, values]

    before = state()
    call()
    after = state()
    assert before[:2] == after[:2]
    for (required, grad), (required_after, grad_after) in zip(before[2], after[2], strict=True):  # type: ignore[call-overload]
        assert required == required_after
        assert (grad is None) == (grad_after is None) and (
            grad is None or torch.equal(grad, grad_after)
        )
    assert all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))  # type: ignore[call-overload]


def test_no_activation_outlives_the_call(model: nn.Module) -> None:
    explainer = Explainer(model)
    seen: list[weakref.ref[Tensor]] = []
    layer = model.get_submodule(explainer.layer)
    for module in layer.modules():
        module.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    result = explainer(images(), TARGETS)
    gc.collect()
    # An activation outlives the call only as a result, and those are copies.
    assert seen and all(ref() is None for ref in seen)
    assert all(t.grad_fn is None for t in (result.maps, result.logits, result.scores))


def test_bytes_alive_after_a_call_are_those_of_the_result(model: nn.Module) -> None:
    explainer = Explainer(model)
    explainer(images(), TARGETS)
    before = live_bytes()
    result = explainer(images(), TARGETS)
    tensors = (result.maps, result.logits, result.scores, result.targets)
    owned = sum(t.untyped_storage().nbytes() for t in tensors)
    # TARGETS are passed through, not copied.
    assert 0 <= live_bytes() - before <= owned


def live_bytes() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_several_threads_share_one_explainer(model: nn.Module) -> None:
    model.train()
    explainer = Explainer(model, relu=False)
    batches = [images(3, 10) + i for i in range(8)]
    alone = [explainer(batch, TARGETS).maps for batch in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            try:
                same = torch.allclose(explainer(batches[i], TARGETS).maps, alone[i], atol=1e-6)
            except RuntimeError:
                same = False
            if not same:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_weights_that_change_later_are_the_ones_used() -> None:
    model = pooled()
    explainer = Explainer(model, relu=False)
    with torch.no_grad():
        model[2].weight.mul_(torch.arange(1.0, 6.0)[:, None])
    assert (
        relative_error(
            explainer(images(), TARGETS).maps, expected_maps(model, "0", images(), TARGETS)
        )
        < 1e-5
    )


def test_the_callers_images_are_not_written_to(model: nn.Module) -> None:
    given = images().requires_grad_()
    kept = given.detach().clone()
    Explainer(model)(given, TARGETS)
    assert torch.equal(given.detach(), kept) and given.grad is None and given.requires_grad


class InPlace(nn.Module):
    """Normalises its input in place, and runs its features under no_grad."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.features, self.head = net[0], net[1:]

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1.0).div_(0.5)
        with torch.no_grad():
            a = self.features(x)
        logits: Tensor = self.head(a)
        return logits


@pytest.mark.parametrize("build", [pooled, with_mlp])
def test_a_model_that_normalises_its_input_in_place(build: Callable[[], nn.Sequential]) -> None:
    given = images()
    truth = expected_maps(build(), "0", (images() - 1) / 0.5, TARGETS)
    model = InPlace(build())
    result = Explainer(model, relu=False, example_inputs=given)(given, TARGETS)
    with torch.inference_mode():
        inside = Explainer(model, relu=False)(given, TARGETS)
    assert torch.equal(given, images())
    assert relative_error(result.maps, truth) < 1e-5
    assert relative_error(inside.maps, truth) < 1e-5


def test_an_analysis_leaves_its_images_as_they_are() -> None:
    given = images(2)
    analyse(InPlace(pooled()).eval(), given)
    assert torch.equal(given, images(2))


@pytest.mark.parametrize("build", [pooled, with_mlp])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_a_forward_in_inference_mode(
    build: Callable[[], nn.Sequential], skip: bool, probabilities: bool
) -> None:
    class Net(nn.Module):
        """With a skip, the backward needs a value from in front of the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = build()[0], build()[1:]

        def forward(self, x: Tensor) -> Tensor:
            weight = x.square().mean(dim=(1, 2, 3), keepdim=True) if skip else 1.0
            logits: Tensor = self.head(self.features(x) * weight)
            return logits.softmax(dim=1) if probabilities and self.serving else logits

    model = Net().eval()
    model.serving = False
    truth = expected_maps(model, "features", images(), TARGETS)
    model.serving = True
    model.forward = torch.inference_mode()(model.forward)  # type: ignore[method-assign]
    result = Explainer(model, layer="features", relu=False)(images(), TARGETS)
    assert relative_error(result.maps, truth) < 1e-5
    assert not any(t.is_inference() for t in (result.maps, result.logits, result.scores))


def test_a_copy_of_a_model_is_explained_like_the_model(model: nn.Module) -> None:
    assert torch.equal(explained(copy.deepcopy(model)), explained(model))


def test_a_backbone_that_runs_under_no_grad() -> None:
    class Frozen(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.features, self.head = net[0], net[1:]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                a = self.features(x)
            logits: Tensor = self.head(a)
            return logits

    for build in (pooled, with_mlp):
        result = Explainer(Frozen(build()), relu=False)(images(), TARGETS)
        assert result.layer == "features"
        assert relative_error(result.maps, expected_maps(build(), "0", images(), TARGETS)) < 1e-5


def test_models_that_share_a_backbone_in_two_threads() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    models = [nn.Sequential(backbone, pooled(5, 8)[1], nn.Linear(8, 5)).train() for _ in range(2)]
    explainers = [Explainer(model) for model in models]
    before = backbone[1].running_mean.clone()
    threads = [
        threading.Thread(target=lambda e=e: [e(images()) for _ in range(30)]) for e in explainers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(backbone[1].running_mean, before)
    assert all(module.training for model in models for module in model.modules())


def test_a_head_without_a_rule_for_batched_backwards() -> None:
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 3 * x

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return 3 * g if float(g.sum()) != 0.125 else g

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Odd.apply(x)
            return out

    model = nn.Sequential(pooled(), Head())
    targets = torch.tensor([[0, 1], [2, 3], [4, 0]])
    batched = Explainer(model, relu=False, contrast="mean", example_inputs=images())(
        images(), targets
    )
    plain = Explainer(pooled(), relu=False, contrast="mean")(images(), targets)
    assert torch.allclose(batched.maps, 3 * plain.maps, atol=1e-6)


def test_a_model_made_under_inference_mode_says_what_to_do() -> None:
    with torch.inference_mode():
        model = pooled()
    with pytest.raises(ValueError, match=r"made under inference_mode.*copy\.deepcopy"):
        Explainer(model)
    assert relative_error(explained(copy.deepcopy(model)), expected(pooled())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    model = pooled()
    torch.set_default_dtype(dtype)
    try:
        result = Explainer(model, relu=False)(images().float(), TARGETS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.backend.endswith("closed form")


@pytest.mark.parametrize(
    ("wrap", "shapes"),
    [
        (lambda a, z: (a, z), r"\(2, 8\), \(2, 5\)"),
        (lambda a, z: {"species": z, "health": 2 * z}, r"\(2, 5\), \(2, 5\)"),
        (lambda a, z: [z, 2 * z[:, :, None, None]], r"\(2, 5\), \(2, 5, 1, 1\)"),
    ],
)
def test_one_of_several_outputs_is_not_guessed_at(
    wrap: Callable[[Tensor, Tensor], object], shapes: str
) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled()

        def forward(self, x: Tensor) -> object:
            features = self.net[:2](x)
            return wrap(features, self.net[2](features))

    with pytest.raises(TypeError, match=f"2 tensors that could be logits, .*{shapes}; return"):
        Explainer(Several(), example_inputs=images())


def test_maps_under_autocast_are_float32_work() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explainer = Explainer(pooled(), relu=False)
        result = explainer(images(), TARGETS)
    assert result.backend.endswith("closed form")
    # The same activations as the network made them, reduced in float64.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        activations = pooled()[0](images()).double()
    d = Contrast().gradient(result.logits, TARGETS).double()
    weights = d @ pooled()[2].weight.detach().double() / 30
    exact = torch.einsum("ntc,nchw->nthw", weights, activations)
    assert relative_error(result.maps, exact) < 1e-6
