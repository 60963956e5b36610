"""``-m``: from the name of a model to a network, its preprocessing and its class names."""

import contextlib
import difflib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffcam_fast.formats import names_onnx
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.models import default
from diffcam_fast.models.exported import load_exported
from diffcam_fast.models.labels import imagenet_labels
from diffcam_fast.models.weights import fill, load_weights

Weights = Path | Literal["random"] | None

_FORMS = (
    "torchvision:NAME, timm:NAME, a file MODEL.pt2, package.module:factory, or,"
    " where ONNX files are taken, MODEL.onnx"
)
_OFFLINE = (
    "pass --weights FILE (.safetensors, or a .pth state dict),"
    " or --weights random to try without training"
)


@dataclass(frozen=True)
class LoadedModel:
    """A network that is ready to be explained.

    Attributes:
        model: In eval mode; takes (N, 3, H, W), returns logits (N, K).
        preprocess: From a photograph to the network's input.
        labels: K class names, or None.
        name: What the user calls it.
        batch: The only batch size that the network takes, or None.
    """

    model: nn.Module
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    name: str
    batch: int | None = None


def load_model(
    spec: str | Callable[[], object] | None, *, weights: Weights = None, device: str = "cpu"
) -> LoadedModel:
    """Makes the network that ``spec`` names.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, a file of `torch.export.save` (``.pt2``),
            ``package.module:factory`` (imported with the working folder on the path, and called;
            it returns an ``nn.Module`` or a `LoadedModel`), such a function itself, or None:
            EfficientNet-Lite0.
        weights: A weights file, which is never unpickled; ``"random"``; or None for the trained
            weights that the model comes with (torchvision and timm download them).
        device: ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        ValueError: Unknown model, missing package, weights that cannot be had or do not fit, a
            device that is not there.
    """
    target = check_device(device)
    if spec is None:
        loaded = _load_default(weights)
    elif not isinstance(spec, str):
        loaded = _call_factory(spec, getattr(spec, "__qualname__", type(spec).__name__), weights)
    elif spec.startswith("torchvision:"):
        loaded = _load_torchvision(spec, spec.partition(":")[2], weights)
    elif spec.startswith("timm:"):
        loaded = _load_timm(spec, spec.partition(":")[2], weights)
    elif spec.endswith(".pt2"):
        loaded = _load_file(spec, weights)
    elif ":" in spec and not Path(spec).exists():
        loaded = _load_factory(spec, weights)
    else:
        hint = ""
        if spec.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")):
            hint = "; a weights file goes with its architecture: -m torchvision:NAME --weights FILE"
        elif names_onnx(spec):
            hint = "; an ONNX file is no PyTorch model: diffcam export makes it explain itself"
        raise ValueError(f"{spec!r} names no model; expected {_FORMS}{hint}")
    return replace(loaded, model=loaded.model.to(target).eval())


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: PyTorch does not know it, or it is not there.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"cannot use the device {device!r}: {first}; try --device cpu") from None
    return target


def _load_default(weights: Weights) -> LoadedModel:
    model = default.build()
    if weights != "random":
        path = weights or default.weights_path()
        model = load_weights(model, path, rebuild=default.build)
    model = default.name_parts(model)
    return LoadedModel(model, default.PREPROCESS, _imagenet(_classes(model)), default.NAME)


def _load_torchvision(spec: str, name: str, weights: Weights) -> LoadedModel:
    models = _optional("torchvision.models", spec)
    _check_name(spec, name, models.list_models(module=models))
    config = models.get_model_weights(name)["DEFAULT"]
    build = _torchvision_builder(models, name, trained=weights != "random")
    model = build(1000)
    if weights is None:
        with _download(spec):
            # torchvision's own loader would unpickle; this one takes tensors alone.
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                config.url, map_location="cpu", check_hash=True, weights_only=True
            )
        model = fill(model, state, source=config.url)
    elif weights != "random":
        model = load_weights(model, weights, rebuild=build)
    transforms = config.transforms()
    crop = int(transforms.crop_size[0])
    preprocess = Preprocess(
        size=(crop, crop),
        crop_pct=crop / int(transforms.resize_size[0]),
        interpolation=_interpolation(transforms.interpolation.value),
        mean=_triple(transforms.mean),
        std=_triple(transforms.std),
    )
    names = tuple(config.meta["categories"])
    labels = names if len(names) == _classes(model) else None
    return LoadedModel(model, preprocess, labels, spec)


