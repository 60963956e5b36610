"""The arms of the study, one after the other, each kept as it ends."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffcam_bench.rows import Row, read_rows, write_rows
from diffcam_bench.sham.fooling import ATTACKER, Attacker
from diffcam_bench.sham.honest import CLEAN, CONTROL, Honest
from diffcam_bench.sham.networks import NETWORKS, Classifier
from diffcam_bench.sham.pictures import Pictures, Sizes
from diffcam_bench.sham.training import trained

ARMS = ("location", "top_k", "centre_of_mass", "sham", "adaptive")
WHICH = ("true", "predicted", "all")
# What makes an honest network, of name, seed, pictures and sizes.
Maker = Callable[[str, int, Pictures, Sizes], Classifier]
_KEY = ("network", "seed", "arm", "attacked", "sizes", "data")


@dataclass(frozen=True)
class Study:
    """The arms that are asked for.

    Attributes:
        pictures: to train on and to explain.
        sizes: how much is done.
        networks: names that `make` takes.
        seeds: each an honest network and all its arms.
        arms: of `ARMS` and `FIXED`.
        which: whose map is attacked, of `WHICH`; `true` needs labels.
        make: makes the honest networks.
        attacker: who fools them.
    """

    pictures: Pictures
    sizes: Sizes = field(default_factory=Sizes)
    networks: Sequence[str] = tuple(NETWORKS)
    seeds: Sequence[int] = (0, 1, 2)
    arms: Sequence[str] = ARMS
    which: Sequence[str] = WHICH
    make: Maker = trained
    attacker: Attacker = ATTACKER

    @property
    def total(self) -> int:
        """How many arms run, those of all networks and seeds together."""
        return len(self.networks) * len(self.seeds) * len(list(self._arms()))

    def run(
        self,
        path: Path | None,
        folder: Path | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Row]:
        """Its rows; those that the file has are not made again, and each arm is kept as it ends.

        Args:
            path: the CSV file of the rows, or None.
            folder: where a picture of each arm goes, or None.
            progress: called after each arm with their number so far.
        """
        rows: list[Row] = list(read_rows(path)) if path is not None else []
        data, done = self.pictures.digest, 0
        found: list[Row] = []
        for name, seed in itertools.product(self.networks, self.seeds):
            honest: Honest | None = None
            for arm, attacked in self._arms():
                key = (name, str(seed), arm, attacked, str(self.sizes), data)
                there = [row for row in rows if tuple(str(row[k]) for k in _KEY) == key]
                if not there:
                    honest = honest or self._honest(name, seed)
                    start = dict(zip(_KEY, key, strict=True))
                    network, weight = honest.fooled(arm, attacked)
                    there = [start | {"weight": weight} | row for row in honest.rows(network, arm)]
                    rows += there
                    if folder is not None:
                        title = "-".join(filter(None, (name, str(seed), arm, attacked)))
                        honest.draw(network, folder / f"{title}.png")
                    if path is not None:
                        write_rows(path, rows)
                found += there
                done += 1
                progress(done)
        return found

    def _honest(self, name: str, seed: int) -> Honest:
        network = self.make(name, seed, self.pictures, self.sizes)
        return Honest.of(network, seed, self.pictures, self.sizes, self.attacker)

    def _arms(self) -> Iterator[tuple[str, str]]:
        yield CLEAN, ""
        # What training on, towards nothing, changes by itself.
        yield CONTROL, ""
        yield from itertools.product(self.arms, self.which)
