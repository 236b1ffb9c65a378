# SPDX-License-Identifier: Apache-2.0
"""Rows as Markdown: one table for a set of parameters, or one for many."""

from __future__ import annotations

from bench.measure import OOM
from bench.roofline import share
from bench.rows import Row, settings, varying

#: Providers that compute something else, or are given more, or are no whole operation.
OTHERS = (
    "floor", "same_keys", "same_keys/cudnn", "flash", "forward", "kernel", "stream", "attention", "attention/concat",
    "vpt/published", "vpt/fastprompt",
)  # fmt: skip


def best_peer(rows: dict[str, Row]) -> str | None:
    """The fastest provider of the same work that is not fastprompt; None if there is none."""
    times = {n: r["p50_s"] for n, r in rows.items() if "p50_s" in r and n not in OTHERS}
    return min((n for n in times if not n.startswith("fastprompt")), key=lambda n: times[n], default=None)


def detail(group: list[Row], found: dict[str, float]) -> str:
    """All that is known of one set of parameters, a line a provider; ``found`` are the ceilings of its device."""
    counted, rows = (any(key in r for r in group) for key in ("flops", "tokens"))
    more = ["TFLOP/s"] * counted + ["token rows"] * rows
    head = ["provider", "p50 ms", "p20", "p80", f"against {group[0]['baseline']}", "peak MiB", *more]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in group:
        if r.get("why_not") == OOM:
            lines.append(f"| {r['provider']} | out of memory |" + " |" * (4 + len(more)))
        elif "why_not" not in r:
            times = " | ".join(_milliseconds(r[k]) for k in ("p50_s", "p20_s", "p80_s"))
            rate = f" {_rate(r, found)} |" * counted + (f" {r['tokens']:,} |" if "tokens" in r else " |" * rows)
            lines.append(f"| {r['provider']} | {times} | {_ratio(r, 3)} | {r['peak_bytes'] / 2**20:,.0f} |{rate}")
    return "\n\n".join(
        [f"{settings(group[0]['params']) or 'As given'}. {_where(group)}.", "\n".join(lines), *_absent([group])]
    )


def pivot(groups: list[list[Row]]) -> str:
    """Median milliseconds and ratios of many sets: a column for every value of ``prompts``, a table for the rest."""
    tables: dict[str, list[list[Row]]] = {}
    for group, params in zip(groups, varying(groups), strict=True):
        tables.setdefault(settings({k: v for k, v in params.items() if k != "prompts"}), []).append(group)
    same = {k: v for k, v in groups[0][0]["params"].items() if k not in varying(groups)[0]}
    parts = [f"{settings(same)}. {_where(groups[0])}. Median ms, ratio to {groups[0][0]['baseline']}."]
    for title, columns in tables.items():
        cells: dict[str, list[str]] = {}
        for group in columns:
            for r in group:
                text = r["why_not"].split(":")[0] if "why_not" in r else f"{_milliseconds(r['p50_s'])}, {_ratio(r, 2)}"
                cells.setdefault(r["provider"], []).append(text)
        heads = " | ".join(f"P={group[0]['params']['prompts']}" for group in columns)
        lines = [f"| provider | {heads} |", "|---" * (1 + len(columns)) + "|"]
        lines += [f"| {n} | {' | '.join(row)} |" for n, row in cells.items() if set(row) != {"not run"}]
        parts += [f"{title}:", "\n".join(lines), *_absent(columns)]
    return "\n\n".join(parts)


def ceilings_text(found: dict[str, float]) -> str:
    """The fastest copy and matrix products."""
    products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {n}" for n, rate in found.items() if n != "copy")
    return f"copy {found['copy'] / 1e9:,.0f} GB/s; matrix product {products}."


def _rate(row: Row, found: dict[str, float]) -> str:
    if "flops" not in row:
        return ""
    part = share(row, found)
    reached = f" ({100 * part[1]:.0f} % of the {part[0]} ceiling)" if part else ""
    return f"{row['flops'] / row['p50_s'] / 1e12:.3g}{reached}"


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3f}"


def _ratio(row: Row, digits: int) -> str:
    return f"{row['ratio_p50']:.{digits}f}x" if "ratio_p50" in row else "-"


def _where(group: list[Row]) -> str:
    m = group[0]["machine"]
    threads = f", {m['threads']} threads" if "threads" in m else ""
    return f"{m['device']}{threads}, torch {m['torch']}, {m['date'][:10]}"


def _absent(groups: list[list[Row]]) -> list[str]:
    """One line with the providers that ran nowhere, and why."""
    reasons: dict[str, list[str]] = {}
    for r in groups[0]:
        if r.get("why_not", OOM) != OOM:
            reasons.setdefault(r["why_not"], []).append(f"`{r['provider']}`")
    return ["; ".join(f"{', '.join(n)} {why}" for why, n in reasons.items()) + "."] if reasons else []
