# SPDX-License-Identifier: Apache-2.0
"""Train the projector that ships in ``fastprompt/data/tiny_llava``: DINOv2-S and SmolLM2-135M look at OpenMoji.

    fastprompt assets fetch dinov2-small smollm2-135m openmoji emoji-names
    python examples/train_tiny_llava.py --out runs/tiny-llava

Both towers are frozen, and what the vision tower makes of a few hundred views of each kind is kept. First every patch
of a picture is taught to look like the word of its kind; then the language model reads several pictures and is asked
for each of them. Ctrl-C saves; the same command goes on from there. Test drawings are read for the accuracy at the end
alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from fastprompt.data.openmoji import draw, load_openmoji
from fastprompt.data.pictures import (
    context_text,
    held_out_drawings,
    picture_questions,
    question_text,
    training_drawings,
)
from fastprompt.hf.tiny_llava import TinyLlavaProcessor, build_tiny_llava, load_tiny_llava, normalised, save_tiny_llava
from fastprompt.tuning.checkpoint import Checkpoint, capture, check_fits, read_checkpoint, write_checkpoint
from fastprompt.tuning.config import TuneConfig, learning_rate
from fastprompt.tuning.interrupts import hold_interrupts
from fastprompt.tuning.pictures import answer_pictures, kind_token
from fastprompt.tuning.progress import progress_bar
from fastprompt.tuning.randomness import get_rng, seed_rng, set_rng


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyper-parameters; a step sees ``images`` drawings, in contexts of one to ``pictures``."""

    align_steps: int = 500
    align_lr: float = 1e-3
    steps: int = 360
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    images: int = 24
    views: int = 256
    pictures: int = 4
    seed: int = 0


def augmented(drawings: Tensor) -> Tensor:
    """Mirror, turn, scale, move and tint drawings ``[B,3,H,W]`` of 0..1; what comes in from outside is white."""
    count = len(drawings)
    angle, scale = 0.4 * (torch.rand(count) - 0.5), 0.85 + 0.4 * torch.rand(count)
    flip = 1 - 2 * (torch.rand(count) < 0.5).float()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 0.2 * (torch.rand(2, count) - 0.5)
    affine = torch.stack([flip * cos, -sin, shift[0], flip * sin, cos, shift[1]], dim=1).view(count, 2, 3)
    grid = nn.functional.affine_grid(affine, list(drawings.shape), align_corners=False)
    moved = 1 - nn.functional.grid_sample(1 - drawings, grid, align_corners=False)
    grey = moved.mean(dim=1, keepdim=True)
    saturation = (1.3 - torch.rand(count, 1, 1, 1)).clamp(max=1)
    tint = 1 + 0.3 * (torch.rand(count, 3, 1, 1) - 0.5)
    return ((grey + saturation * (moved - grey)) * tint).clamp(0, 1)


