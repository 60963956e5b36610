"""``diffcam inspect``: what was found out about a model, and why."""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from diffcam_fast.cli.console import shortened

if TYPE_CHECKING:
    from diffcam_fast.analysis import Inspection

# The nearest to the classifier come first; there are some thirty in ConvNeXt.
_SHOWN = 8


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "named", metavar="MODEL", help="MODEL, as explain takes it.")
@click.option("--layer", help="Look at this layer in place of the one that is found.")
@click.option("--size", help="Input size of the network: 224, or HEIGHTxWIDTH.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, nothing left out.")
def inspect(
    model: str | None, named: str | None, layer: str | None, size: str | None, as_json: bool
) -> None:
    """Shows how a model would be explained: target layer, head, closed form or backward, and why.

    MODEL is torchvision:NAME, timm:NAME, MODEL.pt2, or package.module:factory; without it, the
    default network. Nothing is downloaded: the structure does not depend on the weights.
    """
    if model is not None and named is not None:
        raise click.UsageError(f"two models were given, {model} and -m {named}; name one")
    model = model if named is None else named
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    from diffcam_fast.cli.job import make_explainer, resized
    from diffcam_fast.models.loading import load_model

    try:
        exported = model is not None and model.endswith(".pt2")
        loaded = resized(load_model(model, weights=None if exported else "random"), size)
        found = make_explainer(loaded, layer=layer).inspect()
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        facts = {"model": loaded.name, "size": list(loaded.preprocess.size)}
        click.echo(json.dumps({**facts, **dataclasses.asdict(found)}, indent=2))
    else:
        height, width = loaded.preprocess.size
        click.echo(f"model       {loaded.name}, {height} x {width} pixels")
        for line in _lines(found):
            click.echo(line)


def _lines(found: "Inspection") -> Iterator[str]:
    yield f"layer       {found.layer}  {_shape(found.shape)}"
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


def _shape(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
