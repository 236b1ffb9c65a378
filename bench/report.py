# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and bench/results/README.md from the committed results: ``python -m bench.report``."""

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


def results_block() -> str:
    """Every JSON-lines file of benchmark cases, one table a set of parameters."""
    parts = []
    for file in sorted(RESULTS.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if "case" not in rows[0]:
            continue
        tables: dict[str, list[dict]] = {}
        for row in rows:
            tables.setdefault(json.dumps(row["params"]), []).append(row)
        parts.append(f"## `{rows[0]['case']}` ([{file.name}]({file.name}))")
        for params, group in tables.items():
            machine = group[0]["machine"]
            settings = ", ".join(f"{k} {v}" for k, v in json.loads(params).items())
            baseline = group[0]["baseline"]
            lines = [f"| provider | p50 ms | p20 | p80 | against {baseline} | peak MiB |", "|---|---|---|---|---|---|"]
            for r in group:
                times = " | ".join(f"{1e3 * r[k]:,.1f}" for k in ("p50_s", "p20_s", "p80_s"))
                peak = r["peak_bytes"] / 2**20
                lines.append(f"| {r['provider']} | {times} | {r['ratio_p50']:.3f}x | {peak:,.0f} |")
            where = (
                f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}"
            )
            parts += [f"{settings}. {where}.", "\n".join(lines)]
    return "\n\n".join(parts)


def main() -> None:
    """Rewrite the tables."""
    for file, blocks in (
        (ROOT / "README.md", {"demo": demo_block, "vpt_step": vpt_step_block}),
        (RESULTS / "README.md", {"results": results_block}),
    ):
        text = file.read_text()
        for name, make in blocks.items():
            text = replace_block(text, name, make())
        file.write_text(text)


if __name__ == "__main__":
    main()
