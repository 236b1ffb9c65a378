# SPDX-License-Identifier: Apache-2.0
"""Attach an image adapter to a diffusers UNet in place, train it, save it, and take it off without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fastprompt.diffusers.sites import find_sites
from fastprompt.diffusers.swap import PROJECTION, Swap
from fastprompt.errors import AttachError, CheckpointError
from fastprompt.hf.checkpoint import check_tensors, compare_base, read, sample, write
from fastprompt.recipes.ip_adapter import IPAdapter
