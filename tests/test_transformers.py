"""Tests files and numbers with transformers: each side loads the checkpoints that the other makes.

Holds to account: r1/files and r1/model.

transformers is the peer, not a dependency, so CI skips this file: tests/reference holds its outputs
for CI. To run it:

    pip install ".[peers]" && python -m pytest tests/test_transformers.py

Versions before 5.15 compute other logits for V2. The MTP test needs 5.20, and is skipped with less.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer_transformers
import pytest
import torch
from folders import load
from models import TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, V2, V3, model, random_tokens
from torch import Tensor

import r1
from r1 import Backend, Config
from r1.files.config_json import dump_config, load_config
from r1.files.names import places
from r1.files.save import save
from r1.model.config import Llama3
from r1.model.mtp import MTPLayer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="the peer: pip install transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FP32 = 1e-4
"""The same sums in another order: 4e-6 seen, at logits of up to 8."""
BF16 = 1.5
"""In bf16 each implementation errs by some 0.013 of a token's logits (2^-9 = 0.002 a product, a
dozen in a row), each at places of its own. So ours is as far from theirs as theirs is from fp32:
0.7 to 1.2 times as far was seen, over 15 models."""

PREFIX = {
    "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2",
    "qwen2": "Qwen2",
    "llama": "Llama",
    "qwen3": "Qwen3",
}
CASES = {
    "v3": V3,
    "v3-plain": V3.change(
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        yarn=None,
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    ),
    "v3-tied": replace(V3, tie_word_embeddings=True, num_nextn_predict_layers=0),
    "v2": V2,
    "v2-greedy": V2.change(topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1),
    "qwen2-tied": TINY_QWEN2.change(num_hidden_layers=2),
    "llama": TINY_LLAMA.change(num_hidden_layers=2, llama3=Llama3(8.0, 16)),
    "qwen3": TINY_GROUPED.change(num_hidden_layers=2),
}


def tokens(config: Config, batch: int = 2, length: int = 24) -> Tensor:
    """Random ids, past YaRN's original length of 8."""
    return random_tokens(5, batch, length, config.vocab_size)


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    """A folder as transformers loads it; nothing may be missing, nor surplus beside the MTP
    layer.
    """
    name = PREFIX[load_config(folder).model_type] + "ForCausalLM"
    peer, report = getattr(transformers, name).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    assert all(key.startswith("model.layers.2.") for key in report["unexpected_keys"]), report
    return peer.eval()


@torch.no_grad()
def their_logits(peer: Any, ids: Tensor) -> Tensor:
    return peer(ids, use_cache=False).logits.float()


def distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of logits (B, S, W): |one - other| / |other| for each token, and of these the
    80th percentile.
    """
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).quantile(0.8))


# ---------------------------- ours, there
@pytest.mark.parametrize("case", CASES)
def test_our_checkpoint_loads_there(case: str, tmp_path: Path) -> None:
    """A bf16 checkpoint in two shards: the same logits in fp32, and in bf16 as near as bf16 can
    tell.
    """
    config = CASES[case]
    made = model(config, mtp=config.num_nextn_predict_layers > 0)
    size = sum(t.nbytes for t in places(made).values())
    save(made, tmp_path / "ours", shard_bytes=int(size * 0.7))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == 2

    ids = tokens(config)
    peers, ours = {}, {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        peer = theirs(tmp_path / "ours", dtype)
        assert peer.dtype == dtype
        if config.tie_word_embeddings:
            assert peer.lm_head.weight is peer.model.embed_tokens.weight
        peers[name] = their_logits(peer, ids)
        ours[name] = r1.load(
            tmp_path / "ours", Backend(device="cpu", dtype=name), quiet=True
        ).logits(ids)
    assert float((ours["fp32"] - peers["fp32"]).abs().max()) < FP32

    # Not the largest but the 80th percentile over tokens: one whose experts bf16 chose otherwise,
    # there or here, is far off.
    error = distance(peers["bf16"], peers["fp32"])
    assert 1e-3 < error < 0.05, "bf16 did not run, or it is not bf16 that errs"
    assert distance(ours["bf16"], peers["bf16"]) < BF16 * error
    assert distance(ours["bf16"], peers["fp32"]) < BF16 * error
    # Nor does bf16 hide a mistake: 3 % on the output head is found.
    assert distance(ours["bf16"] * 1.03, peers["bf16"]) > BF16 * error


# ---------------------------- theirs, here
@pytest.mark.parametrize("case", CASES)
def test_their_checkpoint_loads_here(case: str, tmp_path: Path) -> None:
    """`save_pretrained` of a model born there (transformers 5's spelling of config.json), sharded:
    the same logits.
    """
    config = CASES[case]
    spelled = dump_config(config)
    spelled.pop("architectures")
    config_class, model_class = (
        getattr(transformers, PREFIX[config.model_type] + part)
        for part in ("Config", "ForCausalLM")
    )
    peer = model_class._from_config(
        config_class(**spelled), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise)
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert "rope_parameters" in (tmp_path / "config.json").read_text()

    ids = tokens(config)
    engine = r1.load(tmp_path, Backend(device="cpu", dtype="fp32"), quiet=True)
    assert float((engine.logits(ids) - their_logits(peer, ids)).abs().max()) < FP32
    # What they save has no MTP layer, though config.json counts one: loading it is refused, not
    # made up.
    if engine.config.num_nextn_predict_layers:
        with pytest.raises(r1.InputError, match=r"lacks model\.layers\.2\."):
            r1.load(tmp_path, Backend(device="cpu", dtype="fp32"), mtp=True, quiet=True)


# ---------------------------- the MTP layer
@torch.no_grad()
def test_mtp_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' MtpModel reads our files and takes one step: its hidden states and logits are
    ours.
    """
    mtp = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(getattr(mtp, "MtpModel", None), "forward_layer"):
        pytest.skip(f"transformers {transformers.__version__} has no MTP layer to call: 5.20 has")
    from transformers.cache_utils import MtpCache

    # It knows MTP weights by the model's list of keys to ignore, which has R1's layer 61 only; here
    # it is layer 2.
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [r"model\.layers\.2\."],
    )
    save(model(V3, dtype="fp32", mtp=True), tmp_path / "ours", shard_bytes=60_000)
    peer = theirs(tmp_path / "ours", torch.float32)
    drafter = mtp.MtpModel.from_pretrained(peer).eval()

    ids = tokens(V3)
    hidden = peer.model(
        ids[:, :-1], use_cache=False
    ).last_hidden_state  # (B, S - 1, D), normed: at 0, 1, ...
    positions = torch.arange(1, ids.shape[1]).expand(len(ids), -1)  # those of the tokens at i + 1
    cache = MtpCache(config=peer.config.get_mtp_config())
    expected = drafter.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])

    ours, report = load(tmp_path / "ours", mtp=True, dtype="fp32")
    assert [key for keys in report.skipped.values() for key in keys] == [
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    ]
    own = ours(ids[:, :-1], ours.step("prefill", positions - 1, 0))
    assert float((own - hidden).abs().max()) < FP32
    step = ours.step("prefill", positions, 0)
    embedding = ours.embed_tokens(ids[:, 1:])
    layer = ours.mtp[0]
    assert isinstance(layer, MTPLayer)
    found = layer(embedding, own, step)
    assert float((found - expected).abs().max()) < FP32
    logits = drafter._project_to_logits(expected)
    assert float((ours.lm_head(found) - logits).abs().max()) < FP32
    drafted, draft_logits, _ = drafter(
        ids[:, 1:], hidden, None, positions, MtpCache(config=peer.config.get_mtp_config())
    )
    assert torch.equal(ours.lm_head(found)[:, -1].argmax(-1, keepdim=True), drafted)
    assert float((ours.lm_head(found)[:, -1:] - draft_logits).abs().max()) < FP32

    # Each way to get it wrong would show: the paper's order of the two halves, and the embedding
    # not shifted.
    wrong = layer(own, embedding, step)
    halves = torch.cat((layer.hnorm(own), layer.enorm(embedding)), dim=-1)
    paper = layer.shared_head.norm(layer.block(layer.eh_proj(halves), step, None))
    unshifted = layer(ours.embed_tokens(ids[:, :-1]), own, step)
    for mistake in (wrong, paper, unshifted):
        assert float((mistake - expected).abs().max()) > 1000 * FP32


def test_the_measured_peer_has_the_shape_of_ours() -> None:
    """The random model of compare_peers.py: as many parameters, a tied head once."""
    for config in (TINY_LLAMA, TINY_QWEN2, V3.change(num_nextn_predict_layers=0)):
        for tied in (False, True):
            config = replace(config, tie_word_embeddings=tied)
            peer = peer_transformers.random_model(config, torch.device("cpu"), torch.bfloat16)
            own = model(config)
            count = sum(tensor.numel() for tensor in peer.parameters())
            assert count == sum(
                tensor.numel() for name, tensor in places(own).items() if "_bias" not in name
            )
            ids = tokens(config)
            assert their_logits(peer, ids).isfinite().all()
