"""Rows -> a table: the columns, and what a cell of each says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from r1.bench.report.aligned import aligned
from r1.bench.workload import SIZES

Row = dict[str, Any]


def table(rows: list[Row], only: Sequence[str] | None = None) -> list[str]:
    """The rows as lines of Markdown, in all columns or in `only` these.

    A size that is the same in all rows is left out, except batch: the text above the table has it.
    A column without any content is left out too.
    """
    same = {name for name in SIZES if name != "batch" and len({r[name] for r in rows}) < 2}
    columns: dict[str, list[str]] = {}
    for name, cell in COLUMNS.items():
        cells = [
            cell(r) if not r["refused"] or name in IDENTITY else "n/a" if name == "TTFT ms" else ""
            for r in rows
        ]
        if (only is None or name in only) and name not in same and any(cells):
            columns[name] = cells
    return aligned(columns)


def _tpot(r: Row) -> str:
    return f"{r['tpot_ms']:.2f} ({r['tpot_p90_ms']:.2f})" if r["tpot_p90_ms"] else ""


def _speedup(r: Row) -> str:
    if r["speedup"] is None:
        return "1" if r["kind"] == "baseline" else "" if r["parity"] else "parity fails"
    return f"{r['speedup']:.2f} ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})" + (
        " noise" if r["within_noise"] else ""
    )


def _moe_layer(r: Row) -> str:
    return f"{r['moe_layer_us']:.0f} ({r['moe_layer_floor_us']:.0f})" if r["moe_layer_us"] else ""


def _memory(r: Row) -> str:
    """The GPU's, or on a CPU the process's."""
    return f"{r['host_gb'] if r['allocated_gb'] is None else r['allocated_gb']:.2f}"


def _start(r: Row) -> str:
    cold = "" if r["start_cold_s"] is None else f"{r['start_cold_s']:.1f}"
    return cold + (f" ({r['start_warm_s']:.1f})" if r["start_warm_s"] is not None else "")


def _kl(r: Row) -> str:
    """The median's; the mean's in older results, which have no median."""
    kl = r["mean_kl"] if r.get("median_kl") is None else r["median_kl"]
    return f"{kl:.1e} ({r['kl_bound']:.1e})"


def _right_answers(r: Row) -> str:
    return "" if r.get("accuracy") is None else f"{r['accuracy']:.1%} of {r['problems']}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "arm": lambda r: r["arm"],
    **{name: partial(lambda r, name: str(r[name]), name=name) for name in SIZES},
    "TTFT ms": lambda r: f"{r['ttft_ms']:.1f}",
    "prefill MFU": lambda r: f"{r['mfu_prefill']:.0%}" if r["mfu_prefill"] else "",
    "TPOT ms (p90)": _tpot,
    "tok/s": lambda r: f"{r['decode_tok_s']:.1f}" if r["decode_tok_s"] else "",
    "speed-up": _speedup,
    "MBU": lambda r: f"{r['mbu']:.1%}" if r["mbu"] else "",
    "floor ms": lambda r: f"{r['floor_ms']:.3f}",
    "waits for": lambda r: r["bottleneck"],
    "MoE layer µs (floor)": _moe_layer,
    "experts hit": lambda r: f"{r['experts_hit']:.1f}",
    "GB": _memory,
    "start s (warm)": _start,
    "pays after": lambda r: "" if r["break_even_tokens"] is None else str(r["break_even_tokens"]),
    "KL (bound)": _kl,
    "mean KL": lambda r: f"{r['mean_kl']:.1e}",
    "max Δlogit": lambda r: f"{r['max_logit_diff']:.1e}",
    "top-1": lambda r: f"{r['top1']:.3f}",
    "right answers": _right_answers,
}
IDENTITY = ("arm", *SIZES)
"""Columns that a refused row fills too."""
