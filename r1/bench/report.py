"""Measurements -> rows -> what a person, or a program, reads.

A row is flat; its fields, with their units, are FIELDS. Where a switch can't be had the row says
why in `refused`, and has nothing else. Where parity fails there is no speed-up: a fast wrong answer
is none."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from r1 import roofline
from r1.bench.arms import SIZES, Arm, Workload
from r1.bench.process import Found
from r1.model.config import Config
from r1.switches.backend import Backend

SCHEMA = 1
FIELDS: dict[str, str] = {
    "arm": "the switches that are on",
    "kind": "baseline, alone, together, ladder (with all rungs before it), all-but-one",
    "model": "the checkpoint's folder, or the shape of random weights",
    "batch": "rows decoded together",
    "prompt": "tokens of each row's prompt",
    "new": "new tokens of each row",
    "depth": "tokens in the cache before the prompt",
    "refused": "why this arm can't be had here; null where it can, and then the rest is there",
    "crashed": "true where it should have been had, and broke down: a defect",
    "ttft_ms": "time to the first token, median",
    "tpot_ms": "(end to end - TTFT) / (new - 1), median over repetitions",
    "tpot_p90_ms": "90th percentile of the single steps of all repetitions; one of speculation gives several tokens",
    "decode_tok_s": "batch / TPOT",
    "prefill_tok_s": "batch x prompt / TTFT",
    "speedup": "the baseline's TPOT / this one's, median over repetitions run in turn; null where parity fails",
    "speedup_low": "smallest of those ratios",
    "speedup_high": "largest of those ratios",
    "within_noise": "true where the ratios lie on both sides of 1; null with one repetition, which has no spread",
    "acceptance": "share of drafts that were accepted, all repetitions; null without speculation",
    "assumed": "the acceptance, where a coin of this probability decided and not the model: the row's text means nothing",
    "tokens_per_step": "new tokens a step and row, of rows that were not done; 1 without speculation",
    "predicted_speedup": "what so many tokens a step are worth against steps of one, by the bytes they move alone",
    "pays_from": "the acceptance from which that is more than 1; null where not even all drafts would pay",
    "floor_ms": "the least TPOT that the measured copy bandwidth and matmul rate allow for this step's bytes and FLOPs",
    "mbu": "bytes that a step must move / time of a step (TPOT, without speculation) / measured copy bandwidth",
    "mfu_prefill": "FLOPs of the prompt / TTFT / measured matmul rate",
    "bottleneck": "what a step waits for: memory, compute, launches (kernels x gap) or, on a CPU, framework",
    "step_gb": "bytes that a step must move; under speculation a verification's and its drafts', uniform routing assumed",
    "moe_layer_us": "one MoE layer of a decode step, attention included, run as this arm runs its steps; null without one",
    "moe_layer_floor_us": "the least time that the measured rates allow for it",
    "experts_hit": "different experts that a MoE layer uses in a step of one token a row, average, as the reference routed",
    "kernels": "kernels of one decode step; null on a CPU",
    "kernel_times": "what each of them adds to the step, in microseconds (timeline.py), as profiled; null on a CPU",
    "allocated_gb": "peak of the GPU's allocator; null on a CPU",
    "reserved_gb": "peak of what it took from the GPU; null on a CPU",
    "host_gb": "peak of the process's resident memory, from its start to the last repetition",
    "start_cold_s": "first call - second, nothing cached (but what a CPU can do): compilation and capture; null without either",
    "start_warm_s": "the same in a new process that finds the first one's compiled code; null without --warm-start",
    "break_even_tokens": "decode steps after which the cold start has paid for itself; null where it never does",
    "parity": "true where median_kl is within kl_bound, and mean_kl within a bound that leaves room for flipped experts",
    "kl_bound": "the largest median_kl that passes: what rounding to this arm's dtype explains, measured on this model and text",
    "median_kl": "nats, of the middle position; null in older results, whose kl_bound is for mean_kl",
    "mean_kl": "nats, next-token distributions against the fp32 eager reference on the same tokens",
    "max_logit_diff": "largest difference of one logit",
    "top1": "share of positions where both like the same token best",
    "positions": "how many positions were compared",
    "same_text": "share of the reference's greedy text that this arm wrote before it parted; null where acceptance is assumed",
    "accuracy": "share of held-out problems (the checkpoint's exam.json) with a right answer, greedy; null where none was asked",
    "problems": "how many were asked, the same in all arms; null where none was",
    "load_s": "seconds to load or make the model",
    "sm_mhz": "GPU clock after the last repetition, where it can be read",
    "power_w": "GPU power then",
    "backend": "every switch as it was resolved",
    "repetitions": "raw: TTFT and total seconds of each repetition",
}
NESTED = ("kernel_times", "backend", "repetitions")
ALWAYS = (
    "ttft_ms",
    "tpot_ms",
    "floor_ms",
    "bottleneck",
    "experts_hit",
    "host_gb",
    "mean_kl",
    "kl_bound",
    "max_logit_diff",
    "top1",
)
"""Never null in a row that is not refused."""


def row(
    arm: Arm, workload: Workload, found: dict[str, Any], reference: dict[str, Any], config: Config
) -> dict[str, Any]:
    """One arm's findings as a row. `found` has the worker's answers by command, `reference` the
    reference's."""
    if "refused" in found:
        identity = {"arm": arm.name, "kind": arm.kind, "model": workload.name, **workload.sizes}
        return identity | {"refused": found["refused"], "crashed": found.get("crashed", False)}
    repetitions = found["measure"]
    tpots = [_tpot(r) for r in repetitions]
    tpot, ttft = statistics.median(tpots), statistics.median(r["ttft"] for r in repetitions)
    gaps = sorted(gap for r in repetitions for gap in r["gaps"])
    parity, memory = found["parity"], found["measure"][-1]["memory"]
    backend = Backend(**found["build"]["backend"])
    started = backend.compile or backend.cuda_graphs or backend.prefill_graphs
    twice = found["cold"] is not None
    cold = found["cold"] if twice else found["warm"]["start_seconds"] if started else None
    assumed = workload.assumed if backend.speculate != "off" else None
    out: dict[str, Any] = {
        "arm": arm.name if assumed is None else f"{arm.name} (acceptance of {assumed:g} assumed)",
        "kind": arm.kind,
        "model": workload.name,
        **workload.sizes,
        "refused": None,
        "crashed": False,
        "ttft_ms": 1e3 * ttft,
        "tpot_ms": 1e3 * tpot,
        "tpot_p90_ms": 1e3 * gaps[int(0.9 * (len(gaps) - 1))] if gaps else None,
        "decode_tok_s": workload.batch / tpot if tpot else None,
        "prefill_tok_s": workload.batch * workload.prompt / ttft,
        **_speculation(workload, backend, config, repetitions),
        **_roofline(workload, backend, config, reference, found["kernels"]["count"], repetitions),
        "kernel_times": found["kernels"]["parts"],
        "moe_layer_us": found["moe_layer"]["seconds"] and 1e6 * found["moe_layer"]["seconds"],
        "allocated_gb": memory["allocated"] and memory["allocated"] / 1e9,
        "reserved_gb": memory["reserved"] and memory["reserved"] / 1e9,
        "host_gb": memory["host"] / 1e9,
        "start_cold_s": cold,
        "start_warm_s": found["warm"]["start_seconds"] if twice else None,
        "parity": parity["passes"],
        "kl_bound": parity["bound"],
        "median_kl": parity["median_kl"],
        "mean_kl": parity["mean_kl"],
        "max_logit_diff": parity["max_logit_difference"],
        "top1": parity["top1_agreement"],
        "positions": parity["positions"],
        "same_text": parity["same_text"],
        "accuracy": found.get("accuracy", {}).get("share"),
        "problems": found.get("accuracy", {}).get("problems"),
        "load_s": found["build"]["load_seconds"],
        "sm_mhz": repetitions[-1].get("sm_mhz"),
        "power_w": repetitions[-1].get("power_w"),
        "backend": found["build"]["backend"],
        "repetitions": [{"ttft": r["ttft"], "total": r["total"]} for r in repetitions],
    }
    return {
        name: (out | _speedup(found["beside"], tpots, parity["passes"], cold)).get(name)
        for name in FIELDS
    }


