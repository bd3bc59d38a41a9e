"""Compares our model with transformers', layer by layer, on the cases of tests/reference.

Holds to account: r1/model, r1/files, r1/run/trace.py and tools/check/diff_layers.py.

tools/check/make_reference.py made the cases.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diff_layers
import pytest
import torch
from cases import (
    CASES,
    REFERENCE,
    GroupedPadded,
    attention_names,
    check,
    config,
    differences,
    fresh,
    reference,
    runner,
    use_dispatch,
)
from safetensors.torch import load_file, save_file
from tolerances import TOLERANCES, atol

from r1 import InputError
from r1.files.names import places
from r1.model.config import AttentionShape, Llama3, Yarn
from r1.run.runner import Runner
from r1.run.trace import Difference, compare, first_divergence, trace

WITH_ATTENTION = [(case, attention) for case in CASES for attention in attention_names(case)]
EXPERTS = ("loop", "gather", "grouped")
PAIRS = [
    (case, attention, moe)
    for case, attention in WITH_ATTENTION
    for moe in (EXPERTS if config(case).experts.n_routed_experts else EXPERTS[:1])
]
"""Every pair of strategies. Models without experts have none of them."""
LATENT = [case for case in CASES if isinstance(config(case).attention, AttentionShape)]
SISTERS = ("glm", "glm-hf5", "youtu", "sarvam", "mistral4", "v32")
"""Cases of other families with latent attention."""
DECODED = ["v3-yarn", "v3-odd", "v3-groups", "v2-groups", *SISTERS]
DECODED += ["qwen2-biases", "llama-scaled", "qwen3-yarn"]


# ---------------------------- prefill
@pytest.mark.parametrize(("case", "attention", "moe"), PAIRS)
def test_every_layer_agrees(case: str, attention: str, moe: str) -> None:
    """Logits, each layer's attention, feed-forward and output, and the router's choices, for each
    pair of strategies.
    """
    switches = {"attention": attention, "prefill_attention": attention}
    if moe == "grouped":  # no case has aligned sizes: the same function runs on widened weights
        run = use_dispatch(runner(case, **switches), GroupedPadded())
    else:
        run = runner(case, **switches, prefill_moe=moe)
    check(case, run)


@pytest.mark.parametrize("case", CASES)
def test_separate_matrices_agree(case: str) -> None:
    """The tests above join matrices of one input, and rotate queries and key in one call."""
    check(case, fresh(case, join="off"))


def test_grouped_refuses_sizes_that_are_not_aligned() -> None:
    for case in LATENT:
        if not config(case).experts.n_routed_experts:
            continue
        with pytest.raises(InputError, match="grouped_mm wants rows of a multiple of 16 bytes"):
            runner(case, prefill_moe="grouped")


def test_the_cases_cover_what_is_promised() -> None:
    """Each variant of the architecture has its reference."""
    found = [config(case) for case in LATENT]
    assert len(found) == 19
    assert {c.attention.q_lora_rank is None for c in found} == {True, False}
    assert {1, 8} <= {c.experts.n_group for c in found if c.experts.topk_method != "greedy"}
    assert {(c.experts.topk_method, c.experts.norm_topk_prob) for c in found} >= {
        ("noaux_tc", True),
        ("noaux_tc", False),
        ("greedy", True),
    }
    assert {c.experts.first_k_dense_replace for c in found} >= {0, 1, 3}
    for case, c in zip(LATENT, found, strict=True):
        if c.attention.yarn:
            assert c.attention.yarn.factor == 40
            assert (
                reference(case)["tokens"].shape[1]
                > c.attention.yarn.original_max_position_embeddings
            ), f"{case} stays within"
    assert any(
        c.hidden_size % 2 and c.attention.kv_lora_rank % 2 and c.experts.moe_intermediate_size % 2
        for c in found
    )


def test_the_grouped_cases_cover_what_is_promised() -> None:
    """Biases, norms, ties, both kinds of scaling beyond the original length, and every group."""
    found = [(case, config(case)) for case in CASES if case not in LATENT]
    shapes = [c.grouped for _, c in found]
    assert {c.model_type for _, c in found} == {"qwen2", "llama", "qwen3"}
    assert {c.tie_word_embeddings for _, c in found} == {True, False}
    for name in ("attention_bias", "qk_norm"):
        assert {getattr(shape, name) for shape in shapes} == {True, False}
    assert {1, 3, 6} <= {shape.group for shape in shapes}
    scaled = [(case, c.grouped.yarn or c.grouped.llama3) for case, c in found]
    assert {type(scaling) for _, scaling in scaled} == {Yarn, Llama3, type(None)}
    for case, scaling in scaled:
        if scaling is not None:
            length = reference(case)["tokens"].shape[1]
            assert length > scaling.original_max_position_embeddings, f"{case} stays within"


# ---------------------------- decode
@pytest.mark.parametrize(
    ("case", "attention", "moe"), [pair for pair in PAIRS if pair[0] in DECODED]
)
def test_decoding_agrees(case: str, attention: str, moe: str) -> None:
    """One token after the other through the cache gives the reference's logits too."""
    run = runner(case, attention=attention, moe="loop" if moe == "grouped" else moe)
    if moe == "grouped":
        use_dispatch(run, GroupedPadded())
    tokens, logits = reference(case)["tokens"], reference(case)["logits"]
    read = tokens.shape[1] // 2
    cache = run.cache(*tokens.shape)
    got = [run.prefill(tokens[:, :read].tolist(), cache)]
    got += [run.decode(tokens[:, i : i + 1], cache)[:, 0] for i in range(read, tokens.shape[1])]
    off = (torch.stack(got, dim=1) - logits[:, read - 1 :]).abs().amax(dim=(0, 2))
    wrong = (off > atol("reference fp32")).nonzero().flatten().tolist()
    assert not wrong, f"first off at position {read - 1 + wrong[0]}, by {off[wrong[0]]:.2e}"


