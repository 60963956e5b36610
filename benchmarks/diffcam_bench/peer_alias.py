"""A pytest plugin that puts the compat layer in the place of another library.

`python -m pytest -p diffcam_bench.peer_alias` in a checkout of pytorch-grad-cam, torch-cam or
captum runs its tests against this library. A name that the compat layer does not have becomes a
class that skips whatever uses it. Model hubs are not asked: networks get random weights.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torchvision

NOT_OFFERED = "not offered"


class _Missing(type):
    """A class that cannot be made, or subclassed, without a skip."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pytest.skip(f"{NOT_OFFERED}: {cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"{NOT_OFFERED}: {cls.__name__}.{name}")


class _Alias(ModuleType):
    """A module with the names of one of ours, and a stand-in for any other."""

    def __init__(self, name: str, ours: str | None) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self._ours = importlib.import_module(ours) if ours else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(self._ours, name)
        except AttributeError:
            return _Missing(name, (), {})

    @property
    def __dict__(self) -> Any:  # type: ignore[override]  # of modules it may be assigned
        # torch-cam's tests look classes up by `module.__dict__[name]`.
        return _Names(self)


class _Names(dict):  # type: ignore[type-arg]  # of any names
    def __init__(self, module: _Alias) -> None:
        super().__init__()
        self._module = module

    def __missing__(self, name: str) -> Any:
        return getattr(self._module, name)


ALIASES = {
    "pytorch_grad_cam": "diffcam_fast.compat",
    "pytorch_grad_cam.utils": None,
    "pytorch_grad_cam.utils.image": "diffcam_fast.compat.image",
    "pytorch_grad_cam.utils.model_targets": "diffcam_fast.compat.targets",
    "pytorch_grad_cam.utils.svd_on_activations": None,
    "torchcam": None,
    "torchcam.methods": "diffcam_fast.compat.torchcam",
    "torchcam.methods.activation": "diffcam_fast.compat.torchcam",
    "torchcam.methods.core": None,
    "torchcam.methods.gradient": "diffcam_fast.compat.torchcam",
    "torchcam.metrics": None,
    "torchcam.utils": "diffcam_fast.compat.image",
    "captum.attr._core.layer.grad_cam": "diffcam_fast.compat.captum",
}
"""Their module -> ours."""


def _without_weights() -> None:
    for name in ("resnet18", "resnet50", "vgg11", "vgg16", "mobilenet_v2"):
        build = getattr(torchvision.models, name)

        def random(*args: Any, build: Any = build, **kwargs: Any) -> Any:
            kwargs.pop("pretrained", None)
            return build(**{**kwargs, "weights": None})

        setattr(torchvision.models, name, random)


for theirs, ours in ALIASES.items():
    sys.modules[theirs] = _Alias(theirs, ours)
    parent, _, child = theirs.rpartition(".")
    if isinstance(sys.modules.get(parent), _Alias):
        ModuleType.__setattr__(sys.modules[parent], child, sys.modules[theirs])
_without_weights()
