"""`diffcam bench all`: verdicts and pages from rows, and that documents say what the committed rows
say; `diffcam bench scaling` on a small network.
"""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from diffcam_bench import scaling as bench_scaling
from diffcam_bench import scaling_cli, standings_cli
from diffcam_bench.blocks import MissingBlockError, block, replaced, without_blocks
from diffcam_bench.cli import bench
from diffcam_bench.methods import ParityError
from diffcam_bench.rows import read_rows, results_folder, write_rows
from diffcam_bench.standings import plots
from diffcam_bench.standings.comparison import figure
from diffcam_bench.standings.page import Page, Picture, Section, Table
from diffcam_bench.standings.reading import LAYOUTS, comparisons
from diffcam_bench.standings.report import page, short_form
from diffcam_bench.standings.short import lines
from diffcam_bench.standings.tables import MANY
from figures import paragraphs, unsupported
from networks import pooled

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SOURCE = {"machine": "a CPU", "cpus": "2", "threads": "2", "torch": "2", "commit": "c", "date": "d"}


def cam(name: str, ratio: str, low: str = "", high: str = "", **others: str) -> dict[str, str]:
    row = {"model": "torchvision:net", "method": "grad_cam", "name": name, "rounds": "5"}
    spread = {"ratio": ratio, "ratio_p20": low, "ratio_p80": high}
    return {**row, **spread, **SOURCE, **others}


def read(folder: Path, **files: list[dict[str, str]]) -> Path:
    for name, rows in files.items():
        write_rows(folder / f"{name}.csv", rows)
    return folder


@pytest.mark.parametrize(
    ("ratio", "low", "high", "rounds", "verdict", "lost"),
    [
        ("3", "2.5", "3.5", "5", "faster", False),
        ("1.1", "0.9", "1.3", "5", "even", False),
        ("0.9", "0.8", "1.0", "5", "even", False),
        ("0.9", "0.8", "0.99", "5", "slower", True),
        ("3", "", "", "5", "no spread", False),
        ("0.7", "", "", "5", "no spread", True),
        # the percentiles of a single round
        ("0.7", "0.7", "0.7", "1", "no spread", True),
    ],
)
def test_verdicts(
    ratio: str, low: str, high: str, rounds: str, verdict: str, lost: bool, tmp_path: Path
) -> None:
    rows = [cam("diffcam-fast", "1", "1", "1"), cam("theirs", ratio, low, high, rounds=rounds)]
    [found] = comparisons(read(tmp_path, cams=rows))
    assert (found.verdict, found.lost) == (verdict, lost)
    assert (found.other, found.kind, found.ratio) == ("theirs", "library", float(ratio))
    assert found.case == "grad_cam, net"
    assert found.where == "a CPU, 2 threads" and not found.gpu


def test_ratios_over_a_plain_forward_are_turned_round(tmp_path: Path) -> None:
    rows = [
        {**cam("plain forward", "1", "1", "1"), "median_ms": "100"},
        {**cam("diffcam-fast, A", "1.25", "1.0", "2.0"), "median_ms": "120"},
        {**cam("diffcam-fast, B", "2", "1.6", "2.5"), "median_ms": "200"},
        {**cam("peer, B", "4", "3", "5"), "median_ms": "300"},
    ]
    a, b, peer = comparisons(read(tmp_path, methods=rows))
    assert (a.ratio, a.p20, a.p80, a.verdict) == (0.8, 0.5, 1.0, "even")
    assert (b.ratio, b.p20, b.p80, b.verdict) == (0.5, 0.4, 0.625, "slower")
    # beside the variant of the same name, and of two medians
    assert (peer.ours, peer.other, peer.ratio, peer.p20) == ("diffcam-fast, B", "peer", 1.5, None)


def test_hardware_cases_and_libraries_are_those_of_the_rows(tmp_path: Path) -> None:
    gpu = {"device": "cuda", "gpu": "NVIDIA X"}
    rows = [
        cam("diffcam-fast", "1", "1", "1", device="cpu", gpu=""),
        cam("newcomer", "2", "1.5", "2.5", device="cpu", gpu=""),
        cam("diffcam-fast", "1", "1", "1", **gpu),
        cam("diffcam-fast, twice", "3", "2", "4", **gpu),
        cam("newcomer", "0.5", "0.4", "0.6", **gpu),
        cam("plain forward", "0.9", "0.8", "1.1", **gpu),
    ]
    folder = read(tmp_path, cams=rows)
    found = lines(comparisons(folder))
    assert [(one.beside, one.hardware, one.verdicts) for one in found] == [
        ("newcomer", "CPU", "1 faster"),
        ("newcomer", "NVIDIA X", "1 slower"),
        ("the model without maps", "NVIDIA X", "1 even"),
    ]
    made = page(folder)
    assert [p.name for p in made.pictures] == [
        "standings-methods-cpu",
        "standings-methods-nvidia-x",
    ]
    titles = {one.title: one.parts for one in made.sections}
    lost = titles["Where ours is not faster"][1]
    assert isinstance(lost, Table) and [row[2] for row in lost.rows] == ["newcomer"]
    assert "| newcomer | NVIDIA X | 0.50 (0.40 - 0.60) | slower |" in made.markdown()


