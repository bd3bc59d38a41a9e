"""Plan a run on several GPUs, without one: what each rank would hold, and how fast a step can be.

    python tools/check/plan_ranks.py --shape r1 --quant fp8 --tp 8 --gpu h200
    python tools/check/plan_ranks.py --shape r1 --quant fp8 --ep 8 --batch 1,8,32,128 --gpu h200
    python tools/check/plan_ranks.py --shape r1 --quant fp8 --pp 2 --tp 4 --prompt 1024,8192

Each rank's part is made as a run makes it, but without memory, by the switches that the guide
expects to be fastest. Whether it loads and fits, build.py and bench.py say. "beside" is memory that
a pass takes while it runs. "floor ms" is the least time of a step, without "sums ms" between GPUs
("-": the links have no figure); "floor tok/s" has both. What stages send to each other is left out.
"expected" starts from rows that were measured (r1/guide/README.md).
`--tp N --ep M` are N x M GPUs, as for bench.py: for eight, `--tp 8`, `--ep 8` or `--tp 2 --ep 4`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared

from r1 import Backend, Config, InputError, roofline
from r1.bench.sizes import check_sizes
from r1.bench.workload import Workload
from r1.build import check_memory, placement_of, sketch, weight_bytes
from r1.device import torch_device
from r1.errors import flags_spelling, setting
from r1.footprint import Footprint, Sizes, footprint
from r1.guide import gpus, links, measured
from r1.guide.layouts import Shares, fastest
from r1.guide.predict import Predictor
from r1.guide.setup import QUANTS, Setup, published
from r1.model.moe import MoE
from r1.model.shapes import SHAPES, shape
from r1.model.transformer import Block
from r1.placement.mesh import Mesh
from r1.run.runner import round_rows
from r1.switches.backend import SHARING
from r1.switches.resolve import resolve

GB = 1e9
SIZES = {"batch": "1,8,32,128", "prompt": "1024", "new": "128"}


@dataclass(frozen=True)
class Rank:
    """One rank's part of the model, without memory."""

    rank: int
    stage: int
    layers: range
    heads: int
    experts: range
    """The routed experts of each of its sparse layers; empty if it has no such layer."""
    expert_values: int
    """Inner values that it has of each of them."""
    weight_bytes: int
    """Of all its tensors, as the loader counts them."""
    refused: str | None
    """What the loader says where they can't fit."""
    needs: tuple[Footprint, ...]
    """All its memory at the peak, by workload."""


def rank_of(config: Config, backend: Backend, number: int, work: list[Workload], free: int) -> Rank:
    """One rank of a resolved backend, on a GPU of `free` bytes. Raises InputError."""
    mesh = Mesh(backend.tp, backend.ep, number, pp=backend.pp)
    placement = placement_of(config, backend, mesh)
    model = sketch(config, backend, mtp=backend.speculate == "mtp", placement=placement)
    sizes = placement.sizes(model, device := torch_device(backend.device))
    check = partial(check_memory, sizes, model, backend, setting("layers", "N"), lambda _: free)
    stacks = [each.experts for each in model.modules() if isinstance(each, MoE)]
    ids, values = (stacks[0].ids, stacks[0].gate_proj.shape[-2]) if stacks else (range(0), 0)
    layers = range(first := model.first_layer, first + len(model.layers))
    weights, attention = sizes[device.type], cast(Block, model.layers[0]).self_attn
    needs = (footprint(model, backend, Sizes(w.batch, w.prompt, w.new), weights) for w in work)
    holds = layers, attention.shape.num_attention_heads, ids, values, weights
    return Rank(number, mesh.stage, *holds, refusal(check), tuple(needs))


def refusal(check: Callable[[], None]) -> str | None:
    """The sentence of a check that refuses."""
    try:
        check()
    except InputError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Speed:
    """A workload on the whole mesh. Times in milliseconds."""

    batch: int
    prompt: int
    new: int
    refused: str | None
    """What bench.py says where it can't fit."""
    floor_ms: float
    """Of a step, or of a turn of speculation; without sums."""
    sums_ms: float | None
    """Drafts' own are left out. None: the links have no figure."""
    tokens_per_s: float
    """Of all rows, at the floor with its sums, where they are known."""
    expected_tokens_per_s: float | None
    """By the guide, from the nearest measured row; None: there is none, or drafts are checked."""
    floor_ttft_ms: float | None


