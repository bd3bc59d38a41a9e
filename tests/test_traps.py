"""Proof that the parity tests can fail: each known mistake, put into our code, is found.

Holds to account: r1/model, r1/storage, r1/switches, and the tests of them.

The mistake is also found where it should be. Each one once broke a real implementation. A test's
docstring begins with the mistake's number in this table:

| mistake | test |
|---|---|
| 1 softmax scale without mscale^2 | test_softmax_scale; and that position 0 cannot show it |
| 2 factor on cos/sin | test_table_factor |
| 3 SDPA without scale=, absorbed scaled by its own width | test_scale_is_given |
| 4, 5, 7 YaRN's range, its length, its ramp | test_frequencies |
| 6 halves instead of interleaved pairs | test_rope_layout |
| 6 odd rope dim | test_odd_rope_dim_is_refused |
| 8 biased weights | test_router_weights |
| 8 score recovered as biased minus bias | test_bias_is_never_subtracted_back |
| 9, 10, 12 group score, mask of 0, bias left out | test_router_choice |
| 11 router in bf16 | test_router_in_bf16; under autocast: test_properties.py |
| 11 bias in bf16 | test_bias_stays_fp32 |
| 13 normalizing and scaling tied together | test_router_weights |
| 14 near ties | test_near_ties_flip; test_properties.py leaves them out |
| 15 FP8 scales divided by, edges padded | test_fp8_scales; loading: test_checkpoint.py |
| 19 kv_b copied for absorption | test_absorbed_uses_the_weight_itself |
| 19 kv_b re-quantized for absorption | test_requantized_kv_b |
| 20 fp16 overflows | test_bf16_is_preferred |
| 21 MTP layers counted or dropped | test_mtp_is_not_dropped_in_silence |
| 22 MTP's order | test_mtp_order |
| 25 RMSNorm's rounding | test_norm_rounds_first |
| 29 padding seen | test_padding_is_hidden; test_properties.py: ragged, poisoned |
| 30 host syncs, shapes that grow | test_properties.py: no sync, compiled once |
| 31 pairs of switches | test_pairs.py, test_parity.py, test_properties.py |
| extra: heads, biases, norms, scaling of grouped queries | test_grouped_queries and below |
| extra: latent norms' eps, Kimi's step | test_latent_norm_eps, test_a_step_for_a_ramp |
| extra: Mistral 4's factor | test_query_factor |

Mistakes 26 to 28 are in test_tokenizer.py. The missing numbers belong to parts that have tests of
their own, or that are not built yet.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import REFERENCE, ROOT, check, config, differences, fresh, reference
from tolerances import atol
from torch import Tensor
from torch.nn import functional as F

import r1
from r1 import InputError
from r1.files.config_json import parse_config
from r1.files.names import places
from r1.model import attend, gqa, gqa_attend, mla, rope, temper, transformer
from r1.model.config import AttentionShape, Llama3, Yarn
from r1.model.layers import Linear, RMSNorm
from r1.model.rope import rotate
from r1.model.router import Router
from r1.model.shapes import shape
from r1.model.step import Step, visible
from r1.run.runner import Runner
from r1.run.trace import first_divergence
from r1.storage import fp8
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

Patch = pytest.MonkeyPatch
MARGIN = 10
"""How many tolerances a wrong formula must be off by, so that passing isn't luck."""


def found_at(case: str, run: Runner | None = None, first: int | None = None) -> str:
    """The name of the first divergence, which must be no narrow one.

    Builds the model unless `run` has one.
    """
    wrong = first_divergence(differences(case, run or fresh(case), first))
    assert wrong is not None, f"{case}: the mistake passes"
    assert "indices" in wrong.name or wrong.max_abs > MARGIN * atol("reference fp32"), (
        f"{case}: narrowly found, {wrong}"
    )
    return wrong.name


