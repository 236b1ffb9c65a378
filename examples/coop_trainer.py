# SPDX-License-Identifier: Apache-2.0
"""CoOp in the Hugging Face Trainer: the classifier is a model as any other, and its checkpoints hold the prompt alone.

``python examples/coop_trainer.py [STEPS]``; it needs ``pip install "fastprompt[demo]"``.
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

import fastprompt
from fastprompt.tuning.clips import ClipTask


def accuracy(prediction) -> dict[str, float]:
    """What the Trainer reports at an evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(steps: int) -> None:
    task = ClipTask(shots=16)
    clip, tokenizer = task.build_model()
    images = task.images()
    torch.manual_seed(0)
    clf = fastprompt.CLIPClassifier(
        clip, tokenizer, images.classes, fastprompt.CoOp(init="a photo of a"), cache_images=True
    )
    arguments = TrainingArguments(
        "runs/coop_trainer", max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=32,
        learning_rate=2e-2, optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="cosine",
        dataloader_pin_memory=torch.cuda.is_available(), logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        clf, arguments, train_dataset=task.training(images, clip), eval_dataset=task.evaluation(images, clip),
        compute_metrics=accuracy,
    )  # fmt: skip
    print(f"accuracy before {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.train()
    print(f"accuracy after {trainer.evaluate()['eval_accuracy']:.3f}")
    clf.save("runs/coop_trainer")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
