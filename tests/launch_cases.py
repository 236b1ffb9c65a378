# SPDX-License-Identifier: Apache-2.0
"""Launches of every Triton kernel by Triton's own path into a driver that is not there: see test_launch.py.

Run as a program, in a process that does not interpret kernels; prints what it found as JSON.
"""

import json
import struct
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import triton

from bench import stand_in
from bench.resources import source
from fastprompt.kernels import configs, prompt_part
from fastprompt.kernels.launch import Plan, Step
from fastprompt.ops import (
    compress_kv,
    decoupled_attention,
    diffuse_prompts,
    key_scores,
    prompt_attention,
    prompt_attention_varlen,
    summarize_tokens,
)

BF16 = torch.bfloat16


def rows(batch=2, heads=4, tokens=197, dim=64, dtype=BF16):
    """As a model's projection leaves them."""
    return torch.zeros(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def attention(batch=2, heads=4, heads_kv=4, tokens=197, dim=64, prompts=10, bank=None, dtype=BF16, learned=None):
    lead = () if bank is None else (bank,)
    tensors = [rows(batch, h, tokens, dim, dtype) for h in (heads, heads_kv, heads_kv)]
    return tensors + [torch.zeros(*lead, heads_kv, prompts, dim, dtype=learned or dtype) for _ in range(2)]


def both(op, tensors, needs=None):
    """Forward and backward of fresh leaves; every call has tensors of its own."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    wanted = leaves if needs is None else leaves[needs]
    out = op(*leaves)
    if isinstance(out, tuple):
        torch.autograd.grad(out, wanted, [torch.zeros_like(x) for x in out])
    else:
        torch.autograd.grad(out, wanted, torch.zeros_like(out))


def cases():
    """Name -> a call that launches kernels."""
    index = torch.tensor([2, 0])
    visible = torch.ones(2, 1, 197, 197, dtype=torch.bool)
    biased = torch.zeros(197, 197)
    ends = torch.tensor([0, 77, 154], dtype=torch.int32)
    packed = [torch.zeros(154, 4, 64, dtype=BF16) for _ in range(3)]
    prompts = [torch.zeros(4, 10, 64) for _ in range(2)]
    width = 256
    wide = [torch.zeros(s, dtype=BF16) for s in ((2, 197, width),) * 2]
    wide += [torch.zeros(s) for s in ((10, width), (4, width), (width, 4), ())]
    lse = torch.zeros(2, 4, 197)
    valid = torch.ones(2, 197, dtype=torch.bool)
    q, k, v = attention()[:3]
    spatial = torch.zeros(2, 1, 197, 11)
    branches = [rows(), rows(2, 4, 77), rows(1, 4, 11), rows(2, 4, 77), rows(1, 4, 11)]

    def decoupled(query, a, b, c, d, weight):
        masks = [None, spatial]
        return decoupled_attention(query, [a, b], [c, d], [0.5, weight], attn_masks=masks, is_causal=[True, False])

    def behind_a_library():
        q, *others = attention(bank=1)
        out, merged = prompt_part.forward(q, *others, None, q, lse, 0.125)
        prompt_part.backward(q, q, *others, None, out, merged, torch.zeros_like(q), 0.125, [True, True])

    return {
        "plain": lambda: both(prompt_attention, attention()),
        "lse": lambda: both(lambda *x: prompt_attention(*x, return_lse=True), attention()),
        "prompts alone": lambda: both(prompt_attention, attention(learned=torch.float32), slice(3, None)),
        "one prompt, one sample": lambda: both(prompt_attention, attention(1, prompts=1)),
        "no prompts": lambda: both(prompt_attention, attention(prompts=0), slice(3)),
        "bool mask": lambda: both(lambda *x: prompt_attention(*x, attn_mask=visible), attention()),
        "float mask, grouped": lambda: both(
            lambda *x: prompt_attention(*x, attn_mask=biased, is_causal=True), attention(heads=8, heads_kv=2)
        ),
        "bank": lambda: both(prompt_attention, attention(bank=2)),
        "indexed bank": lambda: both(lambda *x: prompt_attention(*x, prompt_index=index), attention(bank=3)),
        "float32": lambda: both(prompt_attention, attention(dtype=torch.float32, dim=80)),
        "packed": lambda: both(
            lambda *x: prompt_attention_varlen(*x, ends, max_seqlen=77, is_causal=True), [*packed, *prompts]
        ),
        "packed bank": lambda: both(
            lambda *x: prompt_attention_varlen(*x, ends, max_seqlen=77),
            [*packed, *(torch.zeros(2, 4, 10, 64) for _ in range(2))],
        ),
        "decoupled": lambda: both(decoupled, [*branches, torch.zeros(4, 1)]),
        "diffused": lambda: both(diffuse_prompts, wide),
        "diffused, softmax": lambda: both(lambda *x: diffuse_prompts(*x, activation="softmax"), wide),
        "summaries": lambda: both(summarize_tokens, [torch.zeros(3, 10, width), wide[0]]),
        "scores": lambda: key_scores(q, k, lse),
        "scores, masked": lambda: key_scores(q, k, lse, query_mask=valid, key_mask=valid, normalize="visible"),
        "behind a library": behind_a_library,
        "compressed": lambda: compress_kv(k, v, lse, 64, merge="pivot"),
    }


def shapes():
    """Kernel -> calls of what a user may mix in one process: models, lengths, batches, numbers of prompts."""
    for batch in (1, 2, 32):
        for heads, tokens in ((12, 197), (16, 257), (16, 577), (12, 256)):
            for prompts in (1, 10, 16, 50):
                yield lambda a=(batch, heads, heads, tokens, 64, prompts): both(prompt_attention, attention(*a))
    for prompts in (4, 16):
        for text in (64, 77):
            for tokens in (256, 1024):
                tensors = [rows(2, 8, tokens)] + [rows(2, 8, n) for n in (text, prompts, text, prompts)]
                yield lambda t=tensors: both(lambda q, a, b, c, d: decoupled_attention(q, [a, b], [c, d], [1, 0.5]), t)


def number(kind, value):
    """What the driver gets for a value of this type, as bits."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    return value % (1 << 8 * stand_in.BYTES.get(kind, 8))


def flatten(kinds, values):
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield number(kind, value)


class Witness:
    """What Triton compiles and what arrives at the driver, beside what was meant."""

    def __init__(self, heard):
        self.heard, self.faults, self.compiled, self.launched = heard, [], [], 0
        self.real, self.step = triton.compiler.compile, None
        self.folder = Path(tempfile.mkdtemp())
        self.really = 0
        first, launch = Step.first, Plan._launch

        def spy_first(step, tensors):
            self.step = step
            first(step, tensors)

        def spy_launch(plan, inputs, outputs, workspace, addresses, stream):
            before = len(heard)
            launch(plan, inputs, outputs, workspace, addresses, stream)
            tensors = plan.tensors(inputs, outputs, workspace)
            if addresses != [0 if x is None else x.data_ptr() for x in tensors]:
                self.faults.append("addresses are not those of the tensors")
            for step, arrived in zip(plan.steps, heard[before:], strict=True):
                self.check(step, arrived, tensors)

        Step.first, Plan._launch = spy_first, spy_launch
        triton.compiler.compile = self.compile

    def check(self, step, arrived, tensors):
        """Kernel, grid and every argument, in order."""
        self.launched += 1
        launch = step.launch
        kinds = source(launch).signature.values()
        want = [
            launch.kernel.__name__,
            launch.programs,
            32 * launch.config.warps,
            *flatten(kinds, step.arguments(tensors)),
        ]
        got = [arrived.kernel, arrived.programs, arrived.threads, *arrived.arguments]
        if want != got:
            self.faults.append(f"{launch.kernel.__name__}: the driver got {got}, expected {want}")

    def compile(self, src, target=None, options=None, _env_vars=None):
        """Compare with what the compile gate would compile; the code itself only for some."""
        launch = self.step.launch
        want = source(launch)
        got, meant = (
            # Versions of Triton differ in whether they list what has no attribute.
            (x.fn, x.signature, x.constants, {k: v for k, v in x.attrs.items() if v})
            for x in (src, want)
        )
        wanted = launch.options()
        asked = {name: options[name] for name in wanted}
        if got != meant or asked != wanted:
            self.faults.append(
                f"{launch.kernel.__name__}: Triton compiles {got} with {asked}, the gate {meant} with {wanted}"
            )
        self.compiled.append(launch.kernel.__name__)
        if self.really > 0:
            self.really -= 1
            return self.real(src, target=target, options=options)
        return self.without_code(src, target, options)

    def without_code(self, src, target, options):
        """A kernel that is launched like a compiled one."""
        sizes = dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
        aligned = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
        metadata = {
            **options,
            **sizes,
            **aligned,
            "target": vars(target),
            "name": src.fn.__name__,
            "tensordesc_meta": [],
        }
        stem = self.folder / str(len(self.compiled))
        files = {stem.with_suffix(s): b for s, b in ((".json", json.dumps(metadata, default=vars)), (".cubin", "none"))}
        for path, text in files.items():
            path.write_text(text)
        return triton.compiler.CompiledKernel(src, {path.name: str(path) for path in files}, "hash")


def main():
    torch.set_num_threads(1)
    with stand_in.active(), stand_in.listen() as heard:
        found = {"forms": forms(), "cases": {}}
        witness = Witness(heard)
        for name, call in cases().items():
            # Two kernels all the way: by Triton, LLVM and ptxas.
            witness.really = 2 if name == "prompts alone" else 0
            counts = []
            for _ in range(2):
                before = len(witness.compiled), witness.launched
                call()
                counts.append((witness.compiled[before[0] :], witness.launched - before[1]))
            found["cases"][name] = counts
        found["faults"] = witness.faults
    json.dump(found, sys.stdout)


def forms():
    """How often each kernel would be compiled for all of `shapes`."""
    keys = defaultdict(set)

    def hook(fn, key, **_):
        keys[fn.jit_function].add(key)
        return True  # leaves it at what would be compiled; nothing is launched

    triton.knobs.runtime.jit_cache_hook = hook
    for call in shapes():
        call()
    triton.knobs.runtime.jit_cache_hook = None
    configs.stamp += 1
    for kernel in keys:
        # It would remember the compiler from before `Witness`.
        kernel.device_caches.clear()
    return {kernel.__name__: len(x) for kernel, x in keys.items()}


if __name__ == "__main__":
    main()
