"""Time each decode kernel alone, on a GPU, beside the torch function that it replaces.

    python tools/measure/bench_kernels.py --batch 1,8,32 -o moonlight.json
    python tools/measure/bench_kernels.py --batch 1 --only attention,experts --sweep 120
    python tools/measure/bench_kernels.py --batch 1 --shape r1-distill-qwen-7b --quant int4
    python tools/measure/bench_kernels.py --batch 4096 --only experts --quant fp8 \\
        --quant-activations fp8 --sweep 60
    python tools/measure/bench_kernels.py --batch 1 --shape r1 --quant fp8 --only q_b \\
        --launch outputs=8,inputs=2048,warps=4 --launch outputs=16,inputs=512,warps=2

Each kernel runs in a CUDA graph, over several copies of its weights. The copies are larger than the
second-level cache, so the weights are cold, as in a model of many layers. A graph has many calls,
because starting a graph takes time once for a whole step: that time must not count as the kernel's.

`--sweep` searches launch parameters. It changes one at a time, and stops when no change helps or
when the given seconds (for all cases together) are over. `--launch` times the default with several
parameters changed at a time; a search begins with the best of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from attention_cases import attention_case, grouped_case, latent_case
from kernel_cases import (
    Case,
    Place,
    experts_case,
    gated_case,
    linear_case,
    prompt_case,
    route_case,
    step_case,
)
from torch import Tensor

from r1 import Config, InputError
from r1.bench import rates
from r1.bench.report.aligned import aligned
from r1.model.config import GroupedShape
from r1.storage.kinds import KINDS

REPETITIONS = 21
COLD = 3
"""The weights of one graph take so many times the size of the second-level cache."""
LEAST_CALLS = 27
"""The least number of calls in one graph, Moonlight's number of layers. Fewer copies are reused."""
MOST_OFF = 0.05
"""A kernel that is farther off its twin is wrong."""
KERNELS = (
    "step",
    "qkv_a",
    "q_b",
    "latent",
    "qkv",
    "attention",
    "o_proj",
    "dense_up",
    "dense_down",
    "prompt",
    "route",
    "lm_head",
    "experts",
)
"""A model has some of them: q_b exists where queries are compressed, qkv where attention is
grouped-query, route and experts where there are experts. prompt is dense_down once more, as a long
prompt multiplies by packed weights."""


Maker = Callable[[], Case]


def makers(
    place: Place, c: Config, tokens: int, contexts: Sequence[int], only: Sequence[str]
) -> list[Maker]:
    """Functions that make the cases: of all kernels that the model runs, or of `only` those.

    Functions, because a case takes gigabytes: make one case, run it, drop it.
    """
    dim, inner = c.hidden_size, c.intermediate_size
    linear = partial(linear_case, place=place, tokens=tokens)
    of_attention = grouped_makers if isinstance(c.attention, GroupedShape) else latent_makers
    found: dict[str, list[Maker]] = {
        "step": [lambda: step_case(place, c, tokens, contexts[0])],
        **of_attention(place, c, tokens, contexts),
        "dense_up": [lambda: gated_case(place, c, tokens)],
        "dense_down": [lambda: linear("dense_down", inputs=inner, outputs=dim, residual=True)],
        "lm_head": [lambda: linear("lm_head", inputs=dim, outputs=c.vocab_size, head=True)],
    }
    if place.quant != "none":
        found["prompt"] = [lambda: prompt_case("prompt", place, tokens, inner, dim)]
    if c.experts.n_routed_experts:
        found["route"] = [lambda: route_case(place, c, tokens)]
        found["experts"] = [lambda: experts_case(place, c, tokens)]
    return [make for name, each in found.items() if not only or name in only for make in each]


def latent_makers(
    place: Place, c: Config, tokens: int, contexts: Sequence[int]
) -> dict[str, list[Maker]]:
    """The kernels of latent attention, by name."""
    a, dim = c.latent, c.hidden_size
    q, o, rank = (
        a.num_attention_heads * a.qk_head_dim,
        a.num_attention_heads * a.v_head_dim,
        a.q_lora_rank,
    )
    linear = partial(linear_case, place=place, tokens=tokens)
    found: dict[str, list[Maker]] = {
        "qkv_a": [
            lambda: linear("qkv_a", inputs=dim, outputs=(rank or q) + a.latent_dim, norm=True)
        ],
    }
    if rank is not None:
        found["q_b"] = [lambda: linear("q_b", inputs=rank, outputs=q, norm=True)]
    return found | {
        "latent": [lambda: latent_case(place, c, tokens, contexts[0])],
        "attention": [partial(attention_case, place, c, tokens, n) for n in contexts],
        "o_proj": [lambda: linear("o_proj", inputs=o, outputs=dim, residual=True)],
    }


