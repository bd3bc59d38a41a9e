"""Tests saving and loading: what is written is read back bit for bit, and FP8 within its error.

Holds to account: r1/files, r1/storage and tools/train/make_checkpoint.py.

Whatever a load leaves out, it reports.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import make_checkpoint
import pytest
import torch
from folders import load, rewrite, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FP8, TINY_GROUPED, TINY_QWEN2, V2, V3, model
from refusals import refused
from safetensors import safe_open
from torch import Tensor

import r1
from r1 import Backend, InputError
from r1.files import shards
from r1.files.config_json import load_config
from r1.files.names import places
from r1.files.save import save
from r1.files.shards import INDEX, SINGLE
from r1.model.transformer import Transformer
from r1.storage import fp8

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny-r1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def parameters(module: Transformer) -> dict[str, Tensor]:
    return places(module)


# ---------------------------- save -> load
SHARDS = {"one file": 10**9, "a few": 30_000, "one tensor each": 1}
CONFIGS = {
    "v3": V3,
    "v2": V2,
    "tied": V3.change(tie_word_embeddings=True, num_nextn_predict_layers=0),
    "tied with mtp": V3.change(tie_word_embeddings=True),
    "two mtp layers": V3.change(num_nextn_predict_layers=2),
    "dense": V3.change(
        n_routed_experts=0, num_nextn_predict_layers=0, q_lora_rank=None, first_k_dense_replace=0
    ),
    "qwen2, tied": TINY_QWEN2,
    "qwen3": TINY_GROUPED,
}


@pytest.mark.parametrize("size", SHARDS)
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_round_trip_is_bit_exact(case: str, size: str, dtype: str, tmp_path: Path) -> None:
    config, shard_bytes = CONFIGS[case], SHARDS[size]
    mtp = config.num_nextn_predict_layers > 0
    saved = model(config, dtype=dtype, mtp=mtp)
    save(saved, tmp_path / "new" / "here", shard_bytes=shard_bytes)
    folder = tmp_path / "new" / "here"
    loaded, report = load(folder, dtype=dtype, mtp=mtp)
    assert_same(parameters(loaded), parameters(saved))
    assert len(loaded.mtp) == config.num_nextn_predict_layers
    assert (loaded.lm_head.matrix is loaded.embed_tokens.matrix) == config.tie_word_embeddings

    # The folder: no more than is told, the config as it was, shards of at most what was asked.
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["here"], (
        "nothing lies beside the folder"
    )
    assert load_config(folder) == config
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    index = [INDEX] if len(shards) > 1 else []
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", *shards, *index]
    )
    assert (len(shards) == 1) == (size == "one file")
    on_disk = {path.name: path_tensors(path) for path in folder.glob("*.safetensors")}
    for name, found in on_disk.items():
        assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= shard_bytes, name
    total = sum(t.nbytes for found in on_disk.values() for t in found.values())
    if index:
        told = json.loads((folder / INDEX).read_text())
        assert told["weight_map"] == {key: name for name, found in on_disk.items() for key in found}
        assert told["metadata"]["total_size"] == total
        assert shards == [
            f"model-{n:05d}-of-{len(shards):06d}.safetensors" for n in range(1, len(shards) + 1)
        ]
    else:
        assert shards == [SINGLE]
    skipped = {key for keys in report.skipped.values() for key in keys}
    assert report.nbytes == total - sum(
        t.nbytes for key, t in tensors(folder).items() if key in skipped
    )


def path_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as shard:
        return {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118


def test_keys_are_the_published_ones(tmp_path: Path) -> None:
    """R1's own names, written out from its model.safetensors.index.json."""
    save(model(FP8, mtp=True), tmp_path / "x")
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(3):
        stem = f"model.layers.{layer}."
        expected |= {f"{stem}{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        expected |= {f"{stem}self_attn.{norm}_layernorm.weight" for norm in ("q_a", "kv_a")}
        linears = [f"self_attn.{name}" for name in attention]
        mlps = (
            ["mlp"]
            if layer == 0
            else ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(8))]
        )
        linears += [f"{mlp}.{name}_proj" for mlp in mlps for name in ("gate", "up", "down")]
        expected |= {
            f"{stem}{name}.weight{scale}" for name in linears for scale in ("", "_scale_inv")
        }
        if layer:
            expected |= {f"{stem}mlp.gate.weight", f"{stem}mlp.gate.e_score_correction_bias"}
    expected |= {
        f"model.layers.2.{n}.weight"
        for n in ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm")
    }
    expected |= {"model.layers.2.shared_head.head.weight"}
    found = tensors(tmp_path / "x")
    assert found.keys() == expected
    for key, tensor in found.items():
        fp32 = key.endswith(("_scale_inv", "e_score_correction_bias"))
        fp8_stored = f"{key}_scale_inv" in found
        assert tensor.dtype == (
            torch.float32 if fp32 else fp8.E4M3 if fp8_stored else torch.bfloat16
        ), key


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_remapping_a_shard_changes_nothing(dtype: str, tmp_path: Path) -> None:
    """A shard that is unmapped and mapped again after every tensor, or never, gives the same."""
    save(model(FP8), tmp_path / "x", shard_bytes=20_000)
    whole, _ = load(tmp_path / "x", dtype=dtype)
    with (
        mock.patch("r1.files.shards.REMAP_BYTES", 1),
        mock.patch("r1.files.shards.safe_open", wraps=shards.safe_open) as opened,
    ):
        parts, report = load(tmp_path / "x", dtype=dtype)
    left = sum(map(len, report.skipped.values()))
    assert opened.call_count > len(tensors(tmp_path / "x")) - left
    assert_same(parameters(parts), parameters(whole))


