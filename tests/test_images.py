# SPDX-License-Identifier: Apache-2.0
"""Image folders, few-shot splits, data sets and preprocessing, on tiny images made here."""

import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from fastprompt.data import images
from fastprompt.data.images import DecodedImages, ImageDataset, ImageFolder, Sample, few_shot, read_rgb
from fastprompt.errors import AssetError, DataError
from fastprompt.hf.images import FAMILIES, ImageTransform, image_transform

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).to(torch.float32) / 255


@pytest.fixture
def root(tmp_path):
    """Three classes of 4, 6 and 8 images, with names whose creation order is not their sorted order."""
    for name, count in (("red", 8), ("blue", 4), ("green", 6)):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for index in reversed(range(count)):
            Image.new("RGB", (6, 5), COLOURS[name]).save(folder / f"{index}.png")
    return tmp_path / "set"


def test_folder_is_sorted_and_labelled(root):
    (root / "notes.txt").write_text("not a class")
    (root / ".cache").mkdir()
    (root / "blue" / "notes.txt").write_text("not an image")
    (root / "blue" / "._0.png").write_bytes(b"not an image")
    (root / "blue" / "more").mkdir()
    Image.new("RGB", (6, 5)).save(root / "blue" / "more" / "x.JPG")
    folder = ImageFolder(str(root))
    assert folder.classes == ("blue", "green", "red")
    assert len(folder) == 5 + 6 + 8
    assert [sample.file.name for sample in folder.samples[:5]] == ["0.png", "1.png", "2.png", "3.png", "x.JPG"]
    assert all(sample.file.relative_to(root).parts[0] == folder.classes[sample.label] for sample in folder.samples)
    assert "19 images, classes blue, green, red" in repr(folder)