# ---------------------------- attention and rope
@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed"])
def test_softmax_scale(monkeypatch: Patch, attention: str) -> None:
    """1. Without YaRN's temperature squared; a test of the first position alone would pass."""
    monkeypatch.setattr(mla, "softmax_scale", lambda a: a.qk_head_dim**-0.5)
    assert (
        found_at("v3-yarn", fresh("v3-yarn", attention=attention, prefill_attention=attention))
        == "attn.0"
    )
    assert first_divergence(differences("v3-yarn", fresh("v3-yarn"), first=1)) is None


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("v3-mscale", lambda yarn: 1.0),
        ("v3-mscale", lambda yarn: yarn.temperature(yarn.mscale)),
        ("v3-yarn", lambda yarn: yarn.temperature(yarn.mscale)),
        ("v2-lite", lambda yarn: yarn.softmax_factor),
    ],
)
def test_table_factor(monkeypatch: Patch, case: str, wrong: Callable[[Yarn], float]) -> None:
    """2. The factor on cos and sin is the ratio of two temperatures, and not the softmax's."""
    monkeypatch.setattr(Yarn, "table_factor", property(wrong))
    assert found_at(case) == "attn.0"


def test_scale_is_given(monkeypatch: Patch) -> None:
    """3. torch's default, 1 / sqrt(width), lacks the temperature; and absorbed keys have another
    width.
    """
    with monkeypatch.context() as patch:
        sdpa = lambda *a, scale=None, **k: F.scaled_dot_product_attention(*a, **k)  # noqa: E731
        patch.setattr(attend, "F", SimpleNamespace(scaled_dot_product_attention=sdpa))
        assert found_at("v3-yarn", fresh("v3-yarn", prefill_attention="expand")) == "attn.0"
    right = attend.probabilities
    width = config("v3-plain").attention.latent_dim
    monkeypatch.setattr(
        attend, "probabilities", lambda scores, scale, bias: right(scores, width**-0.5, bias)
    )
    assert found_at("v3-plain", fresh("v3-plain", prefill_attention="absorbed")) == "attn.0"


def plain_rope(a: AttentionShape) -> Tensor:
    """The frequencies without YaRN."""
    return rope.frequencies(dataclasses.replace(a, yarn=None))


def stretched_range(a: AttentionShape) -> Tensor:
    """The range of the stretched length, not of the original one."""
    assert a.yarn
    length = config("v3-yarn").max_position_embeddings
    yarn = dataclasses.replace(a.yarn, original_max_position_embeddings=length)
    return rope.frequencies(dataclasses.replace(a, yarn=yarn))


def inverted(a: AttentionShape) -> Tensor:
    """Low frequencies kept, high ones divided."""
    assert a.yarn
    return plain_rope(a) + plain_rope(a) / a.yarn.factor - rope.frequencies(a)


def all_divided(a: AttentionShape) -> Tensor:
    assert a.yarn
    return plain_rope(a) / a.yarn.factor


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        (stretched_range, None),  # 4
        (plain_rope, 32),  # 5: plain rope up to the original length
        (inverted, None),  # 7
        (all_divided, None),  # 7
    ],
)
def test_frequencies(
    monkeypatch: Patch, wrong: Callable[[AttentionShape], Tensor], first: int | None
) -> None:
    """4, 5, 7. YaRN's range is that of the original length, it holds at every length, and the ramp
    falls.
    """
    monkeypatch.setattr(transformer, "frequencies", wrong)
    assert found_at("v3-yarn", first=first) == "attn.0"


right_factor = temper.query_factor


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        (lambda p, yarn: torch.ones(*p.shape, 1, 1), None),  # left out
        (lambda p, yarn: right_factor(p + 1, yarn), None),  # counted from 1
        (lambda p, yarn: 1 + 0.3 * (1 + p / 16).log()[..., None, None], 16),  # no whole lengths
    ],
)
def test_query_factor(
    monkeypatch: Patch, wrong: Callable[[Tensor, Yarn], Tensor], first: int | None
) -> None:
    """Mistral 4's queries grow by whole lengths of the first training, counted from 0."""
    monkeypatch.setattr(temper, "query_factor", wrong)
    assert found_at("mistral4", first=first) == "attn.0"


def test_frequencies_of_r1() -> None:
    """7. R1's own table: the fastest pairs as trained, the slowest divided by 40, falling all the
    way.
    """
    a = shape("r1").attention
    frequency, plain = rope.frequencies(a), plain_rope(a)
    kept = frequency / plain
    assert (
        kept[0] == 1.0
        and torch.allclose(kept[-1], torch.tensor(1 / 40))
        and bool((kept.diff() <= 1e-7).all())
    )
    # By hand: pairs turn 32 times and once in 4096 positions at 10.2 and 22.5, so the ramp runs
    # from 10 to 23.
    assert int((kept > 1 - 1e-6).sum()) == 11 and int((kept < 1 / 40 + 1e-6).sum()) == 9
    assert round(rope.softmax_scale(a) * 192**0.5, 3) == 1.874


