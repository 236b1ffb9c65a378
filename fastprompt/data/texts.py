# SPDX-License-Identifier: Apache-2.0
"""Files of labelled texts, and few-shot splits of them whose test part no seed ever trains on."""

import csv
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastprompt.data import assets
from fastprompt.errors import DataError

# Draws the test part of every split.
_TEST_SEED = "test"


class TextSample(NamedTuple):
    """One text and the index of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class Texts:
    """Labelled texts, each once.

    Args:
        root: the file that they come from.
        classes: class names, sorted; a label is an index into it.
        samples: texts in the order of the file.
        repeated: texts left out because an earlier one is the same but for case, digits and punctuation; a copy on
            both sides of a split would be counted as learned.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[TextSample, ...]
    repeated: int

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"Texts({str(self.root)!r}: {len(self)} texts, classes {', '.join(self.classes)})"


class TextSplit(NamedTuple):
    """Training and evaluation samples, without overlap, ordered by class."""

    train: list[TextSample]
    evaluation: list[TextSample]


def read_texts(file: str | Path) -> Texts:
    r"""Read a CSV file with the columns ``text`` and ``label``, or a JSONL file with these keys (UTF-8).

    Args:
        file: ends in ``.csv`` or ``.jsonl``; other columns and keys are left alone.

    Raises:
        DataError: no such file, another ending, an unreadable line, a missing column, an empty text or label, or fewer
            than two classes.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "toy.csv"
        >>> _ = file.write_text("text,label\nfine,good\nawful,bad\nFine!,good\n")
        >>> data = read_texts(file)
        >>> data.classes, len(data), data.repeated
        (('bad', 'good'), 2, 1)
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"data: {path} is not a file; expected a .csv or .jsonl file with text and label")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"data: got {path.name}, expected a file that ends in .csv or .jsonl")
    return _collect(path, readers[path.suffix.lower()](path, "utf-8-sig", "text", "label"))


def sms_spam(*, cache_dir: str | Path | None = None) -> Texts:
    """Return the SMS Spam Collection of the ``sms-spam`` asset: real text messages, labelled ``ham`` or ``spam``.

    Almeida, Gómez Hidalgo and Yamakami, 2011 (https://doi.org/10.1145/2034691.2034742).

    Args:
        cache_dir: folder of all assets; default ``assets.default_cache_dir()``.

    Raises:
        AssetError: the asset is not there; the message holds the command that fetches it.
    """
    path = assets.entry("sms-spam", cache_dir=cache_dir)
    return _collect(path, _csv_rows(path, "latin-1", "v2", "v1"))


def few_shot_texts(
    data: Texts,
    shots: int,
    seed: int,
    eval_size: int | None = None,
    part: Literal["test", "validation"] = "test",
) -> TextSplit:
    """Draw a balanced test part that no seed changes, then from the rest ``shots`` training texts of each class.

    Settings are chosen on ``part="validation"``, drawn by ``seed`` from what neither trains nor tests; a test text is
    never seen there.

    Args:
        data: the texts.
        shots: training texts of each class, at least 1.
        seed: draws training and validation texts.
        eval_size: evaluation texts in all, balanced over the classes. Default: half of the smallest class, of each.
        part: what to evaluate on, ``"test"`` or ``"validation"`` (of the same size, or smaller where a class has no
            more texts).

    Raises:
        DataError: a bad argument, or a class with too few texts for it.
    """
    for name, value in (("shots", shots), ("eval_size", eval_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DataError(f"{name}: got {value!r}, expected an integer of at least 1")
    if part not in ("test", "validation"):
        raise DataError(f"part: got {part!r}, expected 'test' or 'validation'")
    groups = [[s for s in data.samples if s.label == label] for label in range(len(data.classes))]
    size = max(1, min(map(len, groups)) // 2) * len(groups) if eval_size is None else eval_size
    train: list[TextSample] = []
    test: list[TextSample] = []
    rests: list[list[TextSample]] = []
    for label, (name, group) in enumerate(zip(data.classes, groups, strict=True)):
        share = size // len(groups) + (label < size % len(groups))
        needed = shots + share + (part == "validation")
        if len(group) < needed:
            raise DataError(
                f"class {name!r} of {data.root} has {len(group)} texts, expected {needed}: {shots} shots and {share} "
                f"to test (its part of eval_size){' and 1 to validate' if part == 'validation' else ''}; lower shots "
                "or eval_size, or add texts"
            )
        random.Random(f"{_TEST_SEED}/{name}").shuffle(group)
        kept = len(group) - share
        rest = group[:kept]
        random.Random(f"{seed}/{name}").shuffle(rest)
        train += rest[:shots]
        test += group[kept:]
        rests.append(rest[shots:])
    if part == "test":
        return TextSplit(train, test)
    most = min(max(1, size // len(groups)), *map(len, rests))
    return TextSplit(train, [sample for rest in rests for sample in rest[:most]])


def _csv_rows(path: Path, encoding: str, text: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    with open(path, encoding=encoding, newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (text, label) if name not in (reader.fieldnames or ())]
        if missing:
            got = ", ".join(map(repr, reader.fieldnames or ())) or "nothing"
            raise DataError(
                f"data: the first line of {path} has the columns {got}, expected {text!r} and {label!r}; rename them"
            )
        for row in reader:
            yield reader.line_num, row[text], row[label]


def _jsonl_rows(path: Path, encoding: str, text: str, label: str) -> Iterator[tuple[int, Any, Any]]:
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"data: line {number} of {path} is not JSON ({error}); expected an object") from error
            if not isinstance(row, dict) or not {text, label} <= row.keys():
                got = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"data: line {number} of {path} has {got}, expected the keys {text!r} and {label!r}")
            yield number, row[text], row[label]


def _collect(path: Path, rows: Iterable[tuple[int, Any, Any]]) -> Texts:
    found: dict[str, tuple[str, str]] = {}
    count = 0
    try:
        for number, text, label in rows:
            if not isinstance(text, str) or not text.strip() or label is None or not str(label).strip():
                raise DataError(
                    f"data: line {number} of {path} has text {text!r} and label {label!r}, expected neither to be "
                    "empty; fill or remove the line"
                )
            count += 1
            found.setdefault(_key(text), (text.strip(), str(label).strip()))
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    classes = tuple(sorted({label for _, label in found.values()}))
    if len(classes) < 2:
        got = f"only the class {classes[0]!r}" if classes else "no texts"
        raise DataError(f"data: {path} has {got}, expected texts of at least two classes")
    samples = tuple(TextSample(text, classes.index(label)) for text, label in found.values())
    return Texts(path, classes, samples, count - len(samples))


def _key(text: str) -> str:
    """What texts share that differ in case, digits and punctuation alone; without a letter, the text itself."""
    return re.sub(r"[\W\d_]+", " ", text.casefold()).strip() or text.strip()
