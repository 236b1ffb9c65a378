# SPDX-License-Identifier: Apache-2.0
"""A frozen CLIP as an image classifier whose class texts, and vision tower, carry learned prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastprompt.errors import AttachError, CheckpointError
from fastprompt.hf import clip_checkpoint
from fastprompt.hf.attach import Handle, attach
from fastprompt.hf.class_encoder import ClassEncoder, recomputed
from fastprompt.hf.class_texts import check_classnames
from fastprompt.hf.clip_vision import (
    ImageCache,
    Scored,
    VisionPrompts,
    check_clip,
    check_labels,
    image_features,
    prompted_layers,
)
from fastprompt.hf.holds import Freeze
from fastprompt.hf.packing import Packing
from fastprompt.hf.sites import choose_tower
from fastprompt.recipes.registry import CLIP_RECIPES
from fastprompt.recipes.zero_shot import TEMPLATE, check_templates


class CLIPClassifier(nn.Module):
    """Cosine classification with a frozen CLIP and learned prompts: ``logits = exp(t) * unit(image) . unit(text_c)``.

    The numbers and gradients are those of the published formulation (one row of 77 tokens a class), computed without
    padding, without copies of the shared context and without rows that nobody reads (identity I3). It is a plain module
    for any training loop or the Hugging Face ``Trainer``; exactly the recipe's tensors require gradients, and its
    ``state_dict`` holds them alone.

    Args:
        clip: ``CLIPModel`` or a model with its parts (MetaCLIP 2, SigLIP). It is frozen, and runs in eval mode. Recipes
            with vision prompts put them into its vision tower until `detach`.
        tokenizer: The CLIP's: an object with transformers' call, ``bos_token_id`` and ``eos_token_id``.
        classnames: C names; a class's text is its name and a full stop.
        recipe: ``CoOp``, ``CoCoOp``, ``MaPLe``, ``IVLP``, ``DPL`` or ``ZeroShot``.
        share: What the texts share: ``"all"`` (one prefix), ``"image"`` (one an image), ``"none"``; None is the most
            that is exact.
        class_chunk: Classes encoded at a time while training, each chunk recomputed in the backward pass; None is as
            many as keep the text tower's activations below 2 GiB.
        cache_images: Keep the feature of every image seen, in memory, and look it up by the image's bytes: for recipes
            that leave the vision tower alone, and data without random augmentation.

    Raises:
        TypeError, ValueError: bad input; the message names it.
        UnsupportedModelError: not a CLIP-like model.
        AttachError: the vision tower already holds prompts.

    Example:
        >>> import torch, fastprompt
        >>> from transformers import CLIPConfig, CLIPModel
        >>> tower = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> clip = CLIPModel(CLIPConfig(projection_dim=16, vision_config=dict(image_size=32, patch_size=16, **tower),
        ...                             text_config=dict(vocab_size=300, bos_token_id=1, eos_token_id=2, **tower)))
        >>> class Letters:
        ...     bos_token_id, eos_token_id = 1, 2
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [ord(c) for c in text]}
        >>> clf = fastprompt.CLIPClassifier(clip, Letters(), ["cat", "dog", "bird"], fastprompt.CoOp(n_ctx=4))
        >>> out = clf(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2]))
        >>> out.loss.backward()
        >>> out.logits.shape, [n for n, p in clf.named_parameters() if p.grad is not None]
        (torch.Size([2, 3]), ['learner.context'])
    """

    def __init__(
        self,
        clip: Any,
        tokenizer: Any,
        classnames: Sequence[str],
        recipe: Any,
        *,
        share: str | None = None,
        class_chunk: int | None = None,
        cache_images: bool = False,
    ):
        super().__init__()
        check_clip(clip)
        if isinstance(recipe, type) or type(recipe).__name__ not in CLIP_RECIPES:
            raise TypeError(f"recipe: got {recipe!r}, expected one of {', '.join(CLIP_RECIPES)}, e.g. CoOp(n_ctx=16)")
        texts = ClassEncoder(clip, tokenizer, classnames, class_chunk)
        learner = recipe.build(texts.sites(clip)).to(clip.logit_scale.device)
        if cache_images and learner.vision_depth:
            raise ValueError(
                f"cache_images: got True, but {type(recipe).__name__} learns in the vision tower, whose features "
                "change with every step; expected False"
            )
        texts.lay_out(recipe, learner.length, share)
        texts.tower.splits = list(learner.text_split)
        self.recipe = recipe
        self._images = ImageCache() if cache_images else None
        self._handle: Handle | None = None
        if learner.vision_depth:
            self._handle = attach(clip, VisionPrompts(clip, learner), tower="vision")
        self._freeze: Freeze | None = Freeze(clip.parameters())
        self._freeze.apply()
        self._modes = [(module, module.training) for module in clip.modules()]
        self._attentions = choose_tower(clip, "vision").attentions
        self._prompted = prompted_layers(self._attentions)
        self.clip, self.texts, self.learner = clip, texts, learner
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_pre_hook(_note_base)
        self.register_load_state_dict_post_hook(_forgive_base)
        self.train(self.training)

    @property
    def classnames(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return self.texts.classnames

    @property
    def num_trainable(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.learner.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> CLIPClassifier:
        """Set the learner's mode; the CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit image features ``[B,D]``, float32 (float64 of a float64 model).

        Raises:
            AttachError: another classifier or handle has changed the prompts of the vision tower.
        """
        if prompted_layers(self._attentions) != self._prompted:
            raise AttachError(
                "clip: its vision tower has got or lost prompts since this classifier was built; detach the other "
                "classifier or handle first, or build a classifier on a CLIP of its own"
            )
        if self._images is None or torch.compiler.is_compiling():
            return image_features(self.clip, pixel_values)
        return self._images.lookup(pixel_values, lambda x: image_features(self.clip, x), self.clip.parameters())

    def text_features(self, image_features: Tensor | None = None) -> Tensor:
        """Unit text features ``[C,D]``, or ``[B,C,D]`` where the recipe's context depends on the image.

        Where no gradient is needed they are kept until a prompt or a weight changes.

        Args:
            image_features: Unit rows ``[B,D]``; `CoCoOp` alone reads them.
        """
        if self.learner.context is None:
            return self.texts.template_features(self.recipe.templates).clone()
        if self.learner.meta is not None:
            return self.texts.encode_all(self._context(image_features), self.learner.deep())
        compute = lambda: self.texts.encode_all(self._context(None), self.learner.deep())[0]  # noqa: E731
        # A copy, which the caller may write to.
        return self.texts.keep("learned", self.learner.parameters(), compute).clone()

    def _context(self, image: Tensor | None) -> Tensor:
        """What the texts' slots hold: ``[G,slots,W]``."""
        context = cast(Tensor, self.learner.text(image))
        return context if self.learner.meta is not None else context.reshape(1, -1, context.shape[-1])

    def _logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits ``[B,c]`` of unit features ``[B,D]`` and ``[c,D]`` or ``[B,c,D]``."""
        # Scaled by 100, cosines need more than half precision.
        with torch.autocast(image.device.type, enabled=False):
            cosine = image @ text.T if text.dim() == 2 else torch.einsum("bd,bcd->bc", image, text)
            logits = self.clip.logit_scale.exp().to(cosine.dtype) * cosine
            bias = getattr(self.clip, "logit_bias", None)
            return logits if bias is None else logits + bias.to(cosine.dtype)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, *, return_logits: bool = True) -> Scored:
        """Logits of every class, and the cross entropy with ``labels``.

        Where classes go in chunks (``class_chunk``), the loss is a running log-sum-exp over them: neither text features
        nor differentiable logits of all classes are alive at once, and beside a loss ``logits`` carries no gradient.
        Without labels it does, for a loss of your own.

        Args:
            pixel_values: ``[B,3,H,W]`` as the CLIP expects.
            labels: int64 ``[B]``, values in ``[0, C)``.
            return_logits: False keeps no logits; it needs labels.

        Returns:
            ``.loss`` (None without labels) and ``.logits [B,C]`` (None if not kept), float32.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or not len(pixel_values):
            got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: got {got}, expected a tensor [B,3,H,W] of at least one image")
        if labels is not None:
            check_labels(labels, len(pixel_values), len(self.classnames))
        elif not return_logits:
            raise ValueError("return_logits: got False without labels, expected labels: nothing would be returned")
        image = self.image_features(pixel_values)
        if self.learner.context is not None:
            context = self._context(image)
            tracked = torch.is_grad_enabled() and context.requires_grad
            packings = self.texts.chunks(len(context), tracked)
            if len(packings) > 1 and (tracked or self.learner.meta is not None):
                return self._chunked(packings, image, context, labels, return_logits, tracked)
        logits = self._logits(image, self.text_features(image))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Scored(loss, logits if return_logits else None)

    def _chunked(
        self,
        packings: list[Packing],
        image: Tensor,
        context: Tensor,
        labels: Tensor | None,
        return_logits: bool,
        tracked: bool,
    ) -> Scored:
        """`forward` over chunks of classes, each computed again in the backward pass."""
        deep = self.learner.deep()

        def score(packing: Packing, first: int, image: Tensor, context: Tensor) -> tuple[Tensor | None, ...]:
            features = self.texts.encode(packing, context, deep)
            logits = self._logits(image, features if self.learner.meta is not None else features[0])
            if labels is None:
                return None, None, logits
            kept = logits.detach() if return_logits else None
            place = labels - first
            inside = (place >= 0) & (place < packing.classes)
            found = logits.gather(1, place.clamp(0, packing.classes - 1)[:, None])[:, 0]
            return logits.logsumexp(1), found * inside, kept

        firsts = accumulate((p.classes for p in packings[:-1]), initial=0)
        parts = [recomputed(tracked, score, p, n, image, context) for p, n in zip(packings, firsts, strict=True)]
        sums, found, kept = zip(*parts, strict=True)
        loss = None if labels is None else (torch.stack(sums).logsumexp(0) - torch.stack(found).sum(0)).mean()
        return Scored(loss, torch.cat(kept, dim=1) if return_logits else None)

    def zero_shot_weights(self, templates: str | Sequence[str] | None = None) -> Tensor:
        """Unit class weights ``[C,D]`` of hand-written templates, without prompts: the zero-shot classifier.

        Args:
            templates: Texts with one ``{}``; several are averaged as unit features. None is the recipe's own
                (`ZeroShot`), or ``"a photo of a {}."``.
        """
        if templates is None:
            templates = getattr(self.recipe, "templates", (TEMPLATE,))
        return self.texts.template_features(check_templates(templates)).clone()

    @torch.no_grad()
    def export(self) -> Tensor:
        """The learned prompt as plain class weights ``[C,D]``, unit rows.

        ``logits = exp(t) * unit(image) @ weights.T``. With vision prompts the image features must still come from
        `image_features`.

        Raises:
            ValueError: the context depends on the image.
        """
        if self.learner.meta is not None:
            raise ValueError(
                f"recipe: got {type(self.recipe).__name__}, whose class weights depend on the image; expected a recipe "
                "with one set of class weights, such as CoOp"
            )
        return self.text_features()

    def save(self, directory: str | Path) -> None:
        """Write ``prompt_config.json`` and ``prompts.safetensors``: the learned tensors, class names and recipe."""
        clip_checkpoint.save(self, Path(directory))

    @classmethod
    def load(
        cls,
        clip: Any,
        tokenizer: Any,
        directory: str | Path,
        *,
        classnames: Sequence[str] | None = None,
        share: str | None = None,
        class_chunk: int | None = None,
        cache_images: bool = False,
    ) -> CLIPClassifier:
        """The classifier that `save` wrote, on the CLIP it was trained on.

        Args:
            clip: The base model (same weights; another float dtype is fine).
            tokenizer: Its tokenizer.
            directory: Holds both files.
            classnames: Other classes for the same prompt (base-to-new); None is those it was trained on.
            share: As for a new classifier.
            class_chunk: As for a new classifier.
            cache_images: As for a new classifier.

        Raises:
            CheckpointError: a file is missing or changed, or belongs to another CLIP; ``clip`` is left as it was.
            ValueError: ``classnames`` for a prompt with one context a class (``csc``).
        """
        content, tensors = clip_checkpoint.read(Path(directory), CLIP_RECIPES)
        check_clip(clip)
        clip_checkpoint.check_base(content, clip)
        names = content["classnames"] if classnames is None else list(check_classnames(classnames))
        if content["config"].get("csc") and names != content["classnames"]:
            raise ValueError(
                f"classnames: got others than the {len(content['classnames'])} classes that each have a context of "
                "their own (csc=True); expected those, or a prompt that was trained with csc=False"
            )
        try:
            recipe = CLIP_RECIPES[content["method"]](**content["config"])
            with torch.random.fork_rng([]):  # the initial prompts are drawn, and then replaced
                options: Any = {"share": share, "class_chunk": class_chunk, "cache_images": cache_images}
                clf = cls(clip, tokenizer, names, recipe, **options)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"directory: what {directory} holds does not fit this CLIP, tokenizer and options: {error}"
            ) from error
        try:
            clip_checkpoint.fill(clf.learner, tensors)
        except BaseException:
            clf.detach()
            raise
        return clf

    def detach(self) -> None:
        """Give the CLIP back: no prompts in its vision tower, its gradient flags, modes and config as before."""
        if self._freeze is None:
            raise AttachError("classifier: its CLIP was given back already, or it is a copy that never held it")
        self._freeze.release(())
        self._freeze = None
        if self._handle is not None:
            self._handle.detach()
        for module, training in self._modes:
            module.training = training

    def __getstate__(self) -> dict:
        # A copy has a CLIP of its own, which holds its prompts for good; what is kept belongs to the original.
        return {**super().__getstate__(), "_freeze": None, "_handle": None, "_modes": []}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"recipe={self.recipe!r}"


def _drop_base(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    """Leave the frozen CLIP out of a state dict."""
    for name in [n for n in state if n.startswith(prefix + "clip.")]:
        del state[name]


def _note_base(module: Any, state: dict, prefix: str, *_: Any) -> None:
    """Remember what the CLIP's keys begin with, for `_forgive_base`, which is not told."""
    module._base = prefix + "clip."


def _forgive_base(module: Any, keys: Any) -> None:
    """A state dict without the CLIP is whole."""
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(module._base)]
