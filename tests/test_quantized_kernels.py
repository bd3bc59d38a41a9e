"""The kernels on quantized weights, each against its torch twin: under the interpreter on a CPU.

Holds r1/kernels/tiles.py to account.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch
from models import V3
from tolerances import atol
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from r1.kernels.block import DecodeBlock
from r1.kernels.chip import Chip
from r1.kernels.experts import ExpertsLaunch, experts, experts_torch
from r1.kernels.linear import LinearLaunch, linear, linear_torch
from r1.model.layers import MLP
from r1.model.moe import Experts, MoE
from r1.model.transformer import Block
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = Chip.of(DEVICE)
SPECS = {
    "fp8 blocks": Spec("fp8", 16, 32),
    "fp8 rows": Spec("fp8", 1, 0),
    "fp8 whole": Spec("fp8", 0, 0),
    "int8 rows": Spec("int8", 1, 0),
    "int8 blocks": Spec("int8", 16, 16, zeros=True),
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


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_fp8_number(tokens: int, e4m3: bool) -> None:
    """With the chip's own instruction, or by bits: x picks one column after the other."""
    if e4m3 and not (CHIP.e4m3 or DEVICE.type == "cpu"):
        pytest.skip("this GPU has no such instruction: it needs an NVIDIA GPU from sm_89 on")
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    spec = Spec("fp8", 0, 0)
    packed = {"weight": codes.view(torch.float8_e4m3fn).view(16, 16)}
    packed["weight_scale_inv"] = torch.ones(1, 1)
    weight = KINDS["fp8"](spec, (16, 16), torch.float32, packed).to(DEVICE)
    chip = dataclasses.replace(CHIP, e4m3=e4m3)
    launch = LinearLaunch(1 if tokens == 1 else 16, 2 if tokens == 1 else 16, 16, 4)
    right = packed["weight"].float()
    for start in range(0, 16, tokens):
        x = torch.eye(16, device=DEVICE)[start : start + tokens]
        ours = linear(chip, x, weight, launch=launch)
        assert torch.equal(ours.cpu(), right.T[start : start + tokens])


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize(("tokens", "apart"), [(1, False), (6, False), (6, True)])
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
    one, several = ExpertsLaunch(1, 2, 32, 4, 16), ExpertsLaunch(16, 16, 16, 16, 16, apart=apart)
    launch = one if tokens == 1 else several
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
