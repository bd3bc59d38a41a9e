"""Time each decode kernel alone, on a GPU, beside the torch function that it replaces.

    python tools/measure/bench_kernels.py --batch 1,8,32 -o moonlight.json
    python tools/measure/bench_kernels.py --batch 1 --only attention,experts --sweep 120

Each kernel runs in a CUDA graph, over several copies of its weights. The copies are larger than the
second-level cache, so the weights are cold, as in a model of many layers. A graph has many calls,
because starting a graph takes time once for a whole step: that time must not count as the kernel's.

`--sweep` searches launch parameters. It changes one at a time, and stops when no change helps or
when the given seconds (for all cases together) are over.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1 import Config, InputError
from r1.bench import rates
from r1.bench.report.aligned import aligned
from r1.model.config import GroupedShape
from r1.storage.dense import Dense
from r1.storing import join_matrices

REPETITIONS = 21
COLD = 3
"""The weights of one graph take so many times the size of the second-level cache."""
MOST_COPIES = 128
LEAST_CALLS = 27
"""The least number of calls in one graph, Moonlight's number of layers. Fewer copies are reused."""
EPS = 1e-6
MOST_OFF = 0.05
"""A kernel that is farther off its twin is wrong."""
KERNELS = (
    "step",
    "qkv_a",
    "q_b",
    "latent",
    "attention",
    "o_proj",
    "dense_up",
    "dense_down",
    "route",
    "lm_head",
    "experts",
)
"""q_b exists only in models that compress their queries."""


@dataclass
class Case:
    """One kernel, or the few kernels of one function, at one size."""

    name: str
    nbytes: int
    """Bytes that must be read and written, each once."""
    flops: int
    copies: list[Any]
    """Copies of the weights, or of other inputs that must be cold."""
    run: Callable[[Any, Any], Any]
    """Runs the kernel on one of the copies. Launch parameters come second; None: the default."""
    twin: Callable[[Any], Any]
    """The same function in torch."""
    default: Any
    """The default launch parameters; None for a kernel without any."""
    outputs: Callable[[Any], Sequence[Tensor]] = lambda result: [result]
    """From the kernel's result to all tensors that it made, for comparison with the twin's."""


def randn(*size: int, scale: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, scale)


