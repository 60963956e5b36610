"""Parameter randomisation: a map that explains a network must change with its weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def cascade(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """A copy of the model whose layers lose what they learned, one after the other from the head
    down, and stay so (Sanity Checks for Saliency Maps, arXiv 1810.03292).

    A layer is a module with `reset_parameters`, in the reverse of `named_modules`; it is drawn anew
    by that method, which of a batch normalisation resets its statistics too.

    Args:
        model: stays as it is.
        seed: of the random weights; the generators of the caller are left alone.

    Yields:
        The name of the layer that was reset last, and the copy, in evaluation mode. It is one
        module all along: use it before the next one is asked for.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, _ in cascade(model)]
        ['2', '0']
    """
    fallen = copy.deepcopy(model).eval()
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in fallen.named_modules()
        if callable(getattr(module, "reset_parameters", None))
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = torch.get_rng_state()
    for name, module in reversed(layers):
        with torch.random.fork_rng(), torch.no_grad():
            torch.set_rng_state(state)
            module.reset_parameters()
            state = torch.get_rng_state()
        yield name, fallen