def _speedup(
    beside: list[dict[str, Any]], tpots: list[float], passes: bool, cold: float | None
) -> dict[str, Any]:
    """Against the baseline's repetitions that were run in turn with these."""
    if not beside or not passes or not min(tpots):
        return {}
    ratios = [_tpot(b) / own for b, own in zip(beside, tpots, strict=True)]
    out: dict[str, Any] = {
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
    }
    if len(ratios) > 1:
        out["within_noise"] = min(ratios) <= 1 <= max(ratios)
    saved = statistics.median(_tpot(b) for b in beside) - statistics.median(tpots)
    if cold is not None and saved > 0:
        out["break_even_tokens"] = round(cold / saved)
    return out


def _speculation(w: Workload, backend: Backend, config: Config, repetitions: list[Found]) -> Found:
    if backend.speculate == "off":
        return {"tokens_per_step": 1.0}
    turns, accepted = (sum(r[name] for r in repetitions) for name in ("turns", "accepted"))
    if not turns:
        return {}
    model = roofline.speculation(config, backend, w.batch, w.depth + w.prompt + w.new / 2)
    return {
        "acceptance": accepted / turns / backend.draft_tokens,
        "assumed": w.assumed,
        "tokens_per_step": 1 + accepted / turns,
        "predicted_speedup": model.speedup(1 + accepted / turns),
        "pays_from": model.pays_from(),
    }


