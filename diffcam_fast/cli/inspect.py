"""``diffcam inspect``: what was found out about a model, and why."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffcam_fast.cli.console import shortened
from diffcam_fast.formats import names_onnx

if TYPE_CHECKING:
    from diffcam_fast.analysis import Inspection

# The nearest to the classifier come first; there are some thirty in ConvNeXt.
_SHOWN = 8


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "named", metavar="MODEL", help="MODEL, as explain takes it.")
@click.option("--layer", help="Look at this layer in place of the one that is found.")
@click.option("--size", help="Input size of the network: 224, or HEIGHTxWIDTH.")
@click.option("--logits", help="Output with the logits, for an ONNX file with several.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing left out.")
def inspect(
    model: str | None,
    named: str | None,
    layer: str | None,
    size: str | None,
    logits: str | None,
    as_json: bool,
) -> None:
    """Shows how a model would be explained: target layer, head, closed form or backward, and why.

    MODEL is torchvision:NAME, timm:NAME, MODEL.pt2, package.module:factory, or an ONNX file;
    without it, the default network. Nothing is downloaded: the structure does not depend on the
    weights.
    """
    if model is not None and named is not None:
        raise click.UsageError(f"two models were given, {model} and -m {named}; name one")
    model = model if named is None else named
    try:
        if model is not None and names_onnx(model):
            name, found = model, _of_onnx(model, layer, size, logits)
        elif logits is not None:
            raise ValueError("--logits is for ONNX files; a PyTorch model returns its logits")
        else:
            name, found = _of_pytorch(model, layer, size)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    height, width = found.input_shape[1:]
    if as_json:
        facts = {"model": name, "size": [height, width]}
        click.echo(json.dumps({**facts, **dataclasses.asdict(found)}, indent=2))
    else:
        click.echo(f"model       {name}, {height} x {width} pixels")
        for line in _lines(found):
            click.echo(line)


def _of_onnx(model: str, layer: str | None, size: str | None, logits: str | None) -> "Inspection":
    # Here, not above: ONNX takes long to import, and --help needs none of it.
    from diffcam_export.inspection import inspect_onnx

    if size is not None:
        raise ValueError("an ONNX file has its size; leave --size out")
    return inspect_onnx(Path(model), layer=layer, logits=logits)


def _of_pytorch(model: str | None, layer: str | None, size: str | None) -> tuple[str, "Inspection"]:
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    from diffcam_fast.cli.opening import make_explainer, resized
    from diffcam_fast.models.loading import load_model

    exported = model is not None and model.endswith(".pt2")
    loaded = resized(load_model(model, weights=None if exported else "random"), size)
    return loaded.name, make_explainer(loaded, layer=layer).inspect()


def _lines(found: "Inspection") -> Iterator[str]:
    yield f"layer       {found.layer}  {_shape(found.shape)}"
    if found.layout.grid is not None:
        yield f"tokens      {found.layout.first} before a grid of {_shape(found.layout.grid)}"
    yield f"head        {shortened(found.head)}"
    yield f"gradient    {'closed form' if found.closed_form else 'backward of the head'}"
    yield f"why         {found.reason}"
    if found.weight is not None:
        yield f"weight      {found.weight}"
    yield "candidates"
    shown = [
        candidate
        for index, candidate in enumerate(found.candidates)
        if index < _SHOWN or candidate.name == found.layer
    ]
    shapes = [_shape(candidate.shape) for candidate in shown]
    wide = max((len(shape) for shape in shapes), default=0)
    width = max((len(candidate.name) for candidate in shown), default=0)
    for candidate, shape in zip(shown, shapes, strict=True):
        mark = "*" if candidate.name == found.layer else " "
        yield f"  {mark} {candidate.name:<{width}}  {shape:<{wide}}  {candidate.note}".rstrip()
    if len(found.candidates) > len(shown):
        yield f"    and {len(found.candidates) - len(shown)} more (--json lists all)"


def _shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape))
