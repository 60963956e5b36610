"""What a command says to people, all of it on standard error, so that output can be piped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click


def printable(text: str) -> str:
    r"""The text with what no terminal takes spelt out: a file name need not be valid UTF-8.

    Example:
        >>> printable("caf\udce9.jpg") == "caf" + chr(92) + "udce9.jpg"
        True
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shortened(chain: str) -> str:
    """A chain ``a -> b -> ...``, its middle counted where it is long.

    Example:
        >>> shortened(" -> ".join("abcdefghij"))
        'a -> b -> c -> d -> ... 3 more ... -> h -> i -> j'
    """
    steps = chain.split(" -> ")
    if len(steps) > 8:
        steps[4:-3] = [f"... {len(steps) - 7} more ..."]
    return " -> ".join(steps)


@dataclass(frozen=True)
class Console:
    """Messages and progress on standard error.

    Attributes:
        verbose: Also say why (``-v``).
        bar: Show a progress bar where standard error is a terminal.
    """

    verbose: bool = False
    bar: bool = True

    def say(self, text: str) -> None:
        """Writes a line, above the progress bar if there is one."""
        text = printable(text)
        if self._on_terminal():
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                click.echo(text, err=True)
        else:
            click.echo(text, err=True)

    def why(self, text: str) -> None:
        """Writes a line where the user asked for reasons."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[int], object]]:
        """A bar of ``total`` images with their rate, None for no end; silent where there is no
        terminal.

        Yields:
            A function to call with the number of images that are finished since the last call.
        """
        from tqdm import tqdm

        hidden = not (self.bar and self._on_terminal())
        with tqdm(total=total, unit="img", disable=hidden, file=sys.stderr) as bar:
            yield bar.update

    @staticmethod
    def _on_terminal() -> bool:
        return sys.stderr.isatty()
