"""Products of packed weights by the matrix units (r1/kernels/narrow.py), against fp64 products."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from models import V3, unit_gain
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from test_fixed import counting

from r1.kernels.block import DecodeBlock
from r1.kernels.chip import Chip
from r1.kernels.experts import Swiglu, experts, experts_take_fixed, stored_sizes
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.fixed import LARGEST as LARGEST_FIXED
from r1.kernels.fixed import Fixed, storage_sizes
from r1.kernels.linear import linear, linear_takes_fixed
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.narrow import Form, pairs
from r1.kernels.router import RouterLaunch, route
from r1.kernels.tiles import operand
from r1.model.layers import MLP
from r1.model.moe import Experts
from r1.model.router import Router
from r1.storage.activations import LARGEST
from r1.storage.kinds import KINDS
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = Chip.of(DEVICE)
if DEVICE.type == "cpu":  # what the interpreter imitates has these; the kernels need no more of it
    CHIP = dataclasses.replace(CHIP, byte_products=True, ptx=True)
ABLE = pytest.mark.skipif(not CHIP.ptx, reason="needs FP8 products, as chips from sm_89 on have")
SPECS = {
    "fp8 blocks": Spec("fp8", 128, 128),
    "fp8 rows": Spec("fp8", 1, 0),
    "groups of 128": Spec("int4", 1, 128),
    "zero points": Spec("int4", 1, 64, scale="fp16", zeros=True),
    "4 bits, rows": Spec("int4", 1, 0),
}
EPS = 1e-6
pytestmark = ABLE


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(spec: Spec, *shape: int) -> Quantized:
    weight = torch.randn(shape) * shape[-1] ** -0.5 + 0.02
    return KINDS[spec.kind].of(weight, spec).to(DEVICE)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().to(DEVICE)


def values(made: Fixed, length: int, step: int) -> Tensor:
    """What the pairs stand for, fp64 (N, length)."""
    tokens = made.planes.shape[0]
    if made.planes.dtype == torch.float8_e4m3fn:
        high, low = made.planes.double().unbind(1)
        scale = made.scales.double()
        return (high + low / 16) * scale.repeat_interleave(step, 1)
    planes = made.planes.view(torch.int8).view(tokens, 2, 2, length // 2).double()
    whole = (256 * planes[:, 0] + planes[:, 1]).transpose(1, 2).reshape(tokens, length)
    sums = whole.view(tokens, -1, step).sum(-1)
    assert torch.equal(sums.float(), made.scales[..., 1]), "the sums are of these numbers"
    return whole * made.scales[..., 0].double().repeat_interleave(step, 1)


@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize("name", ["fp8 blocks", "groups of 128"])
def test_pairs_hold_what_bf16_holds(name: str, step: int) -> None:
    """Numbers of many sizes in one step, zeros, and a row a program after the first."""
    length = 1152
    x = draw(3, length) * torch.exp(3 * torch.randn(3, length, device=DEVICE)).bfloat16()
    x[1, :step], x[2, 7] = 0, 3e38
    w = operand(stored(SPECS[name], 128, length), CHIP.ptx)
    gap = (values(pairs(CHIP, x, w, step), length, step) - x.double()).abs()
    largest = x.double().abs().view(3, -1, step).amax(-1).repeat_interleave(step, 1)
    if w.FORMAT.value == "fp8":
        bound = x.double().abs() * 2**-8 + largest / LARGEST * 2**-14
    else:
        bound = largest / LARGEST_FIXED.value * 0.51
    assert bool((gap <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fp8 blocks", "groups of 128"])
def test_what_is_no_number_stays_none(name: str, bad: float) -> None:
    """In its own token alone."""
    x = draw(2, 256)
    x[1, 3] = bad
    launch = LinearLaunch(8, 16, 128, 4, 2, narrow=True)
    y = linear(CHIP, x, stored(SPECS[name], 32, 256), launch=launch)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize(("tokens", "rows"), [(9, 8), (19, 16)])
def test_linear(tokens: int, rows: int, spec: Spec) -> None:
    """72 rows in blocks of 32; x has a stride."""
    weight, x = stored(spec, 72, 384), draw(tokens, 500)[:, :384]
    gain, residual = draw(384) + 1, draw(tokens, 72)
    launch = LinearLaunch(rows, 32, 128, 4, 2, narrow=True)
    right = x.double() @ weight.dense().double().T
    ours = linear(CHIP, x, weight, dtype=torch.float32, launch=launch)
    torch.testing.assert_close(ours.double(), right, atol=2e-2, rtol=0)
    normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * gain
    right = residual.double() + normed @ weight.dense().double().T
    ours = linear(
        CHIP, x, weight, norm=gain, eps=EPS, residual=residual, dtype=torch.float32, launch=launch
    )
    torch.testing.assert_close(ours.double(), right, atol=3e-2, rtol=0)


def crowded(spec: Spec, tokens: int) -> tuple[Experts, MLP, Tensor, Tensor, Tensor]:
    """Eight experts, of which number 5 has all tokens and number 0 none, two shared ones, and x,
    weights and indices of the tokens.
    """
    dim, inner = 256, 128
    config = V3.change(hidden_size=dim, moe_intermediate_size=inner, n_shared_experts=2)
    routed, shared = Experts(config), MLP(dim, 2 * inner)
    routed.gate_proj, routed.up_proj = (stored(spec, 8, inner, dim) for _ in range(2))
    routed.down_proj, shared.down_proj.matrix = (
        stored(spec, 8, dim, inner),
        stored(spec, dim, 2 * inner),
    )
    shared.gate_proj.matrix, shared.up_proj.matrix = (
        stored(spec, 2 * inner, dim) for _ in range(2)
    )
    x, weights = draw(tokens, dim), torch.rand(tokens, 3, device=DEVICE)
    others = torch.tensor([1, 2, 3, 4, 6, 7])
    indices = torch.stack([others[torch.randperm(6)[:3]] for _ in range(tokens)]).to(DEVICE)
    indices[:, 1] = 5
    return routed, shared, x, weights, indices


@pytest.mark.parametrize("name", ["fp8 blocks", "groups of 128", "zero points"])
@pytest.mark.parametrize("partial", [False, True])
def test_experts(partial: bool, name: str) -> None:
    """Expert 5 has all tokens, expert 0 none, and of `partial` the last tokens have none at all.
    Two shared experts.
    """
    routed, shared, x, weights, indices = crowded(SPECS[name], 11)
    if partial:
        indices[6:], routed.partial = 8, True
    launch = ExpertsLaunch(8, 64, 128, 128, 128, 4, 2, apart=True, narrow=True)
    ours = experts(CHIP, x, indices, weights, routed, shared, x, launch=launch)
    right = reference(x, indices, weights, routed, shared)
    assert float((ours.double() - right).abs().max() / right.abs().max()) < 0.01


def reference(x: Tensor, indices: Tensor, weights: Tensor, routed: Experts, shared: MLP) -> Tensor:
    """x and its experts' outputs, fp64."""

    def swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g = x.double() @ gate.double().T
        return (g * g.sigmoid() * (x.double() @ up.double().T)) @ down.double().T

    names = ("gate_proj", "up_proj", "down_proj")
    y = x.double() + swiglu(*(getattr(shared, name).matrix.dense() for name in names))
    stacks = [getattr(routed, name).dense() for name in names]
    for expert in range(8):
        share = (weights * (indices == expert)).sum(-1, keepdim=True)
        y = y + share * swiglu(*(stack[expert] for stack in stacks))
    return y


