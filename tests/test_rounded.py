"""Products of FP8 weights with inputs of FP8 (r1/kernels/rounded.py), against fp64 products of the
same rounded inputs.

Run as in test_narrow.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import bench_kernels
import kernel_cases
import pytest
import torch
from models import V3
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

import test_narrow
from test_activations import BLOCKS, CONFIG, ROWS, counted, experts_by_definition, packed, run
from test_narrow import CHIP, DEVICE, EPS, crowded, draw, stored

from r1.kernels import prompt, prompt_block
from r1.kernels.block import DecodeBlock
from r1.kernels.chip import Chip
from r1.kernels.experts import experts
from r1.kernels.experts_dispatch import dispatch
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.gated import gated, gated_torch
from r1.kernels.linear import linear, linear_torch
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.prompt_block import PromptBlock, fused
from r1.kernels.rounded import round_input, takes_one_number
from r1.model.cache import Cache
from r1.model.dispatch import STRATEGIES
from r1.model.layers import MLP, Linear
from r1.model.moe import Experts
from r1.model.rounded import Rounded
from r1.storage.activations import FROM_TOKENS, as_fp8, rounded
from r1.storage.spec import Spec
from r1.switches.strategies import EXPERTS

pytestmark = test_narrow.ABLE
BF16, CPU = torch.bfloat16, torch.device("cpu")
PLAIN = Chip.of(DEVICE)
"""The interpreter has none of the instructions that unpack FP8 on a chip with FP8 products."""
H100 = Chip(132, 227 * 1024, True, ptx=True, byte_products=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Watched(Chip):
    """It remembers the names of the kernels that it runs."""

    ran: set[str]

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.ran.add(kernel.fn.__name__)
        super().run(kernel, *arguments, **constants)


def watched(chip: Chip = CHIP) -> Watched:
    made = Watched(**{field.name: getattr(chip, field.name) for field in dataclasses.fields(chip)})
    object.__setattr__(made, "ran", set())
    return made


def values(x: Tensor) -> Tensor:
    """fp64, of what stays of x."""
    return rounded(x.float()).double()


def check_sums(ours: Tensor, x: Tensor, dense: Tensor) -> None:
    """`ours` (N, out) is x (N, in), rounded, times `dense` (out, in).

    Hopper's matrix units add up FP8 products with some 14 bits (DeepSeek-V3's report, section
    3.5.2), each 128 columns by themselves: a sum is off by a part of what all its products are
    together.
    """
    least = 1e-5 if DEVICE.type == "cpu" else 2.0**-11
    products = values(x).abs() @ dense.abs().T
    off = (ours.double() - values(x) @ dense.T).abs()
    assert bool((off <= 1e-5 + least * products).all()), float((off / products).max())


def test_inputs_are_the_twins() -> None:
    """To the bit, where division is exact: on a CPU; and so does a graph round them. A row has a
    program after the first.
    """
    x = draw(3, 1400)[:, :1152] * torch.exp(3 * torch.randn(3, 1152, device=DEVICE)).bfloat16()
    x[1, :128], x[2, 128:256] = 0.0, 1e-37
    made = round_input(CHIP, x)
    found = made.planes.double() * made.scales.double().repeat_interleave(128, 1)
    assert not found[1, :128].any() and not found[2, 128:256].any()
    if DEVICE.type == "cpu":
        assert torch.equal(found.float(), rounded(x.float()))
        bad = x.clone()
        bad[0, 7], bad[1, 300] = float("nan"), float("inf")
        for given in (x, bad):
            right, fine = round_input(CHIP, given), ~rounded(given).isnan()
            planes, scales = (part.flatten(1).float() for part in as_fp8(given))
            assert torch.equal(planes[fine], right.planes.float()[fine])
            finite = fine[:, ::128]
            assert torch.equal(scales[finite], right.scales[finite])
            assert not bool(scales[~finite].isfinite().any())
    assert float(((found - values(x)).abs() > 1e-6 * x.double().abs()).double().mean()) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """In its own token alone; the inner values of experts likewise."""
    x = draw(2, 256)
    x[1, 3] = bad
    y = linear(CHIP, x, stored(BLOCKS, 32, 256), round_x=True)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())
    routed = Experts(V3.change(hidden_size=256, moe_intermediate_size=128))
    routed.gate_proj, routed.up_proj = (stored(BLOCKS, 8, 128, 256) for _ in range(2))
    routed.down_proj = stored(BLOCKS, 8, 256, 128)
    indices = torch.tensor([[0, 1, 2], [0, 1, 2]], device=DEVICE)
    weights = torch.rand(2, 3, device=DEVICE)
    y = experts(CHIP, x, indices, weights, routed, round_x=True)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())


@pytest.mark.parametrize("spec", [BLOCKS, ROWS], ids=["blocks", "rows"])
@pytest.mark.parametrize(("tokens", "rows", "outputs"), [(70, 64, 256), (9, 128, 64)])
def test_linear(tokens: int, rows: int, outputs: int, spec: Spec) -> None:
    """200 rows of W; x has a stride."""
    weight, x = stored(spec, 200, 384), draw(tokens, 500)[:, :384]
    gain, residual = draw(384) + 1, draw(tokens, 200)
    launch = LinearLaunch(rows, outputs, 128, 4, 2, narrow=True)
    dense = weight.dense(torch.float32).double()
    ours = linear(CHIP, x, weight, dtype=torch.float32, launch=launch, round_x=True)
    check_sums(ours, x, dense)
    # A compiled prompt gives the rounded x alone, and a search may launch it in any way.
    fixed, none = round_input(CHIP, x), torch.full_like(x, float("nan"))
    other = dataclasses.replace(launch, narrow=False)
    again = linear(CHIP, none, weight, dtype=torch.float32, launch=other, round_x=True, fixed=fixed)
    assert torch.equal(again, ours)
    assert float((values(x) @ dense.T - x.double() @ dense.T).abs().max()) > 1e-2
    normed = F.rms_norm(x.float(), (384,), gain.float(), EPS)
    right = residual.double() + values(normed) @ dense.T
    ours = linear(
        CHIP, x, weight, norm=gain, eps=EPS, residual=residual, dtype=torch.float32, launch=launch,
        round_x=True,
    )  # fmt: skip
    # The norm's factor may round a number to its other neighbour.
    assert float((ours - right).abs().max()) < 0.05 and float((ours - right).abs().mean()) < 1e-3


@pytest.mark.parametrize(("spec", "partial"), [(BLOCKS, True), (ROWS, False)], ids=str)
def test_experts(spec: Spec, partial: bool) -> None:
    """Expert 5 has all 70 tokens, two tiles, expert 0 none, and of `partial` the last tokens have
    none at all. Two shared experts.
    """
    routed, shared, x, weights, indices = crowded(spec, 70)
    if partial:
        indices[60:], routed.partial = 8, True
    launch = ExpertsLaunch(64, 128, 128, 256, 128, 4, 2, apart=True, narrow=True)
    ours = experts(CHIP, x, indices, weights, routed, shared, x, launch=launch, round_x=True)
    other = dataclasses.replace(launch, narrow=False)
    again = experts(CHIP, x, indices, weights, routed, shared, x, launch=other, round_x=True)
    assert torch.equal(again, ours)
    right = x.double() + experts_by_definition(x, indices, weights, routed)
    gate, up, down = (
        layer.matrix.dense(torch.float32).double()
        for layer in (shared.gate_proj, shared.up_proj, shared.down_proj)
    )
    g = values(x) @ gate.T
    right += values(g * g.sigmoid() * (values(x) @ up.T)) @ down.T
    gap = (ours.double() - right).abs() / right.abs().max()
    assert float(gap.max()) < 0.01 and float(gap.mean()) < 1e-3


@pytest.mark.parametrize(
    ("spec", "columns", "dtype"),
    [
        (BLOCKS, 320, torch.bfloat16),  # no whole groups
        (BLOCKS, 256, torch.float32),
        (BLOCKS, 256, torch.bfloat16),  # a chip without FP8 products
        (Spec("int4", 1, 64), 256, torch.bfloat16),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_rounded_before(
    spec: Spec, columns: int, dtype: torch.dtype
) -> None:
    """But for int4, whose inputs are left as they are."""
    weight, x = stored(spec, 48, columns), draw(70, columns).to(dtype)
    able = spec == BLOCKS and columns == 256 and dtype == torch.bfloat16
    assert takes_one_number(CHIP.ptx, x, weight) is able
    seen = watched(dataclasses.replace(PLAIN, ptx=False))
    taken = x if spec.kind == "int4" else rounded(x)
    for tokens in (1, 70):  # directly, and by a dense matrix
        ours = prompt.multiply(seen, weight, x[:tokens], round_x=True)
        right = taken[:tokens].double() @ weight.dense(torch.float32).double().T
        torch.testing.assert_close(ours.double(), right, atol=3e-2, rtol=1e-2)
    gain = torch.ones(columns, dtype=dtype, device=DEVICE)
    ours = linear(seen, x, weight, norm=gain, eps=EPS, round_x=True)
    twin = linear_torch(x, weight, norm=gain, eps=EPS, round_x=spec.kind == "fp8")
    # (The norm in bf16, which the twin has, rounds some numbers to their other neighbours.)
    assert float((ours - twin).abs().float().mean()) < 3e-2
    assert "rounded_kernel" not in seen.ran


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("able", [True, False])
def test_prompts_experts(tokens: int, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy `triton`, as a prompt calls it; also on a chip that has no FP8 products."""
    seen = watched(CHIP if able else dataclasses.replace(PLAIN, ptx=False))
    monkeypatch.setattr(Chip, "of", lambda _: seen)
    routed = Experts(V3.change(hidden_size=256, moe_intermediate_size=128))
    routed.gate_proj, routed.up_proj = (stored(BLOCKS, 8, 128, 256) for _ in range(2))
    routed.down_proj = stored(BLOCKS, 8, 256, 128)
    x, weights = draw(tokens, 256), torch.rand(tokens, 3, device=DEVICE)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)]).to(DEVICE)
    strategy = EXPERTS["triton"]
    monkeypatch.setattr(strategy, "dispatch", dispatch, raising=False)
    ours = Rounded(strategy, 1)(routed, x, indices, weights)
    right = experts_by_definition(x, indices, weights, routed)
    gap = (ours.double() - right).abs() / right.abs().max()
    assert float(gap.max()) < 0.03 and float(gap.mean()) < 5e-3
    assert ({"up_rounded_kernel", "down_rounded_kernel"} <= seen.ran) is able