def test_extra_fields_are_written(tmp_path: Path) -> None:
    save(model(V2), tmp_path / "x", extra={"transformers_version": "4.33.1"})
    assert (
        json.loads((tmp_path / "x" / "config.json").read_text())["transformers_version"] == "4.33.1"
    )


# ---------------------------- dtypes
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("loaded", ["fp32", "bf16", "fp16"])
def test_weights_take_the_dtype_that_is_asked_for(stored: str, loaded: str, tmp_path: Path) -> None:
    """Whatever the file has; but the gate is fp32 in the model, and its bias in the file too, to
    the last bit.
    """
    saved = model(V3, dtype="fp32")
    save(saved, tmp_path / "x", dtype=DTYPES[stored])
    file = tensors(tmp_path / "x")
    found, _ = load(tmp_path / "x", dtype=loaded)
    for key, place in places(found).items():
        bias, gate = key.endswith("e_score_correction_bias"), ".mlp.gate." in key
        assert file[key].dtype == (torch.float32 if bias else DTYPES[stored]), key
        assert place.dtype == (torch.float32 if gate else DTYPES[loaded]), key
        assert torch.equal(place, file[key].to(place.dtype)), key
    before = places(saved)[BIAS]
    assert torch.equal(places(found)[BIAS], before)
    assert not torch.equal(before.bfloat16().float(), before), "this bias could not show a loss"
    torch_dtype = json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"]
    assert torch_dtype == str(DTYPES[stored]).removeprefix("torch.")


# ---------------------------- what is skipped
def test_what_is_skipped_is_said(tmp_path: Path) -> None:
    """MTP layers that nobody asked for, copies of shared weights, computed frequencies: each by its
    reason.
    """
    save(model(FP8, mtp=True), tmp_path / "x")
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "x", lambda t: t.update({rotary: torch.ones(4)}))
    mtp_keys = {key for key in tensors(tmp_path / "x") if key.startswith("model.layers.2.")}
    copies = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}

    _, report = load(tmp_path / "x")
    by_reason = {reason.split()[0]: set(keys) for reason, keys in report.skipped.items()}
    weights = {key for key in mtp_keys if not key.endswith("_scale_inv")}
    assert by_reason == {"rotation": {rotary}, "MTP": weights}
    assert (
        f"{len(weights)} tensors not loaded: MTP layers are loaded only when asked for"
        in " ".join(report.sentences())
    )

    _, report = load(tmp_path / "x", mtp=True)
    by_reason = {reason.split()[0]: set(keys) for reason, keys in report.skipped.items()}
    assert by_reason == {"rotation": {rotary}, "the": copies}

    engine = r1.load(tmp_path / "x", Backend(device="cpu"), quiet=True)
    assert len(engine.notes) == 2 and any("MTP" in note for note in engine.notes)


