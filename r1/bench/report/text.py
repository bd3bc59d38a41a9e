"""A result as Markdown: the machine, the table, and sentences about its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1.bench.report.speedup import baseline_of
from r1.bench.report.table import COLUMNS, USUAL, Row, table, varies
from r1.bench.workload import SIZES


def markdown(result: dict[str, Any], wide: bool = False) -> str:
    """The whole result, its table in the usual columns or, if `wide`, in all."""
    rows = result["rows"]
    lines = [*_heading(result), "", result["workload"], ""]
    usual = [name for name in USUAL if name != "batch" or varies(rows, name)]
    lines += table(rows, COLUMNS if wide else usual)
    lines += [f"\n{r['arm']}: {refusal(r)}" for r in rows if r["refused"]]
    lines += [f"\n{r['arm']}: {drafts(r, rows)}" for r in rows if r.get("acceptance") is not None]
    noise = [r["arm"] for r in rows if r.get("within_noise")]
    if noise:
        lines += [f"\nNo difference from the baseline beyond the noise: {', '.join(noise)}."]
    failed = [f"{r['arm']}{_wrong(r)}" for r in rows if r.get("parity") is False]
    if failed:
        lines += [f"\nPARITY FAILS, so no speed-up is shown: {', '.join(failed)}."]
    if result["pairs"]:
        lines += _pairs(result["pairs"])
    lines += [f"\n{note}" for note in result["notes"]]
    lines += ["\n--explain columns says what the columns mean" + ("." if wide else MORE)]
    return "\n".join(lines)


MORE = "; --wide shows more of them, -o json all that was measured."


def model_name(result: dict[str, Any]) -> str:
    """The name of a result's model. Older results have the path of a checkpoint's folder."""
    return str(result.get("workload", "")).split(": batch")[0].rstrip("/").rsplit("/", 1)[-1]


def busy(machine: dict[str, Any]) -> str | None:
    """A sentence, if other programs kept so many CPUs busy that r1 had to wait for one.

    `load` is the average number of other threads that ran or waited for a CPU (../busy.py).
    """
    load, cpus = machine.get("load"), machine.get("cpus")
    if load is None or not cpus or load + (machine.get("threads") or 1) <= cpus + 0.5:
        return None
    return f"BUSY: load {load:.{0 if load >= 9.5 else 1}f} on {cpus} CPUs: timings mean little"


def _heading(result: dict[str, Any]) -> list[str]:
    """The machine, its threads and its rates."""
    m = result["machine"]
    parts = [m["name"], threads(m), f"torch {m['torch']}", f"python {m['python']}"]
    parts.append(repetitions(result))
    lines = [" · ".join(part for part in parts if part)]
    if "copy_gb_s" in m:
        products = ", ".join(f"{rate:.3g} ({dtype})" for dtype, rate in m["matmul_tflop_s"].items())
        link = f", from host memory {m['link_gb_s']:.3g} GB/s" if m.get("link_gb_s") else ""
        lines += [
            f"measured here: copy {m['copy_gb_s']:.0f} GB/s, matrix products {products} TFLOP/s"
            + link
            + (f", from files {m['disk_gb_s']:.3g} GB/s" if m.get("disk_gb_s") else "")
            + (f", host memory {m['ram_gb_s']:.3g} GB/s" if m.get("ram_gb_s") else "")
        ]
    return [*lines, *filter(None, [busy(m)])]


def threads(machine: dict[str, Any]) -> str:
    """How many CPU threads torch used. Empty where a GPU did the work, and in older results."""
    count = machine.get("threads")
    return f"{count} thread{'s' * (count != 1)}" if count else ""


def repetitions(result: dict[str, Any]) -> str:
    """How often each arm was measured."""
    count = result["repetitions"]
    return f"{count} repetitions, in turn" if count != 1 else "1 repetition"


def refusal(r: Row) -> str:
    """Why a row has no measurements. The text before it names the arm, so the reason does not."""
    name = r["arm"].removeprefix("+ ")  # "+ " marks a rung of the ladder
    return f"{'BROKE DOWN' if r['crashed'] else 'n/a'}: {r['refused'].removeprefix(f'{name}: ')}"


def _wrong(r: Row) -> str:
    """In which numbers a row fails parity, in brackets. Older results do not say it."""
    reasons = [
        f"{words} {_number(r[name])}, where at most {_number(most)} passes"
        for words, name, most in (
            ("median KL", "median_kl", r["kl_bound"]),
            ("mean KL", "mean_kl", r.get("mean_kl_bound")),
            ("excess", "excess", 1),
            ("outliers", "outliers", r.get("outliers_bound")),
            ("wrong tokens of its own", "wrong_tokens", 0),
        )
        if r.get(name) is not None and most is not None and not r[name] <= most
    ]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def drafts(r: Row, rows: Sequence[Row]) -> str:
    """What speculation did in a row, and what it is worth. `rows` has the row's baseline."""
    how = (
        "by the model"
        if r["assumed"] is None
        else f"ASSUMED, by a coin of {r['assumed']:g}: its text means nothing"
    )
    pays = "it never pays" if r["pays_from"] is None else f"it pays from {r['pays_from']:.0%}"
    return (
        f"{r['acceptance']:.0%} of drafts accepted ({how}), "
        f"{r['tokens_per_step']:.2f} tokens a step{_places(r)}; "
        f"by bytes alone worth {r['predicted_speedup']:.2f}x steps of one token, and {pays}."
        + ("" if r["same_text"] is None else _greedy_text(r, rows))
        + ("" if r.get("wrong_tokens") is None else _own_text(r))
    )


def _places(r: Row) -> str:
    """The acceptance of each draft of a step, where there are several."""
    places = r.get("acceptance_by_place") or []
    return f" (by place: {', '.join(f'{each:.0%}' for each in places)})" if len(places) > 1 else ""


def _greedy_text(r: Row, rows: Sequence[Row]) -> str:
    """How much of the reference's greedy text a row wrote, and its baseline for comparison."""
    base = baseline_of(r, rows) or {}
    average = " on average" if r["batch"] > 1 else ""
    how_far = (
        "to the end"
        if r["same_text"] == 1
        else "up to the first token that differs, "
        f"{r['same_text']:.1%} into the tokens compared{average}"
    )
    without = (
        ""
        if base.get("same_text") is None
        else f" (the baseline's, without drafts: {base['same_text']:.1%})"
    )
    return f" Its greedy text is the fp32 reference's {how_far}{without}."


def _own_text(r: Row) -> str:
    """Whether the arm's steps, which read the text that it wrote with drafts, agree with it."""
    without = "" if r["assumed"] is None else "Without the coin, "
    wrong = r["wrong_tokens"]
    verdict = (
        "every token of its text is the one that its own steps choose"
        if not wrong
        else f"its own steps choose other tokens than its text has, in {wrong} places"
    )
    sentence = f"{without}{verdict}"
    return f" {sentence[0].upper()}{sentence[1:]}."


def _pairs(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """The list of pairs of switches, each with its verdict."""
    varied = [name for name in SIZES if len({p[name] for p in pairs}) > 1]
    return ["\nPairs of switches:"] + [
        f"- {', '.join([p['pair'], *(f'{name} {p[name]}' for name in varied)])}: {_verdict(p)}"
        for p in pairs
    ]


def _verdict(p: dict[str, Any]) -> str:
    """Whether a pair passes parity."""
    if p["refused"]:
        return f"{'BROKE DOWN' if p['crashed'] else 'refused'}: {p['refused']}"
    return f"{'passes' if p['parity'] else 'FAILS'}, KL {p['mean_kl']:.1e}"
