"""``diffcam``: the group of commands."""

from importlib import import_module

import click

from diffcam_fast import __version__
from diffcam_fast.cli.explain import explain
from diffcam_fast.cli.inspect import inspect

# Imported when they are called.
_LAZY = {
    "bench": "diffcam_bench.cli",
    "export": "diffcam_export.cli",
    "serve": "diffcam_fast.cli.serve",
    "verify": "diffcam_export.verify_cli",
}


class _Commands(click.Group):
    """The commands, with those whose packages lie above this one and are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LAZY])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _LAZY:
            return super().get_command(ctx, name)
        command: click.Command = getattr(import_module(_LAZY[name]), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="diffcam")
def main() -> None:
    """Shows where an image classifier looked, for every prediction.

    Exit status: 0 all is well, 1 the run could not go on, 2 wrong usage, 3 some images failed,
    130 stopped by Ctrl-C.
    """


main.add_command(explain)
main.add_command(inspect)