def test_a_tied_head_is_skipped_and_said(tmp_path: Path) -> None:
    config = V3.change(tie_word_embeddings=True, num_nextn_predict_layers=0)
    save(model(config), tmp_path / "x")
    assert "lm_head.weight" not in tensors(tmp_path / "x")
    _, report = load(tmp_path / "x")
    assert not report.skipped
    embedding = tensors(tmp_path / "x")["model.embed_tokens.weight"]
    rewrite(tmp_path / "x", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    found, report = load(tmp_path / "x")
    assert report.skipped == {
        "config.json ties the output head to the embedding": ["lm_head.weight"]
    }
    assert bool(found.lm_head.matrix.dense().any())


@pytest.mark.parametrize("rows", [48, 47])
def test_a_head_that_is_not_the_embedding_is_not_tied(rows: int, tmp_path: Path) -> None:
    """transformers unties such a head. The last number alone differs here."""
    save(model(V3.change(tie_word_embeddings=True, num_nextn_predict_layers=0)), tmp_path / "x")
    head = tensors(tmp_path / "x")["model.embed_tokens.weight"][:rows].clone()
    head[-1, -1] += 1
    rewrite(tmp_path / "x", lambda t: t.update({"lm_head.weight": head}))
    with refused("lm_head.weight is not model.embed_tokens.weight, though config.json ties them"):
        load(tmp_path / "x")


SURPLUS = [
    "model.layers.3.input_layernorm.weight",  # beyond the one MTP layer
    "model.layers.02.enorm.weight",
    "model.layers.².enorm.weight",  # a digit, says Python
    "model.layers.-1.enorm.weight",
    "model.layers.1.mlp.experts.8.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "layers.2.enorm.weight",
    "lm_head.bias",
    "model.norm.weight_scale_inv",
    "",
]


def test_every_other_key_is_an_error(tmp_path: Path) -> None:
    save(model(V3, mtp=True), tmp_path / "x")
    complete = tensors(tmp_path / "x")
    for key in SURPLUS:
        rewrite(tmp_path / "x", only({**complete, key: torch.zeros(2)}))
        for mtp in (False, True):
            with pytest.raises(InputError, match="for which config.json's model has no place"):
                load(tmp_path / "x", mtp=mtp)


def only(wanted: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A change for `rewrite`: these tensors in place of those that are there."""

    def change(found: dict[str, Tensor]) -> None:
        found.clear()
        found.update(wanted)

    return change


def test_every_key_is_needed(tmp_path: Path) -> None:
    """Whichever is taken away is missed, by name; those of the MTP layer only where it is
    loaded.
    """
    save(model(FP8, mtp=True), tmp_path / "x")
    complete = tensors(tmp_path / "x")
    spare = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    for gone in complete.keys() - spare:
        if gone.startswith("model.layers.0.self_attn") or re.search(r"\.experts\.[0-6]\.", gone):
            continue  # others like them are tried
        rewrite(tmp_path / "x", only({k: tensor for k, tensor in complete.items() if k != gone}))
        with pytest.raises(InputError, match=re.escape(gone)):
            load(tmp_path / "x", mtp=True)
        if gone.startswith("model.layers.2.") and f"{gone}_scale_inv" not in complete:
            load(tmp_path / "x")


# ---------------------------- FP8
def decode_e4m3(byte: int) -> float:
    """The number that an e4m3fn byte stands for, from its bits: sign, 4 of exponent (bias 7), 3 of
    mantissa.
    """
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (
        mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


def by_element(q: Tensor, scale: Tensor, block: tuple[int, int], how: Any = None) -> Tensor:
    """What `fp8.dequantize` must give, one element after the other, in double precision."""
    how = how or (lambda value, factor: value * factor)
    values, factors = q.view(torch.uint8).tolist(), scale.double().tolist()
    return torch.tensor(
        [
            [
                how(decode_e4m3(byte), factors[i // block[0]][j // block[1]])
                for j, byte in enumerate(row)
            ]
            for i, row in enumerate(values)
        ],
        dtype=torch.float64,
    )


blocks = st.tuples(st.integers(1, 9), st.integers(1, 9))
shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))
seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    block=blocks,
    seed=seeds,
    band=st.sampled_from([1, 400, 2**25]),
    dtype=st.sampled_from([*DTYPES.values()]),
)
def test_dequantize_by_element(
    shape: tuple[int, int], block: tuple[int, int], seed: int, band: int, dtype: torch.dtype
) -> None:
    """Bit-equal to the definition: any bytes (two are NaN), ragged edges, however the rows are cut
    into bands, into any dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    assert fp8.grid(shape, block) == grid
    scale = torch.rand(grid, generator=generator) * 0.01 + 1e-4
    out = torch.full(shape, float("nan"), dtype=dtype)
    with mock.patch.object(fp8, "BAND_BYTES", band):
        fp8.dequantize(bits.view(fp8.E4M3), scale, block, out)
    # A product of 4 and 24 bits is exact in double precision; fp32 rounds it once, and `out`'s
    # dtype once more.
    expected = by_element(bits.view(fp8.E4M3), scale, block).float().to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_the_wrong_formulas_would_show() -> None:
    """Dividing by the scale, taking the grid transposed, or forgetting the crop give other numbers
    than `by_element`.
    """
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    weight *= (
        1 + torch.arange(40) // 16 + 5 * (torch.arange(40)[:, None] // 16)
    )  # blocks of unlike sizes
    q, scale = fp8.quantize(weight, (16, 16))
    right = by_element(q, scale, (16, 16))
    assert float((right - weight).abs().max()) < 2**-4 * float(weight.abs().max())
    for wrong in (
        by_element(q, scale, (16, 16), lambda value, factor: value / factor),
        by_element(q, scale.T, (16, 16)),
        by_element(q, scale, (14, 14)),  # 40 / 3 blocks, as if they were even
        by_element(q, torch.ones(3, 3), (16, 16)),
    ):
        assert float((wrong - weight).abs().max()) > 2**-4 * float(weight.abs().max())


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    block=blocks,
    seed=seeds,
    band=st.sampled_from([1, 400, 2**25]),
    exponent=st.integers(-30, 30),
)
def test_quantization_error_is_bounded(
    shape: tuple[int, int], block: tuple[int, int], seed: int, band: int, exponent: int
) -> None:
    """Each block's largest lands on 448; half a step of 3 mantissa bits away at most, or of the
    smallest subnormal, 2^-9.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight[::3] *= 1e-4  # some rows far below their block's largest: subnormal
    with mock.patch.object(fp8, "BAND_BYTES", band):
        q, scale = fp8.quantize(weight, block)
    assert q.shape == weight.shape and q.dtype == fp8.E4M3
    assert scale.shape == fp8.grid(shape, block) and scale.dtype == torch.float32
    for i, j in torch.cartesian_prod(*map(torch.arange, scale.shape)).view(-1, 2).tolist():
        rows, columns = (
            slice(i * block[0], (i + 1) * block[0]),
            slice(j * block[1], (j + 1) * block[1]),
        )
        largest = weight[rows, columns].abs().max()
        assert scale[i, j] == largest.clamp(min=1e-12) / 448  # below that, it is as good as zero
        assert float(q[rows, columns].float().abs().max()) == 448 or largest < 1e-12
    factors = scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[
        :, : shape[1]
    ]
    bound = torch.maximum(weight.abs() * 2**-4, factors * 2**-10) * (1 + 1e-6)
    error = (by_element(q, scale, block) - weight).abs()
    assert bool((error <= bound).all())


def test_a_block_of_zeros() -> None:
    """No division by zero: zeros stay zeros, with a finite scale."""
    q, scale = fp8.quantize(torch.zeros(5, 7), (4, 4))
    assert not bool(q.float().any()) and bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (8, 24)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fp8_round_trip(block: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    """save -> load is quantize -> dequantize of each projection, within half a step, and exact for
    all else.
    """
    saved = model(V3.change(fp8_block=block), dtype=dtype, mtp=True)
    save(saved, tmp_path / "x", shard_bytes=20_000)
    found, _ = load(tmp_path / "x", dtype=dtype, mtp=True)
    changed = 0
    for key, place in places(found).items():
        before = places(saved)[key]
        if "_proj" in key and "eh_proj" not in key:
            expected = by_element(*fp8.quantize(before, block), block).float().to(place.dtype)
            assert float((place.float() - before.float()).abs().max()) <= (2**-4 + 2**-8) * float(
                before.float().abs().max()
            )
            changed += not torch.equal(place, before)
        else:
            expected = before
        assert torch.equal(place, expected), key
    assert changed == 5 * 3 + 3 + 2 * 3 * 9, "each projection was quantized"


def test_a_checkpoint_may_mix_fp8_and_others(tmp_path: Path) -> None:
    """R1's does; and one whose blocks were made bf16 loads although its config still speaks of
    FP8.
    """
    save(model(FP8), tmp_path / "x")
    key = "model.layers.0.self_attn.o_proj.weight"
    plain = torch.randn(32, 24).bfloat16()
    rewrite(tmp_path / "x", lambda t: (t.pop(f"{key}_scale_inv"), t.update({key: plain})))
    found, _ = load(tmp_path / "x", dtype="bf16")
    assert torch.equal(places(found)[key], plain)


# ---------------------------- whole checkpoints
def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_random_checkpoint_follows_from_its_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python tools/train/make_checkpoint.py tiny DIR`, byte for byte; beside the trained one, only
    the weights differ.
    """
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        assert make_checkpoint.main(["tiny", str(tmp_path / name), "--seed", seed]) == 0
    assert "5 shards" in capsys.readouterr().out
    one, other, trained = digests(tmp_path / "one"), digests(tmp_path / "other"), digests(TINY)
    assert one == digests(tmp_path / "again")
    shards = {name for name in one if name.endswith(".safetensors")}
    assert {name for name in one if one[name] != other[name]} == shards
    # The trained one was written when tensors had another order, and so other shards.
    assert {name for name in one if one[name] != trained[name]} == shards | {INDEX}
    keys = [
        json.loads((folder / INDEX).read_text())["weight_map"].keys()
        for folder in (tmp_path / "one", TINY)
    ]
    assert keys[0] == keys[1]
    assert trained.keys() - one.keys() == {"README.md", "training.json", "exam.json", "domain.json"}


def test_what_the_tool_makes_is_what_was_asked_for(tmp_path: Path) -> None:
    """Layers, bf16 in place of FP8, megabytes of 10^6 bytes; a bias that a reader can't forget."""
    flags = ["--layers", "2", "--no-fp8", "--shard-mb", "0.5"]
    assert make_checkpoint.main(["tiny", str(tmp_path / "x"), *flags]) == 0
    config = load_config(tmp_path / "x")
    assert config.num_hidden_layers == 2 and config.files.fp8_block is None
    found = tensors(tmp_path / "x")
    assert {t.dtype for key, t in found.items() if not key.endswith("bias")} == {torch.bfloat16}
    shards = [path_tensors(path).values() for path in (tmp_path / "x").glob("*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    assert max(sizes) <= 500_000 and len(sizes) > 1
    assert 0.05 < float(found[BIAS].std()) < 0.2 and found[BIAS].dtype == torch.float32
    for wrong in ("0", "-1", "nan", "1e10"):
        assert make_checkpoint.main(["tiny", str(tmp_path / "y"), f"--shard-mb={wrong}"]) == 2
    assert not (tmp_path / "y").exists()


def test_embedded_checkpoint_has_all_of_r1s_format() -> None:
    """What the issue asks of it: small, sharded, ragged FP8 blocks, bias, groups, YaRN, query rank,
    MTP layer, tokenizer.
    """
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 16e6
    shards = list(TINY.glob("*.safetensors"))
    assert len(shards) > 1 and (TINY / INDEX).is_file()
    config = load_config(TINY)
    assert config.model_type == "deepseek_v3" and config.experts.topk_method == "noaux_tc"
    assert (
        config.files.fp8_block == (128, 128)
        and config.experts.n_group == 4
        and config.attention.q_lora_rank
        and config.num_nextn_predict_layers == 1
    )
    assert config.attention.yarn and config.attention.yarn.factor == 40
    assert config.max_position_embeddings > config.attention.yarn.original_max_position_embeddings
    found = tensors(TINY)
    assert {key for key, tensor in found.items() if tensor.dtype == fp8.E4M3} == {
        key
        for key in found
        if "_proj" in key and "eh_proj" not in key and not key.endswith("_scale_inv")
    }
    quantized = [tensor for tensor in found.values() if tensor.dtype == fp8.E4M3]
    assert any(t.shape[0] % 128 and t.shape[0] > 128 for t in quantized), (
        "cropped at the lower edge"
    )
    assert any(t.shape[1] % 128 and t.shape[1] > 128 for t in quantized), (
        "cropped at the right edge"
    )
    biases = [tensor for key, tensor in found.items() if key.endswith("e_score_correction_bias")]
    assert len(biases) == 5 and all(
        bool(bias.all()) and bias.dtype == torch.float32 for bias in biases
    )
    assert any(key.startswith("model.layers.5.eh_proj") for key in found)

    engine = r1.load(TINY, Backend(device="cpu"), mtp=True, quiet=True)
    assert engine.tokenizer is not None and engine.tokenizer.vocab_size <= config.vocab_size
    assert len(engine.model.mtp) == 1
    (completion,) = engine.generate([[0, 5, 7]], max_new_tokens=3, temperature=0.0)
    assert completion.tokens
