# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and bench/results/README.md from the committed results: ``python -m bench.report``."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from bench.rows import RESULTS, by_params, read
from bench.run import names
from bench.tables import ceilings_text, detail, pivot
from fastprompt.demo import table

ROOT = Path(__file__).parent.parent


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
    rows = {r["provider"]: r for r in read(RESULTS / "vpt_step-cpu.jsonl")}
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


def cases_block() -> str:
    """Every case and where it was measured."""
    lines = ["| case | what it times | CPU | CUDA |", "|---|---|---|---|"]
    for name in names():
        doc = importlib.import_module(f"bench.cases.{name}").__doc__ or ""
        what = doc.splitlines()[0].rstrip(".")
        files = [f"{name}-{device}.jsonl" for device in ("cpu", "cuda")]
        places = [f"[{file}]({file})" if (RESULTS / file).exists() else "*not measured*" for file in files]
        lines.append(f"| `{name}` | {what} | {' | '.join(places)} |")
    return "\n".join(lines)


def results_block() -> str:
    """Every JSON-lines file of benchmark cases."""
    parts = [ceilings_text()] if ceilings_text() else []
    for file in sorted(RESULTS.glob("*.jsonl")):
        groups = by_params(read(file))
        if groups:
            parts.append(f"## `{groups[0][0]['case']}` ([{file.name}]({file.name}))")
            parts += [pivot(groups)] if len(groups) > 4 else [detail(group) for group in groups]
    return "\n\n".join(parts)


def written() -> dict[Path, str]:
    """The two files with their tables as the results are now."""
    found = {}
    for file, blocks in (
        (ROOT / "README.md", {"demo": demo_block, "vpt_step": vpt_step_block}),
        (RESULTS / "README.md", {"cases": cases_block, "results": results_block}),
    ):
        found[file] = file.read_text()
        for name, make in blocks.items():
            found[file] = replace_block(found[file], name, make())
    return found


def main() -> None:
    """Rewrite the tables."""
    for file, text in written().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
