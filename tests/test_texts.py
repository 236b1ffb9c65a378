# SPDX-License-Identifier: Apache-2.0
"""Files of texts: what is read, what is refused and why, and splits that never mix training and test."""

import json
import re
from collections import Counter

import pytest

from fastprompt.data import few_shot_texts, read_texts, sms_spam
from fastprompt.errors import DataError


def write(folder, name, content, encoding="utf-8"):
    file = folder / name
    file.write_bytes(content.encode(encoding))
    return file


def table(folder, sizes):
    words = "abcdefghijklmnopqrstuvwxyz"
    rows = [f"{name} {a}{b},{name}" for name, n in sizes.items() for a, b in [divmod(i, 26) for i in range(n)]]
    rows = [re.sub(r"(\d+),", lambda m: f"{''.join(words[int(d)] for d in m[1])},", row) for row in rows]
    return read_texts(write(folder, "table.csv", "text,label\n" + "\n".join(rows)))


def test_csv_and_jsonl_give_the_same(tmp_path):
    rows = [("it is, well, fine", "good"), ('a "quoted"\nline', "bad"), ("ünïcode ☃", "good")]
    lines = [json.dumps({"id": i, "text": t, "label": y}) for i, (t, y) in enumerate(rows)]
    jsonl = read_texts(write(tmp_path, "a.jsonl", "\n".join(lines) + "\n\n"))
    quoted = ['{},"{}"'.format(y, t.replace('"', '""')) for t, y in rows]
    csv = read_texts(write(tmp_path, "a.CSV", "label,text\r\n" + "\r\n".join(quoted), "utf-8-sig"))
    assert csv.samples == jsonl.samples and csv.classes == jsonl.classes == ("bad", "good")
    assert [(s.text, csv.classes[s.label]) for s in csv.samples] == rows


def test_whole_numbers_are_class_names(tmp_path):
    lines = [json.dumps({"text": t, "label": y}) for t, y in (("no", 0), ("yes", 1))]
    assert read_texts(write(tmp_path, "a.jsonl", "\n".join(lines))).classes == ("0", "1")


def test_texts_that_differ_in_case_digits_and_punctuation_count_once(tmp_path):
    content = "text,label\nCall 0800 now!,spam\ncall 0900 NOW,ham\ncall them now,ham\n123,ham\n124,spam\n"
    data = read_texts(write(tmp_path, "a.csv", content))
    assert [s.text for s in data.samples] == ["Call 0800 now!", "call them now", "123", "124"]
    assert data.repeated == 1 and data.classes[data.samples[0].label] == "spam"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"got a\.txt, expected a file that ends in \.csv or \.jsonl"),
        ("a.csv", "text,klass\nx,y\n", r"columns 'text', 'klass', expected 'text' and 'label'"),
        ("a.csv", "", r"columns nothing, expected"),
        ("a.csv", "text,label\n", "has no texts, expected texts of at least two classes"),
        ("a.csv", "text,label\nx,y\nz,y\n", "has only the class 'y'"),
        ("a.csv", "text,label\nx,y\n  ,z\n", "line 3 of .* has text '  '"),
        ("a.csv", "text,label\nx,y\nz\n", "line 3 of .* label None"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text"\n', "line 2 of .* is not JSON"),
        ("a.jsonl", '["x"]', "line 1 of .* has list, expected the keys 'text' and 'label'"),
        ("a.jsonl", '{"text": "x"}', "line 1 of .* has 'text', expected the keys"),
        ("a.jsonl", '{"text": 3, "label": "y"}', "line 1 of .* has text 3"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path, name, content))


def test_missing_file_and_wrong_encoding_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_texts(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_texts(write(tmp_path, "a.csv", "text,label\ncafé,y\n", "latin-1"))


def test_the_test_part_is_balanced_and_the_same_for_every_seed_and_shots(tmp_path):
    data = table(tmp_path, {"x": 60, "y": 20, "z": 31})
    splits = [few_shot_texts(data, shots, seed) for shots, seed in ((3, 0), (3, 1), (9, 0))]
    assert Counter(s.label for s in splits[0].evaluation) == {0: 10, 1: 10, 2: 10}
    assert splits[0].evaluation == splits[1].evaluation == splits[2].evaluation
    assert splits[0].train != splits[1].train and set(splits[0].train) < set(splits[2].train)
    assert Counter(s.label for s in splits[2].train) == {0: 9, 1: 9, 2: 9}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_train_validation_and_test_are_apart(tmp_path, seed):
    data = table(tmp_path, {"x": 60, "y": 20})
    validation = few_shot_texts(data, 6, seed, 16, "validation")
    test = few_shot_texts(data, 6, seed, 16)
    parts = [test.train, test.evaluation, validation.evaluation]
    assert test.train == validation.train
    assert len(set().union(*parts)) == sum(map(len, parts))
    # Class y has 20 - 8 - 6 texts left to validate on, fewer than its 8 to test.
    assert Counter(s.label for s in validation.evaluation) == {0: 6, 1: 6}


def test_an_uneven_eval_size_gives_the_first_classes_one_more(tmp_path):
    data = table(tmp_path, {"x": 20, "y": 20, "z": 20})
    assert Counter(s.label for s in few_shot_texts(data, 2, 0, 8).evaluation) == {0: 3, 1: 3, 2: 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots: got 0"),
        ({"eval_size": 0}, "eval_size: got 0"),
        ({"part": "train"}, "part: got 'train'"),
        ({"shots": 11}, "class 'y' of .* has 20 texts, expected 21: 11 shots and 10 to test"),
        ({"shots": 10, "part": "validation"}, "expected 21: 10 shots and 10 to test .* and 1 to validate"),
        ({"eval_size": 38}, "class 'y'"),
    ],
)
def test_splits_that_cannot_be_are_refused(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        few_shot_texts(table(tmp_path, {"x": 60, "y": 20}), **({"shots": 3, "seed": 0} | arguments))


@pytest.mark.assets
def test_sms_spam_is_what_its_authors_describe():
    data = sms_spam()
    assert data.classes == ("ham", "spam")
    # 5,572 rows of the file, less near copies.
    assert len(data) + data.repeated == 5572
    assert Counter(s.label for s in data.samples)[1] == 590
    assert any("£" in s.text or "\x92" in s.text for s in data.samples)
