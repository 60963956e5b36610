"""``diffcam inspect``: what was found out about a model, and why."""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from diffcam_fast.analysis import Inspection


@click.command()
@click.argument("model", required=False)
@click.option("--layer", help="Look at this layer in place of the one that is found.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str | None, layer: str | None, as_json: bool) -> None:
    """Shows how a model would be explained: target layer, head, closed form or backward, and why.

    MODEL is torchvision:NAME, timm:NAME, MODEL.pt2, or package.module:factory; without it, the
    default network. Nothing is downloaded: the structure does not depend on the weights.
    """
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    from diffcam_fast.cli.job import make_explainer
    from diffcam_fast.models.loading import load_model

    try:
        exported = model is not None and model.endswith(".pt2")
        loaded = load_model(model, weights=None if exported else "random")
        found = make_explainer(loaded, layer=layer).inspect()
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        size = list(loaded.preprocess.size)
        fields = {"model": loaded.name, "size": size, **dataclasses.asdict(found)}
        click.echo(json.dumps(fields, indent=2))
    else:
        height, width = loaded.preprocess.size
        click.echo(f"model       {loaded.name}, {height} x {width} pixels")
        for line in _lines(found):
            click.echo(line)


def _lines(found: "Inspection") -> Iterator[str]:
    yield f"layer       {found.layer}  {_shape(found.shape)}"
    yield f"head        {found.head}"
    yield f"gradient    {'closed form' if found.closed_form else 'backward of the head'}"
    yield f"why         {found.reason}"
    if found.weight is not None:
        yield f"weight      {found.weight}"
    yield "candidates"
    width = max((len(candidate.name) for candidate in found.candidates), default=0)
    for candidate in found.candidates:
        mark = "*" if candidate.name == found.layer else " "
        line = f"  {mark} {candidate.name:<{width}}  {_shape(candidate.shape):<14} {candidate.note}"
        yield line.rstrip()


def _shape(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