def test_the_first_half_of_a_feed_forward() -> None:
    mlp = MLP(256, 128)
    mlp.gate_proj.matrix, mlp.up_proj.matrix = (stored(BLOCKS, 128, 256) for _ in range(2))
    x, gain, seen = draw(65, 256), draw(256) + 1, watched()
    ours = gated(seen, x, mlp, gain, EPS, round_x=True)
    twin = gated_torch(x, mlp, gain, EPS, round_x=True)
    # As above: a number in its other neighbour is off by a 16th.
    assert float((ours - twin).abs().float().mean() / twin.abs().float().mean()) < 0.05
    assert "rounded_kernel" in seen.ran


@pytest.mark.usefixtures("compiler")
def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels=triton prompts take these kernels, compiled or not, and steps of so many tokens
    (here 4). A compiled prompt's graph rounds x: no kernel does it alone.
    """
    seen = watched()
    monkeypatch.setitem(FROM_TOKENS, "decode", 4)
    monkeypatch.setattr(Chip, "of", lambda _: seen)
    made, kernels = packed(DEVICE.type), {"rounded_kernel", "up_rounded_kernel"}
    switches = {"kernels": "triton", "attention": "triton", "moe": "triton"}
    fused = run(made, quant_activations="fp8", prefill_moe="triton", **switches)
    prompts = [[5, 9, 20, 7], [11, 3]]
    ours = fused.prefill(prompts, fused.cache(2, 16))
    assert kernels | {"round_kernel"} <= seen.ran and "pair_kernel" not in seen.ran
    seen.ran.clear()
    compiled = run(made, quant_activations="fp8", prefill_moe="triton", compile=True, **switches)
    again = compiled.prefill(prompts, compiled.cache(2, 16))
    assert torch.equal(again, ours) or DEVICE.type != "cpu"
    assert float((again - ours).abs().mean()) < 0.1
    assert kernels <= seen.ran and "round_kernel" not in seen.ran
    seen.ran.clear()
    tokens = torch.arange(4, device=DEVICE)[:, None]
    steps = fused.decode(tokens, fused.cache(4, 16))
    assert kernels <= seen.ran and "pair_kernel" not in seen.ran
    twin = run(made, quant_activations="fp8")
    right = twin.prefill(prompts, twin.cache(2, 16))
    assert float((ours - right).abs().mean()) < 0.1 < float(right.std())
    right = twin.decode(tokens, twin.cache(4, 16))
    assert float((steps - right).abs().mean()) < 0.1 < float(right.std())


def test_a_prompts_sparse_layer_is_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared experts have no kernels of their own, and the residual is added with the slots."""
    monkeypatch.setattr(Chip, "of", lambda _: CHIP)
    ran: list[str] = []
    launch = Chip.run

    def keep(chip: Chip, kernel: Any, *arguments: Any, **constants: Any) -> None:
        ran.append(kernel.fn.__name__)
        launch(chip, kernel, *arguments, **constants)

    monkeypatch.setattr(Chip, "run", keep)
    # The interpreter cuts bf16 numbers where others round: attention and norm are the model's own.
    monkeypatch.setattr(
        prompt_block, "attention", lambda layer, *given: given[3] + layer(*given[:3])
    )
    own: Any = lambda norm, x: (norm(x), as_fp8(norm(x)))  # noqa: E731
    monkeypatch.setattr(prompt_block, "norm_and_round", own)
    made = packed(DEVICE.type)
    runner = run(made, quant_activations="fp8", prefill_moe="triton", kernels="triton")
    way, block = runner.ways["prefill"], cast(Any, made.layers[-1])
    x = draw(7, CONFIG.hidden_size)[None]
    step = made.step("prefill", torch.arange(7, device=DEVICE)[None], 0)
    one: Any = way.block(block)
    ours = one(x, step, None)
    projections = ran.count("rounded_kernel")
    assert ran.count("add_kernel") == 1
    ran.clear()
    monkeypatch.setattr(way, "fused", lambda block: block)
    two: Any = way.block(block)
    right = two(x, step, None)
    assert ran.count("rounded_kernel") > projections > 0
    # The shared experts' outputs are rounded each, and the sums are rounded less often.
    assert float((ours - right).abs().max()) < 0.05 < float((right - x).std())


