"""Exported programs (``.pt2``): checked before PyTorch reads them, then given their modules back.

`torch.export.load` unpickles whatever parts of an archive ask for it, evaluates the strings of its
symbolic sizes, and looks up operators by dotted names. A file from elsewhere must not get that far,
so its parts are checked first; a file with anything but tensors and tensor operators is refused.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What `torch.export.save` writes for the operators of a network, and for arithmetic on sizes.
_TARGET = re.compile(
    r"torch\.ops\.(?!_)\w+\.\w+(\.\w+)?|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
# A symbolic size such as "Max(1, Symbol('s77', positive=True, integer=True)//2)": no attribute
# access, and no names but these.
_SIZE_CHARACTERS = re.compile(r"[\w\s'(),=+*/<>-]*")
_SIZE_NAMES = re.compile(
    r"[suz]\d+|\d+|Symbol|Integer|Add|Mul|Pow|Mod|Max|Min|Eq|Ne|True|False"
    r"|positive|nonnegative|integer|nonzero|finite|[A-Z]\w*(Div|Mod)|Where|IsNonOverlappingAndDense"
)
# PyTorch writes names into generated code: nothing that could end an identifier or a string.
_NAMED = re.compile(r"(.*_)?(name|names|fqn)|nn_module_stack")
_NAME = re.compile(r"[\w.,;:@<>\[\] -]*")


@dataclass(frozen=True)
class ExportedModel:
    """An exported program as a module with dotted submodules.

    Attributes:
        model: The network.
        size: Height and width of the input; None where the program takes any.
        batch: The only batch size that the program takes; None where it takes any.
    """

    model: nn.Module
    size: tuple[int, int] | None
    batch: int | None


def load_exported(path: Path) -> ExportedModel:
    """Reads a file of `torch.export.save`.

    Raises:
        ValueError: There is no such file, it is damaged, it would run code, or the program's input
            is not one tensor (N, 3, H, W).
    """
    if not path.is_file():
        raise ValueError(f"there is no model file {path}")
    try:
        reason = next(_objections(path), None)
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in many ways, all of them before any use
        raise ValueError(f"cannot read {path} as an exported program: {error!r}") from None
    if reason is not None:
        raise ValueError(
            f"refused to read {path}: {reason}. Only programs of plain tensors and operators are"
            " read; write it again with torch.export.save of a recent PyTorch"
        )
    try:
        program = torch.export.load(path)
        model = torch.export.unflatten(program)
    except Exception as error:  # noqa: BLE001 - PyTorch raises its own many types on programs it cannot take
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"PyTorch {torch.__version__} cannot load the exported program {path}: {first}"
        ) from None
    shape = _input_shape(program, path)
    batch, _, height, width = (size if isinstance(size, int) else None for size in shape)
    size = (height, width) if height is not None and width is not None else None
    return ExportedModel(model, size, batch)


def _input_shape(program: torch.export.ExportedProgram, path: Path) -> tuple[Any, ...]:
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    shapes = [tuple(n.meta["val"].shape) for n in inputs if n.name in names]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise ValueError(
            f"the exported program {path} takes inputs of shapes {shapes};"
            " expected one image tensor (N, 3, H, W)"
        )
    return shapes[0]


def _objections(path: Path) -> Iterator[str]:
    """Reasons not to hand an archive to `torch.export.load`."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        # The archive's own folder stands before every name: "resnet/models/model.json".
        inner = [name.partition("/")[2] for name in names]
        if len(set(names)) != len(names) or len({n.partition("/")[0] for n in names}) != 1:
            yield "its parts are ambiguous"
        if "version" in names or "archive_version" not in inner:
            yield "it is not in the format of PyTorch 2.8 or newer"
        if any(name.startswith("data/aotinductor/") for name in inner):
            yield "it holds compiled code"
        models = [name for name in inner if name.startswith("models/")]
        if models != ["models/model.json"]:
            yield f"it holds {models}, expected models/model.json"
        for name, part in zip(names, inner, strict=True):
            if part.endswith("_config.json"):
                yield from _payload_objections(json.loads(archive.read(name)))
            elif part == "models/model.json":
                yield from _graph_objections(json.loads(archive.read(name)))
            elif part.startswith("data/sample_inputs/"):
                data = archive.read(name)
                if data:
                    # Where this fails, PyTorch would try again and unpickle.
                    torch.load(io.BytesIO(data), weights_only=True)
            elif re.fullmatch(r"data/(weights|constants)/.*\.pt", part):
                yield f"{part} would be unpickled"


def _payload_objections(config: dict[str, Any]) -> Iterator[str]:
    for name, payload in config.get("config", {}).items():
        path = payload.get("path_name", "")
        if payload.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", path):
            yield f"its part {name!r} ({path}) would be unpickled"


def _graph_objections(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _graph_objections(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _field_objections(key, item)
            yield from _graph_objections(item)


def _field_objections(key: str, item: Any) -> Iterator[str]:
    if key == "expr_str" and not _is_size(str(item)):
        yield f"it has the symbolic size {item!r}"
    elif key == "target" and isinstance(item, str) and not _TARGET.fullmatch(item):
        yield f"it calls {item!r}, which is not a tensor operator"
    elif _NAMED.fullmatch(key):
        for name in item if isinstance(item, list) else [item]:
            if isinstance(name, str) and not _NAME.fullmatch(name):
                yield f"it has the name {name!r}"


def _is_size(text: str) -> bool:
    names = re.findall(r"\w+", text)
    return bool(_SIZE_CHARACTERS.fullmatch(text)) and all(map(_SIZE_NAMES.fullmatch, names))