def _roofline(
    w: Workload,
    backend: Backend,
    config: Config,
    reference: Found,
    kernels: int | None,
    repetitions: list[Found],
) -> Found:
    rates = roofline.Rates(**reference["rates"][backend.compute])
    hit, context = reference["reference"]["experts_hit"], w.depth + w.prompt + w.new / 2
    work = roofline.step_work(config, backend, w.batch, 1, context, hit)
    fewer = dataclasses.replace(
        config, num_hidden_layers=config.num_hidden_layers - 1
    )  # without its last layer, a MoE layer
    layer = work - roofline.step_work(fewer, backend, w.batch, 1, context, hit)
    if backend.speculate != "off":
        work = roofline.speculation(config, backend, w.batch, context).turn
    ttft = statistics.median(r["ttft"] for r in repetitions)
    seconds = statistics.median(
        (r["total"] - r["ttft"]) / max(1, len(r["gaps"])) for r in repetitions
    )  # of a step
    steps = statistics.median(
        len(r["gaps"]) / max(1, r["tokens"] - 1) for r in repetitions
    )  # for each token
    everything = min(
        config.experts.n_routed_experts, w.batch * w.prompt * config.experts.num_experts_per_tok
    )
    prompt = roofline.step_work(config, backend, w.batch, w.prompt, w.depth, everything)
    return {
        "floor_ms": 1e3 * rates.seconds(work) * (steps or 1),
        "mbu": work.nbytes / seconds / rates.copy if seconds else None,
        "mfu_prefill": prompt.flops / ttft / rates.matmul,
        "bottleneck": roofline.bottleneck(work, rates, kernels, backend.cuda_graphs, seconds),
        "step_gb": work.nbytes / 1e9,
        "moe_layer_floor_us": 1e6 * rates.seconds(layer) if hit else None,
        "experts_hit": hit,
        "kernels": kernels,
    }


def pair(arm: Arm, workload: Workload, found: dict[str, Any]) -> dict[str, Any]:
    """Two switches together: does it pass parity, or is it refused, and why."""
    out = {
        "pair": arm.name,
        **workload.sizes,
        "refused": found.get("refused"),
        "crashed": found.get("crashed", False),
    }
    if "parity" in found:
        out |= {"parity": found["parity"]["passes"], "mean_kl": found["parity"]["mean_kl"]}
    return out


def _tpot(repetition: dict[str, Any]) -> float:
    more = repetition["tokens"] - 1
    return (repetition["total"] - repetition["ttft"]) / more if more else 0.0