@dataclass
class Place:
    """The GPU on which the cases run: torch's default device."""

    chip: Any
    cold: int
    """The least bytes that a graph's weights take, so that the second-level cache has none of
    them."""

    def copies(self, nbytes: int) -> int:
        return max(2, min(MOST_COPIES, -(-self.cold // nbytes)))


def step_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.step import begin_step, begin_step_torch

    frequency = torch.rand(c.attention.qk_rope_head_dim // 2)

    def run(lengths: Tensor, _use: None) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step(place.chip, lengths, 1, frequency, 1.0)

    def twin(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step_torch(lengths, 1, frequency, 1.0)

    # It has no launch parameters, and no input that must be cold.
    nbytes = tokens * (2 * 8 + 2 * 4 * c.attention.qk_rope_head_dim)
    return Case(
        "step",
        nbytes,
        4 * tokens * c.attention.qk_rope_head_dim,
        [torch.full((tokens,), context - 1) for _ in range(8)],
        run,
        twin,
        None,
        list,
    )


def linear_case(
    name: str, place: Place, tokens: int, inputs: int, outputs: int, *, norm: bool = False,
    swiglu: bool = False, residual: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    from r1.kernels.linear import LinearLaunch, linear, linear_torch

    x, up = randn(tokens, 2 * inputs).split(inputs, dim=-1) if swiglu else (None, None)
    x = randn(tokens, inputs) if x is None else x
    given: dict[str, Any] = {
        "up": up,
        "norm": randn(inputs) if norm else None,
        "eps": EPS,
        "dtype": dtype,
    }
    given["residual"] = randn(tokens, outputs) if residual else None

    def run(weight: Dense, use: LinearLaunch | None) -> Tensor:
        return linear(place.chip, x, weight, **given, launch=use)

    def twin(weight: Dense) -> Tensor:
        return linear_torch(x, weight, **given)

    nbytes, weight = 2 * outputs * inputs, randn(outputs, inputs, scale=inputs**-0.5)
    weights = [Dense(weight.clone()) for _ in range(place.copies(nbytes))]
    default = LinearLaunch.default((tokens, inputs, outputs, 2), place.chip)
    nbytes += 2 * x.numel() * (2 if swiglu else 1) + dtype.itemsize * tokens * outputs
    return Case(name, nbytes, 2 * tokens * outputs * inputs, weights, run, twin, default)


def latent_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.latent import LatentLaunch, latent, latent_torch

    heads, rank, r, nope = (
        c.attention.num_attention_heads,
        c.attention.kv_lora_rank,
        c.attention.qk_rope_head_dim,
        c.attention.qk_nope_head_dim,
    )
    q, kv, gain = (
        randn(tokens, heads * c.attention.qk_head_dim),
        randn(tokens, c.attention.latent_dim),
        randn(rank),
    )
    angle = torch.rand(tokens, 1, 1, r)
    positions = torch.full((tokens, 1), context - 1)
    cache = randn(tokens, context, c.attention.latent_dim)

    def run(weight: Tensor, use: LatentLaunch | None) -> tuple[Tensor, Tensor]:
        w_uk = weight[:, :nope]
        return latent(
            place.chip, q, kv, w_uk, gain, EPS, angle, angle, positions, cache, launch=use
        )

    def twin(weight: Tensor) -> tuple[Tensor, Tensor]:
        return latent_torch(q, kv, weight[:, :nope], gain, EPS, angle, angle, positions, cache)

    def outputs(queries: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The queries and the new cache entries. They are cleared here, so that the next kernel
        compared must write them itself.
        """
        written = cache[:, context - 1].clone()
        cache[:, context - 1] = 0
        return [*queries, written]

    nbytes = 2 * heads * nope * rank
    weights = [
        randn(heads, nope + c.attention.v_head_dim, rank, scale=0.02)
        for _ in range(place.copies(nbytes))
    ]
    moved = nbytes + 2 * (q.numel() + kv.numel() * 2 + tokens * heads * c.attention.latent_dim)
    default = LatentLaunch.default((tokens, heads, nope, rank, 2), place.chip)
    return Case("latent", moved, nbytes * tokens, weights, run, twin, default, outputs)


def attention_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.attention import AttentionLaunch, attention, attention_torch

    heads, rank, nope = (
        c.attention.num_attention_heads,
        c.attention.kv_lora_rank,
        c.attention.qk_nope_head_dim,
    )
    q_c, q_pe = (
        randn(tokens, heads, rank, scale=0.1),
        randn(tokens, heads, c.attention.qk_rope_head_dim),
    )
    positions = torch.full((tokens, 1), context - 1)

    def run(cold: tuple[Tensor, Tensor], use: AttentionLaunch | None) -> Tensor:
        return attention(place.chip, q_c, q_pe, cold[0], positions, cold[1][:, nope:], 0.07, use)

    def twin(cold: tuple[Tensor, Tensor]) -> Tensor:
        return attention_torch(q_c, q_pe, cold[0], positions, cold[1][:, nope:], 0.07)

    nbytes = (
        2 * tokens * context * c.attention.latent_dim + 2 * heads * c.attention.v_head_dim * rank
    )
    kv_b = (heads, nope + c.attention.v_head_dim, rank)
    cold = [
        (randn(tokens, context, c.attention.latent_dim), randn(*kv_b, scale=0.02))
        for _ in range(place.copies(nbytes))
    ]
    flops = 2 * tokens * heads * context * (c.attention.latent_dim + rank)
    default = AttentionLaunch.default(
        (tokens, heads, rank, c.attention.qk_rope_head_dim, context, 2), place.chip
    )
    return Case(f"attention, {context} tokens", nbytes, flops, cold, run, twin, default)


def route_case(place: Place, c: Config, tokens: int) -> Case:
    from r1.kernels.router import RouterLaunch, route, route_torch
    from r1.model.router import Router

    x, gain = randn(tokens, c.hidden_size), randn(c.hidden_size)

    def run(gate: Router, use: RouterLaunch | None) -> tuple[Tensor, Tensor, Tensor]:
        return route(place.chip, gate, x, gain, EPS, launch=use)

    def twin(gate: Router) -> tuple[Tensor, Tensor, Tensor]:
        return route_torch(gate, x, gain, EPS)

    def outputs(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """The choices as weights of all experts, most 0: a token's choices have no order."""
        h, indices, weights = found
        return [h, torch.zeros(tokens, c.experts.n_routed_experts).scatter(1, indices, weights)]

    nbytes = 4 * c.experts.n_routed_experts * c.hidden_size
    gates = [Router(c).requires_grad_(False) for _ in range(place.copies(nbytes))]
    for gate in gates:
        gate.weight.normal_(0.0, 0.02)
    flops = 2 * tokens * c.experts.n_routed_experts * c.hidden_size
    default = RouterLaunch.default((tokens, c.experts.n_routed_experts, c.hidden_size), place.chip)
    return Case("route", nbytes + 4 * x.numel(), flops, gates, run, twin, default, outputs)


def filled(make: Callable[[], nn.Module], scale: float) -> Any:
    """A module of bf16 numbers, its gate and up matrices joined as a model's are."""
    device = torch.get_default_device()
    with torch.device("meta"):
        module = make().bfloat16().requires_grad_(False)
        join_matrices(module)
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(0.0, scale)
    return module


def experts_case(place: Place, c: Config, tokens: int) -> Case:
    from r1.kernels.experts import ExpertsLaunch, experts, experts_torch
    from r1.model.dispatch import Grouped
    from r1.model.layers import MLP
    from r1.model.moe import Experts

    dim, inner, count, chosen = (
        c.hidden_size,
        c.experts.moe_intermediate_size,
        c.experts.n_routed_experts,
        c.experts.num_experts_per_tok,
    )
    more, one = (
        c.experts.n_shared_experts,
        2 * 3 * c.hidden_size * c.experts.moe_intermediate_size,
    )  # bytes of an expert
    routed = filled(lambda: Experts(c), 0.02)
    weights, residual, gain = torch.rand(tokens, chosen), randn(tokens, dim), randn(dim)
    x = F.rms_norm(residual, (dim,), gain, EPS)

    def run(cold: tuple[Tensor, MLP], use: ExpertsLaunch | None) -> Tensor:
        return experts(place.chip, x, cold[0], weights, routed, cold[1], residual, gain, EPS, use)

    def twin(cold: tuple[Tensor, MLP]) -> Tensor:
        if tokens == 1:
            return experts_torch(x, cold[0], weights, routed, cold[1], residual)
        # torch's way for several tokens
        return residual + Grouped()(routed, x, cold[0], weights) + cold[1](x)

    drawn = [torch.rand(tokens, count).topk(chosen).indices for _ in range(8)]
    shared = [filled(lambda: MLP(dim, more * inner), 0.02) for _ in drawn]
    hit = sum(i.unique().numel() for i in drawn) / len(drawn)
    default = ExpertsLaunch.default((tokens, chosen, count, dim, inner, 2), place.chip)
    moved, flops = int((hit + more) * one + 4 * x.numel()), tokens * (chosen + more) * one
    cold = list(zip(drawn, shared, strict=True))
    return Case(f"experts, {hit:.1f} hit", moved, flops, cold, run, twin, default)


Maker = Callable[[], Case]


def makers(
    place: Place, c: Config, tokens: int, contexts: Sequence[int], only: Sequence[str]
) -> list[Maker]:
    """Functions that make the cases: of all kernels that the model runs, or of `only` those.

    Functions, because a case takes gigabytes: make one case, run it, drop it.
    """
    q, dim, o = (
        c.attention.num_attention_heads * c.attention.qk_head_dim,
        c.hidden_size,
        c.attention.num_attention_heads * c.attention.v_head_dim,
    )
    found: list[tuple[str, Maker]] = [
        ("step", lambda: step_case(place, c, tokens, contexts[0])),
        (
            "qkv_a",
            lambda: linear_case(
                "qkv_a",
                place,
                tokens,
                dim,
                (c.attention.q_lora_rank or q) + c.attention.latent_dim,
                norm=True,
            ),
        ),
        ("latent", lambda: latent_case(place, c, tokens, contexts[0])),
        *(("attention", partial(attention_case, place, c, tokens, n)) for n in contexts),
        ("o_proj", lambda: linear_case("o_proj", place, tokens, o, dim, residual=True)),
        (
            "dense_up",
            lambda: linear_case("dense_up", place, tokens, dim, 2 * c.intermediate_size, norm=True),
        ),
        (
            "dense_down",
            lambda: linear_case(
                "dense_down", place, tokens, c.intermediate_size, dim, swiglu=True, residual=True
            ),
        ),
        ("route", lambda: route_case(place, c, tokens)),
        (
            "lm_head",
            lambda: linear_case("lm_head", place, tokens, dim, c.vocab_size, dtype=torch.float32),
        ),
        ("experts", lambda: experts_case(place, c, tokens)),
    ]
    if c.attention.q_lora_rank is not None:
        rank = c.attention.q_lora_rank
        found.insert(2, ("q_b", lambda: linear_case("q_b", place, tokens, rank, q, norm=True)))
    return [make for name, make in found if not only or name in only]


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


def sweep(case: Case, deadline: float) -> tuple[Any, list[dict[str, Any]]]:
    """Search launch parameters, one change at a time. Returns the best, and all that were tried."""
    from r1.run.tune import climb

    tried: dict[Any, dict[str, Any]] = {}

    def measure(use: Any) -> float:
        if use not in tried:
            trial: dict[str, Any] = {"launch": dataclasses.asdict(use)}
            try:
                wrong = off(case, use)
                right = wrong < MOST_OFF
                trial["us"] = statistics.median(timed(ours(case, use))) if right else None
                trial["off"] = wrong
            except Exception as error:  # too much shared memory, too many registers: no common type
                trial |= {"us": None, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            tried[use] = trial
        return tried[use]["us"] or float("inf")

    best = climb(case.default, measure, 0.005, lambda: time.monotonic() < deadline)
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
    shared.add_output(parser, "write the figures as JSON")
    arguments = parser.parse_args(argv)
    arguments.command = shared.command(__file__, argv)
    return shared.run(__file__, work, arguments)


def work(arguments: argparse.Namespace) -> int:
    batches = shared.numbers("--batch", arguments.batch)
    contexts = shared.numbers("--context", arguments.context)
    shapes = shared.shapes(arguments.shape)
    only = shared.names("--only", arguments.only, KERNELS)
    shared.check_output(arguments.output)
    for name, config in shapes.items():
        if isinstance(config.attention, GroupedShape):
            has = "has grouped-query attention, and this tool times those of latent attention"
            raise InputError(f"--shape {name} {has}: use bench.py --kernels triton")
    if not torch.cuda.is_available():
        raise InputError(
            "the kernels are timed on a GPU, and torch sees none: "
            "use tools/check/compile_kernels.py to compile them"
        )
    from r1.kernels.chip import Chip

    device = torch.device("cuda")
    torch.set_default_device("cuda")
    place = Place(Chip.of(device), COLD * torch.cuda.get_device_properties(0).L2_cache_size)
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
            rows.append(measure(name, batch, make(), copy, arguments.sweep / len(plan)))
            if arguments.output:  # after each row, so that a time limit loses one row at most
                result = {
                    "command": arguments.command, "machine": torch.cuda.get_device_name(),
                    "torch": torch.__version__, "copy_gb_s": copy, "rows": rows,
                }  # fmt: skip
                arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return int(any(row["off"] >= MOST_OFF for row in rows))


def measure(name: str, batch: int, case: Case, copy: float, seconds: float) -> dict[str, Any]:
    """Measure one case and print its line; with `seconds`, search launch parameters for so long."""
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
    if seconds and case.default:
        best, tried = sweep(case, time.monotonic() + seconds)
        us = min((trial["us"] for trial in tried if trial["us"]), default=None)
        row["sweep"] = {"best": dataclasses.asdict(best), "us": us, "tried": tried}
        print(f"    best of {len(tried)}: {us} us with {best}", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
