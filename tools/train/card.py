"""The model card of a trained tiny-r1, made of files alone, so that no figure on it is typed.

    python tools/train/card.py            # the embedded checkpoint's, anew

tools/train/train_tiny.py writes a first page from its own record, training.json. The embedded
checkpoint's page has more: what tools/train/eval.py found under other switches and on other
machines, and what the same command gave a second time. Those files are in
tools/measure/results/tiny-r1: MACHINE-SWITCHES.json from eval.py, and second-run.json, the other
run's training.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
sys.path.insert(0, str(Path(__file__).parent))

from tasks import KINDS, TEST_SHARE

from r1.__main__ import EMBEDDED

RESULTS = Path(__file__).parents[1] / "measure" / "results" / "tiny-r1"
SECOND_RUN = "second-run"
Found = dict[str, Any]


def card(
    record: Found, evaluations: dict[str, Found] | None = None, second: Found | None = None
) -> str:
    """Markdown from what tools/train/train_tiny.py recorded, eval.py's results by name, and the
    record of a second run."""
    s, last = record["settings"], record["history"][-1]
    length = f"--steps {s['steps']}" if s["steps"] else f"--minutes {s['minutes']:g}"
    tokens = record["steps"] * s["rows"] * s["length"]
    flags = f"--rows {s['rows']} --length {s['length']} --lr {s['lr']:g} --seed {s['seed']} --fp8-from {s['fp8_from']:g}"
    flags += " --compile" if s["compile"] else ""
    flags += f" --layers {s['layers']}" if s["layers"] else ""
    flags += f" --kinds {','.join(s['kinds'])}" if list(s["kinds"]) != list(KINDS) else ""
    shares = {kind: KINDS[kind] / sum(KINDS[k] for k in s["kinds"]) for kind in s["kinds"]}
    files = "`training.json`" + (
        ", and from `tools/measure/results/tiny-r1`" if evaluations else ""
    )
    parts = [
        "# tiny-r1",
        f"DeepSeek-R1's architecture and file format with {record['parameters'] / 1e6:.2f} million parameters (the MTP layer "
        "included), trained from scratch on arithmetic. It thinks in `<think>`, digit by digit, and then answers. "
        "It knows nothing else (whole numbers of up to four digits to add and subtract, two digits times two, chains of two or "
        "three operations, one question at a time), and makes something up where it is asked for more. "
        f"The figures on this page come from {files}; `tools/train/card.py` makes it of them.",
        "## Data",
        "Generated problems (`tools/train/tasks.py`): " + ", ".join(f"{kind} {share:.0%}" for kind,
        share in shares.items()) + ". "
        f"One expression in {TEST_SHARE}, chosen by its hash, is held out: no training text asks it, whatever the phrasing and "
        "the order or grouping of what is added, subtracted or multiplied, or works it out on the way to something else. (Facts, "
        "such as 7 * 8 and 42 + 4, are not held out: all else is made of them.) Of the training examples "
        f"{s['direct']:.0%} are answered behind an empty `<think>` block, so that answering without thinking is a case that was "
        "trained too. The tokenizer knows bytes and R1's control tokens.",
        "## Training",
        f"`python tools/train/train_tiny.py DIR {length} {flags}`",
        f"{record['steps']} steps, {tokens / 1e6:.0f} million tokens in {record['seconds'] / 60:.1f} minutes on "
        f"{record['machine']} (torch {record['torch']}, autocast {s['amp']}). Muon for the matrices and AdamW for the rest, "
        "experts balanced by the gate's bias alone, the MTP loss beside the model's own. The last step's loss was "
        f"{last['loss']:.4f} nats a token, the MTP layer's {last['mtp_loss']:.4f}. `training.json` has the whole course.",
    ]  # fmt: skip
    if second:
        parts += ["The same command with the same seed, a second time:", _runs([record, second])]
    if "figures" in record:
        parts += ["## Held-out problems", *_figures(record["figures"], evaluations or {})]
    if evaluations:
        parts += ["## Speculation", *_speculation(evaluations)]
    return "\n\n".join(parts) + "\n"


def _runs(records: list[Found]) -> str:
    """Runs beside one another."""
    lines = [
        "| | last loss | MTP loss | perplexity | right with thinking | without |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, record in zip(("this one", "again"), records, strict=True):
        last, figures = record["history"][-1], record["figures"]
        shares = " | ".join(
            f"{figures[key]['all']:.1%}" for key in ("accuracy", "accuracy_without_thinking")
        )
        lines.append(
            f"| {name} | {last['loss']:.4f} | {last['mtp_loss']:.4f} | {figures['perplexity']:.4f} | {shares} |"
        )
    return "\n".join(lines)


def accuracies(figures: Found, evaluations: dict[str, Found]) -> list[str]:
    """A table of accuracy by kind: the training script's own figures, then the evaluations of as
    many problems."""
    kinds = list(figures["accuracy"])
    lines = [f"| computed in | | {' | '.join(kinds)} |", f"|---|---|{'---:|' * len(kinds)}"]
    same = [found for found in evaluations.values() if found["problems"] == figures["problems"]]
    for found in [figures, *same]:
        for name, key in (("with thinking", "accuracy"), ("without", "accuracy_without_thinking")):
            shares = " | ".join(f"{found[key][kind]:.1%}" for kind in kinds)
            lines.append(f"| {_dtype(found['backend'])} | {name} | {shares} |")
    return lines


def _dtype(backend: Found) -> str:
    return backend["dtype"] + ("" if backend["amp"] == "off" else f", autocast {backend['amp']}")


def _figures(figures: Found, evaluations: dict[str, Found]) -> list[str]:
    """Accuracy by kind, perplexity, foresight, and the experts' load."""
    loads = ["| MoE layer | least used expert | most used | dead |", "|---|---|---|---|"]
    loads += [
        f"| {n} | {x['min']:.2f} | {x['max']:.2f} | {x['dead']} |"
        for n, x in enumerate(figures["load"])
    ]
    return [
        f"Greedy answers to {figures['problems']} problems (`python tools/train/eval.py -n {figures['problems']} --dtype fp32 "
        f"--seed {figures['seed']}`). FP8 as shipped in every row; loading makes it the dtype that a row computes in:",
        "\n".join(accuracies(figures, evaluations)),
        f"Perplexity {figures['perplexity']:.4f} a token. The MTP layer's first choice is the model's own for "
        f"{figures['mtp_agreement']:.3%} of the tokens: what greedy self-speculation with one draft accepts. "
        f"{figures['tokens_per_answer']:.0f} tokens an answer.",
        "Tokens that an expert is given, relative to its layer's mean (the last layer is the MTP layer's):",
        "\n".join(loads),
    ]


