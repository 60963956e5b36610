"""``diffcam explain``: its options, its exit status, and what it prints."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import click

from diffcam_fast.backends import BACKENDS, Backend
from diffcam_fast.cli.cluster import check_engine, cluster_options, prepare_on_ray, run_on_ray
from diffcam_fast.cli.cluster_summary import tell
from diffcam_fast.cli.console import Console, printable

if TYPE_CHECKING:
    from diffcam_fast.cli.job import Job
    from diffcam_fast.cli.request import Request
    from diffcam_fast.cli.run import Summary

SOME_FAILED, INTERRUPTED = 3, 130

# Spelled out, because the engine that knows them takes seconds to import; a test compares.
METHODS = (
    "diff_grad_cam",
    "diff_grad_cam_pp",
    "grad_cam",
    "grad_cam_pp",
    "xgrad_cam",
    "layer_cam",
    "hires_cam",
    "eigen_grad_cam",
    "cam",
    "eigen_cam",
    "recipro_cam",
    "score_cam",
    "ablation_cam",
    "decom_cam",
)
CONTRASTS = ("mean", "log_odds", "runner_up", "none")
FORMATS = ("overlay", "heatmap", "npz", "jsonl", "parquet")


def batch_size_of(context: click.Context, option: click.Parameter, text: str) -> int | None:
    """The number that ``--batch-size`` names; None for ``auto``."""
    if text == "auto":
        return None
    number: int = click.IntRange(1)(text, option, context)
    return number


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("inputs", nargs=-1, metavar="IMAGES...")
@click.option(
    "-m",
    "--model",
    help="torchvision:NAME, timm:NAME, MODEL.pt2, MODEL.cam.onnx, or package.module:factory."
    "  [default: EfficientNet-Lite0]",
)
@click.option("--weights", metavar="FILE", help="Weights (.safetensors, .pth), or 'random'.")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="Output folder.  [default: beside a single image, else diffcam-out; with --report,"
    " --resume, jsonl or parquet always diffcam-out]",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("overlay",),
    show_default=True,
    help="What to write; may be repeated. For each image a coloured overlay, a grey heatmap"
    " (--cmap does not apply) or an npz of numbers; one explanations.jsonl or maps.parquet/ for"
    " all images.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Images in one file of maps.parquet/; what a killed run had finished of one is lost.",
)
@click.option(
    "--map-type",
    type=click.Choice(("float16", "uint8")),
    default="float16",
    show_default=True,
    help="Of the maps in maps.parquet/.",
)
@click.option(
    "--overlay",
    type=click.Choice(("side", "blend")),
    default="side",
    show_default=True,
    help="Heatmap beside the image, or blended into it.",
)
@click.option("--report", is_flag=True, help="Also write one HTML page that shows all images.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Class to explain, by index or label; may be repeated.  [default: the predicted class]",
)
@click.option("--topk", type=click.IntRange(1), help="Explain the k most probable classes.")
@click.option(
    "--contrast",
    type=click.Choice(CONTRASTS),
    help="What the class is held against.  [default: what the method takes]",
)
@click.option("--temperature", type=float, help="Of the log_odds contrast.  [default: 1]")
@click.option(
    "--method", type=click.Choice(METHODS), help="CAM.  [default: diff_grad_cam, or the file's]"
)
@click.option("--layer", help="Target layer by its dotted name.  [default: found by running]")
@click.option("--size", help="Input size of the network: 224, or HEIGHTxWIDTH.")
@click.option(
    "--batch-size",
    callback=batch_size_of,
    metavar="N|auto",
    default="16",
    show_default=True,
    help="Images at once; auto: as many as the GPU has memory for, 16 on the CPU.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16")),
    help="Of the network, in PyTorch; maps are float32.  [default: as its weights are]",
)
@click.option(
    "--precision",
    type=click.Choice(("float32", "int8")),
    default="float32",
    show_default=True,
    help="int8: features in whole numbers, on the CPU in ONNX Runtime, fitted to the images; says"
    " how well it agrees with float32.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Runtime. auto: on the CPU the faster of PyTorch and ONNX Runtime, whose file is kept for"
    " later runs; on CUDA a CUDA graph. compiled: torch.compile, which compiles first.",
)
@click.option(
    "--labels",
    type=_FILE,
    help="Class names, one a line or JSON, in place of the model's."
    "  [default: ImageNet's where a model of 1000 classes brings none]",
)
@click.option(
    "--cmap",
    default="turbo",
    show_default=True,
    help="Colour map of matplotlib, for overlays and the report.",
)
@click.option("--list", "text_list", type=_FILE, help="Text file with one image path a line.")
@click.option(
    "--watch",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Explain the images of a folder, and those that come, until Ctrl-C; goes on where an"
    " earlier run stopped.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where an earlier run stopped; failed images and deleted outputs are made again.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that reading one image may take; one that takes longer counts as failed.",
)
@click.option(
    "--profile", is_flag=True, help="Say how busy each stage was, and which one is the limit."
)
@cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Say why.")
@click.pass_context
def explain(
    context: click.Context,
    inputs: tuple[str, ...],
    model: str | None,
    weights: str | None,
    out: str | None,
    formats: tuple[str, ...],
    shard_size: int,
    map_type: Literal["float16", "uint8"],
    overlay: Literal["side", "blend"],
    report: bool,
    targets: tuple[str, ...],
    topk: int | None,
    contrast: str | None,
    temperature: float | None,
    method: str | None,
    layer: str | None,
    size: str | None,
    batch_size: int | None,
    dtype: str | None,
    precision: Literal["float32", "int8"],
    device: str | None,
    backend: Backend,
    labels: Path | None,
    cmap: str,
    text_list: Path | None,
    watch: Path | None,
    resume: bool,
    timeout: float,
    profile: bool,
    engine: str,
    ray_address: str | None,
    actors: int | None,
    actor_cpus: int | None,
    actor_gpus: float | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Explains images: for each, where the network looked for its top class.

    IMAGES are files, folders (searched recursively), globs, or - for a list of paths on standard
    input. Folders and globs leave out overlays and heatmaps of earlier runs. Pictures show what
    the network sees, a crop from the middle of the image.

    \b
    Examples:
      diffcam explain cat.jpg
      diffcam explain photos/ -m torchvision:resnet50 --weights w.safetensors -o out/ --report
    """  # noqa: D301 - click takes the control character for: do not rewrap
    console = Console(verbose)
    check_engine(context)
    if engine == "ray":
        prepared = prepare_on_ray(context.params, console)
        # After Ray has started, which takes the signals for itself.
        with stopping_on_signals():
            outcome = run_on_ray(prepared, console)
        if outcome is None:
            raise click.exceptions.Exit(INTERRUPTED)
        tell(outcome, as_json=as_json)
        raise click.exceptions.Exit(SOME_FAILED if outcome.failed else 0)
    with stopping_on_signals():
        try:
            # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
            from diffcam_fast.cli.request import Request

            request = Request(
                inputs=inputs,
                text_list=text_list,
                model=model,
                weights=weights,
                out=None if out is None else Path(out),
                formats=formats,
                shard_size=shard_size,
                map_type=map_type,
                overlay=overlay,
                report=report,
                targets=targets,
                topk=topk,
                contrast=contrast,
                temperature=temperature,
                method=method,
                layer=layer,
                size=size,
                batch_size=batch_size,
                dtype=dtype,
                precision=precision,
                device=device,
                backend=backend,
                labels=labels,
                cmap=cmap,
                watch=watch,
                resume=resume,
                timeout=timeout,
                profile=profile,
            )
            job, summary, page = execute(request, console)
        except KeyboardInterrupt:
            console.say("stopped; run the same command again, with --resume to go on")
            raise click.exceptions.Exit(INTERRUPTED) from None
    _print(job, summary, page, as_json=as_json)
    if summary.interrupted:
        console.say(_how_to_resume(job, summary))
        _leave()
    if summary.failed:
        raise click.exceptions.Exit(SOME_FAILED)


