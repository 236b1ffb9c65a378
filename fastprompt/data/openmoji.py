# SPDX-License-Identifier: Apache-2.0
"""OpenMoji drawings with their names, and a classification task on them whose test drawings no pretraining sees.

Classes are Unicode's subcategories of at least 20 drawings. Emoji are split by *family*: an emoji with all its skin
tones, genders and directions, and emoji drawn the same (Norway's flag is Svalbard's). The split is drawn before any
pretraining, from family names alone:

- ``test``: at most 20 emoji of each class. Nothing of their families is in the other parts, in any style.
- ``pool``: the other emoji of the classes, at least 16 of each, from which few-shot training sets are drawn.
- ``pretraining``: the pool, and all emoji outside the classes. So few-shot drawings are known to the pretrained model,
  as photos of common things are to CLIP; a class of 20 drawings cannot give 16 shots otherwise.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastprompt.data import assets
from fastprompt.data.images import Sample, check_count
from fastprompt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_CLASS = 20
"""Drawings that make a subcategory a class."""
MIN_POOL = 16
"""Emoji of each class that are left to draw few-shot sets from."""
MAX_TEST = 20
"""Test emoji of each class, at most."""

Style = Literal["colour", "outline"]
Part = Literal["all", "base", "new"]

_SPLIT_SEED = "fastprompt.openmoji/1"
_SVG = "http://www.w3.org/2000/svg"
# What fills shapes; the rest of a drawing are its lines.
_FILLS = re.compile(r"color|skin|hair")
_ZWJ, _EMOJI_STYLE = "-200D-", "FE0F"
# Men and women are drawn as the person is, boys and girls as the child; signs of gender and direction follow.
_SAME_PERSON = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_SIGNS = {"2640", "2642", "27A1"}


@dataclass(frozen=True)
class Emoji:
    """One emoji with its drawings.

    Args:
        code: code points in hexadecimal, joined by ``-``: the name of the file.
        file: the colour SVG.
        names: its Unicode name and its short names, in lower case, without repetition.
        category: one of Unicode's nine, such as ``Food & Drink``.
        subcategory: such as ``food-fruit``.
        family: what is shared by emoji that are kept on one side of the split.
        tones: drawings of the same in other skin tones.
    """

    code: str
    file: Path
    names: tuple[str, ...]
    category: str
    subcategory: str
    family: str
    tones: tuple[Path, ...]


@dataclass(frozen=True)
class OpenMoji:
    """All emoji, sorted by code, and the task on them; see the module.

    Args:
        root: the folder of the drawings.
        emoji: every emoji once; skin tones are inside.
    """

    root: Path
    emoji: tuple[Emoji, ...]

    @cached_property
    def subcategories(self) -> tuple[str, ...]:
        """Unicode's names of the classes, sorted; a label is an index into them."""
        counts = Counter(item.subcategory for item in self.emoji)
        return tuple(sorted(name for name, count in counts.items() if count >= MIN_CLASS))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in words, in the order of ``subcategories``."""
        return tuple(map(class_name, self.subcategories))

    @cached_property
    def test(self) -> tuple[Sample, ...]:
        """Test drawings (colour) with labels."""
        return self._samples(item for item in self.emoji if item.family in self._test_families)

    @cached_property
    def pool(self) -> tuple[Sample, ...]:
        """Drawings (colour) with labels that few-shot sets are drawn from."""
        return self._samples(self.pretraining)

    @cached_property
    def pretraining(self) -> tuple[Emoji, ...]:
        """Every emoji of a family without a test emoji."""
        return tuple(item for item in self.emoji if item.family not in self._test_families)

    def few_shot(self, shots: int, seed: int) -> list[Sample]:
        """Draw ``shots`` drawings of each class from the pool; a smaller set of one seed is part of a larger one.

        Args:
            shots: drawings of each class, 1 to ``MIN_POOL``.
            seed: the draw.

        Raises:
            DataError: ``shots`` is out of range.
        """
        check_count("shots", shots)
        if shots > MIN_POOL:
            raise DataError(f"shots: got {shots}, expected at most {MIN_POOL}: what the smallest class has")
        drawn: list[Sample] = []
        for label, name in enumerate(self.subcategories):
            group = [sample for sample in self.pool if sample.label == label]
            random.Random(f"{seed}/{name}").shuffle(group)
            drawn += group[:shots]
        return drawn

    @cached_property
    def _test_families(self) -> frozenset[str]:
        subcategories: dict[str, set[str]] = defaultdict(set)
        for item in self.emoji:
            subcategories[item.family].add(item.subcategory)
        chosen: set[str] = set()
        for name in self.subcategories:
            sizes = Counter(item.family for item in self.emoji if item.subcategory == name)
            room = min(sizes.total() - MIN_POOL, MAX_TEST)
            # A family of two subcategories (a person and a couple that are drawn the same) is left to pretraining.
            for family in sorted((family for family in sizes if len(subcategories[family]) == 1), key=_draw):
                if sizes[family] <= room:
                    room -= sizes[family]
                    chosen.add(family)
        return frozenset(chosen)

    def _samples(self, emoji: Iterable[Emoji]) -> tuple[Sample, ...]:
        label = {name: index for index, name in enumerate(self.subcategories)}
        found = [Sample(item.file, label[item.subcategory]) for item in emoji if item.subcategory in label]
        return tuple(sorted(found, key=lambda sample: (sample.label, sample.file.name)))

    def __repr__(self) -> str:
        return f"OpenMoji({str(self.root)!r}: {len(self.emoji)} emoji, {len(self.subcategories)} classes)"


def load_openmoji(*, cache_dir: str | Path | None = None) -> OpenMoji:
    """Return the drawings of the ``openmoji`` asset with the names of the ``emoji-names`` asset.

    Args:
        cache_dir: folder of all assets; default ``assets.default_cache_dir()``.

    Raises:
        AssetError: an asset is not there; the message holds the command that fetches it.
    """
    root = assets.entry("openmoji", cache_dir=cache_dir)
    names = assets.entry("emoji-names", cache_dir=cache_dir)
    return read_openmoji(root, json.loads(names.read_text(encoding="utf-8")))


def read_openmoji(root: Path, records: Sequence[dict[str, Any]]) -> OpenMoji:
    """Match a folder of drawings with records of emoji.

    Args:
        root: SVG files named by code points.
        records: with the keys ``unified``, ``name``, ``short_names``, ``category``, ``subcategory`` and, where there
            are skin tones, ``skin_variations``; as in iamcal's ``emoji.json``.

    Raises:
        DataError: no record has a drawing.
    """
    files = {_plain(file.stem): file for file in root.glob("*.svg")}
    found = [(record, files[_plain(record["unified"])]) for record in records if _plain(record["unified"]) in files]
    if not found:
        raise DataError(f"root: {root} has no drawing of any of {len(records)} emoji; expected files like 1F600.svg")
    drawn_alike: dict[str, list[str]] = defaultdict(list)
    for record, file in found:
        drawn_alike[hashlib.sha256(file.read_bytes()).hexdigest()].append(_person(record["unified"]))
    families = _merged(drawn_alike.values())
    emoji = [
        Emoji(
            code=file.stem,
            file=file,
            names=_names(record),
            category=record["category"],
            subcategory=record["subcategory"],
            family=families[_person(record["unified"])],
            tones=tuple(
                files[_plain(tone["unified"])]
                for tone in record.get("skin_variations", {}).values()
                if _plain(tone["unified"]) in files
            ),
        )
        for record, file in found
    ]
    return OpenMoji(root, tuple(sorted(emoji, key=lambda item: item.code)))


def class_name(subcategory: str) -> str:
    """Return a subcategory in words.

    Example:
        >>> class_name("sky & weather"), class_name("food-fruit")
        ('sky and weather', 'food fruit')
    """
    return subcategory.replace("&", "and").replace("-", " ")


def class_part(classes: Sequence[str], part: Part) -> list[int]:
    """Return the labels of a part of the classes: every other one is base, the rest are new.

    Args:
        classes: class names; neighbours are alike where they are sorted, so both parts get some of each kind.
        part: ``"all"``, ``"base"`` or ``"new"``.

    Example:
        >>> class_part("abcde", "base"), class_part("abcde", "new")
        ([0, 2, 4], [1, 3])
    """
    if part not in ("all", "base", "new"):
        raise DataError(f"part: got {part!r}, expected 'all', 'base' or 'new'")
    labels = list(range(len(classes)))
    return {"all": labels, "base": labels[::2], "new": labels[1::2]}[part]


def only_classes(samples: Iterable[Sample], labels: Sequence[int]) -> list[Sample]:
    """Return the samples of some classes, labelled by place in ``labels``.

    Example:
        >>> [sample.label for sample in only_classes([Sample(Path("a"), 3), Sample(Path("b"), 4)], [1, 3])]
        [1]
    """
    place = {label: index for index, label in enumerate(labels)}
    return [Sample(sample.file, place[sample.label]) for sample in samples if sample.label in place]


def draw(file: str | Path, *, size: int = 64, style: Style = "colour") -> Any:
    """Rasterise a drawing on white as an RGB ``PIL.Image`` of ``size`` x ``size``.

    Args:
        file: an SVG of OpenMoji.
        size: pixels a side.
        style: ``"colour"`` as drawn, or ``"outline"``: without the groups that fill (colour, skin and hair).

    Raises:
        DataError: the file is missing or no drawing of OpenMoji, or an argument is out of range.
        ImportError: ``resvg-py`` or Pillow is not installed.
    """
    check_count("size", size)
    if style not in ("colour", "outline"):
        raise DataError(f"style: got {style!r}, expected 'colour' or 'outline'")
    try:
        import PIL.Image
        import resvg_py
    except ImportError as error:
        raise ImportError('rasterising needs resvg-py and Pillow: pip install "fastprompt[demo]"') from error
    try:
        svg = Path(file).read_text(encoding="utf-8")
        if style == "outline":
            svg = outline(svg)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"cannot draw {file}: {error}; fetch the openmoji asset again") from error
    return PIL.Image.open(io.BytesIO(bytes(png))).convert("RGB")


def drawer(size: int, style: Style = "colour") -> Callable[[Path], Any]:
    """Return ``draw`` with its options set, for ``ImageDataset(samples, classes, transform, read=drawer(64))``."""
    return partial(draw, size=size, style=style)


def outline(svg: str) -> str:
    """Return a drawing's SVG without the groups of colour, skin and hair: OpenMoji's line drawing.

    Example:
        >>> outline('<svg xmlns="http://www.w3.org/2000/svg"><g id="color"><path /></g><g id="line" /></svg>')
        '<svg xmlns="http://www.w3.org/2000/svg"><g id="line" /></svg>'
    """
    root = ElementTree.fromstring(svg)
    for group in [child for child in root if _FILLS.match(child.get("id", ""))]:
        root.remove(group)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def write_image_folder(
    samples: Iterable[Sample], classes: Sequence[str], root: str | Path, *, size: int = 64, style: Style = "colour"
) -> Path:
    """Write drawings as ``root/<class>/<code>.png``, which ``ImageFolder`` and the command line read.

    Args:
        samples: drawings and labels.
        classes: class names; labels index it.
        root: a new or empty folder.
        size: pixels a side.
        style: as in ``draw``.

    Returns:
        The folder.

    Raises:
        DataError: the folder has files already.
    """
    folder = Path(root)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"root: {folder} is not empty, expected a new folder: old images would be taken for new ones")
    for sample in samples:
        target = folder / classes[sample.label] / f"{sample.file.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(sample.file, size=size, style=style).save(target)
    return folder


def _plain(code: str) -> str:
    """Code points without the sign that asks for a picture: files and records do not agree on it."""
    return "-".join(point for point in code.split("-") if point != _EMOJI_STYLE)


def _person(code: str) -> str:
    """What an emoji's variants by gender and direction share."""
    parts = [_SAME_PERSON.get(part, part) for part in _plain(code).split(_ZWJ)]
    # A sign alone is an emoji of its own.
    return _ZWJ.join(part for part in parts if part not in _SIGNS) or _plain(code)


def _merged(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return for each name the first name of all that are in one group with it, directly or through others."""
    member: dict[str, set[str]] = {}
    for group in groups:
        whole = set(group).union(*(member[name] for name in group if name in member))
        member |= dict.fromkeys(whole, whole)
    return {name: min(whole) for name, whole in member.items()}


def _names(record: dict[str, Any]) -> tuple[str, ...]:
    names = [record["name"], *record["short_names"]]
    words = [" ".join(re.sub(r"[^a-z0-9'.&+]+", " ", name.lower().replace("-", " ")).split()) for name in names]
    return tuple(dict.fromkeys(filter(None, words)))


def _draw(family: str) -> str:
    return hashlib.sha256(f"{_SPLIT_SEED}/{family}".encode()).hexdigest()
