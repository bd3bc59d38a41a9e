"""W8A8: inputs of FP8 for matrices of FP8, as torch rounds them, as kernels do, and as a switch.

Holds to account: r1/storage/activations.py, r1/model/rounded.py, r1/kernels/rounded.py, and what
r1/run/ways.py, r1/kernels/block.py and the benchmark's arms make of `quant_activations`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import TINY, V3, unit_gain
from torch import Tensor

from r1 import Backend, build
from r1.bench import arms, parity
from r1.bench.ablation import ablation, ladder_steps
from r1.bench.arms import TEXTBOOK
from r1.bench.worker import dequantized
from r1.bench.worker.serve import COMMANDS
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.model.dispatch import STRATEGIES
from r1.model.layers import Linear
from r1.model.moe import Experts
from r1.model.rounded import Rounded
from r1.model.transformer import Transformer
from r1.run.runner import Runner
from r1.storage import activations
from r1.storage.activations import FROM_TOKENS, NEVER, rounded, takes
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec
from r1.switches.draft import resolve_draft
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

BLOCKS, ROWS = Spec("fp8", 128, 128), Spec("fp8", 1, 0)
SWITCHES: dict[str, Any] = {"quant": "fp8", "quant_activations": "fp8"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def many_sizes(*shape: int) -> Tensor:
    """Numbers of many sizes in a group, fp32."""
    return torch.randn(shape) * torch.exp(3 * torch.randn(shape))


def stored(spec: Spec, *shape: int) -> Quantized:
    return KINDS[spec.kind].of(torch.randn(shape) * shape[-1] ** -0.5 + 0.02, spec)


# ---------------------------- rounding
def test_each_number_becomes_the_nearest_one() -> None:
    """Of all e4m3 numbers, at the group's scale. The last group has 44 columns."""
    x = many_sizes(5, 300)
    x[1, :128], x[2, 130] = 0.0, 1e-20
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    found = rounded(x).double()
    for first in (0, 128, 256):
        group = x[:, first : first + 128].double()
        scale = group.abs().amax(dim=-1, keepdim=True) / 448
        best = ((group / scale.clamp(min=1e-300))[..., None] - every).abs().amin(dim=-1) * scale
        gap = (found[:, first : first + 128] - group).abs()
        assert bool((gap <= best + 1e-4 * scale).all())
    assert torch.equal(found[1, :128], torch.zeros(128).double())