def grouped_makers(
    place: Place, c: Config, tokens: int, contexts: Sequence[int]
) -> dict[str, list[Maker]]:
    """The kernels of grouped-query attention, by name."""
    a, dim = c.grouped, c.hidden_size
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    linear = partial(linear_case, place=place, tokens=tokens)
    return {
        "qkv": [lambda: linear("qkv", inputs=dim, outputs=q + 2 * kv, norm=True)],
        "attention": [partial(grouped_case, place, c, tokens, n) for n in contexts],
        "o_proj": [lambda: linear("o_proj", inputs=q, outputs=dim, residual=True)],
    }


def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of one call, for each repetition. All calls are in one graph."""
    from r1.run.graphs import record, replay_seconds

    calls = [*calls] * -(-LEAST_CALLS // len(calls))

    def once() -> None:
        for call in calls:
            call()

    return [
        1e6 * seconds / len(calls) for seconds in replay_seconds(record(once), REPETITIONS + 3)[3:]
    ]


def ours(case: Case, use: Any) -> list[Callable[[], Tensor]]:
    """The kernel on each copy."""
    return [partial(case.run, cold, use) for cold in case.copies]


def off(case: Case, use: Any) -> float:
    """The largest difference from the twin, relative to the twin's largest value.

    The worst of all outputs.
    """
    both = case.outputs(case.run(case.copies[0], use)), case.outputs(case.twin(case.copies[0]))
    pairs = [(got.float(), twin.float()) for got, twin in zip(*both, strict=True)]
    return max(float((got - twin).abs().max() / twin.abs().max()) for got, twin in pairs)


def figures(case: Case, times: list[float], copy_gb_s: float) -> dict[str, float]:
    us = statistics.median(times)
    return {
        "us": us, "us_min": min(times), "us_max": max(times), "gb_s": case.nbytes / us / 1e3,
        "tflop_s": case.flops / us / 1e6, "of_copy_rate": case.nbytes / us / 1e3 / copy_gb_s,
    }  # fmt: skip


def changes(text: str) -> dict[str, int]:
    """What `--launch` gives: parameters by name. Raises InputError."""
    try:
        return {name: int(number) for name, number in (each.split("=") for each in text.split(","))}
    except ValueError:
        raise InputError(f"--launch takes NAME=N,.. and not {text}") from None


def changed(case: Case, numbers: dict[str, int]) -> Any:
    """The case's default launch with some parameters changed. Raises InputError."""
    known = [each.name for each in dataclasses.fields(case.default)] if case.default else []
    if unknown := numbers.keys() - known:
        raise InputError(
            f"--launch {min(unknown)}: {case.name} has {', '.join(known) or 'no parameters'}"
        )
    kept = dataclasses.asdict(case.default)
    return dataclasses.replace(
        case.default, **{name: type(kept[name])(number) for name, number in numbers.items()}
    )


