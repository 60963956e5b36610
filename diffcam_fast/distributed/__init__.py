"""More than one machine: a Ray dataset of images in, a Ray dataset of maps out."""

from diffcam_fast.distributed.dataset import explain
from diffcam_fast.distributed.rows import dataset_schema

__all__ = ["dataset_schema", "explain"]
