"""Which contrast is the default: by a rule that was written before the study ran.

1. On clean networks, a contrast's map must be like Grad-CAM's: its mean Pearson correlation with it
   at least nine tenths of the best contrast's.
2. Of those, the one whose worst arm is best: the lowest, over networks and arms other than the
   control, of the mean Pearson correlation of the fooled network's map with the honest one's.

Both take the Grad-CAM form of the contrast (`diff_grad_cam`), and means over seeds and attacked
classes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean

from diffcam_bench.sham.honest import CLEAN, CONTROL

_SHARE = 0.9


@dataclass(frozen=True)
class Standing:
    """A contrast under the rule.

    Attributes:
        contrast: its name.
        agreement: mean correlation with Grad-CAM on clean networks.
        worst: mean correlation with the honest map in the worst arm.
        arm: that arm, as `network, arm`.
        admitted: it agrees well enough.
    """

    contrast: str
    agreement: float
    worst: float
    arm: str
    admitted: bool


def standings(rows: Iterable[Mapping[str, object]]) -> list[Standing]:
    """Every contrast of `diff_grad_cam`, the chosen one first.

    Raises:
        ValueError: no clean network, or no arm, is among the rows.
    """
    clean: dict[str, list[float]] = defaultdict(list)
    arms: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] != "diff_grad_cam":
            continue
        name = str(row["contrast"])
        if row["arm"] == CLEAN:
            clean[name].append(float(str(row["grad_cam"])))
        elif row["arm"] != CONTROL:
            arms[name][f"{row['network']}, {row['arm']}"].append(float(str(row["pearson"])))
    if not clean or set(clean) != set(arms):
        raise ValueError("the rows need clean and fooled networks for every contrast")
    agreement = {name: mean(values) for name, values in clean.items()}
    bound = _SHARE * max(agreement.values())
    found = []
    for name, by_arm in arms.items():
        worst, arm = min((mean(values), arm) for arm, values in by_arm.items())
        found.append(Standing(name, agreement[name], worst, arm, agreement[name] >= bound))
    return sorted(found, key=lambda one: (one.admitted, one.worst), reverse=True)