def test_the_worst_case_is_shown_and_one_round_is_not_the_best(tmp_path: Path) -> None:
    rows = [
        cam("theirs", "2", "1.9", "2.1", method="a"),
        cam("theirs", "0.8", method="b"),
        cam("theirs", "900", "900", "900", method="c", rounds="1"),
    ]
    [line] = lines(comparisons(read(tmp_path, cams=rows)))
    assert line.worst.shown == "0.80"
    assert line.best.shown == "2.00 (1.90 - 2.10)"
    assert line.middle == 2
    assert line.verdicts == "1 faster, 2 no spread (1 below 1)"


def test_many_cases_are_told_together(tmp_path: Path) -> None:
    rows = [
        cam("theirs", str(1 + i / 10), method="ab"[i % 2], model=f"n{i}") for i in range(MANY + 2)
    ]
    made = page(read(tmp_path, cams=rows))
    [section] = [one for one in made.sections if one.title == "Methods"]
    table = section.parts[-1]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["`a`", "`b`"]
    assert table.rows[0][3] == "1.00" and table.rows[1][3] == "1.10"


def test_no_rows_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page(tmp_path).sections == []
    monkeypatch.setattr(standings_cli, "results_folder", lambda: tmp_path)
    done = CliRunner().invoke(bench, ["all"])
    assert done.exit_code == 1 and "no rows" in done.output


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_whole_and_harmless() -> None:
    parts = [
        "a `<b>` and **c**",
        "- x\n- y",
        Table(("h",), [("<script>",)]),
        Picture("p", "s", b""),
    ]
    source = Page("t", "lead", [Section("one", parts)]).html()
    seen = Seen()
    seen.feed(source)
    assert {"script", "link"} & {*seen.tags} == set()
    assert "<code>&lt;b&gt;</code> and <b>c</b>" in source and seen.tags.count("li") == 2
    assert seen.sources == ["data:image/png;base64,"]


def test_bars_and_roofs_say_what_they_were_drawn_from(tmp_path: Path) -> None:
    one = plots.Bar("case", "theirs", 2.0, 1.5, 2.5)
    first = plots.bars([one], "x", "says", "spread")
    other = plots.bars([plots.Bar("case", "theirs", 2.1, 1.5, 2.5)], "x", "says", "spread")
    again = plots.bars([one], "x", "says", "spread")
    assert plots.drawn_from(first.png) == plots.drawn_from(again.png) != ""
    assert plots.drawn_from(first.png) != plots.drawn_from(other.png)
    assert plots.roofline([], "x", "says") is None and plots.growth([], "x", "says") is None


def test_committed_comparisons_count_every_row_of_another() -> None:
    found = comparisons(results_folder())
    for layout in LAYOUTS:
        rows = read_rows(RESULTS / f"{layout.file}.csv")
        mine = [one for one in found if one.file == layout.file]
        if layout.file in ("cams", "kernels", "engine"):
            ours = "diffcam" if layout.file == "kernels" else "diffcam-fast"
            assert len(mine) == sum(row["name"] != ours for row in rows)
        assert len(mine) > 0
    assert all(one.where and one.provenance["commit"] for one in found)


def test_documents_are_current() -> None:
    done = CliRunner().invoke(bench, ["all", "--check"])
    assert done.exit_code == 0, done.output


def test_check_names_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks" / "results"
    read(folder, cams=[cam("theirs", "2", "1.9", "2.1")])
    (tmp_path / "README.md").write_text("<!-- standings: begin, x -->\n<!-- standings: end -->\n")
    monkeypatch.setattr(standings_cli, "results_folder", lambda: folder)
    stale = CliRunner().invoke(bench, ["all", "--check"])
    assert stale.exit_code == 1 and len(stale.stdout.splitlines()) == 3
    assert CliRunner().invoke(bench, ["all", "--report"]).exit_code == 0
    assert CliRunner().invoke(bench, ["all", "--check"]).exit_code == 0
    assert "| Methods | theirs | CPU | 2.00 (1.90 - 2.10) |" in (tmp_path / "README.md").read_text()
    # in a folder of its own, the README stays
    assert CliRunner().invoke(bench, ["all", "--report", str(tmp_path / "o")]).exit_code == 0
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "images",
        "standings.md",
        "standings.html",
    }
    read(folder, cams=[cam("theirs", "2", "1.9", "2.2")])
    assert len(CliRunner().invoke(bench, ["all", "--check"]).stdout.splitlines()) == 3