class Training:
    """One run: drawings as tensors, the model, the optimizer of its projector, and a checkpoint file."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: TinyLlavaProcessor,
        drawings: Mapping[str, Sequence[Sequence[Path]]],
        recipe: Recipe,
        folder: Path,
    ) -> None:
        self.model, self.processor, self.recipe = model, processor, recipe
        self.path, self.log = folder / "checkpoint.safetensors", folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.kinds = sorted(drawings)
        self.kind_tokens = torch.tensor([kind_token(processor, kind) for kind in self.kinds])
        self.projector = model.model.multi_modal_projector.float()
        self.params = list(self.projector.parameters())
        self.embedding = model.get_input_embeddings()
        seed_rng(recipe.seed, [])
        #: Patches of every kind ``[K,views,P,C]``; the tower is frozen and sees each view once.
        self.bank = torch.stack([self._views(drawings[kind]) for kind in self.kinds])
        self._initialise()
        self.optimizer = torch.optim.AdamW(self.params, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.total, self.step = recipe.align_steps + recipe.steps, 0

    @torch.no_grad()
    def _views(self, emoji: Sequence[Sequence[Path]]) -> Tensor:
        """Augmented drawings of one kind as the tower sees them; all skin tones of an emoji are one choice."""
        chosen = [emoji[index % len(emoji)] for index in range(self.recipe.views)]
        files = [tones[int(torch.randint(len(tones), ()))] for tones in chosen]
        read = {file: torch.from_numpy(np.array(draw(file, size=self.processor.image_size))) for file in {*files}}
        views = [
            self.features(normalised(255 * augmented(torch.stack([read[file] for file in part]).movedim(-1, 1) / 255)))
            for part in (files[start : start + 32] for start in range(0, len(files), 32))
        ]
        return torch.cat(views)

    def features(self, pixels: Tensor) -> Tensor:
        """Patches ``[B,P,C]`` as the model selects them."""
        tower = self.model.model.vision_tower
        hidden = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
        return hidden[self.model.config.vision_feature_layer][:, 1:]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start where features have mean 0 and variance 1 in front of the first product, and words' size behind it."""
        features = self.bank[:, :4].flatten(0, 2).float()
        first, second = self.projector.linear_1, self.projector.linear_2
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        first.weight.div_(features.std(dim=0) + 1e-6)
        first.bias.sub_(first.weight @ features.mean(dim=0))
        second.weight.mul_(self.embedding.weight.float().std() / self.projector(features).std())

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Patches ``[count,P,C]`` (float32) of pictures, evenly drawn, and their kinds ``[count]``."""
        kinds = torch.randint(len(self.kinds), (count,))
        return self.bank[kinds, torch.randint(self.recipe.views, (count,))].float(), kinds

    def align_loss(self) -> Tensor:
        """How far patches are from the word of their picture, as a share of the words' variance."""
        features, kinds = self.draw(self.recipe.images)
        words = self.embedding(self.kind_tokens).float()
        far = (self.projector(features) - words[kinds][:, None]).square().mean()
        return far / (words - words.mean(dim=0)).square().mean()

    def answer_loss(self, pictures: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers in contexts of ``pictures``, asked in random order; and the share right."""
        contexts = self.recipe.images // pictures
        features, kinds = self.draw(contexts * pictures)
        kinds = kinds.view(contexts, pictures)
        order = torch.stack([torch.randperm(pictures) for _ in range(contexts)])
        ids, asked = self.tokens(order, kinds)
        embeds = self.embedding(ids)
        images = self.projector(features).to(embeds.dtype)
        embeds = embeds.masked_scatter((ids == self.processor.image_token)[..., None], images)
        hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, asked]).float()
        wanted = self.kind_tokens[kinds.gather(1, order)]
        right = (logits.argmax(dim=-1) == wanted).float().mean()
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), right

    def tokens(self, order: Tensor, kinds: Tensor) -> tuple[Tensor, list[int]]:
        """Contexts with questions and answers ``[B,T]``, and the places where an answer is to be predicted."""
        rows, asked = [], []
        for places, answers in zip(order.tolist(), kinds.tolist(), strict=True):
            row, asked = self.processor.ids(context_text(len(places))), []
            for place in places:
                row += self.processor.ids(question_text(place))
                asked.append(len(row) - 1)
                row += [int(self.kind_tokens[answers[place]]), *self.processor.ids("\n")]
            # The last answer and its line end teach nothing.
            rows.append(row[: asked[-1] + 1])
        return torch.tensor(rows), asked

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
        try:
            with progress_bar("train", self.total, unit="step", shown=True, initial=self.step) as bar:
                while self.step < self.total:
                    with hold_interrupts():
                        row = self._take_step()
                        self.write(row)
                    bar.set_postfix(row, refresh=False)
                    bar.update()
                    if self.step == self.total or self.step % 100 == 0:
                        self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def write(self, row: Mapping[str, float]) -> None:
        """Add a line to the log."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def _take_step(self) -> dict[str, float]:
        recipe = self.recipe
        row: dict[str, float] = {"step": self.step}
        if self.step < recipe.align_steps:
            loss = self.align_loss()
            rate = learning_rate(TuneConfig(lr=recipe.align_lr, warmup=recipe.warmup), self.step, recipe.align_steps)
        else:
            step = self.step - recipe.align_steps
            # One picture, then more; soon as many as will be asked for, most of the time.
            most = min(recipe.pictures, 1 + step * 16 // recipe.steps)
            pictures = most if torch.rand(()) < 0.7 else int(torch.randint(1, most + 1, ()))
            loss, right = self.answer_loss(pictures)
            row |= {"pictures": pictures, "right": round(right.item(), 3)}
            rate = learning_rate(TuneConfig(lr=recipe.lr, warmup=recipe.warmup), step, recipe.steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return row | {"loss": round(loss.item(), 4)}

    def _settings(self) -> dict[str, str | int | float]:
        return {"optimizer": "adamw", "kinds": " ".join(self.kinds), **asdict(self.recipe)}


def test_accuracy(folder: Path, pictures: int, contexts: int = 100) -> float:
    """Share of right answers of a saved model about test drawings, with all keys."""
    model, processor = load_tiny_llava(folder, dtype=torch.bfloat16)
    drawings = held_out_drawings(load_openmoji())
    right = [
        answer_pictures(model, processor, [picture_questions(drawings, pictures, seed)]).right
        for seed in range(contexts)
    ]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Read the command line, train, write the folder that ships, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-llava"), help="folder of checkpoint and projector")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    out, recipe = options.pop("out"), Recipe(**options)
    model, processor = build_tiny_llava()
    run = Training(model.to(torch.bfloat16), processor, training_drawings(load_openmoji()), recipe, out)
    run.resume()
    try:
        run.run()
    except KeyboardInterrupt:
        raise SystemExit(f"saved after step {run.step} of {run.total}; the same command goes on from there") from None
    folder = save_tiny_llava(model, out / "model")
    for pictures in (1, recipe.pictures):
        accuracy = round(test_accuracy(folder, pictures), 4)
        run.write({"test_pictures": pictures, "test_accuracy": accuracy})
        print(f"accuracy on test drawings, {pictures} a context: {accuracy:.3f}")


if __name__ == "__main__":
    main()
