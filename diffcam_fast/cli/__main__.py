"""``python -m diffcam_fast.cli``, the same as ``diffcam``."""

from diffcam_fast.cli.main import main

main(prog_name="diffcam")
