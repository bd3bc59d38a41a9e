"""Prompts over packed weights with `kernels=triton`: no storage is asked to make them dense.

Holds to account: r1/kernels/prompt.py, and the way of prompts in r1/run/ways.py.

Run as in test_kernels.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from conftest import CountingBackend
from models import TINY_QWEN2, V3, unit_gain, with_switches
from tolerances import atol
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

import test_quantized_kernels
from test_kernels import CHIP, DEVICE, DTYPES, SWITCHES, run_here
from test_quantized_kernels import stored

from r1 import build
from r1.kernels import prompt
from r1.kernels.experts_dispatch import dispatch
from r1.model.attend import UpProjection
from r1.model.layers import Linear
from r1.model.moe import Experts
from r1.model.transformer import Transformer
from r1.placement.collectives import Gather, SpreadRows, Sum
from r1.run.runner import Runner
from r1.run.ways import Eager, Unpacking
from r1.storage import int8, quantized
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.matrix import Matrix
from r1.storage.spec import Spec

SPECS = {
    **test_quantized_kernels.SPECS,
    "fp8 128": Spec("fp8", 128, 128),
    "int4 64": Spec("int4", 1, 64, scale="fp16", zeros=True),
    "int4 128": Spec("int4", 1, 128, zeros=True),
}
TINY_SPECS = {
    "fp8": Spec("fp8", 16, 16),
    "int8": Spec("int8", 1, 8, zeros=True),
    "int4": Spec("int4", 1, 8),
}
"""For matrices of 12 to 64 columns."""
MODELS = {
    "latent": V3,
    "grouped": TINY_QWEN2.change(tie_word_embeddings=False, num_hidden_layers=1),
}
PROMPTS = [[5, 9, 20, 7], [11, 3], [40, 41, 42, 43, 44, 45, 46]]
ALL_DENSE, ALL_DIRECT = 0, 10**6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---------------------------- a matrix
@pytest.mark.parametrize("columns", [272, 271])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_dense_has_the_bits_of_the_storage(spec: Spec, columns: int) -> None:
    """Rows of whole words, and of an odd number of bytes. 135 rows: no whole blocks. (To make bf16,
    the interpreter cuts bits off.)
    """
    columns -= spec.kind == "int4" and columns % 2  # 270 numbers are 135 bytes
    weight = stored(spec, 135, columns)
    for name, dtype in DTYPES.items():
        if name != "bf16" or DEVICE.type != "cpu":
            assert torch.equal(prompt.dense(CHIP, weight, dtype), weight.dense(dtype))


@pytest.mark.parametrize("spec", TINY_SPECS.values(), ids=list(TINY_SPECS))
def test_parts_of_a_joined_matrix(spec: Spec) -> None:
    parts = join(stored(spec, 32, 48), stored(spec, 21, 48))
    whole = cast(Any, parts[0]).whole
    assert torch.equal(prompt.dense(CHIP, whole, torch.float32), whole.dense())
    for part in parts:
        assert torch.equal(prompt.dense(CHIP, part, torch.float32), part.dense())


@pytest.mark.parametrize("tokens", [(1,), (2, 3), (2, prompt.FEW_TOKENS)], ids=str)
@pytest.mark.parametrize("spec", TINY_SPECS.values(), ids=list(TINY_SPECS))
def test_a_product(spec: Spec, tokens: tuple[int, ...]) -> None:
    """x is part of a larger tensor, so its rows are further apart than they are long."""
    weight, x = stored(spec, 37, 72), torch.randn(*tokens, 80, device=DEVICE)[..., :72]
    y = prompt.multiply(CHIP, weight, x)
    torch.testing.assert_close(y, weight.matmul(x), atol=atol("algebra fp32"), rtol=1e-5)


def test_what_no_kernel_reads_is_left_to_the_storage() -> None:
    """Columns in the order of a table (g_idx), an odd number of 4-bit columns, dense numbers."""
    spec = Spec("int4", 1, 8, indexed=True)
    indexed = KINDS["int4"].empty(spec, (6, 16), torch.float32)
    indexed.q.random_(0, 255)
    indexed.scale.uniform_()
    cast(Tensor, indexed.group).copy_(torch.randperm(16) // 8)
    odd = stored(Spec("int4", 1, 0), 6, 15)
    plain = Linear(16, 6).requires_grad_(False).matrix
    plain.dense().normal_()
    matrix: Matrix
    for matrix in (indexed, odd, plain):
        matrix.to(DEVICE)
        x = torch.randn(3, matrix.shape[1], device=DEVICE)
        assert torch.equal(prompt.multiply(CHIP, matrix, x), matrix.matmul(x))


def test_rows_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each multiplies its own by a kernel. Here the other rank's are the same."""
    gather = Gather(None, 2)
    monkeypatch.setattr(gather, "last", lambda y: torch.cat((y, 2 * y), dim=-1))
    here, x = stored(TINY_SPECS["int4"], 12, 24), torch.randn(2, 3, 24, device=DEVICE)
    right = here.matmul(x)
    refuse_torch(monkeypatch)
    y = prompt.multiply(CHIP, SpreadRows(here, 0, Sum(None), gather), x)
    torch.testing.assert_close(y, torch.cat((right, 2 * right), dim=-1), atol=1e-5, rtol=1e-5)


