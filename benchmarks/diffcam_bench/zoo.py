"""The networks of timm and torchvision, sorted into families, with random weights."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_bench.rows import optional


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        name: `timm:NAME` or `torchvision:NAME`.
        family: its library and module, with the stem of its name where a timm module holds
            several: `timm/resnet/seresnet`.
        size: (H, W) in pixels, its own input size.
        parameters: their number.
    """

    name: str
    family: str
    size: tuple[int, int]
    parameters: int


def smallest_of_each_family(
    text: str | None = None, progress: Callable[[int], object] = lambda done: None
) -> list[Network]:
    """For each family its network of the fewest parameters, small ones first.

    Args:
        text: only families whose name holds it, or the name of one of whose networks does.
        progress: called with the number of networks looked at so far.
    """
    families = _families()
    wanted = {f for name, f in families.items() if text is None or text in f or text in name}
    best: dict[str, Network] = {}
    for number, (name, family) in enumerate(families.items(), start=1):
        if family in wanted:
            network = _measured(name, family)
            known = best.get(family)
            if known is None or network.parameters < known.parameters:
                best[family] = network
        progress(number)
    return sorted(best.values(), key=lambda n: (n.parameters, n.name))


def build(name: str, *, seed: int = 0) -> nn.Module:
    """A network with random weights and random batch-norm statistics, in evaluation mode.

    Weight matrices that are born as zeros, so that the logits are constant, become random as well.
    """
    torch.manual_seed(seed)
    model = _construct(name).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            mean = getattr(module, "running_mean", None)
            variance = getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.normal_(0, 0.1, generator=generator)
                variance.uniform_(0.8, 1.2, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    return model


def size_of(name: str, model: nn.Module | None = None) -> tuple[int, int]:
    """The input size (H, W): what timm's configuration says, what torchvision trained it at."""
    if name.startswith("timm:"):
        config = getattr(model, "pretrained_cfg", None) or {}
        _, height, width = config.get("input_size", (3, 224, 224))
        return int(height), int(width)
    side = 299 if name == "torchvision:inception_v3" else 224
    return side, side


def _families() -> dict[str, str]:
    """Network -> family."""
    timm = dict(_timm_names())
    stems: dict[str, set[str]] = {}
    for name, module in timm.items():
        stems.setdefault(module, set()).add(_stem(name))
    several = {module for module, found in stems.items() if len(found) > 1}
    families = {
        n: f"{module}/{_stem(n)}" if module in several else module for n, module in timm.items()
    }
    # torchvision has one architecture a module.
    return families | dict(_torchvision_names())


def _measured(name: str, family: str) -> Network:
    if name.startswith("torchvision:"):
        weights = optional("torchvision.models").get_model_weights(name.partition(":")[2])
        return Network(name, family, size_of(name), int(weights.DEFAULT.meta["num_params"]))
    with torch.device("meta"):
        model = _construct(name)
    return Network(name, family, size_of(name, model), sum(p.numel() for p in model.parameters()))


def _timm_names() -> Iterator[tuple[str, str]]:
    registry = optional("timm.models")
    for module in registry.list_modules():
        for name in sorted(registry.list_models(module=module)):
            # timm's own test fixtures are no architectures.
            if not name.startswith("test_"):
                yield f"timm:{name}", f"timm/{module}"


def _torchvision_names() -> Iterator[tuple[str, str]]:
    models = optional("torchvision.models")
    for name in models.list_models(module=models):
        module = models.get_model_builder(name).__module__.rpartition(".")[2]
        yield f"torchvision:{name}", f"torchvision/{module}"


def _stem(name: str) -> str:
    found = re.match(r"[a-z]+", name.partition(":")[2])
    return found[0] if found else name


def _construct(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "timm":
        built = optional("timm").create_model(model, pretrained=False)
    elif library == "torchvision":
        built = optional("torchvision.models").get_model(model, weights=None)
    else:
        raise ValueError(f"a network is timm:NAME or torchvision:NAME, got {name!r}")
    assert isinstance(built, nn.Module)
    return built
