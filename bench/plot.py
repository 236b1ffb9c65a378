# SPDX-License-Identifier: Apache-2.0
"""Plot results files: ``python -m bench.plot bench/results/prompt_attention-cpu.jsonl --out plot.png``."""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import fill

from bench.rows import Row, by_params, read, results_file, settings, varying


def plot(rows: list[Row], out: Path) -> None:
    """Ratios to the baseline as bars, whiskers from p20 to p80; one panel for every case and set of parameters."""
    from matplotlib.figure import Figure

    groups = by_params(rows)
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    longest = max(map(len, groups))
    figure = Figure(figsize=(1 + 3.6 * columns, lines * (1.3 + 0.24 * longest)), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, group in zip(panels, groups, strict=False):
        _bars(panel, group)
        peers = [other for other in groups if other[0]["case"] == group[0]["case"]]
        shown = varying(peers)[peers.index(group)] or group[0]["params"]
        panel.set_title(f"{group[0]['case']}\n{fill(settings(shown), 45)}", fontsize=8)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    devices = sorted({row["machine"]["device"] for row in rows})
    figure.suptitle(f"median time against the baseline, p20 to p80; {', '.join(devices)}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def _bars(panel, group: list[Row]) -> None:
    for y, row in enumerate(group):
        if "ratio_p50" not in row:
            why_not = row.get("why_not", "no baseline")
            panel.text(0.01, y, why_not.split(":")[0], va="center", fontsize=7, color="0.45",
                       transform=panel.get_yaxis_transform())  # fmt: skip
            continue
        low, middle, high = (row[f"ratio_{p}"] for p in ("p20", "p50", "p80"))
        colour = "tab:orange" if row["provider"].startswith("fastprompt") else "0.7"
        panel.barh(y, middle, color=colour, xerr=[[middle - low], [high - middle]], ecolor="0.2", capsize=2)
        panel.text(high, y, f" {middle:.2f}", va="center", fontsize=7)
    panel.set_yticks(range(len(group)), [row["provider"] for row in group], fontsize=7)
    panel.set_ylim(len(group) - 0.5, -0.5)
    panel.margins(x=0.15)
    panel.set_xlim(left=0)
    panel.tick_params(axis="x", labelsize=7)
    panel.axvline(1, color="0.2", linewidth=0.8, linestyle=":")
    panel.set_xlabel(f"x {group[0]['baseline']}", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Read the files and write the PNG."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("files", type=results_file, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    plot([row for file in args.files for row in read(file)], args.out)
    print(args.out)


if __name__ == "__main__":
    main()
