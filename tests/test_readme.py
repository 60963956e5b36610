"""The code blocks of README.md and of docs/ run as they stand there, in a folder with the
photographs of the demo and an explained ONNX file.

A block that must not run says why on its fence: ```bash not-run: REASON.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffcam_fast.demo import copy_photographs
from explained import write_explained

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
SHELLS = {"bash", "console"}
# Where Debian's libonnxruntime-dev puts its headers.
INCLUDES = ["-I/usr/include/onnxruntime", "-I/usr/include/onnxruntime/core/session"]


@dataclass(frozen=True)
class Block:
    language: str
    note: str
    body: str
    line: int

    @property
    def reason(self) -> str | None:
        """Why the block does not run; None: it does."""
        mark = re.fullmatch(r"not-run:?\s*(.*)", self.note)
        return None if mark is None else mark[1].strip()

    def commands(self) -> list[str]:
        """Lines a shell runs; of a console block those after the prompt `$ `, not the output."""
        lines = self.body.splitlines()
        if self.language == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return lines


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        language, _, note = match["info"].strip().partition(" ")
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(language, note.strip(), match["body"], line))
    return found


def blocks_of(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [block for block in blocks(text) if block.language in SHELLS | {"python", "cpp"}]


README = blocks_of("README.md")
DOCUMENTS = [("README", block) for block in README] + [
    (name, block)
    for name in (
        "deploy",
        "fidelity",
        "methods",
        "migrate",
        "robustness",
        "scale",
        "serve",
        "throughput",
    )
    for block in blocks_of(f"docs/{name}.md")
]


def make_targets(line: str) -> list[str] | None:
    """Return the targets of a `make` line, None for any other line."""
    words = line.split("#")[0].split()
    return [word for word in words[1:] if "=" not in word] if words[:1] == ["make"] else None


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "classifier.cam.onnx"
    write_explained(path, labels=True)
    return path


@pytest.fixture
def workplace(tmp_path: Path, classifier: Path) -> Path:
    """Return a folder with demo-out/photos/, as `make demo` leaves it, and an explained file."""
    copy_photographs(tmp_path / "demo-out" / "photos")
    shutil.copy(classifier, tmp_path / "classifier.cam.onnx")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}"
    return done.stdout


def run_cpp(source: str, folder: Path) -> None:
    """Compiles against the headers where the compiler finds them, and Python's own library."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "explain.cpp").write_text(source)
    header = ["-include", "onnxruntime_cxx_api.h", "-fsyntax-only", "-x", "c++", "/dev/null"]
    if subprocess.run(["g++", "-std=c++17", *INCLUDES, *header], capture_output=True).returncode:
        pytest.skip("needs the C++ headers of ONNX Runtime, in CPATH or installed")
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    capi = Path(spec.origin).parent / "capi"
    (library,) = capi.glob("libonnxruntime.so.*")
    # The name under which a release has it, and programs look for it.
    (folder / "libonnxruntime.so.1").symlink_to(library)
    where = [f"-L{folder}", "-l:libonnxruntime.so.1", f"-Wl,-rpath,{folder}"]
    compile_it = ["g++", "-std=c++17", "explain.cpp", *INCLUDES, *where, "-o", "explain"]
    run(compile_it, folder)
    told = run(["./explain"], folder)
    assert re.fullmatch(r"class \d, map 112 x 112, first cell [\d.e-]+\n", told), told


def test_fences_are_read() -> None:
    text = "a\n```bash\nmake demo X=1 # why\n```\n```console\n$ ls\na b\n```\n" + (
        "```python not-run: needs a GPU\nx\n```\n"
    )
    shell, console, python = blocks(text)
    assert (shell.language, shell.line, shell.reason) == ("bash", 2, None)
    assert [make_targets(line) for line in shell.commands()] == [["demo"]]
    assert console.commands() == ["ls"]
    assert make_targets("diffcam explain cat.jpg") is None
    assert (python.language, python.reason) == ("python", "needs a GPU")


def test_readme_names_its_two_commands() -> None:
    targets = [make_targets(line) for block in README for line in block.commands()]
    assert ["demo"] in targets
    assert ["test"] in targets


def test_a_block_that_does_not_run_says_why() -> None:
    silent = [(name, b.line) for name, b in DOCUMENTS if b.note and not b.reason]
    assert silent == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    declared = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for block in README:
        for line in block.commands():
            assert set(make_targets(line) or []) <= declared, f"README line {block.line}: {line}"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{name}-line{block.line}-{block.language}")
        for name, block in DOCUMENTS
        if block.reason is None
    ],
)
def test_block_runs(block: Block, workplace: Path) -> None:
    if block.language == "python":
        run([sys.executable, "-c", block.body], workplace)
        return
    if block.language == "cpp":
        run_cpp(block.body, workplace)
        return
    # make runs are this very test run, and the demo: their targets are checked above
    lines = [line for line in block.commands() if make_targets(line) is None]
    before = set(workplace.rglob("*"))
    run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], workplace)
    if any(line.startswith("diffcam explain") for line in lines):
        assert set(workplace.rglob("*")) > before, "it wrote nothing"


