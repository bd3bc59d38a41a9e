"""The kernels on quantized weights, each against its torch twin: under the interpreter on a CPU.

Holds r1/kernels/tiles.py to account.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from models import V3
from tolerances import atol
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from r1 import build
from r1.kernels.block import DecodeBlock
from r1.kernels.chip import Chip
from r1.kernels.experts import experts, experts_torch
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.gated import gated, gated_torch
from r1.kernels.linear import linear, linear_torch, tile_kernel
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.linear_parts import parts_kernel
from r1.model.layers import MLP
from r1.model.moe import Experts, MoE
from r1.model.transformer import Block
from r1.storage.dense import Dense
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.quantized import Quantized
from r1.storage.rows import Rows
from r1.storage.spec import Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = Chip.of(DEVICE)
SPECS = {
    "fp8 blocks": Spec("fp8", 16, 32),
    "fp8 rows": Spec("fp8", 1, 0),
    "fp8 whole": Spec("fp8", 0, 0),
    "int8 rows": Spec("int8", 1, 0),
    "int8 blocks": Spec("int8", 16, 16, zeros=True),
    "int8 groups": Spec("int8", 1, 32),
    "int4 groups": Spec("int4", 1, 32, scale="bf16"),
    "int4 zeros": Spec("int4", 1, 16, scale="fp16", zeros=True),
    "int4 narrow": Spec("int4", 1, 8),
    "int4 rows": Spec("int4", 1, 0),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(spec: Spec, *shape: int, dtype: torch.dtype = torch.float32) -> Quantized:
    weight = torch.randn(shape) * shape[-1] ** -0.5 + 0.1
    return KINDS[spec.kind].of(weight.to(dtype), spec).to(DEVICE)


def close(ours: Tensor, twin: Tensor) -> None:
    torch.testing.assert_close(ours, twin, atol=atol("algebra fp32"), rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("tokens", [1, 5])
def test_linear(tokens: int, spec: Spec) -> None:
    """Ragged edges: 37 rows, and 72 columns in tiles of 32 and of 64."""
    weight, x = stored(spec, 37, 72), torch.randn(tokens, 72, device=DEVICE)
    right = linear_torch(x, weight)
    for inputs in (32, 64):
        launch = LinearLaunch(1 if tokens == 1 else 16, 2 if tokens == 1 else 16, inputs, 4)
        close(linear(CHIP, x, weight, launch=launch), right)
    close(linear(CHIP, x, weight), right)


FEW = SPECS | {"fp8 128": Spec("fp8", 128, 128), "int8 zeros": Spec("int8", 1, 0, zeros=True)}


@pytest.mark.parametrize("spec", FEW.values(), ids=list(FEW))
@pytest.mark.parametrize(("tokens", "rows"), [(3, 2), (8, 4)])
def test_linear_of_a_few_tokens(tokens: int, rows: int, spec: Spec) -> None:
    """By dot products. Ragged: 37 rows in blocks of 16, 136 columns in tiles of 64, 3 tokens in
    pairs. x's rows are further apart than they are long.
    """
    weight, x = stored(spec, 37, 136), torch.randn(tokens, 140, device=DEVICE)[:, :136]
    gain, residual = torch.rand(136, device=DEVICE), torch.randn(tokens, 37, device=DEVICE)
    right = linear_torch(x, weight, norm=gain, eps=1e-6, residual=residual)
    launch = LinearLaunch(rows, 16, 64, 2)
    y = linear(CHIP, x, weight, norm=gain, eps=1e-6, residual=residual, launch=launch)
    close(y, right)
    close(linear(CHIP, x, weight), linear_torch(x, weight))


@pytest.mark.parametrize("spec", [None, *FEW.values()], ids=["dense", *FEW])
@pytest.mark.parametrize(("tokens", "parts", "step"), [(5, 4, 128), (20, 4, 64), (20, 8, 16)])
def test_linear_in_parts(
    tokens: int, parts: int, step: int, spec: Spec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 rows in blocks of 16, tokens in tiles of 16. A part of the columns has one step, two or
    four. Where it would begin within a block, one warp takes all columns.
    """
    weight = (
        Dense(torch.randn(37, 512, device=DEVICE) / 9) if spec is None else stored(spec, 37, 512)
    )
    weight, kernels, run = weight.requires_grad_(False), [], Chip.run

    def noted(chip: Chip, kernel: Any, *arguments: Any, **constants: Any) -> None:
        kernels.append((kernel, constants["warps"]))
        run(chip, kernel, *arguments, **constants)

    x = torch.randn(tokens, 520, device=DEVICE)[:, :512]
    gain, residual = torch.rand(512, device=DEVICE), torch.randn(tokens, 37, device=DEVICE)
    given: dict[str, Any] = {"norm": gain, "eps": 1e-6, "residual": residual}
    monkeypatch.setattr(Chip, "run", noted)
    y = linear(CHIP, x, weight, **given, launch=LinearLaunch(16, 16, step, parts, parts=parts))
    close(y, linear_torch(x, weight, **given))
    within = spec is not None and spec.columns > 512 // parts
    assert kernels[-1] == ((tile_kernel, 4) if within else (parts_kernel, parts))


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("tokens", [1, 5])
def test_gated(tokens: int, spec: Spec) -> None:
    """Gate and up each by itself, and joined: 20 inner values."""
    x, gain = torch.randn(tokens, 72, device=DEVICE), torch.rand(72, device=DEVICE)
    mlp = MLP(72, 20).requires_grad_(False)
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.matrix = stored(spec, 20, 72)
    for joined in (False, True):
        if joined:
            build.join_matrices(mlp)
        right = gated_torch(x, mlp, gain, 1e-6)
        close(gated(CHIP, x, mlp, gain, 1e-6), right)
        launch = LinearLaunch(1 if tokens == 1 else 16, 8 if tokens == 1 else 16, 32, 4)
        close(gated(CHIP, x, mlp, gain, 1e-6, launch), right)


