# SPDX-License-Identifier: Apache-2.0
"""What the operating system says of a compressing cache: the process gets smaller."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastprompt

RESIDENT = """
import ctypes, gc, json, os, torch
from transformers import DynamicCache, LlamaConfig, LlamaModel
import fastprompt
torch.set_num_threads(1)
torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64, "num_hidden_layers": 8, "vocab_size": 100}
model = LlamaModel(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=4)).eval()
for layer in model.layers:
    # From heads that look everywhere to heads that look at few keys.
    layer.self_attn.q_proj.weight.detach().view(4, 64, 64).mul_(torch.tensor([0.0, 60.0, 120.0, 240.0]).view(4, 1, 1))
    layer.self_attn.k_proj.weight.detach().mul_(8.0)
libc = ctypes.CDLL("libc.so.6")

def resident():
    gc.collect()
    libc.malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def read(cache, length=768):
    model(torch.randint(3, 100, (4, length)), past_key_values=cache)

found = {}
with torch.no_grad():
    read(DynamicCache(config=model.config), 64)
    base, cache = resident(), DynamicCache(config=model.config)
    read(cache)
    found["plain"] = (resident() - base, sum(x.keys.nbytes + x.values.nbytes for x in cache.layers))
    del cache
    for policy in (fastprompt.KeyDiff(0.2), fastprompt.AdaKV(fastprompt.SnapKV(0.2, window=8, kernel=1))):
        cache = fastprompt.PromptCache(model, policy)
        read(cache)
        before, full = resident(), cache.nbytes()
        cache.finalize()
        widest = 0
        for layer in cache.layers:
            blocks = layer.blocks
            if blocks is not None:
                widest += 16 * (max(n for s in blocks.counts for n in s) + 64) * 2 * 64 * 4
        found[type(policy).__name__] = (before - resident(), full - cache.nbytes(), cache.nbytes(), widest)
        cache.close()
        del cache
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and calls glibc's malloc_trim")
def test_the_process_gets_smaller():
    """Resident memory falls with `nbytes`, in heads of one budget and of budgets of their own."""
    root = Path(fastprompt.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, theory = found["plain"]
    # Four sentences of 768 tokens, eight layers, four heads of 64 floats, keys and values.
    assert theory == 4 * 768 * 8 * 4 * 64 * 4 * 2 and plain >= 0.9 * theory
    for name in ("KeyDiff", "AdaKV"):
        fell, expected, held, widest = found[name]
        assert expected >= 0.65 * theory and fell >= 0.7 * expected, found
    assert held < 0.75 * widest, found