def _torchvision_builder(models: Any, name: str, *, trained: bool) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        with warnings.catch_warnings():
            # GoogLeNet and Inception warn about how random weights will be drawn in future.
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
        if trained and hasattr(model, "transform_input"):
            # Their trained weights expect TensorFlow's normalisation: torchvision sets this too.
            setattr(model, "transform_input", True)  # noqa: B010 - no attribute of nn.Module's type
        return model

    return build


def _load_timm(spec: str, name: str, weights: Weights) -> LoadedModel:
    timm = _optional("timm", spec)
    _check_name(spec, name, timm.list_models() + timm.list_pretrained())

    def build(classes: int | None = None, *, pretrained: bool = False) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes)
        return model

    if weights is None:
        with _download(spec), _cached_where_offline():
            model = build(pretrained=True)
    else:
        try:
            model = build()
        except RuntimeError as error:
            raise ValueError(f"timm cannot make {name!r}: {error}") from None
        if weights != "random":
            model = load_weights(model, weights, rebuild=build)
    config = timm.data.resolve_model_data_config(model)
    preprocess = Preprocess(
        size=(int(config["input_size"][1]), int(config["input_size"][2])),
        crop_pct=float(config["crop_pct"]),
        interpolation=_interpolation(config["interpolation"]),
        mean=_triple(config["mean"]),
        std=_triple(config["std"]),
    )
    return LoadedModel(model, preprocess, _timm_labels(timm, model), spec)


def _timm_labels(timm: Any, model: nn.Module) -> tuple[str, ...] | None:
    classes = _classes(model)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    if names is None:
        subset = timm.data.infer_imagenet_subset(model)
        if subset is None or subset == "imagenet-1k":
            return _imagenet(classes)
        names = timm.data.ImageNetInfo(subset).label_descriptions()
    return tuple(names) if len(names) == classes else None


def _load_file(spec: str, weights: Weights) -> LoadedModel:
    if weights is not None:
        raise ValueError(f"{spec} holds its own weights; leave --weights out")
    exported = load_exported(Path(spec))
    preprocess = Preprocess(size=exported.size or (224, 224))
    labels = _imagenet(_classes(exported.model))
    return LoadedModel(exported.model, preprocess, labels, spec, exported.batch)


def _load_factory(spec: str, weights: Weights) -> LoadedModel:
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(f"{spec!r} names no model; expected {_FORMS}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _raised(f"importing {module_name}", spec, error) from error
        raise ValueError(f"{spec}: there is no module {error.name!r} in {Path.cwd()}") from None
    except Exception as error:
        raise _raised(f"importing {module_name}", spec, error) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{spec}: {module_name} has no function {attribute!r}")
    return _call_factory(factory, spec, weights)


def _call_factory(factory: Callable[[], object], spec: str, weights: Weights) -> LoadedModel:
    try:
        made = factory()
    except Exception as error:
        raise _raised(f"calling {spec.rpartition(':')[2]}", spec, error) from error
    if isinstance(made, LoadedModel):
        loaded = made
    elif isinstance(made, nn.Module):
        preprocess = Preprocess(size=(224, 224))
        loaded = LoadedModel(made, preprocess, _imagenet(_classes(made)), spec)
    else:
        raise ValueError(
            f"{spec} returned a {type(made).__name__}, expected an nn.Module or a LoadedModel"
        )
    if isinstance(weights, Path):
        load_weights(loaded.model, weights)
    return loaded


def _raised(doing: str, spec: str, error: Exception) -> ValueError:
    return ValueError(f"{spec}: {doing} failed: {type(error).__name__}: {error}")


def _check_name(spec: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"unknown model {spec!r}{hint}")


@contextlib.contextmanager
def _download(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the hubs' clients raise types of their own for every failure
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"could not download the trained weights of {spec} ({first}); {_OFFLINE}"
        ) from None


@contextlib.contextmanager
def _cached_where_offline() -> Iterator[None]:
    """Keeps the Hugging Face client to its cache where its hub does not answer.

    Left to itself it asks six times for each file, which takes a minute.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers(address: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=5)
    except Exception:  # noqa: BLE001 - the client's errors are requests' or httpx's, by its version
        return False
    return True


def _optional(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(
            f"{spec} needs {package}, which is not installed:"
            " pip install '.[models]' in a checkout of diffcam-fast"
        ) from None


def _classes(model: nn.Module) -> int | None:
    """The number of logits where the last matrix of the network tells it."""
    last = [p for p in model.parameters() if p.ndim >= 2]
    return last[-1].shape[0] if last else None


def _imagenet(classes: int | None) -> tuple[str, ...] | None:
    return imagenet_labels() if classes == len(imagenet_labels()) else None


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    # Other filters (lanczos, or timm's "random" of training) are closest to bicubic.
    return "bilinear" if name == "bilinear" else "bicubic"


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
