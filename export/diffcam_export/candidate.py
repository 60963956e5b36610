"""An explainer as an exported file: made once, held against the model, timed, kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffcam_export.cache import Cache, Kept, digest_of, digest_of_images, versions
from diffcam_export.exact import exactness
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.session import CPU
from diffcam_export.trial import ROUNDING, TOLERANCE, Trial, allowed_target, off_by
from diffcam_fast.explainer import Explainer, Setup
from diffcam_fast.explanation import Explanation
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.running import first_line

if TYPE_CHECKING:
    from diffcam_export.quantised import Agreement
    from diffcam_fast.compiled import CompiledExplainer


@dataclass(frozen=True)
class Fastest:
    """An explainer, and why it is the one.

    Attributes:
        explainer: what to call.
        reason: why it runs where it runs, in a sentence.
        path: the exported file that runs; None where PyTorch does.
        agreement: how near int8 is to float32; None: it is float32.
    """

    explainer: Explainer | OnnxExplainer | CompiledExplainer
    reason: str
    path: Path | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Candidate:
    """An explainer as an exported file."""

    explainer: Explainer
    targets: Literal["predicted", "input"]
    topk: int | None
    batch_size: int
    threads: int | None
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None

    @property
    def _trial(self) -> Trial:
        return Trial(self.explainer, self.targets == "input", self.topk)

    def opened(self, cache: Cache) -> Fastest | str:
        """The faster of both; or why there is no file."""
        key = self._key()
        kept = cache.get(key)
        if kept is None:
            try:
                kept = cache.put(key, self._make)
            except OSError as error:
                return f"the cache {cache.folder} cannot be written: {error.strerror or error}"
            except (ValueError, TypeError) as error:
                return f"it cannot be exported: {first_line(error)}"
            except RuntimeError as error:
                cache.drop(key)
                return f"its exported file does not run: {first_line(error)}"
        try:
            found = self._checked(kept)
        except RuntimeError as error:
            found = f"its exported file does not run: {first_line(error)}"
        if isinstance(found, str):
            cache.drop(key)
        return found

    def _key(self) -> dict[str, Any]:
        setup = self.explainer.setup
        return {
            "model": digest_of(setup.model),
            **_options(setup),
            "targets": self.targets,
            "topk": self.topk,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "preprocess": self.preprocess,
            "labels": self.labels,
            "versions": versions(),
        }

    def _make(self, path: Path) -> Mapping[str, Any]:
        """Exports and times; returns what to note."""
        # Here, not above: whoever opens a kept file need not import what wrote it.
        from diffcam_export.export import export_onnx

        setup = self.explainer.setup
        export_onnx(
            setup.model,
            path,
            example_inputs=self._trial.images(2),
            layer=setup.layers[0],
            method=setup.method.name,
            contrast=setup.contrast,
            relu=setup.relu,
            targets=self.targets,
            topk=self.topk,
            preprocess=self.preprocess,
            labels=self.labels,
            verify=False,
        )
        ours, theirs = self._timed(path)
        return {"onnxruntime_s": ours, "torch_s": theirs}

    def _checked(self, kept: Kept) -> Fastest | str:
        """Opens a file and compares its maps with the explainer's: code may have changed unseen."""
        try:
            file = OnnxExplainer(kept.path, providers=[CPU], threads=self.threads)
        except ValueError as error:
            return str(error)
        images = self._trial.images(2)
        expected = self._trial.explained(self.explainer, images)
        if self.targets == "input":
            # Of the classes that PyTorch found: of two equal logits either may be the largest.
            made = file(images, expected.targets)
        else:
            made = self._trial.explained(file, images)
        off = off_by(made.maps, expected.maps)
        if not (off <= TOLERANCE or self._as_near(images, made, expected)):
            return f"its exported maps are off by {off:.1e}, more than {TOLERANCE:.0e}"
        ratio = kept.facts["onnxruntime_s"] / kept.facts["torch_s"]
        told = f"{ratio:.2f} of the time of torch ({self.batch_size} images at a time)"
        if ratio > 1:
            return Fastest(self.explainer, f"torch, because onnxruntime takes {told}", kept.path)
        return Fastest(file, f"onnxruntime takes {told}", kept.path)

    def _as_near(self, images: Tensor, made: Explanation, expected: Explanation) -> bool:
        """Whether the file is as near to float64 as PyTorch's float32 is."""
        same = torch.equal(made.targets, expected.targets)
        if made.maps.shape != expected.maps.shape or not same:
            return False
        found = exactness(
            self.explainer, images, expected.targets, made=made.maps, expected=expected.maps
        )
        return found.as_near(ROUNDING)

    def quantised(self, calibration: Tensor, floats: Fastest, cache: Cache) -> Fastest:
        """The same in int8, and how near it is.

        Raises:
            ValueError: it cannot be quantised.
        """
        from diffcam_export.quantised import Agreement

        assert isinstance(floats.explainer, OnnxExplainer)
        key = {**self._key(), "precision": "int8", "calibration": digest_of_images(calibration)}
        original = floats.explainer
        kept = cache.get(key) or cache.put(
            key, lambda path: self._make_quantised(path, calibration, original)
        )
        file = OnnxExplainer(kept.path, providers=[CPU], threads=self.threads)
        found = Agreement(**kept.facts["agreement"])
        ratio = kept.facts["int8_s"] / kept.facts["float32_s"]
        reason = (
            f"int8 takes {ratio:.2f} of the time of float32 ({self.batch_size} images at a time); "
            f"{found}"
        )
        return Fastest(file, reason, kept.path, found)

    def _make_quantised(
        self, path: Path, calibration: Tensor, floats: OnnxExplainer
    ) -> Mapping[str, Any]:
        from diffcam_export.quantised import agreement, write_quantised

        held = torch.arange(len(calibration)) % 4 == 3
        write_quantised(
            self.explainer.setup,
            path,
            calibration[~held],
            targets=self.targets,
            topk=self.topk,
            preprocess=self.preprocess,
            labels=self.labels,
        )
        file = OnnxExplainer(path, providers=[CPU], threads=self.threads)
        int8, float32 = self._trial.in_turn(file, floats, self.batch_size)
        target = allowed_target(self.explainer.setup.contrast)
        found = agreement(self.explainer, file, calibration[held], target)
        return {"int8_s": int8, "float32_s": float32, "agreement": asdict(found)}

    def forced(self, found: Fastest) -> Fastest:
        """The file, though PyTorch may be faster."""
        if isinstance(found.explainer, OnnxExplainer) or found.path is None:
            return found
        file = OnnxExplainer(found.path, providers=[CPU], threads=self.threads)
        return replace(found, explainer=file, reason="onnxruntime was asked for")

    def _timed(self, path: Path) -> tuple[float, float]:
        """Seconds for a batch in ONNX Runtime and in PyTorch."""
        file = OnnxExplainer(path, providers=[CPU], threads=self.threads)
        return self._trial.in_turn(file, self.explainer, self.batch_size)


def _options(setup: Setup) -> dict[str, Any]:
    contrast = setup.contrast
    weights = contrast.weights
    return {
        "layer": setup.layers[0],
        "method": repr(setup.method),
        "contrast": [contrast.name, contrast.temperature, contrast.reference],
        "weights": None if weights is None else weights.tolist(),
        "relu": setup.relu,
        "examples": setup.examples,
    }
