"""Blocks of a document that are made from rows, between `<!-- NAME: begin ... -->` and
`<!-- NAME: end -->`.
"""

import re

import click


class MissingBlockError(click.ClickException):
    """A document lacks the markers that something is to be written between."""


def block(text: str, name: str) -> str:
    """What stands in a block, without the space around it.

    Raises:
        MissingBlockError: the document has no such block.

    Example:
        >>> block("a <!-- x: begin, from x.csv -->b<!-- x: end --> c", "x")
        'b'
    """
    return _found(text, name)["body"].strip()


def replaced(text: str, name: str, body: str) -> str:
    r"""The document with something else in a block; its markers stay.

    Raises:
        MissingBlockError: the document has no such block.

    Example:
        >>> replaced("a\n<!-- x: begin -->\n\nold\n\n<!-- x: end -->\n", "x", "new")
        'a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\n'
    """
    found = _found(text, name)
    return f"{text[: found.start('body')]}\n\n{body.strip()}\n\n{text[found.end('body') :]}"


def without_blocks(text: str) -> str:
    """The document without what is made from rows; lines stay where they are."""
    return re.sub(
        _pattern(r"[\w-]+"), lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL
    )


def _found(text: str, name: str) -> re.Match[str]:
    found = re.search(_pattern(re.escape(name)), text, flags=re.DOTALL)
    if found is None:
        raise MissingBlockError(
            f"there is no block <!-- {name}: begin --> ... <!-- {name}: end -->"
        )
    return found


def _pattern(name: str) -> str:
    return rf"<!-- (?P<name>{name}): begin[^>]*-->(?P<body>.*?)<!-- (?P=name): end -->"