def test_a_step_for_a_ramp() -> None:
    """Kimi-K2's beta_fast equals its beta_slow: floor and ceiling still make a ramp, of one step,
    and no division by 0.
    """
    a = shape("kimi-k2").attention
    assert a.yarn and bool(torch.isfinite(rope.frequencies(a)).all())
    once = dataclasses.replace(a.yarn, original_max_position_embeddings=1)
    flat = dataclasses.replace(a, rope_theta=2.0, yarn=once)
    assert bool(torch.isfinite(rope.frequencies(flat)).all())


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's layout: the first half against the second."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[..., 1::2], sin[..., 1::2]  # of each pair, from what `angles` makes
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys and queries turned the other way: as if time ran backwards."""
    return rotate(x, cos, -sin)


def queries_only(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The shared key, which comes last, left as it is."""
    return torch.cat((rotate(x[:, :, :-1], cos, sin), x[:, :, -1:]), dim=2)


@pytest.mark.parametrize("wrong", [halves, backwards, queries_only])
@pytest.mark.parametrize("case", ["v3-plain", "v3-odd"])
def test_rope_layout(monkeypatch: Patch, case: str, wrong: Any) -> None:
    """6. The checkpoint's weights are made for interleaved pairs."""
    monkeypatch.setattr(rope, "rotate", wrong)
    assert found_at(case) == "attn.0"


def test_odd_rope_dim_is_refused() -> None:
    raw = json.loads((REFERENCE / "v3-plain" / "config.json").read_text()) | {"qk_rope_head_dim": 7}
    with pytest.raises(InputError, match="qk_rope_head_dim is 7, but rotation takes pairs"):
        parse_config(raw)