def attempt(case: Case, use: Any) -> dict[str, Any]:
    """A launch with its microseconds; None where it fails, or is wrong."""
    trial: dict[str, Any] = {"launch": dataclasses.asdict(use)}
    try:
        wrong = off(case, use)
        trial["us"] = statistics.median(timed(ours(case, use))) if wrong < MOST_OFF else None
        trial["off"] = wrong
    except Exception as error:  # too much shared memory, too many registers: no common type
        trial |= {"us": None, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    return trial


def sweep(case: Case, start: Any, deadline: float) -> tuple[Any, list[dict[str, Any]]]:
    """Search launch parameters from `start`, one change at a time. Returns the best, and all that
    were tried.
    """
    from r1.run.tune import climb

    tried: dict[Any, dict[str, Any]] = {}

    def measure(use: Any) -> float:
        if use not in tried:
            tried[use] = attempt(case, use)
        return tried[use]["us"] or float("inf")

    best = climb(start, measure, 0.005, lambda: time.monotonic() < deadline)
    return best, list(tried.values())


def table(result: dict[str, Any]) -> list[str]:
    """A result file's content as Markdown, a line for each kernel."""
    rows = result["rows"]

    def column(cell: str) -> list[str]:
        return [
            cell.format(
                **row,
                **row["triton"],
                twin=row["torch"]["us"],
                gain=row["torch"]["us"] / row["triton"]["us"],
            )
            for row in rows
        ]

    cells = {
        "kernel": "{kernel}", "batch": "{batch}", "MB": "{mb:.1f}",
        "µs (range)": "{us:.1f} ({us_min:.1f}-{us_max:.1f})",
        "of the copy rate": "{of_copy_rate:.0%}", "TFLOP/s": "{tflop_s:.1f}",
        "torch µs": "{twin:.1f}", "times": "{gain:.1f}",
    }  # fmt: skip
    return aligned({name: column(cell) for name, cell in cells.items()})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a kernel is off its twin, 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    shared.add_shapes_and_batches(parser, "moonlight-16b", "1,8,32")
    parser.add_argument(
        "--context",
        default="256,4096",
        metavar="N,..",
        help="tokens in the cache (default 256,4096)",
    )
    parser.add_argument(
        "--only", default="", metavar="KERNEL,..", help=f"of {', '.join(KERNELS)} (default: all)"
    )
    parser.add_argument(
        "--sweep",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="search launch parameters too, for so long in all",
    )
    parser.add_argument(
        "--launch",
        action="append",
        default=[],
        metavar="NAME=N,..",
        help="time such a launch too; may be given several times, and needs --only one kernel",
    )
    parser.add_argument(
        "--quant",
        default="none",
        choices=("none", *KINDS),
        help="how the layers' matrices are stored (default none: bf16)",
    )
    parser.add_argument(
        "--quant-activations",
        default="none",
        choices=("none", "fp8"),
        help="with --quant fp8: what their inputs become (default none: they stay as they are)",
    )
    shared.add_output(parser, "write the figures as JSON")
    arguments = parser.parse_args(argv)
    arguments.command = shared.command(__file__, argv)
    return shared.run(__file__, work, arguments)


def work(arguments: argparse.Namespace) -> int:
    batches = shared.numbers("--batch", arguments.batch)
    contexts = shared.numbers("--context", arguments.context)
    shapes = shared.shapes(arguments.shape)
    only = shared.names("--only", arguments.only, KERNELS)
    launches = [changes(text) for text in arguments.launch]
    if launches and len(only) != 1:
        raise InputError("--launch gives one kernel's parameters: name the kernel in --only")
    rounds = arguments.quant_activations != "none"
    if rounds and arguments.quant != "fp8":
        raise InputError("--quant-activations fp8 is for matrices of FP8: add --quant fp8")
    shared.check_output(arguments.output)
    if not torch.cuda.is_available():
        raise InputError(
            "the kernels are timed on a GPU, and torch sees none: "
            "use tools/check/compile_kernels.py to compile them"
        )
    from r1.kernels.chip import Chip

    device = torch.device("cuda")
    torch.set_default_device("cuda")
    cold = COLD * torch.cuda.get_device_properties(0).L2_cache_size
    place = Place(Chip.of(device), cold, arguments.quant, rounds)
    copy, rows = rates.copy_rate(device) / 1e9, []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
    plan = [
        (name, batch, make)
        for name, config in shapes.items()
        for batch in batches
        for make in makers(place, config, batch, contexts, only)
    ]
    with torch.inference_mode():
        for name, batch, make in plan:
            rows.append(measure(name, batch, make(), copy, arguments.sweep / len(plan), launches))
            if arguments.output:  # after each row, so that a time limit loses one row at most
                result = {
                    "command": arguments.command, "machine": torch.cuda.get_device_name(),
                    "torch": torch.__version__, "copy_gb_s": copy, "rows": rows,
                }  # fmt: skip
                arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return int(any(row["off"] >= MOST_OFF for row in rows))


def measure(
    name: str, batch: int, case: Case, copy: float, seconds: float,
    launches: Sequence[dict[str, int]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure one case and print its line, and one for each of `launches`, changes of the default;
    with `seconds`, search launch parameters for so long.
    """
    row: dict[str, Any] = {"shape": name, "batch": batch, "kernel": case.name}
    row |= {"mb": case.nbytes / 1e6, "off": off(case, None)}
    fast = row["triton"] = figures(case, timed(ours(case, None)), copy)
    twins = [partial(case.twin, cold) for cold in case.copies]
    twin = row["torch"] = figures(case, timed(twins), copy)
    row["launch"] = case.default and dataclasses.asdict(case.default)
    verdict = "" if row["off"] < MOST_OFF else f"  OFF BY {row['off']:.2g}"
    print(
        f"{name:14} batch {batch:<3} {case.name:24} {row['mb']:8.1f} MB {fast['us']:8.1f} us "
        f"({fast['us_min']:.1f}-{fast['us_max']:.1f}) {fast['gb_s']:6.0f} GB/s "
        f"{fast['of_copy_rate']:4.0%} {fast['tflop_s']:6.1f} TFLOP/s | "
        f"torch {twin['us']:8.1f} us{verdict}",
        flush=True,
    )
    start, least = case.default, fast["us"]
    for use in [changed(case, numbers) for numbers in launches]:
        trial = attempt(case, use)
        row.setdefault("launches", []).append(trial)
        print(f"    {trial['us'] or trial.get('error', 'wrong')} us with {use}", flush=True)
        if (trial["us"] or least) < least:
            start, least = use, trial["us"]
    if seconds and case.default:
        best, tried = sweep(case, start, time.monotonic() + seconds)
        us = min((trial["us"] for trial in tried if trial["us"]), default=None)
        row["sweep"] = {"best": dataclasses.asdict(best), "us": us, "tried": tried}
        print(f"    best of {len(tried)}: {us} us with {best}", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
