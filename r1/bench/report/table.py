"""Rows -> a table: the columns, what a cell of each says, and the legend of the columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from r1.bench.report.aligned import aligned
from r1.bench.report.fields import FIELDS
from r1.bench.workload import SIZES

Row = dict[str, Any]


def table(rows: list[Row], names: Collection[str]) -> list[str]:
    """The rows as lines of Markdown, in the columns of these names.

    A size that is the same in all rows is left out, except batch: the text above the table has it.
    A column without any content is left out too.
    """
    same = {name for name in SIZES if name != "batch" and not varies(rows, name)}
    columns: dict[str, list[str]] = {}
    for name, column in COLUMNS.items():
        if name in names and name not in same:
            cells = [_cell(name, column, r) for r in rows]
            if any(cells):
                columns[name] = cells
    return aligned(columns)


def varies(rows: list[Row], name: str) -> bool:
    """Whether a size differs between rows."""
    return len({r[name] for r in rows}) > 1


def number(value: float) -> str:
    """A number with three digits, or with all that stand before its point.

    So the speed-up that a reader computes from two cells is the one in the table.
    """
    if value and value < 0.0995:
        return f"{value:.3g}"
    digits = next((d for d in (0, 1, 2) if value >= 0.9995 * 10 ** (2 - d)), 3)
    return f"{value:.{digits}f}"


def ratio(value: float) -> str:
    """A speed-up: as `number`, but with two digits after the point also just below 1."""
    return f"{value:.2f}" if 0.1 <= value < 1 else number(value)


def legend() -> str:
    """What each column says: the fields of `-o json` that it shows, and their meaning."""
    lines = [
        "The columns of the table. Those with a * are shown with --wide only. Below each are the",
        "fields of -o json that it comes from. A column without content is left out.",
    ]
    for name, column in COLUMNS.items():
        lines += ["", name + (" *" if column.wide else "")]
        for field in column.fields:
            lines += textwrap.wrap(
                f"{field}: {FIELDS[field]}", 96, initial_indent="  ", subsequent_indent="    "
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    cell: Callable[[Row], str]
    """What a row's cell says."""
    fields: tuple[str, ...]
    """The fields of a row that it shows (fields.py)."""
    wide: bool = True
    """Whether only --wide shows it."""


def _cell(name: str, column: Column, r: Row) -> str:
    if r["refused"] and column.fields[0] not in ("arm", *SIZES):
        return "n/a" if name == "TTFT ms" else ""
    return column.cell(r)


def _field(name: str, write: Callable[[Any], str]) -> Callable[[Row], str]:
    """A cell that shows one field, and is empty where it is null, 0, or of an older result."""
    return lambda r: write(r[name]) if r.get(name) else ""


def _speedup(r: Row) -> str:
    if r["speedup"] is None:
        return "1" if r["kind"] == "baseline" else "" if r["parity"] else "parity fails"
    if r["speedup_low"] is None:
        return ratio(r["speedup"])
    spread = f"{ratio(r['speedup'])} ({ratio(r['speedup_low'])}-{ratio(r['speedup_high'])})"
    return spread + (" noise" if r["within_noise"] else "")


def _interval(r: Row) -> str:
    return f"{number(r['tpot_low_ms'])}-{number(r['tpot_high_ms'])}" if r["tpot_low_ms"] else ""


def _interactive(r: Row) -> str:
    return "" if r["interactive"] is None else "yes" if r["interactive"] else "no"


def _moe_layer(r: Row) -> str:
    return f"{r['moe_layer_us']:.0f} ({r['moe_layer_floor_us']:.0f})" if r["moe_layer_us"] else ""


def _exchange(r: Row) -> str:
    if not r.get("exchange_ms"):
        return ""
    return f"{number(r['exchange_ms'])} ({r['exchange_exposed']:.0%} exposed)"


def _memory(r: Row) -> str:
    """The GPU's, or on a CPU the process's."""
    return f"{r['host_gb'] if r['allocated_gb'] is None else r['allocated_gb']:.2f}"


def _correct(r: Row) -> str:
    """The verdict of parity, and how many problems were answered rightly."""
    verdict = "yes" if r["parity"] else "NO"
    if r.get("accuracy") is None:
        return verdict
    return f"{verdict}, {round(r['accuracy'] * r['problems'])} of {r['problems']}"


def _start(r: Row) -> str:
    cold = "" if r["start_cold_s"] is None else f"{r['start_cold_s']:.1f}"
    return cold + (f" ({r['start_warm_s']:.1f})" if r["start_warm_s"] is not None else "")