def test_folder_errors_name_the_folder_and_what_was_expected(root, tmp_path):
    with pytest.raises(DataError, match="absent is not a folder; expected one subfolder"):
        ImageFolder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is empty; expected one subfolder"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(DataError, match=r"red has 8 files and no subfolder; expected .* move the images"):
        ImageFolder(root / "red")
    (root / "yellow").mkdir()
    (root / "yellow" / "readme.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"yellow has no images; expected files ending in \.bmp"):
        ImageFolder(root)


def test_few_shot_counts_and_no_overlap(root):
    folder = ImageFolder(root)
    train, evaluation = few_shot(folder, shots=3, seed=0)
    assert Counter(sample.label for sample in train) == {0: 3, 1: 3, 2: 3}
    assert Counter(sample.label for sample in evaluation) == {0: 1, 1: 3, 2: 5}
    assert sorted(train + evaluation) == sorted(folder.samples)


def test_few_shot_balances_a_given_evaluation_size(root):
    train, evaluation = few_shot(ImageFolder(root), shots=2, seed=0, eval_size=5)
    assert Counter(sample.label for sample in evaluation) == {0: 2, 1: 2, 2: 1}
    assert not set(train) & set(evaluation)


def test_few_shot_depends_on_the_seed_alone(root):
    folder = ImageFolder(root)
    assert few_shot(folder, 2, seed=1) == few_shot(ImageFolder(root), 2, seed=1)
    assert len({tuple(few_shot(folder, 2, seed=seed)[0]) for seed in range(20)}) > 10
    # A recorded draw: another machine, or another version of this library, must give the same images.
    names = [f"{sample.file.parent.name}/{sample.file.stem}" for sample in few_shot(folder, 2, seed=0)[0]]
    assert names == ["blue/3", "blue/1", "green/4", "green/2", "red/7", "red/4"]


def test_few_shot_is_nested_in_shots_and_keeps_its_evaluation(root):
    folder = ImageFolder(root)
    small, evaluation = few_shot(folder, shots=1, seed=3, eval_size=3)
    large, same = few_shot(folder, shots=3, seed=3, eval_size=3)
    assert set(small) < set(large)
    assert evaluation == same


def test_few_shot_errors(root):
    folder = ImageFolder(root)
    for shots in (5, 4):
        message = rf"class 'blue' .* has 4 images, expected {shots + 1}: {shots} shots .*; lower shots, or add images"
        with pytest.raises(DataError, match=message):
            few_shot(folder, shots=shots, seed=0)
    with pytest.raises(DataError, match=r"class 'blue' .*: 2 shots and 3 to evaluate .*; lower shots or eval_size"):
        few_shot(folder, shots=2, seed=0, eval_size=9)
    few_shot(folder, shots=2, seed=0, eval_size=6)
    for bad in (0, -1, 1.5):
        with pytest.raises(DataError, match=f"shots: got {bad}, expected an integer of at least 1"):
            few_shot(folder, shots=bad, seed=0)
        with pytest.raises(DataError, match=f"eval_size: got {bad}"):
            few_shot(folder, shots=1, seed=0, eval_size=bad)


def test_dataset_items_and_batches(root):
    folder = ImageFolder(root)
    data = ImageDataset(folder.samples, folder.classes, lambda image: to_tensor(image).double())
    assert len(data) == 18
    item = data[0]
    assert item["pixel_values"].dtype == torch.float32
    assert item["pixel_values"].shape == (3, 5, 6)
    assert item["pixel_values"].mean(dim=(1, 2)).tolist() == [0, 0, 1]
    assert item["labels"].dtype == torch.int64
    assert item["labels"].shape == ()
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert batch["pixel_values"].shape == (5, 3, 5, 6)
    assert batch["labels"].tolist() == [0, 0, 0, 0, 1]


def test_load_all_gives_the_same_items_without_reading_again(root, capsys):
    folder = ImageFolder(root)
    data = ImageDataset(folder.samples, folder.classes, to_tensor)
    decoded = data.load_all(progress=False)
    assert capsys.readouterr().err == ""
    items = [data[index] for index in range(len(data))]
    for sample in folder.samples:
        sample.file.unlink()
    assert type(decoded) is DecodedImages
    assert decoded.pixel_values.shape == (18, 3, 5, 6)
    assert decoded.classes == folder.classes
    assert len(decoded) == 18
    for index, item in enumerate(items):
        assert torch.equal(decoded[index]["pixel_values"], item["pixel_values"])
        assert decoded[index]["labels"] == item["labels"]


def test_load_all_shows_progress(root, capsys):
    ImageDataset(ImageFolder(root).samples, ("a", "b", "c"), to_tensor).load_all()
    assert "reading images" in capsys.readouterr().err


def test_dataset_errors(root):
    samples = ImageFolder(root).samples
    with pytest.raises(DataError, match="samples: got none"):
        ImageDataset([], ("a",), to_tensor)
    with pytest.raises(DataError, match=r"red/0\.png has label 2, expected 0 to 1"):
        ImageDataset(samples, ("a", "b"), to_tensor)
    with pytest.raises(DataError, match=r"transform: gave shape \(5, 6, 3\) for .*expected \[3, H, W\]"):
        ImageDataset(samples, "abc", lambda image: to_tensor(image).permute(1, 2, 0))[0]
    Image.new("RGB", (7, 7)).save(samples[3].file)
    with pytest.raises(DataError, match=r"gave shape \(3, 7, 7\) for .*blue/3\.png and \(3, 5, 6\) before"):
        ImageDataset(samples, "abc", to_tensor).load_all(progress=False)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "truncated", None])
def test_unreadable_image_is_named_and_keeps_the_cause(tmp_path, content):
    file = tmp_path / "bad.png"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image .*bad\.png") as error:
        ImageDataset([Sample(file, 0)], ("a",), to_tensor)[0]
    assert error.value.__cause__ is not None


