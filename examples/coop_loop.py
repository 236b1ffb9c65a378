# SPDX-License-Identifier: Apache-2.0
"""CoOp in a plain training loop: sixteen drawings a class, the shipped CLIP, cross entropy, SGD."""

import sys

import torch
from torch.utils.data import DataLoader

import fastprompt
from fastprompt.tuning import evaluate
from fastprompt.tuning.clips import ClipTask

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
task = ClipTask(shots=16)
clip, tokenizer = task.build_model()
images = task.images()
train_set, test_set = task.training(images, clip), task.evaluation(images, clip)

torch.manual_seed(0)
recipe = fastprompt.CoOp(init="a photo of a")
clf = fastprompt.CLIPClassifier(clip, tokenizer, images.classes, recipe, cache_images=True)
optimizer = torch.optim.SGD(clf.learner.parameters(), lr=0.02, momentum=0.9)
print(f"accuracy before {evaluate(clf, test_set, batch_size=32, progress=False).accuracy:.3f}")
for epoch in range(epochs):
    for batch in DataLoader(train_set, batch_size=32, shuffle=True):
        loss = clf(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}  loss {evaluate(clf, train_set, batch_size=32, progress=False).loss:.3f}")
print(f"accuracy after {evaluate(clf, test_set, batch_size=32, progress=False).accuracy:.3f}")
clf.save("runs/coop_loop")
