"""Where networks come from: hubs, exported programs, a user's own code, the default network."""

from diffcam_fast.models.labels import find_target, imagenet_labels, read_labels
from diffcam_fast.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "find_target", "imagenet_labels", "load_model", "read_labels"]
