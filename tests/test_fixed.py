"""One token times 4 bits by whole numbers (r1/kernels/fixed.py), against fp64 products."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import compile_kernels as compile_tool
import pytest
import torch
from models import TINY_QWEN2, V3, unit_gain
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from r1 import Config
from r1.kernels.attention import AttentionLaunch, attention
from r1.kernels.block import DecodeBlock
from r1.kernels.chip import Chip
from r1.kernels.experts import experts
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.fixed import GROUP, LARGEST, Fixed, fits, fix
from r1.kernels.gated import gated
from r1.kernels.grouped import GroupedLaunch, grouped
from r1.kernels.linear import linear
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.router import RouterLaunch, route
from r1.kernels.step import begin_step_torch
from r1.kernels.tiles import operand
from r1.model.attend import UpProjection
from r1.model.layers import MLP, Linear
from r1.model.moe import Experts
from r1.model.router import Router
from r1.model.shapes import SHAPES
from r1.model.step import Step
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = dataclasses.replace(Chip.of(DEVICE), byte_products=True)
SPECS = {
    "groups of 128": Spec("int4", 1, 128),
    "groups of 32": Spec("int4", 1, 32, scale="bf16"),
    "zero points": Spec("int4", 1, 64, scale="fp16", zeros=True),
    "rows": Spec("int4", 1, 0),
}
EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(spec: Spec, *shape: int) -> Quantized:
    weight = torch.randn(shape) * shape[-1] ** -0.5 + 0.01
    return KINDS["int4"].of(weight, spec).to(DEVICE)


def vector(columns: int) -> Tensor:
    """bf16 (1, columns), with numbers far larger than the others in one group."""
    x = torch.randn(1, columns, device=DEVICE)
    x[:, 3::32] *= 200
    x[:, GROUP.value :] /= 200
    return x.bfloat16()


def error(x: Tensor) -> float:
    """How far a sum over a token's vector may be off, for weights of about 1 / sqrt(columns)."""
    return float(x.abs().max()) / LARGEST.value + 1e-6


@pytest.mark.parametrize("length", [32, 352, 1408, 2080])
@pytest.mark.parametrize("normed", [False, True])
def test_a_vector_is_kept_to_sixteen_bits(length: int, normed: bool) -> None:
    x, gain = torch.cat((vector(length), vector(length) * 1e-3)), None
    right = x.double()
    if normed:
        gain = torch.rand(length, device=DEVICE).bfloat16()
        right = right * (right.square().mean(1, keepdim=True) + EPS).rsqrt() * gain.double()
    found = fix(CHIP, x, gain, EPS)
    even_high, odd_high, even_low, odd_low = found.planes.view(torch.int8).long().unbind(1)
    even, odd = 256 * even_high + even_low, 256 * odd_high + odd_low
    whole = torch.stack((even, odd), 2).flatten(1)  # (2, length)
    scale, total = found.scales.unbind(2)
    assert torch.equal(total.double(), whole.unflatten(1, (-1, GROUP.value)).sum(2).double())
    each = scale.repeat_interleave(GROUP.value, 1).double()
    off = (whole * each - right).abs()
    assert (off <= 0.51 * each + 1e-6 * right.abs()).all()
    for start in range(0, length, GROUP.value):  # a group's largest number takes all bits
        group = slice(start, start + GROUP.value)
        assert (whole[:, group].abs().amax(1) == LARGEST.value).all()


