# SPDX-License-Identifier: Apache-2.0
"""The OpenMoji task: who is on which side of the split, how drawings look, and how sets are drawn."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastprompt.data import ImageDataset, ImageFolder
from fastprompt.data.openmoji import (
    MAX_TEST,
    MIN_POOL,
    class_part,
    draw,
    drawer,
    load_openmoji,
    only_classes,
    outline,
    read_openmoji,
    write_image_folder,
)
from fastprompt.errors import DataError

SVG = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
  <g id="color"><rect x="8" y="8" width="56" height="56" fill="{}"/></g>
  <g id="hair"><rect x="8" y="8" width="9" height="9" fill="#a57939"/></g>
  <g id="skin-shadow"><rect x="9" y="9" width="9" height="9" fill="#d22f27"/></g>
  <g id="line"><rect x="8" y="8" width="56" height="56" fill="none" stroke="#000" stroke-width="2"/></g>
</svg>"""


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def record(code, subcategory="person-sport", tones=(), name="SOME NAME"):
    variations = {tone: {"unified": f"{code}-{tone}"} for tone in tones}
    names = {"unified": code, "name": name, "short_names": ["some_name", "some-alias"]}
    return names | {"category": "People & Body", "subcategory": subcategory, "skin_variations": variations}


@pytest.fixture
def folder(tmp_path):
    """Writes drawings by code; the same number gives the same drawing."""

    def write(codes):
        for code, shade in codes.items():
            (tmp_path / f"{code}.svg").write_text(SVG.format(f"#00{shade:04x}"))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def real():
    return load_openmoji()


def test_variants_follow_their_family(folder):
    codes = ["1F3C3", "1F3C3-1F3FB", "1F3C3-200D-2640-FE0F", "1F3C3-200D-27A1-FE0F", "1F468", "1F469", "1F9D1", "2640"]
    root = folder({code: number for number, code in enumerate(codes)})
    records = [record(code, tones=("1F3FB",) if code == "1F3C3" else ()) for code in codes if "1F3FB" not in code]
    data = read_openmoji(root, records)
    families = {item.code: item.family for item in data.emoji}
    assert "1F3C3-1F3FB" not in families
    assert [tone.stem for tone in data.emoji[[*families].index("1F3C3")].tones] == ["1F3C3-1F3FB"]
    assert families["1F3C3"] == families["1F3C3-200D-2640-FE0F"] == families["1F3C3-200D-27A1-FE0F"]
    assert families["1F468"] == families["1F469"] == families["1F9D1"]
    assert len(set(families.values())) == 3


def test_emoji_drawn_alike_are_one_family_also_through_others(folder):
    # 1 is drawn as 2, 3 as 4, and 2 and 3 are genders of one person.
    root = folder({"1F1E6": 1, "1F3C3-200D-2640-FE0F": 1, "1F3C3-200D-2642-FE0F": 3, "1F1E7": 3, "1F1E8": 5})
    data = read_openmoji(root, [record(file.stem) for file in root.glob("*.svg")])
    assert {item.code: item.family for item in data.emoji}["1F1E8"] == "1F1E8"
    assert len({item.family for item in data.emoji if item.code != "1F1E8"}) == 1


def test_names_are_words_without_repetition_and_files_may_omit_the_style_sign(folder):
    data = read_openmoji(folder({"2614": 1}), [record("2614-FE0F")])
    assert data.emoji[0].names == ("some name", "some alias")


def test_a_folder_without_drawings_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no drawing of any of 1 emoji"):
        read_openmoji(tmp_path, [record("1F600")])