# ---------------------------- grouped-query attention
def interleaved(x: Tensor, step: Step) -> Tensor:
    """R1's layout: each even element against the next one."""
    half = x.shape[-1] // 2
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = step.cos[..., half:], step.sin[..., half:]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def tiled(x: Tensor, q: Tensor) -> Tensor:
    """All heads of keys one after the other, again and again."""
    return x.repeat(1, 1, q.shape[2] // x.shape[2], 1)


def without_factor(yarn: Yarn) -> float:
    """What R1-0528-Qwen3-8B's attn_factor asks for, and transformers does not read."""
    return 1.0


def one_step(llama3: Llama3, plain: Tensor) -> Tensor:
    """Without the blend between the kept and the stretched pairs."""
    turns = llama3.original_max_position_embeddings * plain / (2 * math.pi)
    return (turns < llama3.low_freq_factor).float()


@pytest.mark.parametrize(
    ("case", "owner", "name", "wrong"),
    [
        ("qwen2-biases", gqa, "rotate", interleaved),
        ("qwen3-norms", gqa, "rotate", interleaved),
        ("qwen2-biases", gqa_attend, "for_all_heads", tiled),
        ("qwen3-yarn", Yarn, "table_factor", property(without_factor)),
        ("llama-scaled", rope, "stretched_by_llama3", one_step),
        ("llama-scaled", rope, "stretched_by_llama3", lambda llama3, plain: plain * 0),
        ("llama-scaled", rope, "stretched_by_llama3", lambda llama3, plain: plain * 0 + 1),
    ],
)
def test_grouped_queries(monkeypatch: Patch, case: str, owner: Any, name: str, wrong: Any) -> None:
    monkeypatch.setattr(owner, name, wrong)
    assert found_at(case, fresh(case, attention="naive", prefill_attention="naive")) == "attn.0"


@pytest.mark.parametrize(
    ("case", "ending", "fill"),
    [
        ("qwen2-biases", "q_proj.bias", 0.0),
        ("qwen2-biases", "k_proj.bias", 0.0),
        ("qwen2-biases", "v_proj.bias", 0.0),
        ("qwen3-norms", "q_norm.weight", 1.0),
        ("qwen3-norms", "k_norm.weight", 1.0),
    ],
)
def test_forgotten_vectors(case: str, ending: str, fill: float) -> None:
    run = fresh(case)
    for name, tensor in places(run.model).items():
        if name.endswith(ending):
            tensor.fill_(fill)
    assert found_at(case, run) == "attn.0"


def test_grouped_scale_is_given(monkeypatch: Patch) -> None:
    right = gqa_attend.probabilities
    monkeypatch.setattr(gqa_attend, "probabilities", lambda s, scale, bias: right(s, 1.0, bias))
    for attention in ("naive", "grouped"):
        run = fresh("qwen2-biases", attention=attention, prefill_attention=attention)
        assert found_at("qwen2-biases", run) == "attn.0"


def test_frequencies_of_llama() -> None:
    """By hand: pairs turn 4 times and once in 8192 positions at 28.3 and 35.0 of 64."""
    a = shape("r1-distill-llama-8b").grouped
    kept = rope.frequencies(a) / rope.frequencies(dataclasses.replace(a, llama3=None))
    assert int((kept > 1 - 1e-6).sum()) == 29 and int((kept < 1 / 8 + 1e-6).sum()) == 29
    assert bool((kept.diff() <= 1e-7).all())


def test_latent_norm_eps(monkeypatch: Patch) -> None:
    """The norms of the latents have eps 1e-6 whatever rms_norm_eps says: v3-odd's is 0.01."""
    monkeypatch.setattr(mla, "LATENT_NORM_EPS", config("v3-odd").rms_norm_eps)
    assert found_at("v3-odd") == "attn.0"


# ---------------------------- router
def choose(
    self: Router,
    scores: Tensor,
    *,
    best: int | None = None,
    fill: float = float("-inf"),
    bias: float = 1.0,
    groups: bool = True,
) -> Tensor:
    """The choice of experts with its mistakes as arguments; without any it is right."""
    e = self.shape
    v3 = e.topk_method == "noaux_tc"
    if v3:
        scores = scores + bias * self.e_score_correction_bias
    if groups and e.n_group > 1 and e.topk_method != "greedy":
        grouped = scores.view(len(scores), e.n_group, -1)
        worth = grouped.topk(best or (2 if v3 else 1), dim=-1).values.sum(dim=-1)
        kept = worth >= worth.topk(e.topk_group, dim=-1).values[:, -1:]
        scores = grouped.masked_fill(~kept[..., None], fill).flatten(1)
    return scores.topk(e.num_experts_per_tok, dim=-1).indices


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("v3-groups", {"best": 1}),  # 9: V2's group score
        ("v2-groups", {"best": 2}),  # 9: V3's
        ("v3-groups", {"best": 3}),
        ("v3-groups", {"groups": False}),
        ("v2-groups", {"groups": False}),
        ("v3-negative", {"fill": 0.0}),  # 10
        ("v3-plain", {"bias": 0.0}),  # 12: DeepSeek's demo has a bias only at R1's own width
        ("v3-plain", {"bias": -1.0}),
    ],
)
def test_router_choice(monkeypatch: Patch, case: str, wrong: dict[str, Any]) -> None:
    """9, 10, 12. Which experts; the same function without its mistake agrees."""
    monkeypatch.setattr(Router, "choose", choose)
    check(case, fresh(case))
    monkeypatch.setattr(Router, "choose", lambda self, scores: choose(self, scores, **wrong))
    layer = config(case).experts.first_k_dense_replace
    assert found_at(case) == f"router_indices.{layer}"


def biased_weights(self: Router, scores: Tensor, indices: Tensor) -> Tensor:
    w = (scores + self.e_score_correction_bias).gather(1, indices)
    return w / w.sum(dim=-1, keepdim=True) * self.shape.routed_scaling_factor


def never_normalized(self: Router, scores: Tensor, indices: Tensor) -> Tensor:
    return scores.gather(1, indices) * self.shape.routed_scaling_factor


def scaled_if_normalized(self: Router, scores: Tensor, indices: Tensor) -> Tensor:
    w = scores.gather(1, indices)
    return (
        w / w.sum(dim=-1, keepdim=True) * self.shape.routed_scaling_factor
        if self.shape.norm_topk_prob
        else w
    )


