"""``diffcam_fast.distributed.explain``: options checked here, everything else left to Ray Data."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffcam_fast.contrast import Contrast
from diffcam_fast.distributed.actor import AHEAD, ExplainBatches, check_columns
from diffcam_fast.distributed.settings import Model, Settings, Target

if TYPE_CHECKING:
    import ray.data


def explain(
    dataset: ray.data.Dataset,
    *,
    model: Model = None,
    weights: str | os.PathLike[str] | None = None,
    method: str | None = None,
    contrast: str | Contrast | None = None,
    temperature: float | None = None,
    layer: str | None = None,
    targets: Target | Sequence[Target] | None = None,
    topk: int | None = None,
    size: int | str | tuple[int, int] | None = None,
    labels: Sequence[str] | os.PathLike[str] | None = None,
    batch_size: int = 16,
    cpus_per_actor: int = 1,
    gpus_per_actor: float | None = None,
    concurrency: int | tuple[int, int] | None = None,
    trial: bool = True,
) -> ray.data.Dataset:
    """Explains a dataset of images on all machines of a Ray cluster.

    Lazy and streaming as Ray Data is: nothing runs before the result is consumed or written, and
    no more images are in memory than the actors are about to take. Each actor makes the network
    once. A batch whose actor or machine died is repeated elsewhere, by Ray.

    Args:
        dataset: A row for each image: ``path``, and the file's content in ``bytes``, as
            `ray.data.read_binary_files(..., include_paths=True)` gives them; or uint8 pixels
            ``image`` (H, W, 3), as `ray.data.read_images(..., include_paths=True)` does; or neither
            of the two, where every machine can open the path. Other columns are dropped.
        model: A name as `diffcam_fast.models.load_model` takes it; None: EfficientNet-Lite0; the
            path of an explained ONNX file; or a function without arguments that returns an
            ``nn.Module`` or a `LoadedModel`. Files must lie where every machine finds them.
        weights: A weights file, ``random`` (the same in all actors), or None.
        method: None: ``diff_grad_cam``, or what the ONNX file was exported with.
        contrast: As `Explainer` takes it.
        temperature: As `Explainer` takes it.
        layer: Dotted name of the target layer; None: found by running.
        targets: Class indices or labels, explained for every image; None: the predicted class.
        topk: The k most probable classes instead.
        size: Input size of the network, a side or (height, width); None: the model's own.
        labels: K class names, or a file of them, in place of the model's.
        batch_size: Images that the network takes at once.
        cpus_per_actor: Cores of an actor: threads of the network and for decoding.
        gpus_per_actor: Of an actor; a fraction shares a GPU. None: 1 if the cluster has any.
        concurrency: Actors, or the least and the most of them. None: from one to what the cluster
            holds now, less a core for reading.
        trial: Make the network on this machine first, so that a wrong name, layer or class is an
            error now. False where this machine cannot.

    Returns:
        A dataset of `dataset_schema`: a row for each image and target with ``path``, ``target``,
        ``label``, ``probability``, ``score``, ``map`` (float16, row by row), ``h``, ``w``,
        ``scale``, as in ``maps.parquet/``, and ``error`` null. An image that cannot be read, or
        that the network raises at, is one row with ``path`` and the reason in ``error``. The order
        of rows is Ray's.

    Raises:
        ImportError: Ray is not installed.
        ValueError: Unknown names, options that exclude each other, columns that hold no images.
        TypeError: A network in place of what makes one; another wrong type.

    Example:
        >>> import ray                                                     # doctest: +SKIP
        >>> images = ray.data.read_binary_files(                           # doctest: +SKIP
        ...     "s3://bucket/photos/", include_paths=True)
        >>> explain(images, topk=3).write_parquet("s3://bucket/maps/")     # doctest: +SKIP
    """
    settings = Settings.make(
        model=model,
        weights=weights,
        method=method,
        contrast=contrast,
        temperature=temperature,
        layer=layer,
        targets=targets,
        topk=topk,
        size=size,
        labels=labels,
    )
    check_numbers(batch_size, cpus_per_actor, gpus_per_actor, concurrency)
    engine = import_ray()
    if not isinstance(dataset, engine.data.Dataset):
        raise TypeError(f"dataset is a {type(dataset).__name__}; give a ray.data.Dataset")
    # None where only running it would tell; an actor looks again.
    columns = dataset.columns(fetch_if_missing=False)
    if columns is not None:
        check_columns(columns)
    if trial:
        settings.open("cpu")
    nodes = [node["Resources"] for node in engine.nodes() if node["Alive"]]
    if gpus_per_actor is None:
        gpus_per_actor = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
    if concurrency is None:
        concurrency = 1, most_actors(nodes, cpus_per_actor, gpus_per_actor)
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    result: ray.data.Dataset = dataset.map_batches(
        ExplainBatches,
        fn_constructor_kwargs={
            "settings": settings,
            "batch_size": batch_size,
            "device": "cuda" if gpus_per_actor else "cpu",
            "threads": cpus_per_actor,
        },
        batch_size=AHEAD * batch_size,
        batch_format="numpy",
        compute=engine.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor,
    )
    return result


def import_ray() -> Any:
    """The modules ``ray`` and ``ray.data``.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"more than one machine needs Ray ({error}):"
            " pip install '.[ray]' in a checkout of diffcam-fast"
        ) from error


def check_numbers(
    batch_size: int,
    cpus_per_actor: int,
    gpus_per_actor: float | None,
    concurrency: int | tuple[int, int] | None,
) -> None:
    """Refuses what Ray would take for something else, or never find a place for.

    Raises:
        ValueError: A number is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    if cpus_per_actor < 1:
        raise ValueError(f"cpus_per_actor is {cpus_per_actor}; give at least 1, a whole number")
    if gpus_per_actor is not None and not (0 <= gpus_per_actor <= 1):
        raise ValueError(
            f"gpus_per_actor is {gpus_per_actor}; an explainer runs on one GPU: give 1, a fraction"
            " to share one, or 0 for none"
        )
    if concurrency is None:
        return
    numbers = (concurrency,) if isinstance(concurrency, int) else tuple(concurrency)
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1 or list(numbers) != sorted(numbers):
        raise ValueError(
            f"concurrency is {concurrency}; give the number of actors, or (least, most)"
        )


def most_actors(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many actors fit onto the machines, with a core left that reads for them.

    Args:
        nodes: Of each machine its resources ``CPU`` and ``GPU``.
        cpus: Cores of an actor.
        gpus: GPUs of an actor.

    Raises:
        ValueError: Not one.

    Example:
        >>> most_actors([{"CPU": 16.0}], cpus=4, gpus=0)
        3
        >>> most_actors([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0}], cpus=4, gpus=1)
        2
    """
    fits = [
        min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf)
        for node in nodes
    ]
    most = int(sum(fits))
    cores = sum(node.get("CPU", 0) for node in nodes)
    # Actors that held every core would wait for ever for images that nobody reads.
    most -= cores - most * cpus < 1
    if most < 1:
        raise ValueError(
            f"an actor of {cpus} cores and {gpus:g} GPUs, and a core to read with, do not fit into"
            f" this Ray of {cores:g} cores on {len(nodes)} machines; ask for less, start Ray with"
            " more, or give concurrency where machines are still to come"
        )
    return most
