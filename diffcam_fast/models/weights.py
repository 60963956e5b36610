"""Reading state dicts without unpickling, and loading them with errors that name the keys."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Where checkpoints of training scripts keep the model's state, and what wrappers put before a key.
_NESTS = ("state_dict", "model_state_dict", "model", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# torchvision's own DenseNet files still carry the names of before PyTorch 0.4 ("norm.1").
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads ``.safetensors``, or any ``torch.save`` file of plain tensors.

    Args:
        path: The file. A state nested under ``state_dict`` or ``model`` is taken out.

    Returns:
        Tensors on the CPU, by name.

    Raises:
        ValueError: There is no such file, it is damaged, it would have to be unpickled, or it
            holds no tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        state = _read(path)
    except Exception as error:  # noqa: BLE001 - every kind of damage raises its own type here
        raise ValueError(
            f"cannot read the weights file {path}: {_reason(error)}. Expected .safetensors, or a"
            " file of torch.save(model.state_dict()); whole pickled models are refused, because"
            " reading them runs code"
        ) from None
    for _ in range(2):
        nest = next((n for n in _NESTS if isinstance(state.get(n), Mapping)), None)
        state = state[nest] if nest is not None else state
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(repr, list(state)[:5]))
        raise ValueError(f"the weights file {path} holds no tensors; its keys begin {keys}")
    return tensors


def _read(path: Path) -> Mapping[str, Any]:
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, Mapping):
        raise ValueError(f"it holds a {type(value).__name__}, not a state dict")
    return value


def _reason(error: Exception) -> str:
    """What is wrong with a weights file, on one line."""
    if isinstance(error, pickle.UnpicklingError):
        # PyTorch's own message advises to unpickle it all the same.
        found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        return "not a whole file of tensors" if found is None else f"it holds {found[1]}"
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200].rstrip(".")


def fit_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops wrapper prefixes from the keys of ``state`` until they fit those ``expected``."""
    named = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    for _ in range(len(_PREFIXES)):
        if named.keys() & expected.keys():
            break
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in named)), None)
        if prefix is None:
            break
        named = {key.removeprefix(prefix): value for key, value in named.items()}
    # Keys such as BatchNorm's num_batches_tracked are absent in old files and do no work here.
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            named.setdefault(key, value)
    return named


def load_weights(
    model: nn.Module, path: Path, *, rebuild: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """Loads a weights file into ``model``, strictly.

    Args:
        model: Takes the weights in place.
        path: See `read_state_dict`.
        rebuild: Makes the same network for another number of classes; used where that is the only
            thing in which the file differs.

    Returns:
        ``model``, or the rebuilt one.

    Raises:
        ValueError: Keys are missing or unexpected, or shapes differ; the first few are named.
    """
    return fill(model, read_state_dict(path), source=str(path), rebuild=rebuild)


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    rebuild: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """`load_weights` for tensors that are already read; ``source`` names them in errors."""
    expected = model.state_dict()
    state = fit_names(tensors, expected)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if missing or unexpected:
        parts = [_few("missing", missing), _few("unexpected", unexpected)]
        raise ValueError(
            f"the weights in {source} do not fit the model: {'; '.join(filter(None, parts))}"
        )
    if wrong:
        classes = _other_class_count(wrong, state, expected)
        if rebuild is not None and classes is not None:
            return fill(rebuild(classes), tensors, source=source)
        shapes = [
            f"{k} {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}" for k in wrong
        ]
        raise ValueError(
            f"the weights in {source} do not fit the model: {_few('other shapes', shapes)}"
        )
    model.load_state_dict(state)
    return model


def _other_class_count(
    wrong: list[str], state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> int | None:
    """The file's number of classes, if every differing shape differs only in its first axis."""
    counts = {state[k].shape[0] if state[k].ndim else 0 for k in wrong}
    only_first = all(state[k].shape[1:] == expected[k].shape[1:] for k in wrong)
    return counts.pop() if only_first and len(counts) == 1 else None


def _few(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}"
