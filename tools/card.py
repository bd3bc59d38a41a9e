"""The model card of a trained tiny-r1: a page made of the run's own record, so that no figure on it is typed."""

from __future__ import annotations

from typing import Any

from tasks import KINDS, TEST_SHARE


def card(record: dict[str, Any]) -> str:
    """Markdown from what tools/train_tiny.py recorded."""
    s, last = record["settings"], record["history"][-1]
    length = f"--steps {s['steps']}" if s["steps"] else f"--minutes {s['minutes']:g}"
    tokens = record["steps"] * s["rows"] * s["length"]
    flags = f"--rows {s['rows']} --length {s['length']} --lr {s['lr']:g} --seed {s['seed']} --fp8-from {s['fp8_from']:g}"
    flags += " --compile" if s["compile"] else ""
    shares = {kind: KINDS[kind] / sum(KINDS[k] for k in s["kinds"]) for kind in s["kinds"]}
    parts = [
        "# tiny-r1",
        f"DeepSeek-R1's architecture and file format with {record['parameters'] / 1e6:.2f} million parameters (the MTP layer "
        "included), trained from scratch on arithmetic. It thinks in `<think>`, digit by digit, and then answers. "
        "It knows nothing else. This page was written by the training script from what it measured.",
        "## Data",
        "Generated problems (`tools/tasks.py`): " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()) + ". "
        f"One expression in {TEST_SHARE}, chosen by its hash, is never trained on, whatever the phrasing or the order of "
        f"commuting operands. Of the training examples {s['direct']:.0%} are answered behind an empty `<think>` block, so that "
        "answering without thinking is a case that was trained too. The tokenizer knows bytes and R1's control tokens.",
        "## Training",
        f"`python tools/train_tiny.py DIR {length} {flags}`",
        f"{record['steps']} steps, {tokens / 1e6:.0f} million tokens in {record['seconds'] / 60:.1f} minutes on "
        f"{record['machine']} (torch {record['torch']}, autocast {s['amp']}). Muon for the matrices and AdamW for the rest, "
        "experts balanced by the gate's bias alone, the MTP loss beside the model's own. The last step's loss was "
        f"{last['loss']:.4f} nats a token, the MTP layer's {last['mtp_loss']:.4f}. `training.json` has the whole course.",
    ]  # fmt: skip
    if "figures" in record:
        parts += ["## Held-out problems", *_figures(record["figures"])]
    return "\n\n".join(parts) + "\n"


def _figures(figures: dict[str, Any]) -> list[str]:
    """Accuracy by kind, perplexity, foresight, and the experts' load."""
    kinds = list(figures["accuracy"])
    rows = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for name, key in (("with thinking", "accuracy"), ("without", "accuracy_without_thinking")):
        rows.append(f"| {name} | {' | '.join(f'{figures[key][kind]:.1%}' for kind in kinds)} |")
    loads = ["| MoE layer | least used expert | most used | dead |", "|---|---|---|---|"]
    loads += [f"| {n} | {x['min']:.2f} | {x['max']:.2f} | {x['dead']} |" for n, x in enumerate(figures["load"])]
    return [
        f"Greedy answers to {figures['problems']} problems (`python tools/eval.py -n {figures['problems']} --dtype fp32 "
        f"--seed {figures['seed']}`), the files as they are here, FP8:",
        "\n".join(rows),
        f"Perplexity {figures['perplexity']:.4f} a token. The MTP layer's first choice is the model's own for "
        f"{figures['mtp_agreement']:.1%} of the tokens: what greedy self-speculation with one draft accepts. "
        f"{figures['tokens_per_answer']:.0f} tokens an answer.",
        "Tokens that an expert is given, relative to its layer's mean (the last layer is the MTP layer's):",
        "\n".join(loads),
    ]