@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("columns", [16, 18, 17])
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "int4 zeros"])
def test_every_number(kind: str, columns: int, tokens: int, ptx: bool) -> None:
    """By the chip's own instructions, or by plain operations; in words of 4, 2 and 1 bytes: x picks
    one column after the other.
    """
    if ptx and not CHIP.ptx:
        pytest.skip("no such instructions here: they need an NVIDIA GPU from sm_89 on")
    name, zeros = kind.split()[0], kind.endswith("zeros")
    columns *= 2 if name == "int4" else 1  # so many bytes are a row
    weight = KINDS[name].empty(Spec(name, 1, 0, zeros=zeros), (16, columns), torch.float32)
    codes = torch.randperm(16 * columns) % 256
    if name == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN
    weight.q.view(torch.uint8).flatten().copy_(codes[: weight.q.numel()])
    weight.scale.fill_(1)
    if weight.zero is not None:
        weight.zero.fill_(7)
    weight.to(DEVICE)
    chip = dataclasses.replace(CHIP, ptx=ptx)
    launch = LinearLaunch(tokens, 16, 16, 4)
    right = weight.dense().cpu()
    for start in range(0, columns - tokens + 1, tokens):
        x = torch.eye(columns, device=DEVICE)[start : start + tokens]
        ours = linear(chip, x, weight, launch=launch)
        assert torch.equal(ours.cpu(), right.T[start : start + tokens])


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize(("tokens", "apart"), [(1, False), (6, True)])
def test_experts(tokens: int, apart: bool, spec: Spec) -> None:
    """Routed and shared experts, gate and up joined where blocks allow, all in one format."""
    config = V3.change(hidden_size=48, moe_intermediate_size=32, n_shared_experts=2)
    routed, shared = Experts(config), MLP(48, 64)
    routed.gate_proj, routed.up_proj = join(stored(spec, 8, 32, 48), stored(spec, 8, 32, 48))
    routed.down_proj, shared.down_proj.matrix = stored(spec, 8, 48, 32), stored(spec, 48, 64)
    shared.gate_proj.matrix, shared.up_proj.matrix = (stored(spec, 64, 48) for _ in range(2))
    x = torch.randn(tokens, 48, device=DEVICE)
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)]).to(DEVICE)
    weights = torch.rand(tokens, 3, device=DEVICE)
    one, several = ExpertsLaunch(1, 16, 32, 32, 16), ExpertsLaunch(16, 32, 32, 32, 32, apart=apart)
    launch = one if tokens == 1 else several
    ours = experts(CHIP, x, indices, weights, routed, shared, x, launch=launch)
    close(ours, experts_torch(x, indices, weights, routed, shared, x))
    before = [each.clone() for each in (*routed.parameters(), *routed.buffers())]
    Rows(routed).place(torch.zeros(8, Rows(routed).width, dtype=torch.uint8, device=DEVICE))
    for each, numbers in zip((*routed.parameters(), *routed.buffers()), before, strict=True):
        each.data.copy_(numbers)
    packed = next(iter(routed.down_proj.stored().values()))
    assert not packed.is_contiguous(), "an expert is a row of bytes, as in slots"
    again = experts(CHIP, x, indices, weights, routed, shared, x, launch=launch)
    assert torch.equal(again, ours)