def test_readme_numbers_are_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    with open(ROOT / "benchmarks/results/methods.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_p20", "ratio_p80"))
            cells = f"| {row['name']} | {ratio:.2f} | {low:.2f} - {high:.2f} |"
            assert f"{cells} {float(row['median_ms']):.0f} |" in text
    with open(ROOT / "benchmarks/results/families.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    explained = [row for row in rows if row["supported"] == "yes"]
    closed = sum(row["head"] == "closed form" for row in explained)
    exact = sum(float(row["error"]) <= 1e-5 for row in explained)
    assert f"{len(explained)} of {len(rows)} are explained, {closed} of them in closed form" in text
    assert f"{exact} agree to 1e-5" in text


_ENGINE = {
    "plain inference": "plain inference",
    "**diffcam-fast**": "diffcam-fast",
    "with heatmaps of the images' size": "diffcam-fast, heatmaps of the images' size",
    "five classes in place of one": "diffcam-fast, 5 targets",
    "at `layer3`": "diffcam-fast, layer3",
    "pytorch-grad-cam": "pytorch-grad-cam",
    "torch-cam": "torch-cam",
    "captum": "captum",
}


def test_rates_are_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| images/s (how often ours is that)")[2].partition("\n\n")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    with open(ROOT / "benchmarks/results/engine.csv", encoding="utf-8") as file:
        rows = {(r["model"], r["source"], r["name"]): r for r in csv.DictReader(file)}
    columns = [
        (f"torchvision:{model}", source)
        for model in ("resnet50", "efficientnet_b0")
        for source in ("memory", "files")
    ]
    assert [line[0] for line in shown] == list(_ENGINE)
    for name, *cells in shown:
        for column, cell in zip(columns, cells, strict=True):
            row = rows.get((*column, _ENGINE[name]))
            if row is None:
                assert cell == ""
                continue
            rate = float(row["images_per_s"])
            made = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"
            assert cell == f"{made} ({float(row['ours_over']):.2f})"
    with open(ROOT / "benchmarks/results/endurance.csv", encoding="utf-8") as file:
        tenths = list(csv.DictReader(file))
    first, last = tenths[0], tenths[-1]
    grown = (float(last["memory_mib"]) - float(first["memory_mib"])) * 2**20
    bytes_each = grown / (int(last["explained"]) - int(first["explained"]))
    speeds = [float(tenth["images_per_s"]) for tenth in tenths[1:]]
    said = " ".join(text.split())
    assert f"explained {min(speeds):.0f} to {max(speeds):.0f} images/s" in said
    assert f"memory grew by {bytes_each:.0f} bytes an image" in said


def test_rates_on_a_gpu_are_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| batches of 64 | of 256 |")[2].partition("\n\n")[0]
    with open(ROOT / "benchmarks/results/engine_gpu.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "device"]
    made = {
        tuple(
            f"{float(row['images_per_s']):.0f} ({float(row['ours_over']):.2f})"
            for row in rows
            if row["name"] == name
        )
        for name in {row["name"] for row in rows}
    }
    shown = [line.strip("| ").split(" | ")[-2:] for line in table.splitlines()[2:]]
    assert {tuple(cells) for cells in shown} == made


def test_scale_rates_are_the_committed_rows() -> None:
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (\w+\.csv) \| (\S+), .* \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    )
    assert len(lines) == 3
    for name, model, batch, milliseconds, rate in lines:
        with open(ROOT / "benchmarks/results" / name, encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] == model]
        key = "explained_ms" if name == "onnx_cost.csv" else "median_ms"
        assert {row["cpus"] for row in rows if row[key] == milliseconds} == {"2"}, name
        assert float(rate) == pytest.approx(1000 * int(batch) / float(milliseconds), abs=0.05)


def test_scale_example_prints_what_stands_below_it(tmp_path: Path) -> None:
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8").partition("### An example")[2]
    code, printed = (match["body"] for match in FENCE.finditer(text))
    assert run([sys.executable, "-c", code], tmp_path) == printed


def test_readme_kernel_table_is_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with open(ROOT / "benchmarks/results/kernels.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["n"] == "64"]
    found = set()
    for ours in (row for row in rows if row["name"] == "diffcam"):
        same = ("op", "layer", "t", "k", "dtype", "layout")
        others = {r["name"]: r for r in rows if all(r[key] == ours[key] for key in same)}
        if "compile" in others:
            ratios = [others[name]["speedup_of_diffcam"] for name in ("eager", "compile")]
            found.add(" | ".join([ours["ms"], *ratios, ours["share_of_copy"]]))
    table = text.partition("| kernel | ms |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 10
    for line in table:
        _, _, cells = line.strip("| ").partition(" | ")
        assert cells in found, line