def _leave() -> NoReturn:
    """Ends an interrupted run, whatever the network is still at.

    Some methods take minutes for a batch. A thread that the interpreter finds inside of PyTorch at
    its end would make the process abort; all outputs are on the disk by now.
    """
    from diffcam_fast.stream import NETWORK_THREAD

    if any(thread.name == NETWORK_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    raise click.exceptions.Exit(INTERRUPTED)


def execute(request: "Request", console: Console) -> "tuple[Job, Summary, Path | None]":
    """Runs a request from its options to its report.

    Returns:
        What was run, what came of it, and the report where one was asked for and nothing stopped
        the run before it was written.

    Raises:
        click.UsageError: The request cannot be met.
        click.ClickException: The run could not go on: no memory, no space, no permission.
    """
    from diffcam_fast.cli.job import prepare
    from diffcam_fast.cli.run import ResumeError, run
    from diffcam_fast.cli.summary import write_run_report
    from diffcam_fast.running import is_out_of_memory
    from diffcam_fast.stream import OutOfMemory

    try:
        job = prepare(request, console)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise click.ClickException("out of memory while loading the model") from error
    try:
        summary = run(job, console)
        page = None
        if request.report and not summary.interrupted:
            try:
                page = write_run_report(job, summary)
            except KeyboardInterrupt:
                summary.interrupted = True
    except ResumeError as error:
        raise click.UsageError(str(error)) from error
    except OutOfMemory as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(_cannot_write(error, job)) from error
    return job, summary, page


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Makes SIGTERM end a run as Ctrl-C does, with whole files and an account of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(job: "Job", summary: "Summary", page: Path | None, *, as_json: bool) -> None:
    from diffcam_fast.cli import summary as told

    if as_json:
        click.echo(json.dumps(told.as_json(job, summary, page), indent=2))
    else:
        for line in told.as_lines(job, summary, page):
            click.echo(printable(line))


def _how_to_resume(job: "Job", summary: "Summary") -> str:
    left = summary.found - len(summary.entries)
    if not job.ledger:
        return f"stopped with {left} images left"
    missing = f"{left} of {summary.found} images"
    if left == 0 and job.request.report:
        missing = "the report"
    return (
        f"stopped with {missing} left, all outputs so far are whole;"
        " to go on, run the same command with --resume"
    )


def _cannot_write(error: OSError, job: "Job") -> str:
    where = error.filename or job.out
    if error.errno in (ENOSPC, EDQUOT):
        advice = "; free some space and run the same command with --resume" if job.ledger else ""
        return f"the disk is full, cannot write {where}{advice}"
    return f"cannot write {where}: {error.strerror or error}"