def test_what_can_be_narrow() -> None:
    """A step is as long as blocks, and lengths, let it be; other formats and numbers have none."""

    def sizes(spec: Spec, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, ...]:
        w = operand(stored(spec, 128, columns), CHIP.ptx)
        return storage_sizes(CHIP, torch.zeros(1, columns, dtype=dtype), columns, w)

    assert sizes(SPECS["fp8 blocks"], 384) == (8, 0, 128)
    assert sizes(SPECS["fp8 rows"], 192) == (8, 0, 64)
    assert sizes(SPECS["fp8 rows"], 160) == (8,)
    assert sizes(SPECS["fp8 blocks"], 384, torch.float32) == (8,)
    assert sizes(Spec("fp8", 16, 32), 384) == (8,)
    assert sizes(Spec("int8", 1, 0), 384) == (8,)
    assert sizes(SPECS["groups of 128"], 384) == (4, 1, 128)
    assert sizes(SPECS["zero points"], 384) == (4, 1, 64)
    assert sizes(Spec("int4", 1, 32), 384) == (4, 1)
    old = dataclasses.replace(CHIP, ptx=False)
    w = operand(stored(SPECS["fp8 blocks"], 128, 384), ptx=False)
    assert storage_sizes(old, draw(1, 384), 384, w) == (8,)


def experts_of(spec: Spec) -> Experts:
    """Eight experts, 256 -> 128 -> 256."""
    routed = Experts(V3.change(hidden_size=256, moe_intermediate_size=128))
    routed.gate_proj, routed.up_proj = (stored(spec, 8, 128, 256) for _ in range(2))
    routed.down_proj = stored(spec, 8, 256, 128)
    return routed


def test_who_makes_the_pairs_ahead() -> None:
    """The router, for experts. The attention's kernels make vectors for dot products alone."""
    weight, x = stored(SPECS["groups of 128"], 256, 256), draw(16, 256)
    assert linear_takes_fixed(CHIP, x[:1], weight, 32) == Form(256, 32)
    assert linear_takes_fixed(CHIP, x, weight, 32) is None
    routed = experts_of(SPECS["groups of 128"])
    operands = Swiglu.of(CHIP, routed.gate_proj, routed.up_proj, routed.down_proj)
    assert stored_sizes(CHIP, x, 128, operands, None) == (4, 1, 128)
    assert experts_take_fixed(CHIP, x[:1], routed, None, 3) == Form(256, 32)
    assert experts_take_fixed(CHIP, x, routed, None, 3) == Form(256, 128)
    assert experts_take_fixed(CHIP, x, experts_of(SPECS["zero points"]), None, 3) == Form(256, 64)
    many = draw(4096, 256)  # whose products are bf16
    assert experts_take_fixed(CHIP, many, routed, None, 3) is None
    routed = experts_of(SPECS["fp8 blocks"])
    assert experts_take_fixed(CHIP, x[:1], routed, None, 3) is None
    assert experts_take_fixed(CHIP, x, routed, None, 3) == Form(256, 128, fp8=True)
    assert experts_take_fixed(CHIP, x, routed, None, 3, round_x=True) is None  # of other numbers
    assert experts_take_fixed(CHIP, x.float(), routed, None, 3) is None