def test_outline_has_no_fill(folder):
    file = folder({"1F600": 0xFF}) / "1F600.svg"
    colour, lines = (np.asarray(draw(file, size=36, style=style)) for style in ("colour", "outline"))
    assert colour.shape == (36, 36, 3) and tuple(colour[18, 18]) == (0, 0, 255) and tuple(colour[0, 0]) == (255,) * 3
    assert tuple(lines[18, 18]) == tuple(lines[6, 6]) == (255,) * 3
    assert (lines == lines[..., :1]).all() and lines.min() < 128
    assert "color" not in outline(file.read_text()) and "line" in outline(file.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"style": "grey"}, "style: got 'grey'"), ({"size": 0}, "size: got 0"), ({}, "cannot draw .*absent.svg")],
)
def test_draw_refuses(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        draw(tmp_path / "absent.svg", **options)


def test_draw_refuses_what_is_no_svg(tmp_path):
    (tmp_path / "a.svg").write_text("no drawing")
    for style in ("colour", "outline"):
        with pytest.raises(DataError, match="cannot draw"):
            draw(tmp_path / "a.svg", style=style)


def test_base_and_new_classes():
    base, new = class_part(range(31), "base"), class_part(range(31), "new")
    assert sorted(base + new) == class_part(range(31), "all") and (len(base), len(new)) == (16, 15)
    with pytest.raises(DataError, match="part: got 'old'"):
        class_part("ab", "old")


@pytest.mark.assets
def test_split_is_the_one_that_the_shipped_model_was_pretrained_with(real):
    codes = "\n".join(sample.file.stem for sample in real.test)
    assert len(real.emoji) == 1903 and len(real.classes) == 31
    assert (len(real.test), len(real.pool), len(real.pretraining)) == (394, 874, 1509)
    assert (
        hashlib.sha256(codes.encode()).hexdigest() == "6b9eb420452a983a0904e269fa2456e908acb2e687fec97879450e152f900584"
    )


@pytest.mark.assets
def test_nothing_of_a_test_emoji_is_pretrained_on(real):
    test = {sample.file for sample in real.test}
    family = {item.file: item.family for item in real.emoji}
    tested = {family[file] for file in test}
    assert not tested & {item.family for item in real.pretraining}
    seen = {file for item in real.pretraining for file in (item.file, *item.tones)}
    assert not test & seen and {sample.file for sample in real.pool} <= seen
    tones = {tone for item in real.emoji if item.family in tested for tone in item.tones}
    assert tones and not tones & seen
    drawn = {draw(file, size=32).tobytes() for file in seen}
    assert not [file.name for file in test if draw(file, size=32).tobytes() in drawn]


@pytest.mark.assets
def test_every_class_has_test_and_pool(real):
    test, pool = (Counter(sample.label for sample in part) for part in (real.test, real.pool))
    for label in range(31):
        assert 1 <= test[label] <= MAX_TEST and pool[label] >= MIN_POOL


@pytest.mark.assets
def test_few_shot_sets_are_balanced_nested_and_drawn_by_seed(real):
    few, many, other = real.few_shot(4, 0), real.few_shot(16, 0), real.few_shot(4, 1)
    assert set(Counter(sample.label for sample in few).values()) == {4}
    assert set(few) < set(many) <= set(real.pool) and set(few) != set(other)
    assert few == load_openmoji().few_shot(4, 0)
    for shots in (0, 17):
        with pytest.raises(DataError, match=f"shots: got {shots}"):
            real.few_shot(shots, 0)


@pytest.mark.assets
def test_outlines_of_real_drawings_are_grey(real):
    for sample in real.test[::8]:
        image = np.asarray(draw(sample.file, size=32, style="outline")).astype(int)
        # Lines of a few drawings are dark grey, not black; nothing has a hue.
        assert np.ptp(image, axis=-1).max() <= 2, sample.file.name


@pytest.mark.assets
def test_drawings_as_a_data_set_and_as_a_folder_of_images(real, tmp_path):
    new = class_part(real.classes, "new")
    samples = only_classes(real.few_shot(1, 0), new)
    classes = [real.classes[label] for label in new]
    drawings = ImageDataset(samples, classes, to_tensor, read=drawer(24, "outline"))
    item = drawings[3]
    assert item["pixel_values"].shape == (3, 24, 24) and item["labels"] == 3
    root = write_image_folder(samples, classes, tmp_path / "set", size=24, style="outline")
    folder = ImageFolder(root)
    assert folder.classes == tuple(classes) and len(folder) == len(classes)
    assert torch.equal(ImageDataset(folder.samples, classes, to_tensor)[3]["pixel_values"], item["pixel_values"])
    with pytest.raises(DataError, match="is not empty"):
        write_image_folder(samples, classes, Path(root))
