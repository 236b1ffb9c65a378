# SPDX-License-Identifier: Apache-2.0
"""Pretrain the small CLIP that ships in ``fastprompt/data/openmoji_clip``: OpenMoji drawings and their names.

    fastprompt assets fetch openmoji emoji-names clip-bpe
    python examples/pretrain_openmoji_clip.py --out runs/openmoji-clip

Ctrl-C saves; the same command goes on from there. Test drawings of the task (``fastprompt.data.openmoji``) are read
for the accuracy at the end alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from fastprompt.data.images import ImageDataset
from fastprompt.data.openmoji import Emoji, OpenMoji, Style, class_name, draw, drawer, load_openmoji
from fastprompt.hf.clip_tokenizer import load_clip_tokenizer
from fastprompt.hf.images import OPENAI_CLIP, image_transform
from fastprompt.hf.openmoji_clip import load_openmoji_clip, save_openmoji_clip
from fastprompt.tuning.checkpoint import Checkpoint, capture, check_fits, read_checkpoint, write_checkpoint
from fastprompt.tuning.config import TuneConfig, learning_rate
from fastprompt.tuning.interrupts import hold_interrupts
from fastprompt.tuning.progress import progress_bar
from fastprompt.tuning.randomness import epoch_order, get_rng, seed_rng, set_rng

# Captions of one drawing by its name, and of many by their kind: words of its subcategory or category.
NAMES = (
    "{name}.",
    "a {name}.",
    "the {name} emoji.",
    "a drawing of a {name}.",
    "a photo of a {name}.",
    "a picture of the {name}.",
    "{name}, {kind}.",
    "{kind}: {name}.",
    "{name}, a kind of {kind}.",
)
KINDS = ("{kind}.", "a {kind}.", "a photo of a {kind}.", "a drawing of a {kind}.", "a picture of one {kind}.")
# The same for later positions.
LONG_NAMES = (
    "a small drawing of a {name} on a white background.",
    "this is a clean, simple and colourful drawing, with black lines, of one {name} on a white background.",
    "this is a small and simple drawing with black lines, it belongs to {kind} and is called {name}.",
)
LONG_KINDS = (
    "a drawing of a {kind}, one of many, on a white background.",
    "this is a small and colourful drawing with black lines on a white background, and it shows a {kind}.",
)
LONG_SHARE, CATEGORY_SHARE = 0.2, 0.2


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyper-parameters."""

    epochs: int = 40
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.2
    warmup: float = 0.05
    width: int = 192
    layers: int = 4
    image_size: int = 64
    patch: int = 16
    seed: int = 0


def captions(emoji: Sequence[Emoji]) -> tuple[list[str], list[str], Tensor]:
    """Captions drawn from torch's generator: one a drawing, one a kind, and the index ``[B]`` of each drawing's kind.

    All are short or all are long; kinds are subcategories or, less often, categories.
    """
    names, kinds = (LONG_NAMES, LONG_KINDS) if torch.rand(()) < LONG_SHARE else (NAMES, KINDS)
    level = "category" if torch.rand(()) < CATEGORY_SHARE else "subcategory"
    words = [class_name(getattr(item, level).lower()) for item in emoji]
    of_each = [_pick(names).format(name=_pick(item.names), kind=kind) for item, kind in zip(emoji, words, strict=True)]
    distinct = list(dict.fromkeys(words))
    of_kinds = [_pick(kinds).format(kind=kind) for kind in distinct]
    return of_each, of_kinds, torch.tensor([distinct.index(kind) for kind in words])


def _pick(choices: Sequence[str]) -> str:
    return choices[int(torch.randint(len(choices), ()))]


def all_texts(data: OpenMoji) -> list[str]:
    """Every text that a caption may hold, for the rows of the vocabulary to train."""
    kinds = {kind for item in data.pretraining for kind in (item.subcategory, item.category.lower())}
    words = [name for item in data.pretraining for name in item.names] + sorted(map(class_name, kinds))
    return [*NAMES, *KINDS, *LONG_NAMES, *LONG_KINDS, *words]


def augmented(drawings: Tensor, strength: float) -> Tensor:
    """Move, turn, scale and recolour drawings ``[B,3,H,W]`` of 0..1; what comes in from outside is white.

    ``strength``, 0 to 1, is that of the recolouring: a model learns faster where colours are right at first.
    """
    count = len(drawings)
    angle = 0.5 * (torch.rand(count) - 0.5)
    scale = 0.8 + 0.5 * torch.rand(count)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 0.3 * (torch.rand(2, count) - 0.5)
    stretch = 1 + 0.3 * (torch.rand(count) - 0.5)
    affine = torch.stack([cos, -sin * stretch, shift[0], sin, cos * stretch, shift[1]], dim=1).view(count, 2, 3)
    grid = nn.functional.affine_grid(affine, list(drawings.shape), align_corners=False)
    moved = 1 - nn.functional.grid_sample(1 - drawings, grid, align_corners=False)
    # Less colour, and brighter: shapes and black lines stay.
    grey = moved.mean(dim=1, keepdim=True)
    saturation = (1 - strength * (torch.rand(count, 1, 1, 1) - 0.3)).clamp(max=1)
    tint = 1 + 0.3 * (torch.rand(count, 3, 1, 1) - 0.5)
    brightness = (1 + 3 * strength * torch.rand(count, 1, 1, 1) ** 3) * (0.8 + 0.3 * torch.rand(count, 1, 1, 1))
    return ((grey + saturation * (moved - grey)) * tint * brightness).clamp(0, 1)


