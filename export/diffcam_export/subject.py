"""The file under examination: what all of its checks share."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diffcam_export.explainer import OnnxExplainer
from diffcam_export.plain import Plain, plain_file, plain_part
from diffcam_export.running import run
from diffcam_export.samples import Sample, Samples
from diffcam_export.session import CPU, Opened, Provider, open_session
from diffcam_fast.models.loading import LoadedModel

Against = nn.Module | LoadedModel | str | Path
"""What a file was made from: a PyTorch model, or a plain ONNX file."""

# Rounding in another order is about 1e-6 of a map in float32; half precision has 3 digits.
_USUAL, _HALF = 1e-4, 2e-2
_RECORD = {"session.record_ep_graph_assignment_info": "1"}


class Subject:
    """An explained file, opened.

    Args:
        path: the file.
        against: what it was made from, or None.
        providers: of ONNX Runtime, all of them there.
        threads: for the work inside an operator on the CPU.

    Raises:
        ValueError: it cannot be opened, or is no explained file.
    """

    def __init__(
        self,
        path: Path,
        against: Against | None,
        providers: Sequence[Provider] | None,
        threads: int | None,
    ) -> None:
        self.path = path
        self._providers, self._threads = providers, threads
        self.model = against.model if isinstance(against, LoadedModel) else against
        self.explainer = self.layer(None)
        self.facts = self.explainer.inspect()
        self.opened = self.session(path)
        self.samples = Samples(self.explainer, self._classes)

    @cached_property
    def plain(self) -> Plain:
        """The plain ONNX file that it was made from, or else what is left without its maps."""
        if isinstance(self.model, str | Path):
            return plain_file(Path(self.model))
        return plain_part(self.path)

    @property
    def on_cpu(self) -> bool:
        """The CPU computes it."""
        return self.opened.provider == CPU

    @property
    def tolerance(self) -> float:
        """Of maps and outputs, relative to the largest."""
        return _HALF if self.plain.half else _USUAL

    def layer(self, layer: str | None) -> OnnxExplainer:
        """The file as an explainer for one of its layers; None: the first."""
        return OnnxExplainer(
            self.path, layer=layer, providers=self._providers, threads=self._threads
        )

    def session(self, model: Path | bytes, *, optimise: bool = True) -> Opened:
        """Another model, run as the file is."""
        # What external data is relative to; without effect where the model is a file.
        beside = {"session.model_external_initializers_file_folder_path": str(self.path.parent)}
        return open_session(
            model,
            providers=self._providers,
            threads=self._threads,
            optimise=optimise,
            settings=_RECORD | (beside if isinstance(model, bytes) else {}),
        )

    def feeds(self, sample: Sample) -> dict[str, Tensor]:
        """The inputs of a session for the images of a sample, and its classes where it has some."""
        takes = self.explainer.input
        images = takes.arranged(sample.given).to(device=self.opened.device, dtype=takes.dtype)
        feeds = {takes.name: images.contiguous()}
        if sample.targets is not None:
            feeds["targets"] = torch.tensor(sample.targets, device=self.opened.device)
        return feeds

    def _classes(self, sample: Sample) -> Tensor:
        [classes] = run(self.opened, self.feeds(sample), ["diffcam_target"])
        return classes.cpu()
