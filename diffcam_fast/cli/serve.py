"""``diffcam serve``: the service on the command line."""

from __future__ import annotations

import signal
import socket
from importlib.util import find_spec
from pathlib import Path

import click

from diffcam_fast.backends import BACKENDS, Backend
from diffcam_fast.cli.console import Console
from diffcam_fast.cli.explain import CONTRASTS, METHODS

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


@click.command()
@click.option("-m", "--model", help="As in diffcam explain.  [default: EfficientNet-Lite0]")
@click.option("--weights", metavar="FILE", help="Weights (.safetensors, .pth), or 'random'.")
@click.option("--method", type=click.Choice(METHODS), help="CAM.  [default: diff_grad_cam]")
@click.option("--contrast", type=click.Choice(CONTRASTS), help="What the class is held against.")
@click.option("--temperature", type=float, help="Of the log_odds contrast.  [default: 1]")
@click.option("--layer", help="Target layer by its dotted name.  [default: found by running]")
@click.option("--size", help="Input size of the network: 224, or HEIGHTxWIDTH.")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Runtime, as in diffcam explain; auto: the faster one.",
)
@click.option("--labels", type=click.Path(path_type=Path, dir_okay=False), help="Class names.")
@click.option("--cmap", default="turbo", show_default=True, help="Colour map of matplotlib.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--max-wait",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Milliseconds that a request waits for others to share a batch with.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests under way; more are refused with 503.",
)
@click.option(
    "--max-bytes", type=click.IntRange(1), default=32 * 2**20, show_default=True, help="Of a file."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=64_000_000,
    show_default=True,
    help="Of an image.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds from a request to its answer.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say why, and log requests.")
def serve(
    model: str | None,
    weights: str | None,
    method: str | None,
    contrast: str | None,
    temperature: float | None,
    layer: str | None,
    size: str | None,
    device: str | None,
    backend: Backend,
    labels: Path | None,
    cmap: str,
    host: str,
    port: int,
    batch_size: int,
    max_wait: float,
    queue: int,
    max_bytes: int,
    max_pixels: int,
    timeout: float,
    verbose: bool,
) -> None:
    """Serves explanations over HTTP: an image in, maps as JSON or a picture out.

    It has no authentication: keep it behind a proxy that has. /docs describes it, /metrics is for
    Prometheus.

    \b
    Example:
      diffcam serve -m torchvision:resnet50 --weights w.safetensors
      curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' localhost:8000/v1/explain
    """  # noqa: D301 - click takes the control character for: do not rewrap
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise click.UsageError(
            f"diffcam serve needs {', '.join(missing)}: pip install '.[serve]' in a checkout of"
            " diffcam-fast"
        )
    # Here, not above: PyTorch takes seconds to import, and --help needs none of it.
    import uvicorn

    from diffcam_fast.cli.opening import open_model
    from diffcam_fast.cli.request import Request
    from diffcam_fast.images.colour import colour_table
    from diffcam_fast.serve import Limits, create_app

    console = Console(verbose)
    request = Request(
        inputs=(),
        model=model,
        weights=weights,
        method=method,
        contrast=contrast,
        temperature=temperature,
        layer=layer,
        size=size,
        batch_size=batch_size,
        device=device,
        backend=backend,
        labels=labels,
        # Requests may name classes.
        any_target=True,
    )
    try:
        colour_table(cmap)
        opened = open_model(request, console, images=None)
        assert opened.request.batch_size is not None
        limits = Limits(
            batch_size=opened.request.batch_size,
            max_wait=max_wait / 1000,
            queue=queue,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            timeout=timeout,
        )
        app = create_app(
            opened.explainer,
            opened.loaded.preprocess,
            classes=opened.classes,
            labels=opened.labels,
            name=opened.loaded.name,
            limits=limits,
            cmap=cmap,
        )
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    listening = _listen(host, port)
    address, chosen = listening.getsockname()[:2]
    console.say(f"listening on http://{address}:{chosen}, Ctrl-C ends")
    for number in (signal.SIGINT, signal.SIGTERM):
        # The server answers what it accepted, and then raises the signal that it was sent again.
        signal.signal(number, lambda *_: None)
    level = "info" if verbose else "warning"
    server = uvicorn.Server(uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=60))
    server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections already: its port is known, and whoever reads of it and is
    quicker than the server waits to be accepted.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening
