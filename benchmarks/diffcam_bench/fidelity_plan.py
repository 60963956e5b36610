"""How many images each part of the fidelity study looks at."""

from dataclasses import dataclass, field

from diffcam_bench.fidelity_entries import Entry
from diffcam_bench.fidelity_metrics import Variant

# The others ask a slow method for more maps than there is time for.
SLOW_GROUPS = ("masked", "curves", "road")


@dataclass(frozen=True)
class Plan:
    """How many images each group of metrics looks at; methods that are slow look at `slow` at most.

    Attributes:
        counts: images, by group of metrics; 0 leaves it out.
        slow: images of slow methods, which are left out of `randomised` and `stamps`.
        variant: what is pinned of the metrics.
        resamples: bootstrap samples of the images behind an interval.
    """

    counts: dict[str, int]
    slow: int
    variant: Variant = field(default_factory=Variant)
    resamples: int = 2000

    def count(self, group: str, entry: Entry) -> int:
        """Images of a group for an entry."""
        if not entry.slow:
            return self.counts[group]
        return min(self.counts[group], self.slow) if group in SLOW_GROUPS else 0


def standard(images: int, stamps: int) -> Plan:
    """The plan of so many photographs and stamps."""
    counts = {
        "masked": images,
        "curves": -(-images // 5),
        "road": -(-images // 16),
        "randomised": -(-images // 10),
        "stamps": stamps,
    }
    return Plan(counts, slow=4)


def quick(images: int, stamps: int) -> Plan:
    """One that ends within a minute, and whose figures mean little."""
    counts = {"masked": images, "curves": 2, "road": 1, "randomised": 2, "stamps": stamps}
    return Plan(counts, slow=1, variant=Variant(step=7168, percentiles=(50,)), resamples=200)
