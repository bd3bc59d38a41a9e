"""The speed-up of each row over its baseline, from the milliseconds that the table shows.

The baseline is measured many times in a run: its repetitions are taken in turn with each arm's. So
there are two ways to state a speed-up, and on a noisy machine they differ:

1. the baseline's TPOT over the whole run / the arm's TPOT. Both numbers stand in the table;
2. each repetition's own ratio, to the baseline's repetition right beside it. The reader sees
   neither number of such a ratio. An eager baseline waits for the host, whose speed changes from
   minute to minute. So arms of the same TPOT, measured one after the other, differ in this ratio.

The speed-up is the first: who divides the milliseconds gets the number beside them, and arms of the
same TPOT have the same speed-up. The second says how far to trust it. The range of a speed-up holds
all repetitions' own ratios and the speed-up itself, and if 1 lies in the range, the difference from
the baseline is noise. One repetition has no range.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from r1.bench.workload import SIZES

Row = dict[str, Any]


def baseline_of(r: Row, rows: Sequence[Row]) -> Row | None:
    """The baseline of the same workload, if it was measured."""
    for b in rows:
        if b["kind"] == "baseline" and not b.get("refused") and all(b[n] == r[n] for n in SIZES):
            return b
    return None


def beside(ours: Sequence[float], baselines: Sequence[float]) -> dict[str, Any]:
    """The fields that come from repetitions taken in turn: their TPOTs, in seconds, not 0.

    `set_speedups` widens the range later, when the baseline's row is complete.
    """
    ratios = [b / own for own, b in zip(ours, baselines, strict=True)]
    return {
        "beside_ms": 1e3 * statistics.median(baselines),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
    }


def set_speedups(rows: Sequence[Row]) -> None:
    """Set the speed-up of each row, its range, and when its start-up has paid for itself.

    A row gets none if it or its baseline fails parity: a wrong answer has no speed. Doing this
    twice changes nothing. Results of earlier versions, whose speed-ups were medians of ratios of
    the second kind, get those of the first.
    """
    for r in rows:
        if not r.get("refused"):
            base = baseline_of(r, rows)
            r.update(_compared(r, base) if base and base is not r else dict.fromkeys(FIELDS))


FIELDS = ("speedup", "speedup_low", "speedup_high", "within_noise", "break_even_tokens")
"""The fields that `set_speedups` sets."""


def _compared(r: Row, base: Row) -> Row:
    """The values of FIELDS for a row and its baseline."""
    fields: Row = dict.fromkeys(FIELDS)
    if not (r["parity"] and base["parity"] and r.get("tpot_ms") and base.get("tpot_ms")):
        return fields
    speedup = fields["speedup"] = base["tpot_ms"] / r["tpot_ms"]
    if len(r.get("repetitions") or []) > 1 and r.get("speedup_low") and r.get("speedup_high"):
        fields["speedup_low"] = low = min(r["speedup_low"], speedup)
        fields["speedup_high"] = high = max(r["speedup_high"], speedup)
        fields["within_noise"] = low <= 1 <= high
    saved = base["tpot_ms"] - r["tpot_ms"]
    if r.get("start_cold_s") is not None and saved > 0 and not fields["within_noise"]:
        fields["break_even_tokens"] = round(1e3 * r["start_cold_s"] / saved)
    return fields
