"""Write the embedded checkpoint's model card from result files, so that nobody types a figure.

    python tools/train/card.py

tools/train/train_tiny.py writes a first card from its own record, training.json. The embedded
checkpoint's card has more, from the files in tools/measure/results/tiny-r1:

- MACHINE-SWITCHES.json: results of tools/train/eval.py under other switches, on other machines
- second-run.json: the training.json of a second run of the same command
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from tasks import KINDS, KNOWS, TEST_SHARE

from r1.__main__ import EMBEDDED

RESULTS = Path(__file__).parents[1] / "measure" / "results" / "tiny-r1"
SECOND_RUN = "second-run"
Found = dict[str, Any]


def card(
    record: Found, evaluations: dict[str, Found] | None = None, second: Found | None = None
) -> str:
    """The card as Markdown.

    `record` is the training.json of tools/train/train_tiny.py, `second` that of a second run, and
    `evaluations` are results of tools/train/eval.py by name.
    """
    parts = [*_introduction(record, bool(evaluations)), *_data(record), *_training(record)]
    if second:
        parts += ["The same command with the same seed, a second time:", _runs([record, second])]
    if "figures" in record:
        parts += ["## Held-out problems", *_figures(record["figures"], evaluations or {})]
    if evaluations:
        parts += ["## Speculation", *_speculation(evaluations)]
    return "\n\n".join(parts) + "\n"


def _introduction(record: Found, evaluated: bool) -> list[str]:
    files = "`training.json`" + (", and from `tools/measure/results/tiny-r1`" if evaluated else "")
    return [
        "# tiny-r1",
        f"DeepSeek-R1's architecture and file format with {record['parameters'] / 1e6:.2f} million "
        "parameters (the MTP layer included), trained from scratch on arithmetic. It thinks in "
        "`<think>`, digit by digit, and then answers. It knows nothing else "
        f"({KNOWS}, one question at a time), and makes something up where it is asked for more. "
        f"The figures on this page come from {files}; `tools/train/card.py` makes it of them.",
    ]


def _data(record: Found) -> list[str]:
    s = record["settings"]
    total = sum(KINDS[kind] for kind in s["kinds"])
    shares = ", ".join(f"{kind} {KINDS[kind] / total:.0%}" for kind in s["kinds"])
    return [
        "## Data",
        f"Generated problems (`tools/train/tasks.py`): {shares}. "
        f"One expression in {TEST_SHARE}, chosen by its hash, is held out: no training text asks "
        "it, whatever the phrasing and the order or grouping of what is added, subtracted or "
        "multiplied, or works it out on the way to something else. (Facts, such as 7 * 8 and "
        "42 + 4, are not held out: all else is made of them.) Of the training examples "
        f"{s['direct']:.0%} are answered behind an empty `<think>` block, so that answering "
        "without thinking is a case that was trained too. The tokenizer knows bytes and R1's "
        "control tokens.",
    ]


def _training(record: Found) -> list[str]:
    s, last = record["settings"], record["history"][-1]
    tokens = record["steps"] * s["rows"] * s["length"]
    return [
        "## Training",
        f"`{_command(s)}`",
        f"{record['steps']} steps, {tokens / 1e6:.0f} million tokens in "
        f"{record['seconds'] / 60:.1f} minutes on {record['machine']} (torch {record['torch']}, "
        f"autocast {s['amp']}). Muon for the matrices and AdamW for the rest, experts balanced by "
        "the gate's bias alone, the MTP loss beside the model's own. The last step's loss was "
        f"{last['loss']:.4f} nats a token, the MTP layer's {last['mtp_loss']:.4f}. "
        "`training.json` has the whole course.",
    ]


def _command(s: Found) -> str:
    """The command with these settings."""
    flags = [f"--steps {s['steps']}" if s["steps"] else f"--minutes {s['minutes']:g}"]
    flags += [f"--rows {s['rows']} --length {s['length']} --lr {s['lr']:g} --seed {s['seed']}"]
    flags += [f"--fp8-from {s['fp8_from']:g}"]
    flags += ["--compile"] if s["compile"] else []
    flags += [f"--layers {s['layers']}"] if s["layers"] else []
    flags += [f"--kinds {','.join(s['kinds'])}"] if list(s["kinds"]) != list(KINDS) else []
    return " ".join(["python tools/train/train_tiny.py DIR", *flags])


def _runs(records: list[Found]) -> str:
    """A table with a row for each run."""
    lines = [
        "| | last loss | MTP loss | perplexity | right with thinking | without |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, record in zip(("this one", "again"), records, strict=True):
        last, figures = record["history"][-1], record["figures"]
        shares = " | ".join(
            f"{figures[key]['all']:.1%}" for key in ("accuracy", "accuracy_without_thinking")
        )
        losses = f"{last['loss']:.4f} | {last['mtp_loss']:.4f} | {figures['perplexity']:.4f}"
        lines.append(f"| {name} | {losses} | {shares} |")
    return "\n".join(lines)


def accuracies(figures: Found, evaluations: dict[str, Found]) -> list[str]:
    """A table of accuracy by kind: the training run's own figures, then the evaluations.

    An evaluation of another number of problems is left out.
    """
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
    """Paragraphs: accuracy by kind, perplexity, the MTP layer's agreement, the experts' load."""
    loads = ["| MoE layer | least used expert | most used | dead |", "|---|---|---|---|"]
    loads += [
        f"| {n} | {x['min']:.2f} | {x['max']:.2f} | {x['dead']} |"
        for n, x in enumerate(figures["load"])
    ]
    count = figures["problems"]
    return [
        f"Greedy answers to {count} problems (`python tools/train/eval.py -n {count} --dtype fp32 "
        f"--seed {figures['seed']}`). FP8 as shipped in every row; loading makes it the dtype that "
        "a row computes in:",
        "\n".join(accuracies(figures, evaluations)),
        f"Perplexity {figures['perplexity']:.4f} a token. The MTP layer's first choice is the "
        f"model's own for {figures['mtp_agreement']:.3%} of the tokens: what greedy "
        "self-speculation with one draft accepts. "
        f"{figures['tokens_per_answer']:.0f} tokens an answer.",
        "Tokens that an expert is given, relative to its layer's mean (the last layer is the MTP "
        "layer's):",
        "\n".join(loads),
    ]


def _speculation(evaluations: dict[str, Found]) -> list[str]:
    """Paragraphs: the evaluations with drafts, beside those of as many problems without drafts."""
    drafted = {found["problems"] for found in evaluations.values() if found["speculation"]}
    lines = ["| machine | switches | problems | right | drafts accepted | tokens a step | text |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for name, found in evaluations.items():
        if found["problems"] not in drafted:
            continue
        backend, fared = found["backend"], found["speculation"]
        on = [_dtype(backend), *(f"`{flag}`" for flag, given in _flags(backend).items() if given)]
        accepted = f"{fared['acceptance']:.1%}" if fared else ""
        per_step = f"{fared['tokens_per_step']:.2f}" if fared else ""
        about = f"{name.split('-')[0].upper()} | {' '.join(on)} | {found['problems']}"
        right = f"{found['accuracy']['all']:.1%}"
        lines.append(f"| {about} | {right} | {accepted} | {per_step} | `{found['text'][:12]}` |")
    return [
        "`--speculate mtp` drafts a token with the MTP layer, and changes no text. The last column "
        "is a digest of every token of all answers, with thinking and without: equal digests are "
        "equal texts.",
        "\n".join(lines),
    ]


def _flags(backend: Found) -> dict[str, bool]:
    """The switches other than the dtype, and whether each is on."""
    return {
        "--speculate mtp": backend["speculate"] == "mtp",
        "--cuda-graphs": backend["cuda_graphs"],
        "--compile": backend["compile"],
    }


def shipped() -> tuple[Found, dict[str, Found], Found]:
    """The arguments of `card` for the embedded checkpoint, read from the committed files."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")
    }
    results = {name: found[name] for name in sorted(found)}
    second = results.pop(SECOND_RUN)
    return json.loads((EMBEDDED / "training.json").read_text(encoding="utf-8")), results, second


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.run(__file__, work, shared.parser(__doc__).parse_args(argv))


def work(_arguments: argparse.Namespace) -> int:
    (EMBEDDED / "README.md").write_text(card(*shipped()), encoding="utf-8")
    print(EMBEDDED / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
