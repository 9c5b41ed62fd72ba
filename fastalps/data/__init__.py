"""Reading images and videos: uint8 CPU tensors, with the splits and labels of the protocols."""

from __future__ import annotations

from fastalps.data.containers import Clip, OneClassData
from fastalps.data.folder import load_folder
from fastalps.data.frames import iter_frames, read_frames, read_images
from fastalps.data.images import FASHION_NAMES, IMAGE_DATASETS, load_images
from fastalps.data.listing import IMAGE_SUFFIXES
from fastalps.data.motion import motion_frames, still_background
from fastalps.data.patches import moving_patches, patch_task
from fastalps.data.splits import PROTOCOLS
from fastalps.data.ucsd import load_ucsd

__all__ = [
    "FASHION_NAMES",
    "IMAGE_DATASETS",
    "IMAGE_SUFFIXES",
    "PROTOCOLS",
    "Clip",
    "OneClassData",
    "iter_frames",
    "load_folder",
    "load_images",
    "load_ucsd",
    "motion_frames",
    "moving_patches",
    "patch_task",
    "read_frames",
    "read_images",
    "still_background",
]
