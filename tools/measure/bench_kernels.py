"""Time every decode kernel alone, on a GPU: in a CUDA graph, with cold weights, its torch twin
beside it.

    python tools/measure/bench_kernels.py --shape moonlight-16b --batch 1,8,32 -o moonlight.json
    python tools/measure/bench_kernels.py --shape moonlight-16b --batch 1 --only attention,experts --sweep 120

A graph runs a kernel over several copies of its weights, more than the second-level cache holds, as
a model's layers would, and so often that what starting a graph costs, once for a whole step, is not
counted as the kernel's. `--sweep` changes one launch parameter at a time, as long as that helps and
the seconds given (for all cases) last."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1

import torch
from torch import Tensor
from torch.nn import functional as F

from r1 import Config, InputError, roofline
from r1.bench import report
from r1.model.shapes import SHAPES, shape

REPETITIONS = 21
COLD = 3
"""How many times what the second-level cache holds a graph's weights take."""
MOST_COPIES = 128
LEAST_CALLS = 27
"""In one graph: Moonlight's layers. Where the copies are fewer, it goes through them again."""
EPS = 1e-6
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
"""q_b is of models that compress their queries."""


@dataclass
class Case:
    """One kernel (or the few that make one function) at one size."""

    name: str
    nbytes: int
    """What must be read and written once."""
    flops: int
    copies: list[Any]
    """Of the weights, or what else must be cold."""
    run: Callable[[Any, Any], Any]
    """The kernel, on one of the copies, with launch parameters or None for the default."""
    twin: Callable[[Any], Any]
    default: Any
    outputs: Callable[[Any], Sequence[Tensor]] = lambda found: [found]
    """All that the kernel makes, of what it returns: comparable tensors."""


def randn(*size: int, scale: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, scale)