def test_images_are_read_as_rgb_and_upright(tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 128)).save(tmp_path / "alpha.png")
    assert read_rgb(tmp_path / "grey.png").getpixel((0, 0)) == (200, 200, 200)
    assert read_rgb(tmp_path / "alpha.png").getpixel((0, 0)) == (1, 2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").size == (3, 4)


def test_without_pillow_the_error_tells_what_to_install():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from fastprompt.data.images import read_rgb\n"
        "try: read_rgb('x.png')\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 'pip install "fastprompt[hf]"' in output


def test_textile_without_the_asset_names_the_command(tmp_path):
    with pytest.raises(AssetError, match="fastprompt assets fetch textile"):
        images.textile(cache_dir=tmp_path)


@pytest.mark.assets
def test_textile_images():
    folder = images.textile()
    assert folder.classes == ("global", "local", "nominal")
    assert Counter(sample.label for sample in folder.samples) == {0: 500, 1: 500, 2: 1000}
    train, _ = few_shot(folder, shots=2, seed=0, eval_size=30)
    decoded = ImageDataset(train, folder.classes, image_transform(transformers.Dinov2Config())).load_all(progress=False)
    assert decoded.pixel_values.shape == (6, 3, 224, 224)
    assert 0.1 < decoded.pixel_values.std() < 2


def gradient(width, height):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def by_hand(image, resize, resample, crop, mean, std):
    """The recipe in Pillow and torch alone: resize to (width, height), centre crop, scale, normalise."""
    image = image.resize(resize, resample)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    pixels = to_tensor(image.crop((left, top, left + crop, top + crop)))
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


@pytest.mark.parametrize(
    ("config", "size", "resize", "resample", "crop", "mean_std"),
    [
        (transformers.Dinov2Config(image_size=518), None, (512, 256), BICUBIC, 224, IMAGENET),
        (transformers.Dinov2WithRegistersConfig(), 98, (224, 112), BICUBIC, 98, IMAGENET),
        (transformers.CLIPVisionConfig(image_size=64), None, (128, 64), BICUBIC, 64, CLIP),
        (transformers.CLIPConfig(), 96, (192, 96), BICUBIC, 96, CLIP),
        (transformers.ViTConfig(image_size=64), None, (64, 64), BILINEAR, 64, HALF),
        (transformers.SiglipConfig(), 48, (48, 48), BICUBIC, 48, HALF),
        (transformers.SiglipVisionConfig(image_size=48), None, (48, 48), BICUBIC, 48, HALF),
        (transformers.DINOv3ViTConfig(image_size=64), None, (64, 64), BILINEAR, 64, IMAGENET),
        (transformers.LlavaConfig(vision_config=transformers.Dinov2Config()), 56, (128, 64), BICUBIC, 56, IMAGENET),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PreTrainedConfig) else None,
)
def test_transform_follows_the_published_recipe(config, size, resize, resample, crop, mean_std):
    image = gradient(300, 150)
    got = image_transform(config, size)(image)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(image, resize, resample, crop, *mean_std), atol=1e-5, rtol=0)


def test_transform_from_model_equals_transform_from_its_config():
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    model = transformers.ViTModel(config)
    image = gradient(40, 50)
    assert torch.equal(image_transform(model)(image), image_transform(config)(image))


def test_every_family_has_a_processor_on_this_transformers():
    for model_type in FAMILIES:
        config = transformers.AutoConfig.for_model(model_type)
        assert image_transform(config, 32)(gradient(50, 40)).shape == (3, 32, 32)


def saved_model(folder, processor):
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    transformers.ViTModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return transformers.ViTModel.from_pretrained(folder)


def test_preprocessing_saved_with_the_model_wins(tmp_path):
    model = saved_model(tmp_path, transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32))
    image = gradient(80, 160)
    got = image_transform(model)(image)
    torch.testing.assert_close(got, by_hand(image, (40, 80), BICUBIC, 32, *CLIP), atol=1e-5, rtol=0)
    got = image_transform(model, 64)(image)
    torch.testing.assert_close(got, by_hand(image, (80, 160), BICUBIC, 64, *CLIP), atol=1e-5, rtol=0)


def test_a_processor_is_taken_as_it_is():
    square = transformers.ViTImageProcessorPil(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    image = gradient(40, 50)
    got = image_transform(square, 20)(image)
    torch.testing.assert_close(got, by_hand(image, (20, 20), BILINEAR, 20, (0.0,) * 3, (1.0,) * 3), atol=1e-5, rtol=0)
    assert image_transform(square).processor is square


def test_transform_can_be_sent_to_a_worker():
    transform = pickle.loads(pickle.dumps(image_transform(transformers.ViTConfig(image_size=32))))
    assert type(transform) is ImageTransform
    assert transform(gradient(40, 50)).shape == (3, 32, 32)


def test_transform_errors():
    with pytest.raises(ValueError, match=r"got BertConfig with vision model type 'bert', expected one of clip, .*vit"):
        image_transform(transformers.BertConfig())
    with pytest.raises(ValueError, match="vision model type None"):
        image_transform("google/vit-base-patch16-224")
    for bad in (0, -224, 2.5):
        with pytest.raises(ValueError, match=f"size: got {bad}, expected a positive"):
            image_transform(transformers.ViTConfig(), bad)
