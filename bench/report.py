# SPDX-License-Identifier: Apache-2.0
"""Write the README's tables from the committed results: ``python -m bench.report``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastprompt.demo import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", flags=re.S)
    if not pattern.search(text):
        raise ValueError(f"name: got {name!r}, but the text has no <!-- {name}:begin --> ... <!-- {name}:end -->")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def demo_block() -> str:
    """The demo's table."""
    return table(RESULTS / "demo-textile.jsonl")


def vpt_step_block() -> str:
    """The whole-step benchmark, one row a provider."""
    lines = [
        "| form | s a step | against published | against the floor | peak memory of a step |",
        "|---|---|---|---|---|",
    ]
    rows = {r["provider"]: r for r in map(json.loads, (RESULTS / "vpt_step-cpu.jsonl").read_text().splitlines())}
    floor = rows["floor"]["ratio_p50"]
    names = {
        "published": "published: tokens inserted",
        "kv_concat": "keys and values computed once, concatenated (SDPA)",
        "fastprompt": "**fastprompt**",
        "floor": "floor: no prompts",
    }
    for provider, name in names.items():
        r = rows[provider]
        lines.append(
            f"| {name} | {r['p50_s']:.2f} | {r['ratio_p50']:.2f}x | {r['ratio_p50'] / floor:.2f}x | "
            f"{r['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    params = rows["floor"]["params"]
    return f"{params['prompts']} prompts in each of {params['layers']} layers:\n\n" + "\n".join(lines)


def main() -> None:
    """Rewrite the README's tables."""
    readme = ROOT / "README.md"
    text = replace_block(readme.read_text(), "demo", demo_block())
    readme.write_text(replace_block(text, "vpt_step", vpt_step_block()))


if __name__ == "__main__":
    main()
