# SPDX-License-Identifier: Apache-2.0
"""Image folders and downloadable assets."""

from fastprompt.data.assets import ASSETS, Asset, AssetStatus
from fastprompt.data.images import DecodedImages, ImageDataset, ImageFolder, Sample, few_shot, textile

__all__ = [
    "ASSETS",
    "Asset",
    "AssetStatus",
    "DecodedImages",
    "ImageDataset",
    "ImageFolder",
    "Sample",
    "few_shot",
    "textile",
]
