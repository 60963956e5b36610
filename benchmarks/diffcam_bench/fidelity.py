"""`diffcam bench fidelity`: how faithful each method's maps are, with intervals over the images.

A row is one metric of one method with one contrast. Rows that are there, of the same weights,
images, variant and PyTorch, are not measured again. Maps that agree with those of an earlier entry
on every image are measured once; the row says whose figures it repeats.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_bench.fidelity_data import Photographs, weights_digest
from diffcam_bench.fidelity_entries import BASELINE, Entry, small_maps
from diffcam_bench.fidelity_metrics import GROUPS, Subject, Values, measured, statistic
from diffcam_bench.fidelity_plan import SLOW_GROUPS, Plan
from diffcam_bench.fidelity_scorer import Score
from diffcam_bench.rows import Row, provenance
from diffcam_fast.running import pick_logits

KEY = (
    "model",
    "weights",
    "method",
    "contrast",
    "metric",
    "variant",
    "images",
    "data",
    "resamples",
    "torch",
    "runtime",
)
_SAME = 1e-5


class Study:
    """Measures entry after entry, group after group.

    Args:
        model: in evaluation mode.
        name: of the model, for the rows.
        photographs: as many as any group but `stamps` looks at.
        stamps: with masks; None leaves the group out.
        plan: how many of them.
        threads: of torch, for the rows.
        score: the same network, for passes that need no maps; None: the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        photographs: Photographs,
        stamps: Photographs | None,
        plan: Plan,
        threads: int,
        score: Score | None = None,
    ) -> None:
        self._model, self._name, self._plan = model, name, plan
        self._score: Score = score or model
        self._weights = weights_digest(model)
        self._data = {"stamps": stamps, "photographs": photographs}
        self._targets = {
            kind: _predicted(model, data.images) for kind, data in self._data.items() if data
        }
        self._source = provenance("diffcam-fast", "onnxruntime", "scipy", threads=threads)
        self._makers: dict[tuple[Entry, str], Callable[[Tensor, Tensor], Tensor]] = {}
        self._made: dict[tuple[Entry, str], Tensor] = {}
        self._values: dict[tuple[Entry, str], Values] = {}

    def run(self, chosen: Sequence[Entry], rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Yields the rows of each entry and group: those that are there, or new ones.

        Args:
            chosen: Grad-CAM among them.
            rows: of earlier runs.
        """
        there = {key_of(row): row for row in rows}
        baseline = next(entry for entry in chosen if entry.method == BASELINE)
        for number, entry in enumerate(chosen):
            for group in self._groups(entry):
                wanted = [self._fixed(entry, group, metric) for metric in GROUPS[group]]
                if all(key_of(row) in there for row in wanted):
                    yield [there[key_of(row)] for row in wanted]
                    continue
                same = self._same(entry, group, chosen[:number])
                made = self._rows(same or entry, group, baseline)
                as_entry = {"method": entry.method, "contrast": entry.contrast}
                yield [{**row, **as_entry, "maps_as": same.name if same else ""} for row in made]

    def left_out(self, chosen: Sequence[Entry]) -> list[str]:
        """What is not measured, and why."""
        reasons = []
        if self._data["stamps"] is None:
            reasons.append("pointing and energy: no --stamps")
        reasons += [
            f"{entry.name}, {group}: a control does not look at the network"
            for entry in chosen
            for group in GROUPS
            if group == "randomised" and entry.control
        ]
        reasons += [
            f"{entry.name}, {group}: a pass for each channel of each image"
            for entry in chosen
            for group in GROUPS
            if entry.slow and group not in SLOW_GROUPS
        ]
        return reasons

    def _groups(self, entry: Entry) -> list[str]:
        return [
            group
            for group in GROUPS
            if self._plan.count(group, entry)
            and not (group == "stamps" and self._data["stamps"] is None)
            and not (group == "randomised" and entry.control)
        ]

    def _photographs(self, group: str) -> Photographs:
        found = self._data[_kind(group)]
        assert found is not None
        return found

    def _fixed(self, entry: Entry, group: str, metric: str) -> dict[str, object]:
        count = self._plan.count(group, entry)
        return {
            "model": self._name,
            "weights": self._weights,
            "method": entry.method,
            "contrast": entry.contrast,
            "metric": metric,
            "variant": self._plan.variant.of(group),
            "images": count,
            "data": self._photographs(group).label(count),
            "resamples": self._plan.resamples,
            "torch": self._source["torch"],
            "runtime": "torch" if self._score is self._model else "onnxruntime",
        }

    def _same(self, entry: Entry, group: str, earlier: Sequence[Entry]) -> Entry | None:
        """The first earlier entry whose maps are these."""
        if entry.slow or entry.control:
            return None
        maps = self._maps(entry, group)
        for other in earlier:
            if other.slow or other.control:
                continue
            theirs = self._maps(other, group)
            if theirs.shape == maps.shape and (theirs - maps).abs().max() < _SAME:
                return other
        return None

    def _rows(self, entry: Entry, group: str, baseline: Entry) -> list[dict[str, object]]:
        values, base = self._measured(entry, group), self._measured(baseline, group)
        rows = []
        for metric in GROUPS[group]:
            ours, theirs = values[metric].numpy(), base[metric].numpy()
            # A slow method is held against Grad-CAM on its own few images.
            figures = _figures(metric, ours, theirs[..., : ours.shape[-1]], self._plan.resamples)
            fixed = self._fixed(entry, group, metric)
            rows.append({**fixed, **figures, "maps_as": "", **self._source})
        return rows

    def _measured(self, entry: Entry, group: str) -> Values:
        if (entry, group) not in self._values:
            data, count = self._photographs(group), self._plan.count(group, entry)
            subject = Subject(
                model=self._model,
                score=self._score,
                entry=entry,
                make=self._maker(entry, _kind(group)),
                images=data.images[:count],
                targets=self._targets[_kind(group)][:count],
                maps=self._maps(entry, group)[:count],
                fit_on=self._fit_on(_kind(group)),
                masks=None if data.masks is None else data.masks[:count],
            )
            self._values[entry, group] = measured(group, subject, self._plan.variant)
        return self._values[entry, group]

    def _maps(self, entry: Entry, group: str) -> Tensor:
        kind = _kind(group)
        if (entry, kind) not in self._made:
            images, targets = self._photographs(group).images, self._targets[kind]
            count = self._plan.slow if entry.slow else len(images)
            make = self._maker(entry, kind)
            self._made[entry, kind] = make(images[:count], targets[:count])
        return self._made[entry, kind]

    def _maker(self, entry: Entry, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        if (entry, kind) not in self._makers:
            fit_on = self._fit_on(kind)
            made = small_maps(entry, self._model, fit_on, self._photographs("masked").images)
            kinds = (kind,) if entry.fitted else self._targets
            self._makers.update({(entry, kind): made for kind in kinds})
        return self._makers[entry, kind]

    def _fit_on(self, kind: str) -> tuple[Tensor, Tensor]:
        """The explained images themselves, with what the network says of them as labels."""
        data = self._data[kind]
        assert data is not None
        return data.images, self._targets[kind]


def _kind(group: str) -> str:
    """The images that a group of metrics looks at."""
    return "stamps" if group == "stamps" else "photographs"


def key_of(row: Row) -> tuple[str, ...]:
    """All that the figures of a row depend on."""
    return tuple(str(row[name]) for name in KEY)


def _predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        parts = [
            pick_logits(model(images[i : i + 16])).argmax(dim=1) for i in range(0, len(images), 16)
        ]
    return torch.cat(parts).clone()


def _figures(metric: str, ours: np.ndarray, theirs: np.ndarray, resamples: int) -> dict[str, float]:
    """Mean and 95 % interval over images drawn anew, and of the paired difference to Grad-CAM."""
    # (resamples, N): the same images for both, and for every entry
    drawn = np.random.default_rng(0).integers(ours.shape[-1], size=(resamples, ours.shape[-1]))
    mean, base = (float(np.squeeze(statistic(metric, v))) for v in (ours, theirs))
    boot, other = (statistic(metric, v[..., drawn]) for v in (ours, theirs))
    low, high = np.percentile(boot, [2.5, 97.5])
    over_low, over_high = np.percentile(boot - other, [2.5, 97.5])
    figures = {
        "mean": mean,
        "low": low,
        "high": high,
        "over_grad_cam": mean - base,
        "over_low": over_low,
        "over_high": over_high,
    }
    return {name: round(float(value), 4) + 0.0 for name, value in figures.items()}