# ---------------------------- the comparison itself
@pytest.mark.parametrize(
    "name",
    ["attn.0", "mlp.0", "hidden.0", "attn.1", "router_indices.1", "router_weights.1", "logits"],
)
def test_a_failure_names_the_first_layer_that_is_off(name: str) -> None:
    """Where a tensor and all later ones are off, the comparison gives that tensor's name."""
    ours = trace(runner("v3-yarn"), reference("v3-yarn")["tokens"])
    theirs = dict(reference("v3-yarn"))
    for wrong in list(ours)[list(ours).index(name) :]:
        theirs[wrong] = theirs[wrong] + (1 if "indices" in wrong else 1e-3)
    first = first_divergence(compare(ours, theirs, atol("reference fp32")))
    assert first is not None and first.name == name


def test_nan_and_other_shapes_diverge() -> None:
    ours = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    nan = compare(
        ours,
        {"a": torch.tensor([0.0, float("nan")]), "b": torch.zeros(3), "c": torch.zeros(2)},
        1.0,
    )
    assert [(d.name, d.max_abs, d.diverges) for d in nan] == [
        ("a", float("inf"), True),
        ("b", float("inf"), True),
        ("c", 0, False),
    ]
    with pytest.raises(KeyError):
        compare(ours, {"d": torch.zeros(1)}, 1.0)


def test_check_fails_on_a_wrong_model() -> None:
    run = fresh("v3-dense3")
    places(run.model)["model.layers.2.mlp.down_proj.weight"][3, 3] += 0.3
    with pytest.raises(AssertionError, match=r"v3-dense3: first divergence at mlp\.2: off by"):
        check("v3-dense3", run)


def test_every_tolerance_has_a_reason() -> None:
    assert all(row.atol > 0 and row.scale > 0 and len(row.why) > 40 for row in TOLERANCES.values())
    worst = max(
        (d for case in CASES for d in differences(case) if "indices" not in d.name),
        key=lambda d: d.max_abs,
    )
    assert worst.max_abs < atol("reference fp32") / 4, f"the row's reason is out of date: {worst}"


