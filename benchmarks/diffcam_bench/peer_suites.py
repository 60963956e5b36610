"""`diffcam bench peer-suites`: the tests of other libraries against the compat layer."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from diffcam_bench.peer_alias import NOT_OFFERED
from diffcam_bench.rows import provenance

SUITES = {
    "pytorch-grad-cam": (
        "tests/test_run_all_models.py",
        "tests/test_one_channel.py",
        "tests/test_svd_no_side_effect.py",
    ),
    "torch-cam": (
        "tests/test_methods_core.py",
        "tests/test_methods_gradient.py",
        "tests/test_methods_activation.py",
        "tests/test_utils.py",
    ),
    "captum": ("tests/attr/layer/test_grad_cam.py",),
}
"""Library -> the files of its checkout that ask for what the compat layer has."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file of tests.

    Attributes:
        library: whose tests they are.
        file: in its checkout.
        commit: of the checkout.
        passed: how many passed.
        failed: how many did not.
        not_offered: how many use a class that the compat layer does not have.
        skipped: how many skipped themselves.
        failures: the names of those that failed, with the last line of the reason.
    """

    library: str
    file: str
    commit: str
    passed: int
    failed: int
    not_offered: int
    skipped: int
    failures: tuple[str, ...]

    def row(self) -> dict[str, object]:
        """As a table has it."""
        return {
            "library": self.library,
            "file": self.file,
            "their_commit": self.commit,
            "passed": self.passed,
            "failed": self.failed,
            "not_offered": self.not_offered,
            "skipped": self.skipped,
            "failures": "; ".join(self.failures),
            **provenance("torchvision", threads=1),
        }


def run_suite(library: str, checkout: Path) -> list[Outcome]:
    """Runs the tests of a library in a checkout of it.

    Raises:
        ValueError: the checkout lacks them, or pytest could not run at all.
    """
    return [_run(library, checkout, file) for file in SUITES[library]]


def _run(library: str, checkout: Path, file: str) -> Outcome:
    if not (checkout / file).exists():
        raise ValueError(f"{checkout} is no checkout of {library}: it has no {file}")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "diffcam_bench.peer_alias"]
        command += ["-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}", file]
        # What is imported from the checkout must not be the library itself.
        done = subprocess.run(
            command, cwd=checkout, env=os.environ, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise ValueError(f"pytest did not run: {(done.stderr or done.stdout)[-500:]}")
        return _read(library, checkout, file, report)


def _read(library: str, checkout: Path, file: str, report: Path) -> Outcome:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    # Written by the run just before, from nothing that a stranger sent.
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if bad is not None:
            counts["failed"] += 1
            reason = (bad.get("message") or "").strip().splitlines() or [""]
            failures.append(f"{case.get('name')}: {reason[0][:120]}")
        elif skipped is None:
            counts["passed"] += 1
        else:
            offered = NOT_OFFERED not in (skipped.get("message") or "")
            counts["skipped" if offered else "not_offered"] += 1
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(
        library,
        file,
        head.stdout.strip(),
        counts["passed"],
        counts["failed"],
        counts["not_offered"],
        counts["skipped"],
        tuple(failures),
    )