def unwritten(form: Form, tokens: int) -> Fixed:
    """Memory in which what is not written shows."""
    made = form.empty(torch.empty(0, device=DEVICE), tokens)
    assert Form.of(made) == form
    made.planes.view(torch.uint8).fill_(0x5A)
    made.scales.fill_(torch.nan)
    return made


def same(made: Fixed, right: Fixed) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(made, right, strict=True)
    )


@pytest.mark.parametrize("dim", [128, 1152])
@pytest.mark.parametrize(
    ("name", "step"), [("fp8 blocks", 128), ("fp8 rows", 64), ("groups of 128", 128),
                       ("zero points", 64)],
)  # fmt: skip
def test_the_router_makes_its_pairs(name: str, step: int, dim: int) -> None:
    """The same bits as a kernel of their own. More programs than steps, and fewer, the last one's
    only in part. The last token is zeros.
    """
    c = V3.change(hidden_size=dim, n_routed_experts=12, n_group=1, topk_group=1)
    gate = Router(c).requires_grad_(False).to(DEVICE)
    gate.weight.normal_()
    gate.e_score_correction_bias.zero_()
    x, gain = draw(3, dim) * torch.exp(2 * torch.randn(3, dim, device=DEVICE)).bfloat16(), draw(dim)
    x[2] = 0
    for launch in (RouterLaunch(1, 256, 1), RouterLaunch(4, 128, 4)):
        found = unwritten(Form(dim, step, fp8=name.startswith("fp8")), 3)
        made = route(CHIP, gate, x, gain, EPS, launch=launch, fixed=found)
        plain = route(CHIP, gate, x, gain, EPS, launch=launch)
        for ours, right in zip(made, plain, strict=True):
            assert torch.equal(ours, right)
        w = operand(stored(SPECS[name], 128, dim), CHIP.ptx)
        assert same(found, pairs(CHIP, made[0], w, step))


@pytest.mark.parametrize("name", ["fp8 blocks", "groups of 128", "zero points"])
def test_a_layer_needs_a_kernel_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its result is the same, bit for bit. Experts take no vectors in another form than theirs:
    a search may have found another launch meanwhile.
    """
    config = V3.change(
        hidden_size=128, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, n_shared_experts=1,
    )  # fmt: skip
    block: Any = unit_gain(config, dtype="bf16", device=DEVICE.type).layers[-1]
    moe, x = block.mlp, draw(3, 128)
    for each in ("gate_proj", "up_proj", "down_proj"):
        setattr(moe.experts, each, stored(SPECS[name], 4, 128, 128))
        getattr(moe.shared_experts, each).matrix = stored(SPECS[name], 128, 128)
    chip, apart = counting(CHIP), counting(CHIP)
    y = DecodeBlock(block, chip).mixture(x, moe)
    torch.testing.assert_close(y, DecodeBlock(block, None).mixture(x, moe), atol=0.1, rtol=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBlock, "fixed", lambda *_: None)
        assert torch.equal(y, DecodeBlock(block, apart).mixture(x, moe))
    kernel = "pair_kernel" if name.startswith("fp8") else "fix_kernel"
    assert apart.names - chip.names == Counter({kernel: 1})
    assert not chip.names - apart.names
    wrong = Form(128, 64 if name != "zero points" else 32)
    monkeypatch.setattr(DecodeBlock, "fixed", lambda *_: unwritten(wrong, 3))
    assert torch.equal(y, DecodeBlock(block, counting(CHIP)).mixture(x, moe))


@pytest.mark.parametrize("processors", [4, 132])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (LinearLaunch, (32, 1408, 3648, 2, 4, 1, 128)),
        (LinearLaunch, (32, 2048, 3648, 2, 4, 1, 128)),
        (ExpertsLaunch, (8, 6, 64, 2048, 1408, 2, 8, 0, 128)),
        (ExpertsLaunch, (512, 6, 64, 2048, 1408, 2, 4, 1, 128)),
    ],
)
def test_a_search_begins_with_their_own_choices(
    kind: type[LinearLaunch] | type[ExpertsLaunch], sizes: tuple[int, ...], processors: int
) -> None:
    """They have as few rows as dot products, and outputs as tiles."""
    launch = kind.default(sizes, Chip(processors, 2**17, dependent_launch=processors > 4))
    parts = getattr(launch, "parts", 1)
    assert launch.narrow == (parts == 1)
    assert (parts > 1) == (sizes[1] == 2048 and processors > 4)  # cut into parts on a large chip
    for name in launch.choices.keys() - {"stages", "warps"}:
        assert getattr(launch, name) in launch.choices[name], name
