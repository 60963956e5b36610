"""The command line: ``diffcam explain`` and ``diffcam inspect``."""