def render(result: dict[str, Any], form: str) -> str:
    """The result as md, json, jsonl (a row a line) or csv (without the nested fields)."""
    rows = result["rows"]
    if form == "json":
        return json.dumps(result, indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps({**r, "machine": result["machine"]["name"]}) for r in rows)
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(
            out, [name for name in FIELDS if name not in NESTED], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().rstrip()
    return markdown(result)


Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "arm": lambda r: r["arm"],
    **{name: partial(lambda r, name: str(r[name]), name=name) for name in SIZES},
    "TTFT ms": lambda r: f"{r['ttft_ms']:.1f}",
    "prefill MFU": lambda r: f"{r['mfu_prefill']:.0%}" if r["mfu_prefill"] else "",
    "TPOT ms (p90)": lambda r: (
        f"{r['tpot_ms']:.2f} ({r['tpot_p90_ms']:.2f})" if r["tpot_p90_ms"] else ""
    ),
    "tok/s": lambda r: f"{r['decode_tok_s']:.1f}" if r["decode_tok_s"] else "",
    "speed-up": lambda r: _speedup_cell(r),
    "MBU": lambda r: f"{r['mbu']:.1%}" if r["mbu"] else "",
    "floor ms": lambda r: f"{r['floor_ms']:.3f}",
    "waits for": lambda r: r["bottleneck"],
    "MoE layer µs (floor)": lambda r: (
        f"{r['moe_layer_us']:.0f} ({r['moe_layer_floor_us']:.0f})" if r["moe_layer_us"] else ""
    ),
    "experts hit": lambda r: f"{r['experts_hit']:.1f}",
    "GB": lambda r: f"{r['host_gb'] if r['allocated_gb'] is None else r['allocated_gb']:.2f}",
    "start s (warm)": lambda r: _start_cell(r),
    "pays after": lambda r: "" if r["break_even_tokens"] is None else str(r["break_even_tokens"]),
    "KL (bound)": lambda r: (
        f"{r['mean_kl'] if r.get('median_kl') is None else r['median_kl']:.1e} ({r['kl_bound']:.1e})"
    ),
    "mean KL": lambda r: f"{r['mean_kl']:.1e}",
    "max Δlogit": lambda r: f"{r['max_logit_diff']:.1e}",
    "top-1": lambda r: f"{r['top1']:.3f}",
    "right answers": lambda r: (
        "" if r.get("accuracy") is None else f"{r['accuracy']:.1%} of {r['problems']}"
    ),
}
IDENTITY = ("arm", *SIZES)
"""Columns that a refused row has too."""
WORDS = ("arm", "machine", "dtype")
"""Columns of text; the others are numbers, which stand to the right."""


def _speedup_cell(r: Row) -> str:
    if r["speedup"] is None:
        return "1" if r["kind"] == "baseline" else "" if r["parity"] else "parity fails"
    return f"{r['speedup']:.2f} ({r['speedup_low']:.2f}-{r['speedup_high']:.2f})" + (
        " noise" if r["within_noise"] else ""
    )


def _start_cell(r: Row) -> str:
    cold = "" if r["start_cold_s"] is None else f"{r['start_cold_s']:.1f}"
    return cold + (f" ({r['start_warm_s']:.1f})" if r["start_warm_s"] is not None else "")


