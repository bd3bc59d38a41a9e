"""Measurements -> rows -> what a person, or a program, reads.

A row is flat; its fields, with their units, are FIELDS. Where a switch can't be had the row says why in `refused`, and has
nothing else. Where parity fails there is no speed-up: a fast wrong answer is none.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from typing import Any

FIELDS: dict[str, str] = {
    "arm": "the switches that are on",
    "batch": "rows decoded together",
    "prompt": "tokens of each row's prompt",
    "new": "new tokens of each row",
    "depth": "tokens in the cache before the prompt",
    "refused": "why this arm can't be had here; null where it can",
    "ttft_ms": "time to the first token, median",
    "tpot_ms": "(end to end - TTFT) / (new - 1), median over repetitions",
    "tpot_p90_ms": "90th percentile of the single steps of all repetitions",
    "decode_tok_s": "batch / TPOT",
    "prefill_tok_s": "batch x prompt / TTFT",
    "speedup": "baseline's TPOT / this one's, median over repetitions run in turn; null where parity fails",
    "speedup_low": "smallest of those ratios",
    "speedup_high": "largest of those ratios",
    "within_noise": "true where the ratios lie on both sides of 1",
    "allocated_gb": "peak of the GPU's allocator; null on a CPU",
    "reserved_gb": "peak of what it took from the GPU; null on a CPU",
    "host_gb": "peak of the process's resident memory, this arm's whole life",
    "compile_s": "compilation, with a cold cache: first call - second; null where nothing is compiled",
    "break_even_tokens": "new tokens after which compilation has paid for itself; null where it never does",
    "parity": "true where mean_kl is within the bound for this arm's dtype",
    "mean_kl": "nats, next-token distributions against the fp32 eager reference on the same tokens",
    "max_logit_diff": "largest difference of one logit",
    "top1": "share of positions where both like the same token best",
    "positions": "how many positions were compared",
    "load_s": "seconds to load or make the model",
    "backend": "every switch as it was resolved",
    "repetitions": "raw: TTFT and total seconds of each repetition",
}


def row(arm: str, workload: dict[str, Any], found: dict[str, Any], baseline: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One arm's findings as a row. `found` has the worker's answers by command; `baseline` its repetitions, or None."""
    sizes = {name: workload[name] for name in ("batch", "prompt", "new", "depth")}
    if "refused" in found:
        return {"arm": arm, **sizes, "refused": found["refused"]}
    repetitions = found["measure"]
    tpots = [_tpot(r) for r in repetitions]
    tpot, ttft = statistics.median(tpots), statistics.median(r["ttft"] for r in repetitions)
    gaps = sorted(gap for r in repetitions for gap in r["gaps"])
    parity, memory, compiled = found["parity"], found["memory"], found["warm"]["compile_seconds"]
    out: dict[str, Any] = {
        "arm": arm,
        **sizes,
        "refused": None,
        "ttft_ms": 1e3 * ttft,
        "tpot_ms": 1e3 * tpot,
        "tpot_p90_ms": 1e3 * gaps[int(0.9 * (len(gaps) - 1))] if gaps else None,
        "decode_tok_s": sizes["batch"] / tpot if tpot else None,
        "prefill_tok_s": sizes["batch"] * sizes["prompt"] / ttft,
        "speedup": None,
        "allocated_gb": memory["allocated"] and memory["allocated"] / 1e9,
        "reserved_gb": memory["reserved"] and memory["reserved"] / 1e9,
        "host_gb": memory["host"] / 1e9,
        "compile_s": compiled,
        "break_even_tokens": None,
        "parity": parity["passes"],
        "mean_kl": parity["mean_kl"],
        "max_logit_diff": parity["max_logit_difference"],
        "top1": parity["top1_agreement"],
        "positions": parity["positions"],
        "load_s": found["build"]["load_seconds"],
        "backend": found["build"]["backend"],
        "repetitions": [{"ttft": r["ttft"], "total": r["total"]} for r in repetitions],
    }
    if baseline and parity["passes"] and tpot:
        ratios = [_tpot(b) / own for b, own in zip(baseline, tpots, strict=False)]
        out |= {"speedup": statistics.median(ratios), "speedup_low": min(ratios), "speedup_high": max(ratios)}
        out["within_noise"] = min(ratios) <= 1 <= max(ratios)
        saved = statistics.median(_tpot(b) for b in baseline) - tpot
        if compiled is not None and saved > 0:
            out["break_even_tokens"] = round(compiled / saved)
    return out


def _tpot(repetition: dict[str, Any]) -> float:
    steps = len(repetition["gaps"])
    return (repetition["total"] - repetition["ttft"]) / steps if steps else 0.0


def render(result: dict[str, Any], form: str) -> str:
    """The result as md, json, jsonl (a row a line) or csv (without the nested fields)."""
    rows = result["rows"]
    if form == "json":
        return json.dumps(result, indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps({**r, "machine": result["machine"]["name"]}) for r in rows)
    if form == "csv":
        flat = [name for name in FIELDS if name not in ("backend", "repetitions")]
        out = io.StringIO()
        writer = csv.DictWriter(out, flat, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().rstrip()
    return markdown(result)


def markdown(result: dict[str, Any]) -> str:
    """The machine, then a table for each workload."""
    m = result["machine"]
    lines = [f"{m['name']} · torch {m['torch']} · python {m['python']} · {result['repetitions']} repetitions, in turn", ""]
    lines += [f"{result['workload']}", ""]
    head = ["arm", "batch", "TTFT ms", "TPOT ms (p90)", "tok/s", "prefill tok/s", "speed-up", "memory GB"]
    head += ["compile s", "pays after", "KL", "max Δlogit", "top-1"]
    table = [head, ["---"] + ["---:"] * (len(head) - 1)] + [_cells(r) for r in result["rows"]]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines += ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in table]
    lines += [f"\n{r['arm']}: n/a: {r['refused']}" for r in result["rows"] if r["refused"]]
    failed = [r["arm"] for r in result["rows"] if r.get("parity") is False]
    if failed:
        lines += [f"\nPARITY FAILS, so no speed-up is shown: {', '.join(failed)}"]
    lines += [f"\n{note}" for note in result["notes"]]
    return "\n".join(lines)


def _cells(r: dict[str, Any]) -> list[str]:
    if r["refused"]:
        return [r["arm"], str(r["batch"]), "n/a"] + [""] * 10
    memory = r["allocated_gb"] if r["allocated_gb"] is not None else r["host_gb"]
    if not r["parity"]:
        speed = "parity fails"
    elif r["speedup"] is None:
        speed = "1"
    else:
        speed = f"{r['speedup']:.2f} ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})" + (" noise" if r["within_noise"] else "")
    return [
        r["arm"],
        str(r["batch"]),
        f"{r['ttft_ms']:.1f}",
        f"{r['tpot_ms']:.2f} ({r['tpot_p90_ms']:.2f})" if r["tpot_p90_ms"] else "",
        f"{r['decode_tok_s']:.1f}" if r["decode_tok_s"] else "",
        f"{r['prefill_tok_s']:.0f}",
        speed,
        f"{memory:.2f}",
        f"{r['compile_s']:.1f}" if r["compile_s"] is not None else "",
        f"{r['break_even_tokens']}" if r["break_even_tokens"] is not None else "",
        f"{r['mean_kl']:.1e}",
        f"{r['max_logit_diff']:.1e}",
        f"{r['top1']:.3f}",
    ]