@dataclass
class Place:
    """Where the cases run: on torch's default device."""

    chip: Any
    cold: int
    """Bytes that a graph's weights take at least, so that none are found in the second-level
    cache."""

    def copies(self, nbytes: int) -> int:
        return max(2, min(MOST_COPIES, -(-self.cold // nbytes)))


def step_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.step import begin_step, begin_step_torch

    frequency = torch.rand(c.attention.qk_rope_head_dim // 2)

    def run(lengths: Tensor, _use: None) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step(place.chip, lengths, 1, frequency, 1.0)

    def twin(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step_torch(lengths, 1, frequency, 1.0)

    nbytes = tokens * (
        2 * 8 + 2 * 4 * c.attention.qk_rope_head_dim
    )  # no launch parameters to choose, and nothing that must be cold
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

    x = randn(tokens, inputs * (2 if swiglu else 1))
    given: dict[str, Any] = {
        "swiglu": swiglu,
        "norm": randn(inputs) if norm else None,
        "eps": EPS,
        "dtype": dtype,
    }
    given["residual"] = randn(tokens, outputs) if residual else None

    def run(weight: Tensor, use: LinearLaunch | None) -> Tensor:
        return linear(place.chip, x, weight, **given, launch=use)

    def twin(weight: Tensor) -> Tensor:
        return linear_torch(x, weight, **given)

    nbytes, weights = 2 * outputs * inputs, [randn(outputs, inputs, scale=inputs**-0.5)]
    weights += [weights[0].clone() for _ in range(place.copies(nbytes) - 1)]
    default = LinearLaunch.default((tokens, inputs, outputs, 2), place.chip)
    nbytes += 2 * x.numel() + dtype.itemsize * tokens * outputs
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
        return latent(
            place.chip,
            q,
            kv,
            weight[:, :nope],
            gain,
            EPS,
            angle,
            angle,
            positions,
            cache,
            launch=use,
        )

    def twin(weight: Tensor) -> tuple[Tensor, Tensor]:
        return latent_torch(q, kv, weight[:, :nope], gain, EPS, angle, angle, positions, cache)

    def outputs(queries: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The cache's entries too, which are forgotten here: the next one to be compared has to
        write them."""
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
        return route(place.chip, gate, x, gain, EPS, use)

    def twin(gate: Router) -> tuple[Tensor, Tensor, Tensor]:
        return route_torch(gate, x, gain, EPS)

    def outputs(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """The choices as weights of all experts, 0 for most: the order of a token's choices is
        free."""
        h, indices, weights = found
        return [h, torch.zeros(tokens, c.experts.n_routed_experts).scatter(1, indices, weights)]

    nbytes = 4 * c.experts.n_routed_experts * c.hidden_size
    gates = [Router(c).requires_grad_(False) for _ in range(place.copies(nbytes))]
    for gate in gates:
        gate.weight.normal_(0.0, 0.02)
    flops = 2 * tokens * c.experts.n_routed_experts * c.hidden_size
    default = RouterLaunch.default((tokens, c.experts.n_routed_experts, c.hidden_size), place.chip)
    return Case("route", nbytes + 4 * x.numel(), flops, gates, run, twin, default, outputs)


def experts_case(place: Place, c: Config, tokens: int) -> Case:
    from r1.kernels.experts import ExpertsLaunch, Matrices, experts, experts_torch
    from r1.model.layers import swiglu
    from r1.model.moe import Experts, grouped

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
    routed = Matrices(
        randn(count, 2 * inner, dim, scale=0.02), randn(count, dim, inner, scale=0.02)
    )
    weights, residual, gain = torch.rand(tokens, chosen), randn(tokens, dim), randn(dim)
    x = F.rms_norm(residual, (dim,), gain, EPS)

    def run(cold: tuple[Tensor, Matrices], use: ExpertsLaunch | None) -> Tensor:
        return experts(place.chip, x, cold[0], weights, routed, cold[1], residual, gain, EPS, use)

    def twin(cold: tuple[Tensor, Matrices]) -> Tensor:
        if tokens == 1:
            return experts_torch(x, cold[0], weights, routed, cold[1], residual)
        y = grouped(cast(Experts, routed), x, cold[0], weights)  # what torch has for several tokens
        return residual + y + F.linear(swiglu(F.linear(x, cold[1].gate_up_proj)), cold[1].down_proj)

    drawn = [torch.rand(tokens, count).topk(chosen).indices for _ in range(8)]
    shared = [
        Matrices(randn(2 * more * inner, dim, scale=0.02), randn(dim, more * inner, scale=0.02))
        for _ in drawn
    ]
    hit = sum(i.unique().numel() for i in drawn) / len(drawn)
    default = ExpertsLaunch.default((tokens, chosen, count, dim, inner, 2), place.chip)
    moved, flops = int((hit + more) * one + 4 * x.numel()), tokens * (chosen + more) * one
    cold = list(zip(drawn, shared, strict=True))
    return Case(f"experts, {hit:.1f} hit", moved, flops, cold, run, twin, default)


Maker = Callable[[], Case]


def makers(
    place: Place, c: Config, tokens: int, contexts: Sequence[int], only: Sequence[str]
) -> list[Maker]:
    """What makes the cases, of all kernels that the model runs or `only` those: one after the
    other, for they take gigabytes."""
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
    """Microseconds of one call, by repetition: all calls in one graph."""
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
    """The largest difference from the twin, relative to the twin's largest value: the worst
    output's."""
    found = case.outputs(case.run(case.copies[0], use)), case.outputs(case.twin(case.copies[0]))
    pairs = [(got.float(), twin.float()) for got, twin in zip(*found, strict=True)]
    return max(float((got - twin).abs().max() / twin.abs().max()) for got, twin in pairs)


def figures(case: Case, times: list[float], copy_gb_s: float) -> dict[str, float]:
    us = statistics.median(times)
    return {
        "us": us, "us_min": min(times), "us_max": max(times), "gb_s": case.nbytes / us / 1e3,
        "tflop_s": case.flops / us / 1e6, "of_copy_rate": case.nbytes / us / 1e3 / copy_gb_s,
    }  # fmt: skip


def sweep(case: Case, deadline: float) -> tuple[Any, list[dict[str, Any]]]:
    """The best launch parameters found by changing one at a time, and all that was tried."""
    from r1.kernels.tune import climb

    tried: dict[Any, dict[str, Any]] = {}

    def measure(use: Any) -> float:
        if use not in tried:
            found: dict[str, Any] = {"launch": dataclasses.asdict(use)}
            try:
                wrong = off(case, use)
                found["us"] = statistics.median(timed(ours(case, use))) if wrong < 0.05 else None
                found["off"] = wrong
            except Exception as error:  # too much shared memory, too many registers: no common type
                found |= {"us": None, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            tried[use] = found
        return tried[use]["us"] or float("inf")

    best = climb(case.default, measure, 0.005, lambda: time.monotonic() < deadline)
    return best, list(tried.values())


def table(found: dict[str, Any]) -> list[str]:
    """A result as Markdown, a line for each kernel."""
    rows = found["rows"]

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
    return report.aligned({name: column(cell) for name, cell in cells.items()})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--shape", default="moonlight-16b", help="comma list of " + ", ".join(SHAPES))
    made.add_argument("--batch", default="1,8,32", help="comma list of rows in a decode step")
    made.add_argument("--context", default="256,4096", help="comma list of tokens in the cache")
    made.add_argument("--only", default="", help=f"comma list of {', '.join(KERNELS)}")
    made.add_argument(
        "--sweep",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="search launch parameters, so long in all",
    )
    made.add_argument("-o", "--output", type=Path, help="write JSON there")
    return made


def numbers(flag: str, text: str) -> list[int]:
    if not all(each.isdecimal() and int(each) for each in text.split(",")):
        raise InputError(f"{flag} {text}: give whole numbers of at least 1, such as 1,32")
    return list(map(int, text.split(",")))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a kernel is off its twin, or 2 for input that can't be
    used."""
    arguments = parser().parse_args(argv)
    try:
        batches, contexts = (
            numbers("--batch", arguments.batch),
            numbers("--context", arguments.context),
        )
        shapes = {name: shape(name) for name in arguments.shape.split(",")}
        only = [name for name in arguments.only.split(",") if name]
        if unknown := [name for name in only if name not in KERNELS]:
            raise InputError(f"--only {unknown[0]}: choose of {', '.join(KERNELS)}")
        if arguments.output and (
            arguments.output.is_dir() or not os.access(arguments.output.parent, os.W_OK)
        ):
            raise InputError(f"-o {arguments.output}: no file can be written there")
        if not torch.cuda.is_available():
            raise InputError(
                "the kernels are timed on a GPU, and torch sees none: use tools/check/compile_kernels.py to compile them"
            )
    except InputError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2
    from r1.kernels import Chip

    torch.set_default_device("cuda")
    place = Place(
        Chip.of(torch.device("cuda")), COLD * torch.cuda.get_device_properties(0).L2_cache_size
    )
    copy = roofline.copy_rate(torch.device("cuda")) / 1e9
    rows: list[dict[str, Any]] = []
    bad = 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
    plan = [
        (name, batch, make)
        for name, config in shapes.items()
        for batch in batches
        for make in makers(place, config, batch, contexts, only)
    ]
    with torch.inference_mode():
        for name, batch, make in plan:
            case = make()
            row: dict[str, Any] = {
                "shape": name,
                "batch": batch,
                "kernel": case.name,
                "mb": case.nbytes / 1e6,
            }
            row["off"] = off(case, None)
            row["triton"] = figures(case, timed(ours(case, None)), copy)
            row["torch"] = figures(
                case, timed([partial(case.twin, cold) for cold in case.copies]), copy
            )
            row["launch"] = case.default and dataclasses.asdict(case.default)
            fast, twin = row["triton"], row["torch"]
            verdict = "" if row["off"] < 0.05 else f"  OFF BY {row['off']:.2g}"
            bad += bool(verdict)
            print(
                f"{name:14} batch {batch:<3} {case.name:24} {row['mb']:8.1f} MB {fast['us']:8.1f} us "
                f"({fast['us_min']:.1f}-{fast['us_max']:.1f}) {fast['gb_s']:6.0f} GB/s {fast['of_copy_rate']:4.0%} "
                f"{fast['tflop_s']:6.1f} TFLOP/s | torch {twin['us']:8.1f} us{verdict}",
                flush=True,
            )
            if arguments.sweep and case.default:
                best, tried = sweep(case, time.monotonic() + arguments.sweep / len(plan))
                us = min((t["us"] for t in tried if t["us"]), default=None)
                row["sweep"] = {"best": dataclasses.asdict(best), "us": us, "tried": tried}
                print(f"    best of {len(tried)}: {us} us with {best}", flush=True)
            rows.append(row)
            if arguments.output:  # after each, so that a limit on time loses one row
                found = {
                    "command": shlex.join(["python", *sys.argv]),
                    "machine": torch.cuda.get_device_name(), "torch": torch.__version__,
                    "copy_gb_s": copy, "rows": rows,
                }  # fmt: skip
                arguments.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
