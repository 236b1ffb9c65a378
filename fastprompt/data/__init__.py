# SPDX-License-Identifier: Apache-2.0
"""Image folders, files of texts, and downloadable assets."""

from fastprompt.data.assets import ASSETS, Asset, AssetStatus
from fastprompt.data.images import DecodedImages, ImageDataset, ImageFolder, Sample, few_shot, textile
from fastprompt.data.openmoji import OpenMoji, load_openmoji
from fastprompt.data.texts import Texts, TextSample, few_shot_texts, read_texts, sms_spam

__all__ = [
    "ASSETS",
    "Asset",
    "AssetStatus",
    "DecodedImages",
    "ImageDataset",
    "ImageFolder",
    "OpenMoji",
    "Sample",
    "TextSample",
    "Texts",
    "few_shot",
    "few_shot_texts",
    "load_openmoji",
    "read_texts",
    "sms_spam",
    "textile",
]