def test_short_form_has_losses() -> None:
    said = short_form(results_folder())
    assert ("slower" in said) == any(one.verdict == "slower" for one in lost_ones())
    assert len(said.splitlines()) < 40


def lost_ones() -> list[object]:
    return [one for one in comparisons(results_folder()) if one.lost]


def test_blocks() -> None:
    text = "a\n<!-- x: begin, from x.csv -->\n1.5\n<!-- x: end -->\n"
    text += "b <!-- y: begin -->2<!-- y: end -->"
    assert block(text, "x") == "1.5" and block(text, "y") == "2"
    assert block(replaced(text, "x", "new"), "x") == "new"
    assert without_blocks(text) == "a\n\n\n\nb "
    with pytest.raises(MissingBlockError, match="z: begin"):
        block(text, "z")


def test_figures_of_a_ratio() -> None:
    assert [figure(x) for x in (0.987, 1.0, 12.34, 2534.0)] == ["0.99", "1.00", "12.3", "2534"]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# all of standings.md is made from rows
@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name != "standings.md"], ids=lambda p: p.name
)
def test_every_figure_has_a_row_or_a_reason(path: Path) -> None:
    assert unsupported(path.read_text(encoding="utf-8"), RESULTS) == []


def test_figures_are_seen(tmp_path: Path) -> None:
    read(tmp_path, a=[{"ratio": "1.238", "ms": "1500", **SOURCE}])
    good = (
        "It took 1.24 times as long ([rows](a.csv)), 1,500 ms.\n\n"
        "Maps of 7 x 7 cells, Python 3.11, `1.5` s, arXiv 2506.08514.\n\n"
        "```\n9.9 ms\n```\n\n<!-- x: begin -->\n9.9 ms\n<!-- x: end -->\n\n"
        "At 0.60 dollars.\n<!-- figures: 0.60: assumed -->\n"
    )
    assert unsupported(good, tmp_path) == []
    assert [f for p in paragraphs(good) for f in p.figures()] == ["1.24 times", "1,500 ms", "0.60"]
    for bad in (
        "It took 1.25 times as long (a.csv).",
        "It took 1.24 times as long.",
        "| a.csv | 1.3 to 1.24 |",
        # machine and versions are no measurements
        "It took 2 ms (a.csv).",
        "It is at 80 %.",
        "Off by 3e-6.",
        "<!-- figures: 0.60: it is not there -->",
    ):
        assert len(unsupported(bad, tmp_path)) == 1, bad


PLAN = bench_scaling.Plan(targets=(1, 3), layers=("0", "absent"), sizes=(24, 32), side=24)


def test_scaling_of_a_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scaling, "prepared", lambda model, device: pooled())
    monkeypatch.setattr(bench_scaling, "Plan", lambda: PLAN)
    monkeypatch.setattr(scaling_cli, "results_folder", lambda: tmp_path)
    options = ["scaling", "--threads", "1", "--rounds", "2", "--batch-size", "2", "--write"]
    before = torch.get_num_threads()
    try:
        done = CliRunner().invoke(bench, options)
        assert done.exit_code == 0, done.output
    finally:
        torch.set_num_threads(before)
    rows = read_rows(tmp_path / "scaling.csv")
    # in place of those of an earlier run
    scaling_cli._keep(rows)
    assert read_rows(tmp_path / "scaling.csv") == rows
    found = {(row["series"], row["value"], row["targets"], row["size"]) for row in rows}
    assert len(rows) == len(found) == 5
    assert ("targets", "3", "3", "24 x 24") in found and ("layer", "0", "1", "24 x 24") in found
    assert ("image size", "32", "1", "32 x 32") in found
    assert all(float(row["ratio"]) > 0 and row["machine"] for row in rows)
    made = page(tmp_path)
    assert [one.name for one in made.pictures] == ["standings-scaling"]
    assert "| targets | 3 | closed form |" in made.markdown()


def test_scaling_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(bench, ["scaling", "--quick", "--write"])
    assert done.exit_code == 2 and "mean nothing" in done.output
    monkeypatch.setattr(bench_scaling, "SAME", -1.0)
    with pytest.raises(ParityError, match="nothing is timed"):
        [*bench_scaling.measure(pooled(), PLAN, batch_size=1, rounds=1, device="cpu")]


def test_pictures_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read(tmp_path / "benchmarks" / "results", cams=[cam("theirs", "2", "1.9", "2.1")])
    monkeypatch.setattr(standings_cli, "results_folder", lambda: folder)
    images = tmp_path / "o" / "images"
    images.mkdir(parents=True)
    shutil.copy(ROOT / "docs/images/standings-roof.png", images / "standings-gone.png")
    assert CliRunner().invoke(bench, ["all", "--report", str(tmp_path / "o")]).exit_code == 0
    assert [path.name for path in images.iterdir()] == ["standings-methods-cpu.png"]
