"""``diffcam``: the group of commands."""

import click

from diffcam_fast import __version__
from diffcam_fast.cli.explain import explain
from diffcam_fast.cli.inspect import inspect


class _Commands(click.Group):
    """The commands, with `bench`, whose package lies above this one and is imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "bench"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name != "bench":
            return super().get_command(ctx, name)
        from diffcam_bench.cli import bench

        return bench


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="diffcam")
def main() -> None:
    """Shows where an image classifier looked, for every prediction.

    Exit status: 0 all is well, 1 the run could not go on, 2 wrong usage, 3 some images failed,
    130 stopped by Ctrl-C.
    """


main.add_command(explain)
main.add_command(inspect)