def scaled_unless_normalized(self: Router, scores: Tensor, indices: Tensor) -> Tensor:
    w = scores.gather(1, indices)
    return (
        w / w.sum(dim=-1, keepdim=True)
        if self.shape.norm_topk_prob
        else w * self.shape.routed_scaling_factor
    )


def normalized_over_all(self: Router, scores: Tensor, indices: Tensor) -> Tensor:
    return (
        scores.gather(1, indices)
        / scores.sum(dim=-1, keepdim=True)
        * self.shape.routed_scaling_factor
    )


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("v3-plain", biased_weights),  # 8
        ("v3-plain", never_normalized),  # 13
        ("v3-plain", scaled_unless_normalized),  # 13
        ("v3-unnormed", scaled_if_normalized),  # 13
        ("v2-groups", scaled_if_normalized),  # 13
        ("v2-norm", never_normalized),
        ("v3-plain", normalized_over_all),
    ],
)
def test_router_weights(
    monkeypatch: Patch, case: str, wrong: Callable[[Router, Tensor, Tensor], Tensor]
) -> None:
    """8, 13. The same experts with other weights."""

    def forward(self: Router, x: Tensor, _draws: None) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        scores = (
            logits.sigmoid() if self.shape.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        )
        indices = self.choose(scores)
        return indices, wrong(self, scores, indices)

    monkeypatch.setattr(Router, "forward", forward)
    assert found_at(case) == f"router_weights.{config(case).experts.first_k_dense_replace}"


def test_scoring_function() -> None:
    """9. V3 has a sigmoid and V2 a softmax."""
    for case, other in (("v3-plain", "softmax"), ("v2-norm", "sigmoid")):
        run = fresh(case)
        for module in run.model.modules():
            if isinstance(module, Router):
                module.shape = dataclasses.replace(module.shape, scoring_func=other)
        assert found_at(case, run).startswith("router_")


def router(case: str = "v3-plain") -> Router:
    return next(module for module in fresh(case).model.modules() if isinstance(module, Router))


def test_bias_is_never_subtracted_back() -> None:
    """8. A bias of any size leaves the weights exact; (score + bias) - bias loses digits."""
    gate = router()
    x = torch.randn(50, gate.weight.shape[1], generator=torch.Generator().manual_seed(0))
    scores = F.linear(x, gate.weight).sigmoid()
    gate.e_score_correction_bias.data += 1e5
    indices, weights = gate(x)
    plain = scores.gather(1, indices)
    assert torch.equal(
        weights,
        plain / (plain.sum(-1, keepdim=True) + 1e-20) * gate.shape.routed_scaling_factor,
    )
    back = ((scores + gate.e_score_correction_bias) - gate.e_score_correction_bias).gather(
        1, indices
    )
    recovered = back / back.sum(-1, keepdim=True) * gate.shape.routed_scaling_factor
    assert float((recovered - weights).abs().max()) > MARGIN * atol("reference fp32")


def test_router_in_bf16(monkeypatch: Patch) -> None:
    """11. Logits in bf16: other weights at once, and other experts."""
    right = Router.forward

    def forward(self: Router, x: Tensor, _draws: None) -> tuple[Tensor, Tensor]:
        half = F.linear(x.bfloat16(), self.weight.bfloat16()).float()
        monkeypatch.setattr("r1.model.router.F", SimpleNamespace(linear=lambda *_: half))
        try:
            return right(self, x)
        finally:
            monkeypatch.setattr("r1.model.router.F", F)

    monkeypatch.setattr(Router, "forward", forward)
    assert found_at("v3-plain").startswith("router_")


def test_bias_stays_fp32() -> None:
    """11. Where the model is stored in bf16 too; a rounded bias chooses other experts in a large
    enough sample.
    """
    engine = r1.load(ROOT / "weights" / "tiny-r1", Backend(device="cpu", dtype="bf16"), quiet=True)
    gates = [module for module in engine.model.modules() if isinstance(module, Router)]
    assert gates and all(gate.e_score_correction_bias.dtype == torch.float32 for gate in gates)
    assert any(
        bool((gate.e_score_correction_bias != gate.e_score_correction_bias.bfloat16()).any())
        for gate in gates
    )
    gate = gates[0]
    scores = torch.rand(
        5000, gate.shape.n_routed_experts, generator=torch.Generator().manual_seed(0)
    )
    before = gate.choose(scores).sort(-1).values
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.bfloat16().float()
    assert not torch.equal(before, gate.choose(scores).sort(-1).values)