def speed(setup: Setup, w: Workload) -> Speed:
    """What bounds one workload."""
    config, backend, predictor = setup.config, setup.backend, Predictor(measured.committed())
    refused = refusal(partial(check_sizes, w, config, backend, free=setup.gpu.capacity))
    times = predictor.times(setup, Sizes(w.batch, w.prompt, w.new))
    rows = round_rows(w.batch) if backend.cuda_graphs else w.batch
    floor, tokens, expected = times.floor_tpot_ms, 1.0, times.expected_tpot_ms
    sums = links.exchange_seconds(config, backend, setup.gpu, rows * backend.step_tokens)
    if w.assumed is not None:
        rates, expected = predictor.rates(setup.gpu), None
        turn = roofline.speculation(config, backend, w.batch, w.prompt + w.new / 2)
        floor = 1e3 * (rates.seconds(turn.verify) + rates.seconds(turn.draft))
        tokens = roofline.expected_tokens(w.assumed, turn.drafts)
    sums_ms = None if sums is None else 1e3 * sums
    rate = 1e3 * w.batch * tokens / (floor + (sums_ms or 0.0))
    bounds = floor, sums_ms, rate, expected and 1e3 * w.batch / expected, times.floor_ttft_ms
    return Speed(w.batch, w.prompt, w.new, refused, *bounds)


def command(setup: Setup, work: list[Workload]) -> str:
    """What one would type to measure this."""
    if setup.hosts > 1:
        return f"no command: {setup.hosts} hosts are needed, and bench.py measures on one"
    first, mesh = work[0], "-".join(f"{n}{getattr(setup.backend, n)}" for n in SHARING)
    given = {
        "layers": first.layers, **asked(setup), "assume_acceptance": first.assumed,
        "routing": None if first.routing == "model" else first.routing,
        **{n: ",".join(dict.fromkeys(str(getattr(w, n)) for w in work)) for n in SIZES},
        "repetitions": 3, "no_baseline": True,
        "output_file": f"{setup.name}-{setup.config.num_hidden_layers}-{setup.stored}-{mesh}.json",
    }  # fmt: skip
    start = f"-m torch.distributed.run --nproc-per-node {setup.count} " * (setup.count > 1)
    with flags_spelling():
        flags = [setting(n, None if v is True else v) for n, v in given.items() if v is not None]
    return " ".join([f"python {start}bench.py --shape {setup.name}", *flags])


def asked(setup: Setup) -> dict[str, Any]:
    """The fewest switches that are resolved to these."""
    found = dict(vars(setup.backend))
    for name in vars(setup.backend):
        fewer = {other: value for other, value in found.items() if other != name}
        with suppress(InputError):
            if resolve(Backend(**fewer), setup.config, setup.gpu.as_machine()) == setup.backend:
                found = fewer
    return found


