# SPDX-License-Identifier: Apache-2.0
"""Folders of images by class, few-shot splits of them, and data sets in the form that vision models take."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fastprompt.data import assets
from fastprompt.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of image files, compared in lower case; other files are left out."""


class Sample(NamedTuple):
    """One image file and the index of its class."""

    file: Path
    label: int


class ImageFolder:
    """A folder with one subfolder of images for each class, listed in an order that does not depend on the machine.

    Classes are the subfolders in sorted order; images lie at any depth below; hidden files and folders are left out.

    Args:
        root: the folder.

    Attributes:
        root: the folder.
        classes: class names, sorted; a label is an index into it.
        samples: all images, sorted by class and then by path.

    Raises:
        DataError: no such folder, an empty folder, no class folders, or a class without images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        folders = _class_folders(self.root)
        self.classes = tuple(folder.name for folder in folders)
        self.samples = tuple(Sample(f, label) for label, folder in enumerate(folders) for f in _image_files(folder))

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.root)!r}: {len(self)} images, classes {', '.join(self.classes)})"


def textile(*, cache_dir: str | Path | None = None) -> ImageFolder:
    """Return the textile images of the ``textile`` asset (global 500, local 500, nominal 1,000 images of 250 x 250).

    Args:
        cache_dir: folder of all assets; default ``assets.default_cache_dir()``.

    Raises:
        AssetError: the asset is not there; the message holds the command that fetches it.
    """
    return ImageFolder(assets.entry("textile", cache_dir=cache_dir))


def few_shot(
    folder: ImageFolder, shots: int, seed: int, eval_size: int | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Draw ``shots`` training images of each class, and evaluation images from the rest.

    Each class is shuffled once by ``seed``; training takes from the front and evaluation from the back. So for one
    seed, a smaller training set is part of a larger one, and a given ``eval_size`` names the same evaluation images
    for every ``shots``.

    Args:
        folder: the images.
        shots: training images of each class, at least 1.
        seed: the draw.
        eval_size: evaluation images in all, balanced over the classes (where it does not divide evenly, the first
            classes get one more), so that chance is one over the number of classes. Default: all of the rest, in the
            proportions of the folder.

    Returns:
        Training and evaluation samples, without overlap, ordered by class.

    Raises:
        DataError: a bad argument, or a class with too few images for it.
    """
    check_count("shots", shots)
    if eval_size is not None:
        check_count("eval_size", eval_size)
    train: list[Sample] = []
    evaluation: list[Sample] = []
    for label, name in enumerate(folder.classes):
        samples = [sample for sample in folder.samples if sample.label == label]
        share = None if eval_size is None else _share(eval_size, len(folder.classes), label)
        _check_class(folder, name, len(samples), shots, share)
        random.Random(f"{seed}/{name}").shuffle(samples)
        train += samples[:shots]
        evaluation += samples[shots if share is None else len(samples) - share :]
    return train, evaluation


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images read from their files each time they are asked for.

    Args:
        samples: files and labels, of ``ImageFolder.samples`` or ``few_shot``.
        classes: class names; labels index it.
        transform: maps an RGB ``PIL.Image`` to a tensor ``[3, H, W]``, such as ``fastprompt.hf.images`` gives.
        read: maps a file to an RGB ``PIL.Image``; default ``read_rgb``.

    Items are ``{"pixel_values": float32 [3, H, W], "labels": int64 scalar}``.

    Raises:
        DataError: no samples, a label without a class, or (on access) an unreadable image or a wrong tensor shape.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        transform: Callable[[Any], Tensor],
        *,
        read: Callable[[Path], Any] | None = None,
    ) -> None:
        if not samples:
            raise DataError("samples: got none, expected at least one (file, label) pair")
        for sample in samples:
            if not 0 <= sample.label < len(classes):
                raise DataError(f"samples: {sample.file} has label {sample.label}, expected 0 to {len(classes) - 1}")
        self.samples = tuple(samples)
        self.classes = tuple(classes)
        self.transform = transform
        self.read = read_rgb if read is None else read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file, label = self.samples[index]
        pixels = self.transform(self.read(file))
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise DataError(f"transform: gave shape {tuple(pixels.shape)} for {file}, expected [3, H, W]")
        return {"pixel_values": pixels.to(torch.float32), "labels": torch.tensor(label)}

    def load_all(self, *, progress: bool = True) -> "DecodedImages":
        """Read and transform every image once and keep the result: few-shot sets are read again in each epoch.

        Args:
            progress: show a progress bar on stderr.

        Returns:
            A data set with the same items, held in memory (0.6 MB for an image of 224 x 224).

        Raises:
            DataError: an unreadable image, or images of different shapes.
        """
        first = self[0]["pixel_values"]
        pixels = torch.empty(len(self), *first.shape)
        for index in tqdm(range(len(self)), desc="reading images", disable=not progress):
            image = self[index]["pixel_values"] if index else first
            if image.shape != first.shape:
                raise DataError(
                    f"transform: gave shape {tuple(image.shape)} for {self.samples[index].file} and "
                    f"{tuple(first.shape)} before; expected one shape: resize or crop to a fixed size"
                )
            pixels[index] = image
        return DecodedImages(pixels, torch.tensor([sample.label for sample in self.samples]), self.classes)