def test_other_layers_stay_as_they_are() -> None:
    """A dense layer; a strategy without kernels; shared experts that are stored otherwise; a layer
    that devices share, who could cut it so that not all of them have whole experts.
    """
    runner = run(packed(), quant_activations="fp8", prefill_moe="triton", kernels="triton")
    dense, sparse = runner.model.layers
    moe: Any = sparse.mlp
    assert isinstance(fused(CHIP, sparse), PromptBlock) and fused(CHIP, dense) is dense
    assert fused(dataclasses.replace(CHIP, ptx=False), sparse) is sparse
    stored_so = moe.shared_experts.down_proj.matrix
    moe.shared_experts.down_proj.matrix = Linear(*reversed(stored_so.shape)).matrix
    assert fused(CHIP, sparse) is sparse
    moe.shared_experts.down_proj.matrix = stored_so
    for name in ("sum_heads", "sum_inner"):
        setattr(sparse, name, lambda y: y)
        assert fused(CHIP, sparse) is sparse
        delattr(sparse, name)
    assert isinstance(fused(CHIP, sparse), PromptBlock)
    moe.dispatch["prefill"] = STRATEGIES[0]
    assert fused(CHIP, sparse) is sparse


@pytest.mark.parametrize("tokens", [63, 64])
def test_a_fused_block_rounds_from_64_tokens_on(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels' twins: q with kv_a, o_proj, and in a dense layer gate with up, and down; in a
    sparse one x and inner values of the routed experts, and both of the shared ones.
    """
    runner = run(packed(), attention="naive", prefill_attention="naive")
    step = runner.next_step(runner.cache(tokens, 16), 1)
    shapes, cache = counted(monkeypatch), Cache([(32,)], tokens, 16, 1, device=CPU, dtype=BF16)
    x = torch.randn(tokens, 1, CONFIG.hidden_size).to(BF16)
    for block, products in zip(runner.model.layers, (4, 6), strict=True):
        shapes.clear()
        DecodeBlock(block, None, 64)(x, step, cache.layers[0])
        assert len(shapes) == (products if tokens == 64 else 0)


def test_launches() -> None:
    """The search begins with what it can choose; prompts have the largest tiles that fit."""
    for kind, sizes in (
        (LinearLaunch, (4096, 2048, 3648, 2, 8, 0, 128, 1)),
        (LinearLaunch, (64, 2048, 3648, 2, 8, 0, 128, 1)),
        (ExpertsLaunch, (4096, 6, 64, 2048, 1408, 2, 8, 0, 128, 1)),
        (ExpertsLaunch, (64, 6, 64, 2048, 1408, 2, 8, 0, 128, 1)),
    ):
        launch: Any = kind.default(sizes, H100)
        assert launch.narrow
        for name in launch.choices.keys() - {"stages", "warps"}:
            assert getattr(launch, name) in launch.choices[name], name
    wide = ExpertsLaunch(128, 128, 128, 256, 128, 8, 4, apart=True, narrow=True)
    assert ExpertsLaunch.default((4096, 6, 64, 2048, 1408, 2, 8, 0, 128, 1), H100) == wide


@pytest.mark.parametrize("kernel", ["qkv_a", "dense_up", "experts"])
def test_what_is_timed_is_right(kernel: str) -> None:
    """tools/measure/bench_kernels.py --quant fp8 --quant-activations fp8."""
    with torch.device(DEVICE), torch.inference_mode():
        place = kernel_cases.Place(watched(), 1, "fp8", True)
        (make,) = bench_kernels.makers(place, CONFIG, 3, [20], [kernel])
        case = make()
        assert bench_kernels.off(case, None) < bench_kernels.MOST_OFF
        assert case.default.narrow
        assert {"rounded_kernel", "up_rounded_kernel"} & place.chip.ran


def test_a_tool_rounds_inputs_of_fp8_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--quant-activations", "fp8", "--quant", "int4"]) == 2
    assert "add --quant fp8" in capsys.readouterr().err