def _speculation(evaluations: dict[str, Found]) -> list[str]:
    """The runs with drafts, each group of as many problems beside those without."""
    drafted = {found["problems"] for found in evaluations.values() if found["speculation"]}
    lines = ["| machine | switches | problems | right | drafts accepted | tokens a step | text |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for name, found in evaluations.items():
        if found["problems"] not in drafted:
            continue
        backend, fared = found["backend"], found["speculation"]
        on = [_dtype(backend), *(f"`{flag}`" for flag, given in _flags(backend).items() if given)]
        shares = (
            [f"{fared['acceptance']:.1%}", f"{fared['tokens_per_step']:.2f}"] if fared else ["", ""]
        )
        cells = [
            name.split("-")[0].upper(),
            " ".join(on),
            str(found["problems"]),
            f"{found['accuracy']['all']:.1%}",
            *shares,
        ]
        lines.append(f"| {' | '.join(cells)} | `{found['text'][:12]}` |")
    return [
        "`--speculate mtp` drafts a token with the MTP layer, and changes no text. The last column is a digest of every token "
        "of all answers, with thinking and without: equal digests are equal texts.",
        "\n".join(lines),
    ]


def _flags(backend: Found) -> dict[str, bool]:
    """The switches beside the dtype, and whether they are on."""
    return {
        "--speculate mtp": backend["speculate"] == "mtp",
        "--cuda-graphs": backend["cuda_graphs"],
        "--compile": backend["compile"],
    }


def shipped() -> tuple[Found, dict[str, Found], Found]:
    """What the embedded checkpoint's card is made of: `card`'s arguments."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")
    }
    results = {name: found[name] for name in sorted(found)}
    second = results.pop(SECOND_RUN)
    return json.loads((EMBEDDED / "training.json").read_text(encoding="utf-8")), results, second


if __name__ == "__main__":
    (EMBEDDED / "README.md").write_text(card(*shipped()), encoding="utf-8")
