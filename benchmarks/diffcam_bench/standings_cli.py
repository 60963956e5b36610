"""`diffcam bench all`: everything that the committed rows say."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffcam_bench.blocks import block, replaced
from diffcam_bench.rows import results_folder
from diffcam_fast.outputs.atomic import atomic_write

if TYPE_CHECKING:
    from diffcam_bench.standings.page import Page

BLOCK = "standings"


@click.command("all")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    is_flag=False,
    flag_value=Path(),
    default=None,
    metavar="[FOLDER]",
    help="Write standings.md, standings.html and images/; without FOLDER into docs/ of the "
    "checkout, and the block of README.md too.",
)
@click.option(
    "--check", is_flag=True, help="Exit code 1 where docs/ and README.md are not current."
)
def all_of_it(report: Path | None, check: bool) -> None:
    """Every comparison of the committed rows on one page, wins and losses alike.

    Measures nothing: the page says which command makes which rows. Prints it as Markdown, unless
    it is written or checked.
    """
    from diffcam_bench.standings.report import page, short_form

    results = results_folder()
    made, root = page(results), results.parents[1]
    if not made.sections:
        raise click.ClickException(f"{results} has no rows: this reads those of a checkout")
    if check:
        stale = _stale(made, short_form(results), root)
        for line in stale:
            click.echo(line)
        if stale:
            raise SystemExit(1)
    elif report is None:
        click.echo(made.markdown(), nl=False)
    elif report == Path():
        _write(made, root / "docs")
        readme = root / "README.md"
        _put(readme, replaced(_read(readme), BLOCK, short_form(results)).encode())
    else:
        _write(made, report)


def _write(made: "Page", folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for old in (folder / "images").glob("standings-*.png"):
        old.unlink()
    for picture in made.pictures:
        _put(folder / "images" / f"{picture.name}.png", picture.png)
    _put(folder / "standings.md", made.markdown().encode())
    _put(folder / "standings.html", made.html().encode())


def _read(path: Path) -> str:
    """The text of a document; nothing where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _put(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
    click.echo(f"wrote {path}", err=True)


def _stale(made: "Page", short: str, root: Path) -> list[str]:
    """What is not as the rows have it, and what makes it so."""
    from diffcam_bench.standings.report import stale_pictures

    document, readme = root / "docs" / "standings.md", root / "README.md"
    found = stale_pictures(made.pictures, document.parent / "images")
    if _read(document) != made.markdown():
        found.append(document)
    if block(_read(readme), BLOCK) != short.strip():
        found.append(readme)
    return [f"{path} is not what the rows say: diffcam bench all --report" for path in found]
