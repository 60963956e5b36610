"""What is known of a model at each input size, found out once."""

import threading
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from diffcam_fast.analysis import AnalysisError, Inspection, analyse
from diffcam_fast.analysis.inspection import example_images
from diffcam_fast.layout import Layout
from diffcam_fast.running import OutputError, unwrap
from diffcam_fast.split import Output

# The sizes that image classifiers are made for, tried in this order where the model does not tell
# its own.
_USUAL_SIZES = (224, 299, 384, 256, 128, 64, 32, 28)

Layer = str | nn.Module


class Inspections:
    """The analysis of a model at the sizes it is called with: a pooling window of fixed size is
    global at one only.

    It runs on random images: what a caller's images hold, NaN say, must not decide how they are
    explained. Several threads may share it.

    Args:
        model: an image classifier, unwrapped.
        layers: the target layers; None: the last spatial activation before the classifier.
        output: what finds the logits in what the model returns.
        layout: of the layers' outputs; None: found out.
        examples: (N, C, H, W), the kind of input that the model takes; None: random images.

    Raises:
        AnalysisError: no layer fits, or not one that was given.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer] | None,
        *,
        output: Output,
        layout: Layout | None,
        examples: Tensor | None,
    ) -> None:
        self._model, self._output, self._layout = model, output, layout
        self._names = _dotted_names(model, layers)
        self._lock = threading.Lock()
        self._known: dict[tuple[int, ...], tuple[Inspection, ...]] = {}
        self._first: tuple[Inspection, ...] | None = None
        self._why_not = ""
        if examples is None:
            self._try_usual_sizes()
        else:
            examples = examples[:2]
            # Of an empty batch the size is known, and that is all.
            twice = examples.repeat(2 // len(examples), 1, 1, 1) if len(examples) else None
            self._at(examples.shape[1:], twice)

    @property
    def first(self) -> tuple[Inspection, ...]:
        """What was found at the first size, an inspection for each layer.

        Raises:
            AnalysisError: the model took no random image of a usual size, and has not been called
                yet.
        """
        if self._first is None:
            raise AnalysisError(
                "the layer is not known before the first call, or give example_inputs: "
                f"{self._why_not}"
            )
        return self._first

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the target layers; as for `first` where none were given."""
        return tuple(found.layer for found in self.first) if self._names is None else self._names

    def at(self, images: Tensor) -> tuple[Inspection, ...]:
        """What is known at the size of these images (N, C, H, W)."""
        return self._at(images.shape[1:], None)

    def _at(self, shape: Sequence[int], examples: Tensor | None) -> tuple[Inspection, ...]:
        with self._lock:
            found = self._known.get(tuple(shape))
            if found is None:
                channels, *size = shape
                if examples is None:
                    examples = example_images(self._model, (size[0], size[1]), channels=channels)
                found = tuple(
                    analyse(
                        self._model, examples, layer=name, output=self._output, layout=self._layout
                    )
                    for name in self._names or (None,)
                )
                self._known[tuple(shape)] = found
                self._adopt(found)
        return found

    def _adopt(self, founds: tuple[Inspection, ...]) -> None:
        if self._first is None:
            self._first = founds
            self._names = tuple(found.layer for found in founds)
            return
        for found in founds:
            if found.shape[1:] == (1, 1):
                _, height, width = found.input_shape
                warnings.warn(
                    f"at {height} x {width} pixels layer {found.layer!r} has a single cell, "
                    "and its maps say nothing; "
                    "give an earlier layer, or example_inputs of this size",
                    stacklevel=5,
                )

    def _try_usual_sizes(self) -> None:
        refused: list[str] = []
        for shape in _own_sizes(self._model) or _usual_sizes(self._model):
            try:
                self._at(shape, None)
                return
            except (AnalysisError, OutputError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever a model raises at a size it does not take
                refused.append(f"{shape[1]} x {shape[2]}: {error}")
        self._why_not = f"the model takes no random images of the usual sizes ({refused[0]})"


def _dotted_names(
    model: nn.Module, layers: Layer | Sequence[Layer] | None
) -> tuple[str, ...] | None:
    if layers is None:
        return None
    # An nn.Sequential is one layer, and so is a name.
    given = (layers,) if isinstance(layers, str | nn.Module) else tuple(layers)
    names = tuple(_dotted_name(model, layer) for layer in given)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layer must name each layer once, and one at least; got {list(names)}")
    return names


def _dotted_name(model: nn.Module, layer: Layer) -> str:
    if isinstance(layer, str):
        return layer
    layer = unwrap(layer)
    name: str | None = next((n for n, module in model.named_modules() if module is layer), None)
    if not name:
        raise AnalysisError(
            f"the given layer, a {type(layer).__name__}, is no module inside the model"
        )
    return name


def _usual_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """(C, H, W) with the channels of the first convolution, and with 3: it may see patches."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = [3] if convolution is None else list(dict.fromkeys([convolution.in_channels, 3]))
    return [(c, size, size) for size in _USUAL_SIZES for c in channels]


def _own_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """The input size (C, H, W) that a timm model carries."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return (
        [(int(size[0]), int(size[1]), int(size[2]))] if size is not None and len(size) == 3 else []
    )