@pytest.mark.parametrize("other", [SPECS["int8 groups"], Spec("int8", 1, 16), None], ids=str)
def test_a_shared_expert_stored_in_another_way(other: Spec | None) -> None:
    """One token's down_proj reads it beside the chosen ones where it is stored as those are."""
    spec = SPECS["int8 groups"]
    config = V3.change(hidden_size=48, moe_intermediate_size=64, n_shared_experts=1)
    routed, shared = Experts(config), MLP(48, 64)
    routed.gate_proj, routed.up_proj = (stored(spec, 8, 64, 48) for _ in range(2))
    routed.down_proj = stored(spec, 8, 48, 64)
    for layer in (shared.gate_proj, shared.up_proj, shared.down_proj):
        plain = torch.randn(layer.matrix.shape, device=DEVICE) * 0.2
        layer.matrix = stored(other, *plain.shape) if other else Dense(plain)
    x = torch.randn(1, 48, device=DEVICE)
    indices = torch.tensor([[6, 0, 3]], device=DEVICE)
    weights = torch.rand(1, 3, device=DEVICE)
    ours = experts(CHIP, x, indices, weights, routed, shared, x)
    close(ours, experts_torch(x, indices, weights, routed, shared, x))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and whole numbers that are no place anywhere."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("spec", FEW.values(), ids=list(FEW))
def test_experts_of_a_few_tokens(spec: Spec, poisoned: None) -> None:
    """By dot products. Expert 5 has all tokens, expert 0 none. 44 outputs in blocks of 32, two
    shared experts where blocks allow. Of 4 tokens the last half choose no expert here.
    """
    tokens, more = 4, 2 if max(spec.rows, spec.columns) <= 32 else 1
    config = V3.change(hidden_size=44, moe_intermediate_size=32, n_shared_experts=more)
    routed, shared = Experts(config), MLP(44, more * 32)
    routed.gate_proj, routed.up_proj = (stored(spec, 8, 32, 44) for _ in range(2))
    routed.down_proj, shared.down_proj.matrix = stored(spec, 8, 44, 32), stored(spec, 44, more * 32)
    shared.gate_proj.matrix, shared.up_proj.matrix = (stored(spec, more * 32, 44) for _ in "gu")
    x = torch.randn(tokens, 44, device=DEVICE)
    others = torch.tensor([1, 2, 3, 4, 6, 7])
    indices = torch.stack([others[torch.randperm(6)[:3]] for _ in range(tokens)]).to(DEVICE)
    indices[:, 1] = 5
    weights = torch.rand(tokens, 3, device=DEVICE)
    indices[tokens // 2 :], routed.partial = 8, True
    launch = ExpertsLaunch(1, 32, 32, 32, 16, 2)
    ours = experts(CHIP, x, indices, weights, routed, shared, x, launch=launch)
    close(ours, experts_torch(x, indices, weights, routed, shared, x))


def test_shared_experts_begin_where_a_block_does() -> None:
    """Two shared experts of 24 are one matrix of 48; a block of 16 would lie in both."""
    config = V3.change(moe_intermediate_size=24, n_shared_experts=2)
    block = Block(config, 1)
    assert DecodeBlock.why_not(block) is None
    moe = cast(MoE, block.mlp)
    assert moe.shared_experts
    moe.shared_experts.gate_proj.matrix = stored(SPECS["int8 blocks"], 48, 32)
    assert "2 shared experts of 24" in (DecodeBlock.why_not(block) or "")