def test_edges() -> None:
    """Groups of tiny numbers are 0, and one with NaN or infinity is NaN: in its token alone."""
    x = torch.full((3, 256), 1e-37)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    found = rounded(x)
    assert bool((found[0] == 0).all())
    assert bool(found[1, :128].isnan().all() and (found[1, 128:] == 0).all())
    assert bool(found[2, 128:].isnan().all() and (found[2, :128] == 0).all())
    assert rounded(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.skipif(bool(Machine.here().why_not("compile")), reason="torch.compile can't run here")
@pytest.mark.parametrize("columns", [130, 192])
def test_the_last_group_compiles(columns: int) -> None:
    """By the real compiler: that of torch 2.13 for CPUs left a bf16 padding unwritten."""
    x = torch.randn(5, columns).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(rounded, fullgraph=True)
    torch.testing.assert_close(compiled(x), rounded(x))


def test_which_matrices() -> None:
    """Of FP8, if 128 columns share a scale: also those whose blocks are whole rows, and parts."""
    one, other = join(stored(BLOCKS, 128, 256), stored(BLOCKS, 40, 256))
    assert takes(one, other, stored(ROWS, 8, 160))
    for spec in (Spec("fp8", 16, 64), Spec("int8", 1, 0), Spec("int4", 1, 128)):
        assert not takes(one, stored(spec, 32, 256))
    assert not takes(Linear(256, 8).matrix)


# ---------------------------- a model
CONFIG = V3.change(
    hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=None,
    num_attention_heads=2, v_head_dim=64, max_position_embeddings=256, n_shared_experts=2,
)  # fmt: skip


def packed(device: str = "cpu") -> Transformer:
    """A dense and a sparse layer whose matrices are FP8 in blocks, in bf16 beside that."""
    made = unit_gain(CONFIG, dtype="bf16")
    for name, module in made.named_modules():
        if isinstance(module, Linear) and name.endswith("proj") and "kv_b" not in name:
            module.matrix = KINDS["fp8"].of(module.matrix.dense(), BLOCKS)
        elif isinstance(module, Experts):
            for each in ("gate_proj", "up_proj", "down_proj"):
                stack = getattr(module, each).dense()
                setattr(module, each, KINDS["fp8"].of(stack, BLOCKS))
    build.join_matrices(made)
    return made.to(device)


def run(made: Transformer, dtype: str = "bf16", **switches: Any) -> Runner:
    """As in models.py's `unresolved_runner`."""
    backend = resolve(Backend(made.norm.weight.device.type, dtype, quant="fp8"), made.config)
    backend = dataclasses.replace(backend, **switches)
    return Runner(build.finish(made, backend), backend)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all inputs that are rounded by torch from now on."""
    shapes: list[tuple[int, ...]] = []

    def count(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return rounded(x)

    monkeypatch.setattr(activations, "rounded", count)
    return shapes


@pytest.mark.parametrize("moe", ["loop", "gather", "grouped"])
def test_prompts_and_large_steps(moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of any length, and a step of 64 rows, not of 63. Both layers' projections, the inner
    values of all experts and the routed experts' x; never kv_b_proj's x or the output head's.
    """
    made = packed()
    runner = run(made, quant_activations="fp8", moe=moe, prefill_moe=moe)
    shapes = counted(monkeypatch)
    runner.prefill([[5, 9]], runner.cache(1, 16))
    widths = [shape[-1] for shape in shapes]
    # q with kv_a, gate with up, of both layers and of the shared experts; these experts' down; x
    assert widths.count(256) == 2 + 2 + 1 + 1
    assert widths.count(384) == 1  # the dense layer's down
    inner = widths.count(128) - 2  # without o_proj, of both layers
    assert 3 <= inner <= 6 if moe == "loop" else inner == 1
    assert len(widths) == 6 + 1 + 2 + inner
    for rows, rounds in ((63, False), (64, True)):
        shapes.clear()
        cache = runner.cache(rows, 16)
        runner.decode(torch.zeros(rows, 1, dtype=torch.int64), cache)
        assert bool(shapes) is rounds
    off = run(made, moe=moe, prefill_moe=moe)
    shapes.clear()
    off.prefill([[5, 9]], off.cache(1, 16))
    assert not shapes


def test_only_inputs_are_rounded() -> None:
    """A strategy between rounding and products gets the numbers of fp64 products, with the same
    rounding, written out.
    """
    dim, inner, tokens = 256, 128, 5
    experts = Experts(V3.change(hidden_size=dim, moe_intermediate_size=inner))
    experts.gate_proj, experts.up_proj = (stored(BLOCKS, 8, inner, dim) for _ in range(2))
    experts.down_proj = stored(BLOCKS, 8, dim, inner)
    x, weights = torch.randn(tokens, dim), torch.rand(tokens, 3)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    right = experts_by_definition(x, indices, weights, experts)
    plain = experts_by_definition(x, indices, weights, experts, lambda x: x)
    for strategy in STRATEGIES:
        ours = Rounded(strategy, tokens)(experts, x, indices, weights)
        torch.testing.assert_close(ours.double(), right, atol=1e-5, rtol=1e-5)
        fewer = Rounded(strategy, tokens + 1)(experts, x, indices, weights)
        torch.testing.assert_close(fewer.double(), plain, atol=1e-5, rtol=1e-5)
    assert float((right - plain).abs().max()) > 1e-3


def experts_by_definition(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts,
    round_x: Callable[[Tensor], Tensor] = lambda x: rounded(x.float()).double(),
) -> Tensor:  # fmt: skip
    """fp64 (N, D)."""
    names = ("gate_proj", "up_proj", "down_proj")
    stacks = [getattr(experts, name).dense(torch.float32).double() for name in names]
    y = torch.zeros(len(x), x.shape[1], dtype=torch.float64, device=x.device)
    for token, choice in itertools.product(range(len(x)), range(indices.shape[1])):
        expert = int(indices[token, choice])
        if expert < experts.count:
            gate, up, down = (stack[expert] for stack in stacks)
            v = round_x(x[token].double())
            g = gate @ v
            h = round_x(g * g.sigmoid() * (up @ v))
            y[token] += weights[token, choice].double() * (down @ h)
    return y


def test_a_draft_keeps_what_it_has() -> None:
    asked = Backend(device="cpu", speculate="draft", **SWITCHES)
    assert resolve_draft(asked, TINY).quant_activations == "none"


# ---------------------------- the benchmark
def test_where_its_arms_stand() -> None:
    """It is nothing without matrices of FP8."""
    base, quant, both = arms.from_switches(SWITCHES)
    assert (base.backend.quant, quant.name, both.name) == (
        "none", "quant=fp8", "quant=fp8 + quant_activations=fp8",
    )  # fmt: skip
    every = arms.from_switches(SWITCHES | {"compile": True}, arms.KINDS)
    left = {arm.name: arm.backend for arm in every if arm.kind == "all-but-one"}
    assert left["all but quant=fp8"].quant_activations == "none"
    assert left["all but quant_activations=fp8"].quant == "fp8"
    assert ladder_steps(SWITCHES, Machine(), 1)[-2:] == [
        {"quant": "fp8"}, {"quant_activations": "fp8"},
    ]  # fmt: skip
    assert not any("quant_activations" in s for s in ladder_steps({"quant": "fp8"}, Machine(), 1))
    for arm in ablation(SWITCHES, Machine(), 1):
        backend = arm.backend
        assert backend.quant == "fp8" or backend.quant_activations == "none", arm.name


def subject(folder: Path, monkeypatch: pytest.MonkeyPatch, **switches: Any) -> Subject:
    """An arm's process, in this one, ready for the command "parity". Five runs are the bound."""
    monkeypatch.setattr(parity, "RUNS", 5)
    work = Workload(None, "tiny", 2, 2, 8, 6, 0, 0)
    plain = Subject(Backend(device="cpu", dtype="fp32", **TEXTBOOK), work, folder)
    COMMANDS["build_reference"](plain)
    COMMANDS["reference"](plain, [])
    made = Subject(Backend(**{"device": "cpu", "dtype": "fp32", **switches}), work, folder)
    made.build()
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_parities(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain code rounds what the arm rounds; the second parity tells what both cost. A product
    with another token's scales is found.
    """
    arm = subject(tmp_path, monkeypatch, dtype=dtype, **SWITCHES)
    found = COMMANDS["parity"](arm)
    assert found["passes"] and found["quantizing"]["mean_kl"] > 1e-6
    if dtype == "fp32":
        assert found["median_kl"] < 1e-9

    def wrong(x: Tensor) -> Tensor:
        groups = x.unflatten(0, (-1,)) if x.dim() == 1 else x
        largest = groups.abs().amax(dim=-1, keepdim=True)
        return rounded(x) * (largest.roll(1, dims=-2) / largest.clamp(min=1e-30)).to(x.dtype)

    def multiply(matrix: Matrix, x: Tensor) -> Tensor:
        return matrix.matmul(wrong(x))

    way = arm.engine.runner.ways["prefill"]
    monkeypatch.setattr(way, "given", lambda step: dataclasses.replace(step, multiply=multiply))
    assert not COMMANDS["parity"](arm)["passes"]


def test_steps_round_as_the_arm_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows are few; with a lower limit the arm's steps are rounded, and so are the plain ones,
    however many rows are read together.
    """
    for least, rounds in ((64, False), (2, True)):
        monkeypatch.setitem(FROM_TOKENS, "decode", least)
        arm = subject(tmp_path, monkeypatch, **SWITCHES)
        with dequantized._plain(arm) as plain:
            way, last = plain.engine.runner.ways["decode"], cast(Any, plain.engine.model.layers[-1])
            wanted = 1 if rounds else NEVER
            assert (way.least, last.mlp.dispatch["decode"].least) == (wanted, wanted)
            assert plain.engine.runner.ways["prefill"].least == 1
            assert takes(last.self_attn.o_proj.matrix)
        if rounds:
            assert COMMANDS["parity"](arm)["median_kl"] < 1e-9
