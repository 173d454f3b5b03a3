"""What a run did, kind by kind, as a table."""

from __future__ import annotations

from fuzz.run import Report

COLUMNS = ("cases", "refused", "disagreements", "errors", "crashes", "hangs")


def table(report: Report) -> str:
    """One line a kind that ran, and their sum."""
    rows = {kind: counts for kind, counts in sorted(report.counts.items()) if counts["cases"]}
    total = {name: sum(counts[name] for counts in rows.values()) for name in (*COLUMNS, "nanoseconds")}
    lines = [f"{'kind':18}" + "".join(f"{name:>15}" for name in (*COLUMNS, "ms of CPU"))]
    for kind, counts in {**rows, "all": total}.items():
        milliseconds = counts["nanoseconds"] / 1e6 / max(1, counts["cases"])
        lines.append(f"{kind:18}" + "".join(f"{counts[name]:15,}" for name in COLUMNS) + f"{milliseconds:15.2f}")
    return "\n".join(lines)
