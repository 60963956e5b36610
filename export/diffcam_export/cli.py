"""``diffcam export``: its options, and what it prints."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from diffcam_fast.cli.explain import CONTRASTS, METHODS
from diffcam_fast.formats import names_onnx

if TYPE_CHECKING:
    from diffcam_export.export import Exported
    from diffcam_fast.models.loading import LoadedModel

FAILED = 1
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "named", metavar="MODEL", help="MODEL, as explain takes it.")
@click.option("-o", "--out", type=_FILE, help="File to write.  [default: NAME.cam.onnx]")
@click.option("--weights", metavar="FILE", help="Weights (.safetensors, .pth), or 'random'.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    help="Module, or tensor of an ONNX file, to explain; may be repeated."
    "  [default: the last spatial activation]",
)
@click.option("--method", type=click.Choice(METHODS), default="diff_grad_cam", show_default=True)
@click.option("--contrast", type=click.Choice(CONTRASTS), help="What the class is held against.")
@click.option("--temperature", type=float, help="Of the log_odds contrast.  [default: 1]")
@click.option("--no-relu", is_flag=True, help="Keep negative cells of the maps.")
@click.option(
    "--targets",
    type=click.Choice(("predicted", "input")),
    default="predicted",
    show_default=True,
    help="Explain the predicted class, or classes that are a further input.",
)
@click.option("--topk", type=click.IntRange(1), help="Explain the k most probable classes.")
@click.option("--heatmap", type=click.Choice(("float32", "uint8")), help="Also make heatmaps.")
@click.option("--photographs", is_flag=True, help="Take uint8 photographs of any size.")
@click.option(
    "--preprocess",
    metavar="WAY",
    help="How photographs become the input, where the model does not tell: imagenet, tf (-1 to 1),"
    " with another size than 224 tf:299; or FILE.json, as in diffcam.preprocess.",
)
@click.option("--labels", type=_FILE, help="Class names to keep in the file.")
@click.option("--size", help="Input size of the network: 224, or HEIGHTxWIDTH.")
@click.option("--dynamic-size", is_flag=True, help="Height and width may change between calls.")
@click.option("--half", is_flag=True, help="Weights and network in float16.")
@click.option(
    "--opset", type=click.IntRange(18), help="Of the file, for a PyTorch model.  [default: 18]"
)
@click.option("--inline", is_flag=True, help="No ONNX function; all nodes side by side.")
@click.option("--logits", help="Output with the logits, for an ONNX file with several.")
@click.option(
    "--triton-repo",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write a model repository of Triton Inference Server.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare the file with the model.")
def export(
    model: str | None,
    named: str | None,
    out: Path | None,
    weights: str | None,
    layers: tuple[str, ...],
    method: str,
    contrast: str | None,
    temperature: float | None,
    no_relu: bool,
    targets: Literal["predicted", "input"],
    topk: int | None,
    heatmap: Literal["float32", "uint8"] | None,
    photographs: bool,
    preprocess: str | None,
    labels: Path | None,
    size: str | None,
    dynamic_size: bool,
    half: bool,
    opset: int | None,
    inline: bool,
    logits: str | None,
    triton_repo: Path | None,
    no_verify: bool,
) -> None:
    """Writes an ONNX model that explains itself: its outputs are the model's own and the map.

    MODEL is torchvision:NAME, timm:NAME, MODEL.pt2, package.module:factory, or an ONNX file;
    without it, the default network. The file runs wherever ONNX models run. Exit status: 0 all is
    well, 1 a check of the file failed or it cannot be written, 2 wrong usage.
    """
    if model is not None and named is not None:
        raise click.UsageError(f"two models were given, {model} and -m {named}; name one")
    model = model if named is None else named
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    from diffcam_export.export import export_onnx
    from diffcam_export.triton_repo import triton_name, write_triton_repository
    from diffcam_export.ways import read_preprocess
    from diffcam_fast.models.labels import read_labels

    out = out or Path(f"{_stem(model)}.cam.onnx")
    try:
        if triton_repo is not None:
            # Before a file is written that the repository could not take.
            triton_name(out)
        if model is not None and names_onnx(model):
            _only_for_pytorch(
                weights=weights, size=size, half=half, dynamic_size=dynamic_size, opset=opset
            )
        given = _given(model, weights=weights, size=size)
        done = export_onnx(
            given,
            out,
            layer=layers or None,
            method=method,
            contrast=contrast,
            temperature=temperature,
            relu=not no_relu,
            targets=targets,
            topk=topk,
            heatmap=heatmap,
            preprocess=None if preprocess is None else read_preprocess(preprocess),
            bake_preprocess=photographs,
            labels=None if labels is None else read_labels(labels),
            dtype="float16" if half else None,
            dynamic_size=dynamic_size,
            opset=opset,
            inline=inline,
            logits=logits,
            verify=False,
        )
        for line in _lines(done):
            click.echo(line)
        ok = no_verify or _verified(done, given)
        if triton_repo is not None:
            click.echo(f"triton      {write_triton_repository(out, triton_repo)}")
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot read or write a file: {error}") from error
    if not ok:
        raise click.exceptions.Exit(FAILED)


def _given(model: str | None, *, weights: str | None, size: str | None) -> "LoadedModel | Path":
    from diffcam_fast.cli.opening import resized
    from diffcam_fast.models.loading import load_model

    if model is not None and names_onnx(model):
        return Path(model)
    if weights is None or weights == "random":
        return resized(load_model(model, weights="random" if weights else None), size)
    return resized(load_model(model, weights=Path(weights)), size)


def _only_for_pytorch(**options: object) -> None:
    names = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if names:
        raise ValueError(f"an ONNX file is taken as it is; leave out {', '.join(names)}")


def _stem(model: str | None) -> str:
    if model is None:
        return "efficientnet-lite0"
    path = Path(model)
    if names_onnx(model) or path.suffix == ".pt2":
        return path.stem
    return model.rpartition(":")[2]


def _lines(done: "Exported") -> Iterator[str]:
    yield f"wrote       {done.path}"
    for layer, head, reason in zip(done.layers, done.heads, done.reasons, strict=True):
        yield f"layer       {layer}"
        yield f"way         {head}"
        yield f"why         {reason}"
    yield f"nodes       {done.nodes} of the model, {done.added_nodes} added"
    yield f"bytes       {done.added_bytes:,} added"


def _verified(done: "Exported", given: "LoadedModel | Path") -> bool:
    from diffcam_export.verify import verify

    report = verify(done.path, against=given)
    for line in report.lines():
        click.echo(line)
    return report.ok
