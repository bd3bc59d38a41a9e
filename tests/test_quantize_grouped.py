"""tools/quantize.py on models with grouped-query attention: R1's distilled models, tiny.

Holds to account: tools/quantizing/sites.py, awq.py and job.py. What does not depend on the
attention is in test_quantize.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import quantize as command
import torch
from folders import load
from models import TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, model, random_tokens, runner
from quantizing import awq, job, layer, sites
from quantizing.formats import FORMATS
from quantizing.rounding import Grid
from quantizing.source import Source
from refusals import check_sentence
from tolerances import atol
from torch import Tensor

import r1
from r1 import Backend, Config
from r1.files.names import places, slots
from r1.files.save import save
from r1.model.gqa import GQA
from r1.model.transformer import Block

FAMILIES = {"qwen2": TINY_QWEN2, "llama": TINY_LLAMA, "qwen3": TINY_GROUPED}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ROWS = random_tokens(5, 4, 24, 320).tolist()


def quantized(config: Config, folder: Path, method: str, form: str) -> list[job.Report]:
    """Write `folder`/plain, random weights in bf16, and `folder`/out from it."""
    save(model(config), folder / "plain")
    grid = Grid(4, 8, FORMATS[form].zeros, FORMATS[form].scale)
    source = Source(folder / "plain")
    return job.run(source, folder / "out", job.Plan(method, grid, form), lambda: ROWS, lambda _: 0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", layer.METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_folder_loads_packed(
    family: str, method: str, form: str, tmp_path: Path
) -> None:
    """All projections are packed, with the logits of the dequantized weights. Biases, norms, the
    embedding and the head are what they were, but for the norms that AWQ divides.
    """
    reports = quantized(FAMILIES[family], tmp_path, method, form)
    assert [report["matrices"] for report in reports] == [7, 7, 7]
    packed, read = load(tmp_path / "out", dtype="fp32")
    dense, _ = load(tmp_path / "out", dtype="fp32", quant="none")
    assert not read.skipped and packed.config.files.kind == "int4"
    stored = {key for key, slot in slots(packed).items() if slot.spec}
    assert len(stored) == 3 * 7 and {key.split(".")[-2] for key in stored} == PROJECTIONS
    ours, plain = places(dense), places(load(tmp_path / "plain", dtype="fp32")[0])
    kept = plain.keys() - stored
    assert any("q_proj.bias" in key for key in kept) == (family == "qwen2")
    assert any("q_norm" in key for key in kept) == (family == "qwen3")
    divided = {key for key in kept if not torch.equal(ours[key], plain[key])}
    assert all(key.endswith("layernorm.weight") for key in divided)
    assert bool(divided) == any(report["folded"] for report in reports) == (method == "awq")
    ids = random_tokens(6, 2, 20, 320)
    backend = Backend(device="cpu", dtype="fp32")
    got = r1.load(tmp_path / "out", backend).logits(ids)
    twin = r1.load(tmp_path / "out", replace(backend, quant="none")).logits(ids)
    assert torch.allclose(got, twin, atol=atol("algebra fp32"))
    original = r1.load(tmp_path / "plain", backend).logits(ids)
    assert float((twin - original).norm() / original.norm()) < 0.9  # 4 bits: nearer than chance


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_folding_leaves_the_function_unchanged(
    family: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any powers of two, at every site. Values that several query heads share have no s of
    their own, so o_proj is left alone; else v_proj's rows and bias take it.
    """
    config = FAMILIES[family]
    if not shared:
        config = config.change(num_key_value_heads=config.attention.num_attention_heads)
    made = model(config, dtype="fp32", join="off")
    runner(made, join="off")
    block = cast(Block, made.layers[0])
    (tokens, real), *_ = layer.batches([list(range(12)), list(range(9))])
    assert isinstance(block.self_attn, GQA)
    hidden = torch.randn(*tokens.shape, 48, generator=torch.Generator().manual_seed(9))
    work = layer.Calibrated(
        block, [layer.Batch(tokens, real, hidden)],
        lambda t: made.step("prefill", torch.arange(t.shape[1]).expand_as(t), 0),
    )  # fmt: skip
    before, old = work.output()[0], {name: p.clone() for name, p in block.named_parameters()}
    generator = torch.Generator().manual_seed(4)

    def anything(_readers: list[Tensor], stats: sites.Statistics, _grid: Grid) -> Tensor:
        return torch.exp2(torch.randint(-2, 3, stats.size.shape, generator=generator).float())

    monkeypatch.setattr(awq, "search", anything)
    folded = []
    for site in (site for stage in sites.sites(block) for site in stage):
        seen = work.seen([site]).seen
        if awq.fold(block, site, site.readers, seen, Grid(4, 8)) is not None:
            folded.append(site.name)
        again = work.seen([site]).seen[site.name]  # what the matrices read now
        assert torch.allclose(seen[site.name].h, again.h, rtol=1e-3, atol=1e-5), site.name
        assert torch.allclose(work.output()[0], before, atol=1e-4), site.name
    wanted = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert folded == [name for name in wanted if not (shared and "o_proj" in name)]
    changed = {name for name, p in block.named_parameters() if not torch.equal(p, old[name])}
    alone = ["q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight"]
    alone += ["v_proj.bias", "o_proj.matrix.weight"] if shared else []
    assert changed == old.keys() - {f"self_attn.{name}" for name in alone}


def test_no_experts_only_without_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model(TINY_LLAMA), tmp_path / "plain")
    words = ["--method", "rtn", "--experts-only", str(tmp_path / "plain"), str(tmp_path / "out")]
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert "has no experts: leave it out" in said
    check_sentence(said.strip())
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