def contrastive_loss(logits: Tensor, text: Tensor) -> Tensor:
    """CLIP's loss on ``logits [images, texts]``, where ``text [images]`` is the text of each image.

    Images of one text share it: the target of a text is spread over its images.
    """
    of_texts = nn.functional.one_hot(text, logits.shape[1]).to(logits.dtype)
    of_texts = (of_texts / of_texts.sum(dim=0)).T
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, text) + cross_entropy(logits.T, of_texts)) / 2


class Pretraining:
    """One run: the drawings as tensors, a model with the rows that occur, its optimizer, and a checkpoint file."""

    def __init__(self, data: OpenMoji, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.path = recipe, folder / "checkpoint.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self.emoji = data.pretraining
        files = [(item.file, *item.tones) for item in self.emoji]
        self.first = torch.tensor([0, *map(len, files)]).cumsum(0)
        drawn = [np.asarray(draw(file, size=recipe.image_size)) for group in files for file in group]
        self.drawings = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in OPENAI_CLIP)
        self.tokenizer = load_clip_tokenizer()
        self.rows = torch.tensor(sorted({i for ids in self.tokenizer(all_texts(data)).input_ids for i in ids}))
        seed_rng(recipe.seed, [])
        self.model = CLIPModel(self.config(len(self.rows)))
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.params = decay + rest
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
        self.steps_an_epoch = len(self.emoji) // recipe.batch
        self.total = recipe.epochs * self.steps_an_epoch
        self.schedule = TuneConfig(epochs=recipe.epochs, lr=recipe.lr, warmup=recipe.warmup)
        self.step = 0

    def config(self, tokens: int) -> CLIPConfig:
        width, heads = self.recipe.width, self.recipe.width // 32
        tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        tower |= {"num_hidden_layers": self.recipe.layers, "projection_dim": width, "hidden_act": "gelu"}
        start, end = tokens - 2, tokens - 1
        text = tower | {"vocab_size": tokens, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
        vision = tower | {"image_size": self.recipe.image_size, "patch_size": self.recipe.patch}
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)

    def resume(self) -> None:
        if self.path.exists():
            checkpoint = read_checkpoint(self.path)
            check_fits(self.path, checkpoint, self._settings(), self.params, get_rng([]))
            checkpoint.apply(self.params, self.optimizer)
            set_rng(checkpoint.rng(), [])
            self.step = checkpoint.progress["step"]

    def save(self) -> None:
        tensors = capture(self.params, self.optimizer, get_rng([]))
        write_checkpoint(self.path, Checkpoint(tensors, self._settings(), {"step": self.step}))

    def run(self) -> None:
        """Take the steps that are left; Ctrl-C saves the last whole one."""
        self.model.train()
        try:
            with progress_bar("pretrain", self.total, unit="step", shown=True, initial=self.step) as bar:
                while self.step < self.total:
                    with hold_interrupts():
                        loss = self._take_step()
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                    if self.step == self.total or self.step % (10 * self.steps_an_epoch) == 0:
                        self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        self.model.eval()

    def _take_step(self) -> float:
        epoch, place = divmod(self.step, self.steps_an_epoch)
        order = epoch_order(len(self.emoji), self.recipe.seed, epoch)
        chosen = order[place * self.recipe.batch :][: self.recipe.batch]
        # Every emoji once an epoch, in one of its skin tones.
        counts = self.first[chosen + 1] - self.first[chosen]
        drawings = self.drawings[self.first[chosen] + (torch.rand(len(chosen)) * counts).long()]
        pixels = (augmented(drawings / 255, self.step / self.total) - self.mean) / self.std
        of_each, of_kinds, kind = captions([self.emoji[i] for i in chosen.tolist()])
        ids = self.tokenizer(of_each + of_kinds, padding=True, return_tensors="pt").input_ids
        logits = self.model(input_ids=torch.searchsorted(self.rows, ids), pixel_values=pixels).logits_per_image
        by_name, by_kind = logits.split([len(of_each), len(of_kinds)], dim=1)
        loss = contrastive_loss(by_name, torch.arange(len(chosen))) + contrastive_loss(by_kind, kind)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.schedule, self.step, self.total)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=np.log(100.0))
        self.step += 1
        return loss.item()

    def _settings(self) -> dict[str, str | int | float]:
        return {"optimizer": "adamw", "emoji": len(self.emoji), **asdict(self.recipe)}


@torch.no_grad()
def zero_shot_accuracy(folder: Path, data: OpenMoji, style: Style) -> float:
    """Accuracy of a saved model on the test drawings, with ``a photo of a {class}.`` for each class."""
    model, tokenizer = load_openmoji_clip(folder)
    size = model.config.vision_config.image_size
    images = ImageDataset(data.test, data.classes, image_transform(model), read=drawer(size, style)).load_all(
        progress=False
    )
    texts = tokenizer([f"a photo of a {name}." for name in data.classes], padding=True, return_tensors="pt")
    logits = model(pixel_values=images.pixel_values, **texts).logits_per_image
    return (logits.argmax(dim=-1) == images.labels).float().mean().item()


def main() -> None:
    """Read the command line, train, write the folder that ships, and print its zero-shot accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/openmoji-clip"), help="folder of checkpoint and model")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    out = options.pop("out")
    data = load_openmoji()
    run = Pretraining(data, Recipe(**options), out)
    run.resume()
    try:
        run.run()
    except KeyboardInterrupt:
        raise SystemExit(f"saved after step {run.step} of {run.total}; the same command goes on from there") from None
    folder = save_openmoji_clip(run.model, run.rows, out / "model")
    for style in ("colour", "outline"):
        print(f"zero-shot accuracy on test drawings, {style}: {zero_shot_accuracy(folder, data, style):.3f}")


if __name__ == "__main__":
    main()