# ---------------------------- a model
def packed(name: str, spec: Spec) -> Transformer:
    """A model whose projections and output head are packed, and joined where they can be.

    (kv_b_proj never is packed: r1/switches/precision.py. Routed experts have tests of their own.)
    """
    made = unit_gain(MODELS[name], device=DEVICE.type)
    for module in made.modules():
        if isinstance(module, Linear) and not isinstance(module, UpProjection):
            weight = module.matrix.dense().detach().cpu()
            module.matrix = KINDS[spec.kind].of(weight, spec).to(DEVICE)
    build.join_matrices(made)
    return made


def read(run: Runner) -> Tensor:
    """Ragged prompts, in chunks of 4 tokens of a row: fp32 logits (B, W)."""
    run.prefill_chunk = 4
    return run.prefill(PROMPTS, run.cache(3, 32))


def refuse_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no storage make its numbers dense, and none multiply them in a way of its own."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("torch operations unpack a matrix")

    monkeypatch.setattr(quantized, "dequantize", refuse)
    monkeypatch.setattr(int8, "product", refuse)


@pytest.mark.parametrize("kind", TINY_SPECS)
@pytest.mark.parametrize(
    ("name", "few"), [("latent", ALL_DENSE), ("latent", ALL_DIRECT), ("grouped", ALL_DENSE)]
)
def test_prompts(name: str, kind: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch reads them, without torch's unpacking. On the same model, a runner with
    kernels=torch is what it was: the same bits, by torch's unpacking.
    """
    made = packed(name, TINY_SPECS[kind])
    plain = run_here(made, "fp32")
    before = read(plain)
    assert float(before.std()) > 0.2
    ours = with_switches(plain, **SWITCHES["kernels"])
    assert type(plain.ways["prefill"]) is Eager and isinstance(ours.ways["prefill"], Unpacking)
    monkeypatch.setattr(prompt, "FEW_TOKENS", few)
    with monkeypatch.context() as patch:
        refuse_torch(patch)
        after = read(ours)
        with pytest.raises(AssertionError, match="unpack"):
            read(plain)
    assert float((after - before).abs().max()) < atol("algebra fp32")
    assert torch.equal(read(plain), before)


def test_logits_of_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 tokens by dense matrices, and 40 directly."""
    run = run_here(packed("grouped", TINY_SPECS["int4"]), "fp32")
    tokens = torch.arange(2 * 40, device=DEVICE).view(2, 40) % 48
    right = run.logits(tokens)
    ours = with_switches(run, **SWITCHES["kernels"])
    refuse_torch(monkeypatch)
    for rows in (2, 1):
        gap = (ours.logits(tokens[:rows]) - right[:rows]).abs().max()
        assert float(gap) < atol("algebra fp32")


def test_a_drafter_reads_prompts_likewise() -> None:
    """The MTP layer's block gets the same product as the model's blocks."""
    way = Unpacking(unit_gain(V3, device=DEVICE.type), CHIP)
    given: list[Any] = []

    class Layer(torch.nn.Module):
        block: Callable[..., Any] = staticmethod(lambda _x, step, _cache: given.append(step))

        def forward(self, x: Any, step: Any, cache: Any, block: Callable[..., Any]) -> Any:
            return block(x, step, cache)

    step = way.model.step("prefill", torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 0)
    way.mtp(cast(Any, Layer()))(torch.zeros(1, 1, 32), step, None)
    assert given[0].multiply is way.multiply and step.multiply is not way.multiply


@pytest.mark.parametrize("kind", TINY_SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_prompts(
    name: str, kind: str, compiler: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler takes the products as a whole, experts' too: it gets no numbers to unpack."""
    spec = TINY_SPECS[kind]
    made = packed(name, spec)
    for experts in made.modules():
        if isinstance(experts, Experts):
            for each in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(experts, each).dense().detach().cpu()
                setattr(experts, each, KINDS[spec.kind].of(weight, spec).to(DEVICE))
            experts.gate_proj, experts.up_proj = join(experts.gate_proj, experts.up_proj)
    right = read(run_here(made, "fp32"))
    switches = {**SWITCHES["kernels"], **SWITCHES["prefill_moe"]}
    read(run_here(unit_gain(MODELS[name], device=DEVICE.type), "fp32", **switches, compile=True))
    dense, compiler.graphs = compiler.graphs, 0
    refuse_torch(monkeypatch)
    gap = (read(run_here(made, "fp32", **switches, compile=True)) - right).abs().max()
    assert float(gap) < atol("algebra fp32")
    assert compiler.graphs == dense > 0


def test_compiled_experts_of_two_storages() -> None:
    """Each matrix is read as it is stored itself: here down_proj is plain."""
    experts = Experts(V3)
    for name in ("gate_proj", "up_proj"):
        shape = getattr(experts, name).shape
        packed_stack = KINDS["int4"].of(torch.randn(shape), TINY_SPECS["int4"])
        setattr(experts, name, packed_stack)
    experts.down_proj.dense().detach().normal_()
    experts.to(DEVICE).requires_grad_(False)
    x, weights = torch.randn(5, V3.hidden_size, device=DEVICE), torch.rand(5, 2, device=DEVICE)
    indices = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], device=DEVICE)
    ours = torch.compile(dispatch, fullgraph=True, backend="eager")(experts, x, indices, weights)
    assert torch.equal(ours, dispatch(experts, x, indices, weights))


def test_a_compiled_product_of_what_no_kernel_reads() -> None:
    """It is left to the storage there, too."""
    odd, x = stored(Spec("int4", 1, 0), 6, 15).to(DEVICE), torch.randn(3, 15, device=DEVICE)
    product = torch.compile(prompt.multiply, fullgraph=True, backend="eager")
    assert torch.equal(product(CHIP, odd, x), odd.matmul(x))