@dataclass(frozen=True)
class Plan:
    """Everything about a mesh."""

    setup: Setup
    whole_bytes: int
    """The model's weights, where one device has all of them."""
    ranks: list[Rank]
    speeds: list[Speed]
    command: str
    refusals: list[str]
    """What the checks of memory say, each sentence once."""


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises InputError for a mesh that can't share the model."""
    gpu = gpus.gpu(arguments.gpu)
    drafts = arguments.speculate == "mtp"
    if drafts and not 0 <= arguments.assume_acceptance <= 1:
        raise InputError(f"--assume-acceptance {arguments.assume_acceptance}: give 0 to 1")
    config = shape(arguments.shape, arguments.layers)
    routing = "uniform" if config.experts.n_routed_experts else "model"
    assumed = arguments.assume_acceptance if drafts else None
    sizes = (shared.numbers(f"--{name}", getattr(arguments, name)) for name in SIZES)
    model = None, arguments.shape, arguments.layers
    work = [
        Workload(*model, batch, prompt, new, 0, 0, routing, assumed, alone=True)
        for batch, prompt, new in product(*sizes)
    ]
    config, quant = work[0].config(), arguments.quant or published(config) or "none"
    shares = Shares(quant, arguments.tp, arguments.ep, arguments.pp, "device")
    backend = fastest(config, gpu, shares)
    drafting = {"speculate": arguments.speculate, "draft_tokens": arguments.draft_tokens}
    backend = resolve(dataclasses.replace(backend, **drafting), config, gpu.as_machine())
    setup = Setup(arguments.shape, config, gpu, backend)
    ranks = [rank_of(config, backend, n, work, gpu.capacity) for n in range(backend.ranks)]
    whole = weight_bytes(config, dataclasses.replace(backend, tp=1, ep=1, pp=1), mtp=drafts)
    speeds = [speed(setup, w) for w in work]
    told = [each.refused for each in ranks] + [each.refused for each in speeds]
    refusals = list(dict.fromkeys(filter(None, told)))
    return Plan(setup, whole, ranks, speeds, command(setup, work), refusals)


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Columns under their names, which `head` has with two spaces between."""
    lines = [head.split("  "), *(map(cell, row) for row in rows)]
    columns = [list(column) for column in zip(*lines, strict=True)]
    aligned = [[each.rjust(max(map(len, column))) for each in column] for column in columns]
    return "\n".join("  ".join(line) for line in zip(*aligned, strict=True))


def cell(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def pages(plan: Plan) -> Iterator[str]:
    """What is printed, in blocks."""
    setup, gpu, total = plan.setup, plan.setup.gpu, sum(r.weight_bytes for r in plan.ranks)
    yield (
        f"{setup.name}, {setup.config.num_hidden_layers} layers, {setup.stored}: {setup.layout}, "
        f"{setup.count} x {gpu.title}, of which a model may use {gpu.capacity / GB:.0f} GB\n"
        f"weights of all ranks: {total / GB:.2f} GB, {plan.whole_bytes / GB:.2f} of the model and "
        f"{(total - plan.whole_bytes) / GB:.2f} of copies"
    )
    groups = [list(g) for _, g in groupby(plan.ranks, attrgetter("stage", "weight_bytes"))]
    spans = {f"{g[0].rank}-{g[-1].rank}" if g[1:] else str(g[0].rank): g[0] for g in groups}
    yield table(
        "ranks  stage  layers  heads  experts  values of each  weights GB  loads",
        (
            (span, r.stage, f"{r.layers.start}-{r.layers.stop - 1}", r.heads, len(r.experts),
             r.expert_values, r.weight_bytes / GB, not r.refused)
            for span, r in spans.items()
        ),
    )  # fmt: skip
    yield table(
        "batch  prompt  new  ranks  cache GB  beside GB  left GB",
        (
            (s.batch, s.prompt, s.new, span, need.cache / GB, need.beside / GB,
             (gpu.capacity - need.total) / GB)
            for n, s in enumerate(plan.speeds) for span, r in spans.items() for need in [r.needs[n]]
        ),
    )  # fmt: skip
    yield table(
        "batch  prompt  new  fits  floor ms  sums ms  floor tok/s  expected tok/s  prompt floor ms",
        (
            (s.batch, s.prompt, s.new, not s.refused, s.floor_ms, s.sums_ms, round(s.tokens_per_s),
             s.expected_tokens_per_s and round(s.expected_tokens_per_s), s.floor_ttft_ms)
            for s in plan.speeds
        ),
    )  # fmt: skip
    yield from (f"refused: {sentence}" for sentence in plan.refusals)
    yield plan.command


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 all fits, 1 something does not, 2 input that can't be used."""
    parser = shared.parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="r1", help="a published shape (default r1)")
    add("--layers", type=int, metavar="N", help="only its first N layers")
    add("--quant", choices=QUANTS, help="how matrices are stored (default: as published)")
    known = [name for name, gpu in gpus.all_gpus().items() if not gpu.computer]
    add("--gpu", choices=known, default="h200", help="as for python -m r1.guide (default h200)")
    for name, text in (("tp", "heads and inner values"), ("ep", "experts"), ("pp", "layers")):
        add(f"--{name}", type=int, default=1, metavar="N", help=f"devices that share {text} (1)")
    for name, sizes in SIZES.items():
        add(f"--{name}", default=sizes, metavar="N,..", help=f"as for bench.py (default {sizes})")
    add("--speculate", choices=("off", "mtp"), default="off", help="mtp: with drafts")
    add("--draft-tokens", type=int, default=1, metavar="N", help="for a step (default 1)")
    add("--assume-acceptance", type=float, default=0.85, metavar="A", help="of drafts (0.85)")
    shared.add_output(parser, "write the plan as JSON")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    shared.check_output(arguments.output)
    plan = plan_of(arguments)
    print("\n\n".join(pages(plan)))
    if arguments.output:
        found = {"arguments": shared.recorded(arguments), **dataclasses.asdict(plan)}
        found["setup"] = dataclasses.asdict(plan.setup.backend)
        text = json.dumps(found, indent=1, default=lambda span: [span.start, span.stop])
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 1 if plan.refusals else 0


if __name__ == "__main__":
    sys.exit(main())