# ---------------------------- tools/check/diff_layers.py
def corrupted(case: str, key: str, folder: Path) -> Path:
    """A copy of a case with one weight changed."""
    shutil.copytree(REFERENCE / case, folder)
    weights = load_file(folder / "model.safetensors")
    weights[key].view(-1)[0] += 1.0
    save_file(weights, folder / "model.safetensors")
    return folder


def test_diff_layers_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        diff_layers.main(
            [
                str(REFERENCE / "v3-dense3"),
                "--prefill-attention",
                "absorbed",
                "--prefill-moe",
                "gather",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    assert set(names) == reference("v3-dense3").keys() - {"tokens"} and not err
    assert all(line.endswith("  ok") for line in lines[1:-1]) and lines[-1].startswith(
        "all 16 agree within 0.0001"
    )


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("model.layers.2.self_attn.kv_b_proj.weight", "attn.2"),
        ("model.layers.1.mlp.up_proj.weight", "mlp.1"),
        ("model.layers.3.mlp.gate.weight", "router_indices.3"),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", "mlp.3"),
        ("model.norm.weight", "final_norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_diff_layers_names_a_corrupt_layer(
    key: str, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diff_layers.main([str(corrupted("v3-dense3", key, tmp_path / "case"))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"first divergence: {first}"
    marked = [line.split()[0] for line in lines[1:-1] if line.endswith("DIVERGES")]
    assert marked[0] == first


def test_diff_layers_takes_its_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    assert diff_layers.main([str(REFERENCE / "v3-plain"), "--tolerance", "1e-9"]) == 1
    assert "first divergence: attn.0" in capsys.readouterr().out


def test_diff_layers_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence on stderr, exit status 2, nothing on stdout."""

    def complaint(*arguments: str) -> str:
        assert diff_layers.main([*arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("diff_layers: ") and err.count("\n") == 1
        return err

    assert "there is no folder" in complaint(str(tmp_path / "nothing"))
    case = tmp_path / "case"
    shutil.copytree(REFERENCE / "v3-plain", case)
    assert "use gather" in complaint(str(case), "--prefill-moe", "grouped")
    assert "--tolerance nan" in complaint(str(case), "--tolerance", "nan")
    assert "loop" in complaint(str(case), "--compile", "--prefill-moe", "loop")
    path = case / "reference.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    assert "cut off or corrupt" in complaint(str(case))
    save_file({"tokens": torch.zeros(1, 3)}, path)
    assert "no int64 tensor `tokens`" in complaint(str(case))
    save_file({"tokens": torch.tensor([[0, 40]]), "logits": torch.zeros(1)}, path)
    assert "outside config.json's vocabulary of 40" in complaint(str(case))
    save_file({"tokens": torch.tensor([[0, 4]])}, path)
    assert "nothing to compare" in complaint(str(case))
    save_file({"tokens": torch.tensor([[0, 4]]), "other": torch.zeros(1)}, path)
    assert "none of the names" in complaint(str(case))
    path.unlink()
    assert "has no reference.safetensors" in complaint(str(case))
    (case / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    assert "model_type" in complaint(str(case))


def test_diff_layers_shows_every_kind_of_row() -> None:
    rows = [
        Difference("attn.0", 1e-6, 3.0, False),
        Difference("router_indices.10", 2, 7, True),
        Difference("router_indices.11", float("inf"), float("nan"), True),
    ]
    text = diff_layers.table(rows).splitlines()
    assert "1.00e-06" in text[1] and "2 tokens" in text[2] and " inf " in text[3]
    assert [line.split()[-1] for line in text[1:]] == ["ok", "DIVERGES", "DIVERGES"]


def test_a_run_without_the_cache_leaves_no_hooks() -> None:
    run: Runner = runner("v3-plain")
    trace(run, reference("v3-plain")["tokens"])
    assert not any(module._forward_hooks for module in run.model.modules())