def test_zeros_are_zeros() -> None:
    found = fix(CHIP, torch.zeros(1, 256, device=DEVICE, dtype=torch.bfloat16))
    assert not found.planes.any() and not found.scales.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """Elsewhere the logits of such a step are refused: here it must not become a number."""
    x = vector(256)
    x[0, 77] = bad
    assert not linear(CHIP, x, stored(SPECS["groups of 128"], 8, 256)).isfinite().any()


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("columns", [96, 352])
@pytest.mark.parametrize("normed", [False, True])
def test_linear(spec: Spec, columns: int, normed: bool) -> None:
    if spec.columns and columns % spec.columns:
        columns = -(-columns // spec.columns) * spec.columns
    weight, x = stored(spec, 9, columns), vector(columns)
    gain = torch.rand(columns, device=DEVICE).bfloat16() if normed else None
    v = x.double()
    if gain is not None:
        v = v * (v.square().mean(1, keepdim=True) + EPS).rsqrt() * gain.double()
    right = v @ weight.dense().double().T
    for launch in (None, LinearLaunch(1, 4, 32, 2)):
        y = linear(CHIP, x, weight, norm=gain, eps=EPS, dtype=torch.float32, launch=launch)
        torch.testing.assert_close(y.double(), right, atol=error(v), rtol=1e-5)


@pytest.mark.parametrize("spec", [SPECS["groups of 32"], SPECS["zero points"]])
@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_linear_of_a_few_tokens(spec: Spec, tokens: int) -> None:
    """Ragged: 9 rows in blocks of 4, 192 columns in blocks of 128, the last token by itself."""
    weight = stored(spec, 9, 192)
    x = torch.cat([vector(192) * (1 + row) for row in range(tokens)])
    gain = torch.rand(192, device=DEVICE).bfloat16()
    residual = torch.randn(tokens, 9, device=DEVICE).bfloat16()
    v = x.double()
    normed = v * (v.square().mean(1, keepdim=True) + EPS).rsqrt() * gain.double()
    for given, norm, old in ((v, None, None), (normed, gain, residual)):
        right = given @ weight.dense().double().T + (0 if old is None else old.double())
        for use in (None, LinearLaunch(2, 4, 128, 2)):
            y = linear(
                CHIP, x, weight, norm=norm, eps=EPS, residual=old, dtype=torch.float32, launch=use
            )
            off = (y.double() - right).abs() - 1e-5 * right.abs()
            assert (off.amax(1) <= given.abs().amax(1) / LARGEST.value + 1e-6).all()


def test_rows_of_a_joined_matrix() -> None:
    weight, x = stored(SPECS["groups of 32"], 40, 64), vector(64)
    whole = linear(CHIP, x, weight, dtype=torch.float32)
    _, part = join(stored(SPECS["groups of 32"], 8, 64), weight)
    assert torch.equal(linear(CHIP, x, part, dtype=torch.float32), whole)


def mlp_of(spec: Spec, dim: int, inner: int) -> MLP:
    mlp = MLP(dim, inner).requires_grad_(False).to(DEVICE)
    for name, layer in mlp.named_children():
        assert isinstance(layer, Linear)
        shape = (dim, inner) if name == "down_proj" else (inner, dim)
        layer.matrix = stored(spec, *shape)
    return mlp


def by_hand(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A feed-forward in fp64, whose inner values are rounded to bf16 as the kernels' are."""
    a = x @ gate.double().T
    inner = (a * torch.sigmoid(a) * (x @ up.double().T)).bfloat16().double()
    return inner @ down.double().T


@pytest.mark.parametrize("spec", [SPECS["groups of 32"], SPECS["zero points"]])
def test_gated(spec: Spec) -> None:
    mlp, x = mlp_of(spec, 192, 64), torch.randn(1, 192, device=DEVICE).bfloat16()
    gain = torch.rand(192, device=DEVICE).bfloat16()
    v = x.double() * (x.double().square().mean() + EPS).rsqrt() * gain.double()
    a, b = (v @ p.matrix.dense().double().T for p in (mlp.gate_proj, mlp.up_proj))
    right = a * torch.sigmoid(a) * b
    h = gated(CHIP, x, mlp, gain, EPS)
    # (Triton's interpreter cuts bf16 off, and does not round it.)
    torch.testing.assert_close(h.double(), right, atol=1e-4, rtol=2**-7)


@pytest.mark.parametrize(
    ("name", "tokens", "shared"), [("groups of 32", 3, 1), ("zero points", 1, 2)]
)
def test_experts(name: str, tokens: int, shared: int) -> None:
    """Shared experts of several widths; `zero points` has groups that fill an expert's rows.

    Some experts have no token, and one has all of them.
    """
    spec, dim, inner = SPECS[name], 128, 64
    c = V3.change(hidden_size=dim, moe_intermediate_size=inner, n_routed_experts=6, n_group=1)
    c = c.change(num_experts_per_tok=3, topk_group=1)
    routed = Experts(c).requires_grad_(False)
    for name, shape in (("gate", (inner, dim)), ("up", (inner, dim)), ("down", (dim, inner))):
        setattr(routed, f"{name}_proj", stored(spec, 6, *shape))
    more = mlp_of(spec, dim, shared * inner) if shared else None
    x = torch.randn(tokens, dim, device=DEVICE).bfloat16()
    indices = torch.tensor([[4, 0, 3], [4, 3, 5], [0, 4, 5]], device=DEVICE)
    indices, weights = indices[:tokens], torch.rand(tokens, 3, device=DEVICE)
    parts = (routed.gate_proj, routed.up_proj, routed.down_proj)
    right = x.double()
    for place in range(6):
        y = by_hand(x.double(), *(p.dense()[place] for p in parts))
        right = right + (weights * (indices == place)).sum(1, keepdim=True) * y
    if more is not None:
        layers = (more.gate_proj, more.up_proj, more.down_proj)
        right = right + by_hand(x.double(), *(layer.matrix.dense() for layer in layers))
    launches: list[ExpertsLaunch | None] = [None]
    if tokens > 1:  # few programs: the interpreter takes seconds for a hundred of them
        launches = [ExpertsLaunch(rows, 64, 64, 128, 32, 2) for rows in (1, 2, 4)]
    for launch in launches:
        y = experts(CHIP, x, indices, weights, routed, more, x, launch=launch)
        torch.testing.assert_close(y.double(), right, atol=2**-6, rtol=2**-7)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and whole numbers that are no place anywhere."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("tokens", "held"), [(1, 1), (2, 0), (2, 2)])
def test_choices_of_no_expert(tokens: int, held: int, poisoned: None) -> None:
    """Of two tokens' choices no expert here has more than `held`. The shared experts have both
    tokens nevertheless.
    """
    spec, dim, inner = SPECS["groups of 32"], 128, 64
    c = V3.change(hidden_size=dim, moe_intermediate_size=inner, n_routed_experts=6, n_group=1)
    c = c.change(num_experts_per_tok=3, topk_group=1)
    routed, more = Experts(c, range(3)).requires_grad_(False), mlp_of(spec, dim, inner)
    for name, shape in (("gate", (inner, dim)), ("up", (inner, dim)), ("down", (dim, inner))):
        setattr(routed, f"{name}_proj", stored(spec, 3, *shape))
    x = torch.randn(tokens, dim, device=DEVICE).bfloat16()
    indices = torch.full((tokens, 3), 3, device=DEVICE)
    indices[0, :held] = torch.tensor([1, 2])[:held]
    weights = torch.rand(tokens, 3, device=DEVICE)
    layers = (more.gate_proj, more.up_proj, more.down_proj)
    right = x.double() + by_hand(x.double(), *(layer.matrix.dense() for layer in layers))
    for place in range(held):
        parts = (routed.gate_proj, routed.up_proj, routed.down_proj)
        y = by_hand(x[:1].double(), *(p.dense()[place + 1] for p in parts))
        right[0] += (weights[0, place] * y)[0]
    launch = None if tokens == 1 else ExpertsLaunch(2, 64, 64, 128, 32, 2)
    y = experts(CHIP, x, indices, weights, routed, more, x, launch=launch)
    torch.testing.assert_close(y.double(), right, atol=2**-6, rtol=2**-7)


def test_where_it_is_used() -> None:
    x = torch.zeros(1, 64, device=DEVICE, dtype=torch.bfloat16)
    right = operand(stored(Spec("int4", 1, 32), 8, 64))
    assert fits(CHIP, x, 64, right, None)
    assert not fits(dataclasses.replace(CHIP, byte_products=False), x, 64, right)
    assert not fits(CHIP, x.float(), 64, right)  # fp32 has more bits
    assert not fits(CHIP, x, 64, operand(stored(Spec("int4", 1, 16), 8, 64)))  # small groups
    assert not fits(CHIP, x, 48, right)
    eight = KINDS["int8"].of(torch.randn(8, 64), Spec("int8", 1, 32)).to(DEVICE)
    assert not fits(CHIP, x, 64, right, operand(eight))


# ---------------------------- by the kernels that make the numbers
def unwritten(tokens: int, length: int) -> Fixed:
    """Memory in which what is not written shows."""
    made = Fixed.empty(torch.empty(0, device=DEVICE), tokens, length)
    made.planes.fill_(0x5A5A5A5A)
    made.scales.fill_(math.nan)
    return made


def check_fixed(found: Fixed, x: Tensor) -> None:
    """The same bits as `fix` makes of the stored numbers x (N, length)."""
    right = fix(CHIP, x)
    assert torch.equal(found.planes, right.planes) and torch.equal(found.scales, right.scales)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dim", [32, 352])
@pytest.mark.parametrize("experts", [12, 13])
def test_the_router_makes_its_vector(experts: int, dim: int, tokens: int) -> None:
    """More programs than groups of 32 columns, and fewer, the last one's only in part."""
    c = V3.change(hidden_size=dim, n_routed_experts=experts, n_group=1, topk_group=1)
    gate = Router(c).requires_grad_(False).to(DEVICE)
    gate.weight.normal_()
    gate.e_score_correction_bias.zero_()
    x = torch.cat([vector(dim) * (1 + row) for row in range(tokens)])
    gain = torch.rand(dim, device=DEVICE).bfloat16()
    for launch in (None, RouterLaunch(4, 128, 4)):
        found = unwritten(tokens, dim)
        made = route(CHIP, gate, x, gain, EPS, launch=launch, fixed=found)
        for ours, plain in zip(made, route(CHIP, gate, x, gain, EPS, launch=launch), strict=True):
            assert torch.equal(ours, plain)
        check_fixed(found, made[0])


@pytest.mark.parametrize("lengths", [[[1]], [[33], [1], [40]], [[5, 6], [39, 40]]], ids=str)
@pytest.mark.parametrize("value", [32, 96])
def test_the_attention_makes_its_vector(lengths: list[list[int]], value: int) -> None:
    """Programs of a part of a head's values, of all of them, and of less than a group."""
    heads, rank, rope, tokens = 3, 20, 6, sum(map(len, lengths))
    sizes = [(tokens, heads, rank), (tokens, heads, rope), (len(lengths), 40, rank + rope)]
    q_c, q_pe, cache = (torch.randn(each, device=DEVICE).bfloat16() for each in sizes)
    w_uv = torch.randn(heads, value, rank, device=DEVICE).bfloat16()
    given = (q_c, q_pe, cache, torch.tensor(lengths, device=DEVICE) - 1, w_uv, 0.2)
    few = AttentionLaunch(16, 16, 8, 4, 2, sum_rows=16, values=16, latents=16)
    for launch in (None, few, dataclasses.replace(few, values=32, sum_rows=32)):
        found = unwritten(tokens, heads * value)
        o = attention(CHIP, *given, launch, found)
        torch.testing.assert_close(o, attention(CHIP, *given, launch))
        check_fixed(found, o.flatten(1))


@pytest.mark.parametrize("size", [32, 96])
def test_grouped_attention_makes_its_vector(size: int) -> None:
    positions = torch.tensor([[0], [19]], device=DEVICE)
    keys, values = (torch.randn(2, 20, 2, size, device=DEVICE).bfloat16() for _ in range(2))
    q, found = torch.randn(2, 6, size, device=DEVICE).bfloat16(), unwritten(2, 6 * size)
    o = grouped(CHIP, q, (keys, values), positions, 0.3, GroupedLaunch(16, 2), found)
    check_fixed(found, o.flatten(1))


class Counting(Chip):
    """A chip that counts launches by the kernel's name."""

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.names[kernel.fn.__name__] += 1
        super().run(kernel, *arguments, **constants)

    @property
    def names(self) -> Counter[str]:
        counter: Counter[str] = self.__dict__.setdefault("counter", Counter())
        return counter


def counting(chip: Chip = CHIP) -> Counting:
    kept = {field.name: getattr(chip, field.name) for field in dataclasses.fields(Chip)}
    return Counting(**kept | {"tuned": {}, "asked": {}, "defaults": {}})


SMALL = {"hidden_size": 32, "num_attention_heads": 2}
BLOCKS = {
    "sparse": V3.change(
        **SMALL, q_lora_rank=32, v_head_dim=32, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1,
    ),
    "grouped": TINY_QWEN2.change(
        **SMALL, num_key_value_heads=1, head_dim=32, intermediate_size=32
    ),
    "narrow heads": TINY_QWEN2.change(
        **SMALL, num_key_value_heads=1, head_dim=16, intermediate_size=32
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "saved", "rows"),
    [("sparse", 2, 1), ("grouped", 1, 2), ("narrow heads", 0, 2)],
)
def test_a_layer_needs_fewer_kernels(
    name: str, saved: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its result is the same, bit for bit, as with a kernel of its own for each vector."""
    config: Config = BLOCKS[name]
    block: Any = unit_gain(config, dtype="bf16", device=DEVICE.type).layers[-1]
    for layer in block.modules():
        if isinstance(layer, Linear) and not isinstance(layer, UpProjection):
            layer.matrix = stored(SPECS["groups of 32"], *layer.matrix.shape)
    if name == "sparse":
        for each in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(block.mlp.experts, each)
            setattr(block.mlp.experts, each, stored(SPECS["groups of 32"], *old.shape))
    x = torch.randn(rows, 1, 32, device=DEVICE).bfloat16()
    attending: Any = config.grouped if name != "sparse" else config.attention
    frequency = torch.rand(attending.qk_rope_head_dim // 2, device=DEVICE)
    step = Step("decode", *begin_step_torch(torch.arange(rows, device=DEVICE), 1, frequency, 1.0),
                torch.arange(rows, device=DEVICE)[:, None])  # fmt: skip
    width = (2, 16) if name == "sparse" else (1, attending.head_dim)

    def run(chip: Chip | None) -> Tensor:
        made = torch.Generator(DEVICE).manual_seed(1)
        shapes = [(rows, 16, *width)] * 2
        if name == "sparse":
            shapes = [(rows, 16, config.attention.latent_dim)]
        cache = tuple(torch.randn(s, generator=made, device=DEVICE).bfloat16() for s in shapes)
        return DecodeBlock(block, chip)(x, step, cache)

    chip, apart = counting(), counting()
    y = run(chip)
    torch.testing.assert_close(y, run(None), atol=0.1, rtol=0.02)
    monkeypatch.setattr(DecodeBlock, "fixed", lambda *_: None)
    assert torch.equal(y, run(apart))
    assert apart.names - chip.names == Counter({"fix_kernel": saved}) - Counter()
    assert not chip.names - apart.names


@pytest.mark.parametrize(("name", "dense", "sparse"), [("moonlight-16b", 3, 2), ("r1", 4, 3)])
@pytest.mark.parametrize("batch", [1, 8])
def test_kernels_that_only_fix(name: str, dense: int, sparse: int, batch: int) -> None:
    """Of a dense layer and a sparse one: x is normed first, or one of inner values. Of several
    tokens heads' outputs have one, too.
    """
    target = compile_tool.TARGETS["sm_90"]
    names = Counter(
        each.name for each in compile_tool.launches(SHAPES[name], batch, target, "int4")
    )
    assert names["fix_kernel"] == dense + sparse + (2 if batch > 1 else 0)
