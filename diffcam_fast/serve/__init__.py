"""A small HTTP service: an image in, maps and pictures out."""

from diffcam_fast.serve.app import Limits, create_app

__all__ = ["Limits", "create_app"]