def test_near_ties_flip() -> None:
    """14. Two experts one rounding apart change places under another numerics, and both choices are
    right.
    """
    gate = router()
    scores = torch.full((1, gate.shape.n_routed_experts), 0.25)
    gate.e_score_correction_bias.data.zero_()
    scores[0, :2] = 0.9  # sure of their place; the third place is a tie of all others
    scores[0, 5] = torch.nextafter(torch.tensor(0.25), torch.tensor(1.0))
    up = set(gate.choose(scores)[0].tolist())
    scores[0, 5] = torch.nextafter(torch.tensor(0.25), torch.tensor(0.0))
    down = set(gate.choose(scores)[0].tolist())
    assert up == {0, 1, 5} and down != up and len(down & up) == 2


# ---------------------------- weights
def test_fp8_scales() -> None:
    """15. The scales multiply; a block at an edge is cropped. Both mistakes are far outside a step
    of e4m3.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(200, 300, generator=generator) * torch.logspace(-3, 0, 300)
    q, scale = fp8.quantize(w, (128, 128))
    assert scale.shape == (2, 3) == fp8.grid((200, 300), (128, 128))  # ceil, not floor
    assert fp8.grid((576, 7168), (128, 128)) == (5, 56)
    got = torch.empty_like(w)
    fp8.dequantize(q, scale, (128, 128), out=got)
    by_hand = torch.stack(
        [
            torch.stack([q[i, j].float() * scale[i // 128, j // 128] for j in range(300)])
            for i in (0, 127, 128, 199)
        ]
    )
    assert torch.equal(got[[0, 127, 128, 199]], by_hand)
    blocks = [got[i : i + 128, j : j + 128].abs().max() for i in (0, 128) for j in (0, 128, 256)]
    largest = (
        torch.stack(blocks)
        .view(2, 3)
        .repeat_interleave(128, 0)
        .repeat_interleave(128, 1)[:200, :300]
    )

    def off(x: Tensor) -> float:
        return float(((x - w).abs() / largest).max())

    assert off(got) <= atol("fp8 e4m3")
    divided = torch.empty_like(w)
    fp8.dequantize(q, 1 / scale, (128, 128), out=divided)
    assert off(divided) > MARGIN * atol("fp8 e4m3")
    shifted = torch.empty_like(w)
    fp8.dequantize(q, scale.flip(1), (128, 128), out=shifted)
    assert off(shifted) > MARGIN * atol("fp8 e4m3")


def test_absorbed_uses_the_weight_itself() -> None:
    """19. W_UK and W_UV are views of kv_b_proj, and nothing is made of them at a step."""
    run = fresh("v3-groups", prefill_attention="absorbed")
    layer: Any = run.model.layers[0]
    attention = layer.self_attn
    w_uk, w_uv = attention.kv_b_proj.by_head()
    weight = attention.kv_b_proj.matrix.dense()
    assert (
        w_uk.untyped_storage().data_ptr()
        == w_uv.untyped_storage().data_ptr()
        == weight.untyped_storage().data_ptr()
    )
    weight.data.mul_(2)
    assert found_at("v3-groups", run) == "attn.0"  # a copy made at load would not see the change


def test_requantized_kv_b() -> None:
    """19. FP8 for kv_b beyond what the checkpoint did shows far outside the tolerance."""
    run = fresh("v3-plain", prefill_attention="absorbed")
    for layer in run.model.layers:
        attention: Any = layer.self_attn
        weight = attention.kv_b_proj.matrix.dense()
        fp8.dequantize(*fp8.quantize(weight, (128, 128)), (128, 128), out=weight.data)
    assert found_at("v3-plain", run) == "attn.0"


def test_bf16_is_preferred() -> None:
    """20. R1's activations overflow fp16 (65504): auto takes bf16 wherever the machine has it."""
    ampere = Machine(cuda=True, name="A100", capability=(8, 0))
    assert resolve(Backend(), shape("tiny"), ampere).dtype == "bf16"
    assert (
        resolve(
            Backend(), shape("tiny"), dataclasses.replace(ampere, name="T4", capability=(7, 5))
        ).dtype
        == "fp16"
    )
    assert resolve(Backend(), shape("tiny"), dataclasses.replace(ampere, hip="6.3")).dtype == "bf16"