def _kl(r: Row) -> str:
    """The median's; the mean's in older results, which have no median."""
    kl = r["mean_kl"] if r.get("median_kl") is None else r["median_kl"]
    return f"{kl:.1e} ({r['kl_bound']:.1e})"


def _quantizing(r: Row) -> str:
    """The distance from the original weights; older results do not have it."""
    kl = r.get("quant_kl")
    return "" if kl is None else f"{kl:.1e}, {r['quant_top1']:.3f}"


SPEEDUP = ("speedup", "speedup_low", "speedup_high", "within_noise")

COLUMNS: dict[str, Column] = {
    "arm": Column(lambda r: r["arm"], ("arm",), wide=False),
    "batch": Column(_field("batch", str), ("batch",), wide=False),
    "prompt": Column(_field("prompt", str), ("prompt",), wide=False),
    "new": Column(_field("new", str), ("new",), wide=False),
    "depth": Column(lambda r: str(r["depth"]), ("depth",), wide=False),
    "TTFT ms": Column(_field("ttft_ms", number), ("ttft_ms",), wide=False),
    "prefill MFU": Column(_field("mfu_prefill", "{:.0%}".format), ("mfu_prefill",)),
    "ms/token": Column(_field("tpot_ms", number), ("tpot_ms",), wide=False),
    "p90 ms": Column(_field("tpot_p90_ms", number), ("tpot_p90_ms",)),
    "p99 ms": Column(_field("tpot_p99_ms", number), ("tpot_p99_ms",)),
    "95% interval ms": Column(_interval, ("tpot_low_ms", "tpot_high_ms")),
    "tok/s": Column(_field("decode_tok_s", number), ("decode_tok_s",), wide=False),
    "speed-up": Column(_speedup, SPEEDUP, wide=False),
    "baseline beside ms": Column(_field("beside_ms", number), ("beside_ms",)),
    "MBU": Column(_field("mbu", "{:.1%}".format), ("mbu",)),
    "floor ms": Column(_field("floor_ms", number), ("floor_ms",)),
    "J/token": Column(_field("joules_per_token", number), ("joules_per_token",)),
    "W": Column(_field("mean_power_w", "{:.0f}".format), ("mean_power_w",)),
    "interactive?": Column(_interactive, ("interactive",)),
    "waits for": Column(_field("bottleneck", str), ("bottleneck",)),
    "MoE layer µs (floor)": Column(_moe_layer, ("moe_layer_us", "moe_layer_floor_us")),
    "experts hit": Column(_field("experts_hit", "{:.1f}".format), ("experts_hit",)),
    "in slots": Column(_field("expert_hits", "{:.0%}".format), ("expert_hits",), wide=False),
    "exchange ms": Column(_exchange, ("exchange_ms", "exchange_exposed"), wide=False),
    "exchange MB/step": Column(_field("exchange_mb", number), ("exchange_mb",), wide=False),
    "link MB/step": Column(_field("link_mb", number), ("link_mb",), wide=False),
    "of the link": Column(_field("link_share", "{:.0%}".format), ("link_share",), wide=False),
    "disk MB/step": Column(_field("disk_mb", number), ("disk_mb",), wide=False),
    "of the disk": Column(_field("disk_share", "{:.0%}".format), ("disk_share",), wide=False),
    "on the host": Column(_field("host_computed", "{:.0%}".format), ("host_computed",), wide=False),
    "host MB/step": Column(_field("host_mb", number), ("host_mb",), wide=False),
    "of the RAM": Column(_field("host_share", "{:.0%}".format), ("host_share",), wide=False),
    "memory GB": Column(_memory, ("allocated_gb", "host_gb"), wide=False),
    "start s (warm)": Column(_start, ("start_cold_s", "start_warm_s")),
    "pays after": Column(_field("break_even_tokens", str), ("break_even_tokens",)),
    "correct?": Column(_correct, ("parity", "accuracy", "problems"), wide=False),
    "quantizing: KL, top-1": Column(_quantizing, ("quant_kl", "quant_top1"), wide=False),
    "KL (bound)": Column(_kl, ("median_kl", "kl_bound")),
    "mean KL": Column(lambda r: f"{r['mean_kl']:.1e}", ("mean_kl",)),
    "max Δlogit": Column(lambda r: f"{r['max_logit_diff']:.1e}", ("max_logit_diff",)),
    "top-1": Column(lambda r: f"{r['top1']:.3f}", ("top1",)),
}
"""All columns, from the left."""
USUAL = tuple(name for name, column in COLUMNS.items() if not column.wide)
"""The columns without --wide."""