def table(rows: list[Row], only: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """The rows as lines of Markdown, of `only` these columns.

    Sizes that are the same in all rows are said above the table, batch excepted; columns that
    nothing fills are left out."""
    same = {name for name in SIZES if name != "batch" and len({r[name] for r in rows}) < 2}
    columns: dict[str, list[str]] = {}
    for name, cell in COLUMNS.items():
        cells = [
            cell(r) if not r["refused"] or name in IDENTITY else "n/a" if name == "TTFT ms" else ""
            for r in rows
        ]
        if name in only and name not in same and any(cells):
            columns[name] = cells
    return aligned(columns)


def aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns of cells, by what stands above them, as lines of Markdown that also line up as plain
    text."""
    padded = []
    for name, cells in columns.items():
        column = [
            name,
            "---" if name in WORDS else "---:",
            *(cell.replace("|", "\\|") for cell in cells),
        ]
        width = max(map(len, column))
        padded.append([cell.ljust(width) for cell in column])
    return ["| " + " | ".join(line) + " |" for line in zip(*padded, strict=True)]


def model_name(result: dict[str, Any]) -> str:
    """What a result's workload calls its model, without the folders before it."""
    return str(result.get("workload", "")).split(": batch")[0].rstrip("/").rsplit("/", 1)[-1]


def markdown(result: dict[str, Any]) -> str:
    """The machine, the table, and what is to be said of it."""
    m = result["machine"]
    lines = [
        f"{m['name']} · torch {m['torch']} · python {m['python']} · {result['repetitions']} repetitions, in turn"
    ]
    if "copy_gb_s" in m:
        products = ", ".join(f"{rate:.3g} ({dtype})" for dtype, rate in m["matmul_tflop_s"].items())
        lines += [
            f"measured here: copy {m['copy_gb_s']:.0f} GB/s, matrix products {products} TFLOP/s"
        ]
    lines += ["", result["workload"], ""]
    lines += table(result["rows"])
    lines += [f"\n{r['arm']}: {refusal(r)}" for r in result["rows"] if r["refused"]]
    lines += [
        f"\n{r['arm']}: {drafts(r, result['rows'])}"
        for r in result["rows"]
        if r.get("acceptance") is not None
    ]
    noise = [r["arm"] for r in result["rows"] if r.get("within_noise")]
    if noise:
        lines += [f"\nNo difference from the baseline beyond the noise: {', '.join(noise)}."]
    failed = [r["arm"] for r in result["rows"] if r.get("parity") is False]
    if failed:
        lines += [f"\nPARITY FAILS, so no speed-up is shown: {', '.join(failed)}."]
    if result["pairs"]:
        lines += ["\nPairs of switches:"]
        varied = [name for name in SIZES if len({p[name] for p in result["pairs"]}) > 1]
        lines += [
            f"- {', '.join([p['pair'], *(f'{name} {p[name]}' for name in varied)])}: {_verdict(p)}"
            for p in result["pairs"]
        ]
    lines += [f"\n{note}" for note in result["notes"]]
    return "\n".join(lines)


def refusal(r: Row) -> str:
    """Why there is nothing else in a row; what stands before it names the arm, so the reason need
    not."""
    name = r["arm"].removeprefix("+ ")  # a ladder's
    return f"{'BROKE DOWN' if r['crashed'] else 'n/a'}: {r['refused'].removeprefix(f'{name}: ')}"


def drafts(r: Row, rows: Sequence[Row]) -> str:
    """What speculation did in a row, and what its bytes say of it; `rows` has the baseline of the
    same sizes."""
    assumed = r["assumed"] is not None
    how = (
        f"ASSUMED, by a coin of {r['assumed']:g}: its text means nothing"
        if assumed
        else "by the model"
    )
    pays = "it never pays" if r["pays_from"] is None else f"it pays from {r['pays_from']:.0%}"
    said = f"{r['acceptance']:.0%} of drafts accepted ({how}), {r['tokens_per_step']:.2f} tokens a step; "
    said += f"by bytes alone worth {r['predicted_speedup']:.2f}x steps of one token, and {pays}."
    if r["same_text"] is not None:
        base = next(
            (
                b
                for b in rows
                if b["kind"] == "baseline" and all(b[name] == r[name] for name in SIZES)
            ),
            {},
        )
        average = " on average" if r["batch"] > 1 else ""
        parts = f"up to the first token that differs, {r['same_text']:.1%} into the tokens compared{average}"
        said += f" Its greedy text is the fp32 reference's {'to the end' if r['same_text'] == 1 else parts}"
        said += (
            "."
            if base.get("same_text") is None
            else f" (the baseline's, without drafts: {base['same_text']:.1%})."
        )
    return said


def _verdict(p: dict[str, Any]) -> str:
    if p["refused"]:
        return f"{'BROKE DOWN' if p['crashed'] else 'refused'}: {p['refused']}"
    return f"{'passes' if p['parity'] else 'FAILS'}, KL {p['mean_kl']:.1e}"