def test_mtp_is_not_dropped_in_silence() -> None:
    """21. The layer after the last is MTP's.

    It is left out with a note, loaded when asked for, and refused where there is none.
    """
    tiny = ROOT / "weights" / "tiny-r1"
    plain = r1.load(tiny, Backend(device="cpu"), quiet=True)
    assert len(plain.model.layers) == 5 and not len(plain.model.mtp)
    assert any("MTP layers are loaded only when asked for" in note for note in plain.notes)
    with_mtp = r1.load(tiny, Backend(device="cpu"), mtp=True, quiet=True)
    assert len(with_mtp.model.layers) == 5 and len(with_mtp.model.mtp) == 1
    assert not any("asked for" in note for note in with_mtp.notes)
    assert torch.equal(
        plain.logits(torch.tensor([[0, 5, 7]])), with_mtp.logits(torch.tensor([[0, 5, 7]]))
    )
    with pytest.raises(InputError, match="no MTP layer"):
        r1.build.from_checkpoint(
            REFERENCE / "v3-plain",
            config("v3-plain"),
            resolve(Backend(device="cpu"), config("v3-plain")),
            mtp=True,
        )


def test_mtp_order() -> None:
    """22. eh_proj's left half takes the embedding and its right half the hidden state, each through
    its own norm.
    """
    engine = r1.load(ROOT / "weights" / "tiny-r1", Backend(device="cpu"), mtp=True, quiet=True)
    layer: Any = engine.model.mtp[0]
    seen: list[Tensor] = []
    layer.block.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    embedding, hidden = torch.randn(
        2, 1, 3, 160, generator=torch.Generator().manual_seed(0)
    ).unbind()
    step = engine.model.step("prefill", torch.arange(3)[None], 0)
    weight = layer.eh_proj.matrix.dense().data
    weight.copy_(torch.cat((torch.eye(160), torch.zeros(160, 160)), dim=1))
    layer(embedding, hidden, step)
    weight.copy_(weight.roll(160, dims=1))
    layer(embedding, hidden, step)
    wanted = layer.enorm(embedding), layer.hnorm(hidden)
    assert all(torch.allclose(a, b) for a, b in zip(seen, wanted, strict=True))
    assert float((wanted[0] - wanted[1]).abs().max()) > 1


def test_norm_rounds_first() -> None:
    """25. In bf16 the norm rounds before it multiplies, as transformers does; DeepSeek's demo
    rounds once, after.
    """
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data.normal_(1, 0.3, generator=generator)
    x = torch.randn(100, 64, generator=generator).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), norm.weight * unit.bfloat16())
    demo = (norm.weight.float() * unit).bfloat16()
    assert not torch.equal(norm(x), demo)
    in_bf16 = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    assert not torch.equal(norm(x), in_bf16)


# ---------------------------- batches
@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed"])
def test_padding_is_hidden(monkeypatch: Patch, attention: str) -> None:
    """29. A row that sees one slot too many after its length is not that row alone."""

    def short_row_is_off() -> float:
        run = fresh("v3-plain", attention=attention)
        tokens = reference("v3-plain")["tokens"][:, :12].tolist()
        together, alone = run.cache(2, 20), run.cache(1, 20)
        run.prefill([tokens[0], tokens[1][:5]], together)
        run.prefill([tokens[1][:5]], alone)
        next_token = torch.tensor([[1], [2]])
        return float(
            (run.decode(next_token, together)[1] - run.decode(next_token[1:], alone)[0]).abs().max()
        )

    assert short_row_is_off() < atol("algebra fp32")
    monkeypatch.setattr(
        transformer, "visible", lambda positions, keys: visible(positions + 1, keys)
    )
    assert short_row_is_off() > MARGIN * atol("algebra fp32")


def test_a_layer_left_out_is_found() -> None:
    """Each part of a block matters: set to nothing, it is the first that diverges."""
    for part, name in (("self_attn.o_proj", "attn.1"), ("mlp.shared_experts.down_proj", "mlp.1")):
        run = fresh("v3-groups")
        linear = run.model.layers[1].get_submodule(part)
        assert isinstance(linear, Linear)
        linear.matrix.dense().zero_()
        assert found_at("v3-groups", run) == name
