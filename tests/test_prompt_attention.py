"""A prompt's latent attention without copies (r1/kernels/prompt_attention.py) is the model's own.

Holds to account: r1/kernels/prompt_attention.py.

Run as in test_kernels.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from models import TINY_QWEN2, V3, unit_gain
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

import test_narrow
from test_activations import BLOCKS
from test_kernels import CHIP, DEVICE, DTYPES, close, draw, matrix
from test_narrow import stored
from test_rounded import watched

from r1.kernels import prompt
from r1.kernels.chip import Chip
from r1.kernels.prompt_attention import attention, finish, heads
from r1.model.attend import STRATEGIES, UpProjection
from r1.model.cache import Cache
from r1.model.rope import angles, rotate


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "nope", "rope"), [(3, 12, 6), (16, 128, 64)])
def test_queries_are_rotated_in_place(count: int, nope: int, rope: int, dtype: str) -> None:
    """And the key that heads share is written to all. Nothing else changes, not even what stands
    beside a token's queries. Heads and pairs need not be powers of two.
    """
    rows, tokens, width = 2, 3, nope + rope
    both = draw(rows, tokens, count * width + 5, dtype=dtype)
    q = both[..., : count * width].unflatten(-1, (count, -1))
    k, k_pe = torch.zeros_like(q).contiguous(), draw(rows, tokens, rope + 3, dtype=dtype)[..., 3:]
    positions = torch.arange(6, device=DEVICE).view(rows, tokens)
    cos, sin = angles(positions, torch.rand(rope // 2, device=DEVICE), 1.5)
    before = both.clone()
    finish(CHIP, q, k, k_pe, cos, sin)
    old = before[..., : count * width].unflatten(-1, (count, -1))
    close(q[..., nope:], rotate(old[..., nope:], cos, sin), dtype)
    assert torch.equal(q[..., :nope], old[..., :nope])
    assert torch.equal(both[..., count * width :], before[..., count * width :])
    assert torch.equal(k[..., nope:], k_pe[:, :, None].expand(-1, -1, count, -1))
    assert not k[..., :nope].any()


def made_layer(dtype: str, **changes: Any) -> Any:
    model = unit_gain(V3.change(num_hidden_layers=1, **changes), dtype=dtype, device=DEVICE.type)
    return model, cast(Any, model.layers[0]).self_attn


@pytest.mark.parametrize("q_lora_rank", [None, 16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_attention(dtype: str, q_lora_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several rows, and as one operator of a compiled graph. The cache gets its entries.
    Steps that see earlier keys, and other strategies, have the layer's own.
    """
    seen = watched()
    monkeypatch.setattr(Chip, "of", lambda _: seen)
    model, mla = made_layer(dtype, q_lora_rank=q_lora_rank)
    mla.attend = dict.fromkeys(mla.attend, STRATEGIES[1])
    x = draw(2, 5, V3.hidden_size, dtype=dtype)
    entry = STRATEGIES[1].entry(mla.shape)
    ours, right = (Cache(entry, 2, 8, 1, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
    positions = torch.arange(5, device=DEVICE).expand(2, -1)
    multiply = partial(prompt.multiply, seen)
    step = replace(model.step("prefill", positions, 0), multiply=multiply)
    wanted = mla(x, step, right.layers[0])
    close(attention(mla, x, step, ours.layers[0]), wanted, dtype)
    close(ours.layers[0][0], right.layers[0][0], dtype)
    assert "finish_kernel" in seen.ran
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    close(compiled(mla, x, step, None, x), x + wanted, dtype)
    seen.ran.clear()
    later = replace(model.step("prefill", positions, 8), multiply=multiply)
    own = mla(x, later, right.layers[0])
    assert torch.equal(attention(mla, x, later, right.layers[0], x), x + own)
    mla.attend = dict.fromkeys(mla.attend, STRATEGIES[2])
    assert torch.equal(attention(mla, x, step, None), mla(x, step, None))
    assert not seen.ran


def test_grouped_heads_have_their_own() -> None:
    model = unit_gain(TINY_QWEN2, dtype="fp32", device=DEVICE.type)
    layer: Any = model.layers[0]
    x = draw(1, 4, TINY_QWEN2.hidden_size, dtype="fp32")
    step = model.step("prefill", torch.arange(4, device=DEVICE)[None], 0)
    ours = attention(layer.self_attn, x, step, None)
    assert torch.equal(ours, layer.self_attn(x, step, None))


def test_keys_and_values_are_those_of_the_layer() -> None:
    """Here without a kernel's rounding."""
    _model, mla = made_layer("fp32")
    up: UpProjection = mla.kv_b_proj
    a = mla.shape
    q = draw(2, 3, a.num_attention_heads, a.qk_head_dim, dtype="fp32")
    c_kv, k_pe = (draw(2, 3, n, dtype="fp32") for n in (a.kv_lora_rank, a.qk_rope_head_dim))
    cos = torch.ones(2, 3, 1, a.qk_rope_head_dim, device=DEVICE)
    made: tuple[Tensor, ...] = heads(q, c_kv, k_pe, *up.by_head(), cos, torch.zeros_like(cos))
    for ours, right in zip(made, up.keys_values(c_kv, k_pe), strict=True):
        close(ours, right, "fp32")


@pytest.mark.parametrize("kind", ["fp8", "dense"])
def test_a_product_adds_the_residual(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, too. Where a kernel multiplies, it adds: the sum is rounded once."""
    monkeypatch.setattr(Chip, "of", lambda _: test_narrow.CHIP)
    weight = stored(BLOCKS, 128, 256) if kind == "fp8" else matrix(128, 256, dtype="bf16")
    x, residual = (draw(2, 35, columns, dtype="bf16") for columns in (256, 128))
    run = partial(prompt.multiply, test_narrow.CHIP, weight)
    wanted = run(x, round_x=True) + residual
    close(run(x, round_x=True, residual=residual), wanted, "bf16")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    close(compiled(x, round_x=True, residual=residual), wanted, "bf16")