class DecodedImages(Dataset[dict[str, Tensor]]):
    """Images held as one tensor, with the items of ``ImageDataset``; made by ``ImageDataset.load_all``.

    Args:
        pixel_values: float32 ``[N, 3, H, W]``.
        labels: int64 ``[N]``.
        classes: class names; labels index it.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        self.pixel_values = pixel_values
        self.labels = labels
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def read_rgb(file: str | Path) -> Any:
    """Read an image file as an RGB ``PIL.Image``, turned upright where its EXIF data say how it was held.

    Args:
        file: an image file of any format that Pillow reads.

    Raises:
        DataError: the file is missing or not a whole image; Pillow's error is the cause.
        ImportError: Pillow is not installed.
    """
    pil = _pillow()
    try:
        with pil.Image.open(file) as image:
            return pil.ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, pil.Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {file}: {error}; replace or remove the file") from error


def _pillow() -> ModuleType:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "fastprompt[hf]"') from error
    return PIL


def _class_folders(root: Path) -> list[Path]:
    expected = "expected one subfolder of images for each class"
    if not root.is_dir():
        raise DataError(f"root: {root} is not a folder; {expected}")
    items = sorted(item for item in root.iterdir() if not item.name.startswith("."))
    folders = [item for item in items if item.is_dir()]
    if not items:
        raise DataError(f"root: {root} is empty; {expected}")
    if not folders:
        raise DataError(f"root: {root} has {len(items)} files and no subfolder; {expected}: move the images into them")
    return folders


def _image_files(folder: Path) -> list[Path]:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = [folder / name for name in names if _is_image(Path(name))]
    if not files:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"root: class folder {folder} has no images; expected files ending in {endings}")
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in file.parts)


def _share(eval_size: int, classes: int, label: int) -> int:
    """Return how many of ``eval_size`` images a class gives when they are spread evenly."""
    return eval_size // classes + (label < eval_size % classes)


def check_count(name: str, value: int) -> None:
    """Raise ``DataError`` unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{name}: got {value!r}, expected an integer of at least 1")


def _check_class(folder: ImageFolder, name: str, count: int, shots: int, share: int | None) -> None:
    needed = shots + (1 if share is None else share)
    if count < needed:
        rest = "at least 1 to evaluate" if share is None else f"{share} to evaluate (its part of eval_size)"
        raise DataError(
            f"class {name!r} of {folder.root} has {count} images, expected {needed}: {shots} shots and {rest}; "
            f"lower shots{'' if share is None else ' or eval_size'}, or add images"
        )
