"""Quantized storage: packed numbers are their definition, however a matrix is asked for them.

Holds to account: r1/storage (spec, codes, packing, quantized, fp8, int8, int4, int4_cpu, joined).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from r1.errors import InputError
from r1.storage import fp8
from r1.storage.codes import Codes, dequantize, part
from r1.storage.dense import Dense
from r1.storage.int4 import Int4
from r1.storage.int4_cpu import CpuInt4, takes
from r1.storage.joined import Part, join, products
from r1.storage.kinds import KINDS, USUAL
from r1.storage.packing import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec
from r1.switches.machine import Machine

SPECS = [
    *USUAL.values(),
    Spec("fp8", 16, 16), Spec("fp8", 1, 0), Spec("fp8", 0, 0), Spec("int8", 16, 8),
    Spec("int8", 1, 8, scale="bf16", zeros=True), Spec("int4", 1, 32, scale="fp16"),
    Spec("int4", 1, 8, scale="bf16", zeros=True), Spec("int4", 1, 0), Spec("int4", 0, 0),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_element(codes: Codes, spec: Spec) -> Tensor:
    """The definition, one number after the other, in double precision."""
    height, width = spec.block(codes.q.shape)
    out = torch.empty(codes.q.shape, dtype=torch.float64)
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            across = i // width if codes.group is None else int(codes.group[i])
            at = (o // height, across)
            zero = (8 if spec.kind == "int4" else 0) if codes.zero is None else int(codes.zero[at])
            out[o, i] = (float(codes.q[o, i]) - zero) * float(codes.scale[at])
    return out


def codes_of(matrix: Quantized) -> Codes:
    packed = matrix.stored()
    q, scale, zero, group = (packed.get(name) for name in matrix.NAMES)
    assert q is not None and scale is not None
    return Codes(matrix.unpack(q, matrix.shape[-1]), scale, zero, group)


@pytest.mark.parametrize("spec", SPECS, ids=Spec.describe)
@pytest.mark.parametrize("shape", [(5, 24), (33, 17), (16, 32), (1, 1)])
def test_the_numbers_are_their_definition(spec: Spec, shape: tuple[int, int]) -> None:
    """Odd sizes, cropped blocks; any dtype is rounded to once."""
    weight = random(*shape)
    matrix = KINDS[spec.kind].of(weight, spec)
    right = by_element(codes_of(matrix), spec).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dense(dtype), right.to(dtype))
    assert matrix.dense().dtype == weight.dtype


class Divisors(TorchDispatchMode):
    """Notes by what tensors are divided: by tensors, or by Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[type] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.seen.add(type(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", SPECS, ids=Spec.describe)
def test_every_device_rounds_alike(spec: Spec) -> None:
    """A GPU multiplies by the reciprocal of a Python number, which is another rounding.

    FP8 numbers are few, so of a block of them many lie halfway between two of int8.
    """
    weight = random(256, 96).to(fp8.E4M3).float()
    with Divisors() as divisors:
        packed = KINDS[spec.kind].quantize(weight, spec)
    assert divisors.seen == {Tensor}
    with Divisors() as divisors:
        weight / 127
    assert Tensor not in divisors.seen
    if torch.cuda.is_available():
        for name, tensor in KINDS[spec.kind].quantize(weight.cuda(), spec).items():
            assert torch.equal(tensor.cpu().view(torch.uint8), packed[name].view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    exponent=st.integers(-30, 20),
    seed=st.integers(0, 2**31),
)
def test_the_error_of_rounding_is_bounded(
    spec: Spec, shape: tuple[int, int], exponent: int, seed: int
) -> None:
    """Whole numbers: half a step of the block's scale, and what rounding the scale adds."""
    if spec.kind == "fp8":
        return  # tests/test_checkpoint.py
    if spec.scale == "fp16":
        exponent //= 6  # its range is small
    weight = random(*shape, seed=seed) * 2.0**exponent + 2.0**exponent
    matrix = KINDS[spec.kind].of(weight, spec)
    codes = codes_of(matrix)
    ones = Codes(torch.ones(shape), codes.scale, torch.zeros_like(codes.scale))
    step = dequantize(ones, spec)
    span = 256 if spec.kind == "int8" else 16
    slack = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}[spec.scale] * span
    assert bool(((matrix.dense() - weight).abs() <= step * (0.5 + slack)).all())


def test_zero_points_help_where_numbers_lie_to_one_side() -> None:
    weight = random(8, 64).abs() + 3
    plain, zeros = Spec("int4", 1, 32), Spec("int4", 1, 32, zeros=True)
    errors = [
        float((KINDS["int4"].of(weight, spec).dense() - weight).abs().mean())
        for spec in (plain, zeros)
    ]
    assert errors[1] < errors[0] / 2


def test_zeros_stay_zeros() -> None:
    for spec in SPECS:
        assert not bool(KINDS[spec.kind].of(torch.zeros(5, 9), spec).dense().any())


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_packing_and_back(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (3, count), generator=generator)
    assert torch.equal(unpack_nibbles(pack_nibbles(q), count).long(), q)
    for bits, order in ((4, None), (4, (0, 4, 1, 5, 2, 6, 3, 7)), (8, None), (2, None)):
        numbers = torch.randint(0, 2**bits, (3, count * 16), generator=generator)
        words = pack_words(numbers, bits, order)
        assert words.dtype == torch.int32
        assert torch.equal(unpack_words(words, bits, order).long(), numbers)


def test_bytes_are_words() -> None:
    """The bytes of compressed-tensors' words, least significant first, are ours."""
    q = torch.randint(0, 16, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_words(q, 4).view(torch.uint8), pack_nibbles(q))


@pytest.mark.parametrize("spec", SPECS, ids=Spec.describe)
def test_a_stack_is_its_matrices(spec: Spec) -> None:
    weight = random(5, 32, 24)
    stack = KINDS[spec.kind].of(weight, spec)
    alone = [KINDS[spec.kind].of(each, spec).dense() for each in weight]
    assert torch.equal(stack.dense(), torch.stack(alone))
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(stack.pick(ids), torch.stack(alone)[ids])
    assert torch.equal(stack.one(4), alone[4])
    x = random(7, 24)
    ends = torch.tensor([2, 2, 7, 7, 7], dtype=torch.int32)
    right = torch.cat((F.linear(x[:2], alone[0]), F.linear(x[2:], alone[2])))
    torch.testing.assert_close(stack.grouped(x, ends), right)


def test_only_the_chosen_experts_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = USUAL["int4"]
    stack = KINDS["int4"].of(random(6, 4, 32), spec)
    first, second = join(stack, KINDS["int4"].of(random(6, 4, 32, seed=1), spec))
    asked: list[int] = []
    unpack = KINDS["int4"].unpack

    def count(packed: Tensor, columns: int) -> Tensor:
        asked.append(packed.numel() * 2 // columns)
        return unpack(packed, columns)

    monkeypatch.setattr(KINDS["int4"], "unpack", staticmethod(count))
    for matrix, rows in ((stack, 4), (first, 8), (second, 8)):
        matrix.pick(torch.tensor([1, 5]))
        matrix.one(3)
        assert asked == [2 * rows, rows]
        asked.clear()


def test_bytes_as_stored() -> None:
    stack = KINDS["int4"].of(random(2, 4, 256), USUAL["int4"])
    assert stack.nbytes == 2 * 4 * (128 + 2 * 2)
    assert KINDS["int8"].of(random(4, 256), USUAL["int8"]).nbytes == 4 * 256 + 4 * 4
    assert KINDS["fp8"].of(random(200, 256), USUAL["fp8"]).nbytes == 200 * 256 + 2 * 2 * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_matmul_and_joined_parts(kind: str, lead: tuple[int, ...]) -> None:
    """Two joined matrices give what they give apart."""
    spec = USUAL[kind]
    one, two = (KINDS[kind].of(random(*lead, rows, 40, seed=rows), spec) for rows in (128, 60))
    first, second = join(one, two)
    assert isinstance(first, Part) and isinstance(first.whole, KINDS[kind])
    x = random(7, 40)
    for ours, right in ((first, one), (second, two)):
        assert ours.shape == right.shape
        assert torch.equal(ours.dense(), right.dense())
        assert ours.stored().keys() == right.stored().keys()
        for name, tensor in right.stored().items():
            assert torch.equal(ours.stored()[name].float(), tensor.float())
        if lead:
            ids = torch.tensor([2, 0])
            assert torch.equal(ours.pick(ids), right.pick(ids))
            assert torch.equal(ours.one(1), right.one(1))
        else:
            torch.testing.assert_close(ours.matmul(x), F.linear(x, right.dense()))
    assert first.nbytes + second.nbytes <= one.nbytes + two.nbytes
    both = products(lambda m: m.dense().mT, first, second)
    assert torch.equal(both[0], one.dense().mT) and torch.equal(both[1], two.dense().mT)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (USUAL["fp8"], USUAL["fp8"]),  # 60 rows are half a block
        (USUAL["int4"], USUAL["int8"]),
        (USUAL["int4"], Spec("int4", 1, 32, scale="bf16")),
        (Spec("fp8", 0, 0), Spec("fp8", 0, 0)),  # one scale each
    ],
)
def test_what_cant_be_joined_stays_apart(one: Spec, two: Spec) -> None:
    matrices = [KINDS[spec.kind].of(random(60, 40), spec) for spec in (one, two)]
    assert join(*matrices) == tuple(matrices)
    mixed = (matrices[0], Dense(random(60, 40)))
    assert join(*mixed) == mixed


def test_under_autocast() -> None:
    matrix = KINDS["int4"].of(random(8, 32), USUAL["int4"])
    x = random(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = matrix.matmul(x)
    assert torch.equal(ours, F.linear(x.bfloat16(), matrix.dense(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (4, 64), (5, 64), (2, 40), (3, 33)])
def test_products_with_int8(dtype: torch.dtype, rows: int, columns: int) -> None:
    """torch's CPU operator for few rows of aligned widths; scales factored out for others."""
    stack = KINDS["int8"].of(random(3, 7, columns), USUAL["int8"])
    x = random(rows, columns, seed=1).to(dtype)
    right = F.linear(x.double(), stack.one(1, torch.float64))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    alone = KINDS["int8"](
        stack.spec, (7, columns), dtype, {name: t[1] for name, t in stack.stored().items()}
    )
    ends = torch.tensor([0, rows, rows], dtype=torch.int32)
    products = [alone.matmul(x), alone.matmul(x[:, None])[:, 0]]
    if dtype != torch.float16 or columns % 8 == 0:  # torch's grouped_mm reads 16 bytes at a time
        products.append(stack.grouped(x, ends))
    for ours in products:
        assert ours.dtype == dtype
        assert float((ours - right).abs().max()) < bound * float(right.abs().max())


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(64, 256), (3, 192, 512), (3, 64, 270)])
def test_another_order_for_the_cpus_operator(shape: tuple[int, ...], columns: int) -> None:
    """The numbers stay the same, in whichever way they are asked for."""
    spec = Spec("int4", 1, columns, scale="bf16")
    plain = Int4.of(random(*shape).bfloat16(), spec)
    assert isinstance(plain, Int4)
    ours = CpuInt4(plain)
    for dtype in (torch.float32, torch.bfloat16, None):
        assert torch.equal(ours.dense(dtype), plain.dense(dtype))
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(ours.pick(ids, torch.float32), plain.pick(ids, torch.float32))
    for name, tensor in plain.stored(slice(5, 60)).items():
        assert torch.equal(ours.stored(slice(5, 60))[name], tensor)
    if len(shape) == 3:
        assert torch.equal(ours.one(1), plain.one(1))
    filled = math.prod(shape[:-1]) * (-shape[-1] % columns) // 2
    assert plain.nbytes < ours.nbytes == plain.nbytes + 2 * plain.scale.numel() + filled


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("columns", [256, 208])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_the_cpus_operator(dtype: torch.dtype, columns: int, rows: int) -> None:
    """208 columns are a group of 128 and one of 80."""
    spec = Spec("int4", 1, 128, scale="bf16")
    plain = Int4.of(random(3, 128, columns).bfloat16(), spec)
    assert isinstance(plain, Int4)
    stack, x = CpuInt4(plain), random(rows, columns, seed=1).to(dtype)
    one = {name: tensor[1] for name, tensor in plain.stored().items()}
    alone = CpuInt4(Int4(spec, (128, columns), torch.bfloat16, one))
    right = F.linear(x.double(), plain.one(1, torch.float64))
    ends = torch.tensor([0, rows, rows], dtype=torch.int32)
    under = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    for ours in (alone.matmul(x), alone.matmul(x[:, None])[:, 0], stack.grouped(x, ends)):
        assert ours.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert float((ours - right).abs().max()) < bound * float(right.abs().max())
    with under:
        assert torch.equal(alone.matmul(x), alone.matmul(x.bfloat16()))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (Spec("int4", 1, 128, scale="bf16", zeros=True), (64, 128)),
        (Spec("int4", 1, 128, scale="fp16"), (64, 128)),  # it would be rounded to bf16
        (Spec("int4", 1, 48, scale="bf16"), (64, 96)),
        (Spec("int4", 1, 0, scale="bf16"), (64, 128)),
        (Spec("int4", 2, 128, scale="bf16"), (64, 128)),
        (Spec("int4", 1, 128, scale="bf16"), (65, 128)),
        (Spec("int4", 1, 128, scale="bf16"), (64, 161)),
        (Spec("int8", 1, 128, scale="bf16"), (64, 128)),
    ],
)
def test_what_the_cpus_operator_does_not_take(spec: Spec, shape: tuple[int, int]) -> None:
    assert takes(Spec("int4", 1, 128, scale="bf16"), (64, 128)) and not takes(spec, shape)
    if spec.kind == "int4":
        with pytest.raises(ValueError, match="no layout"):
            CpuInt4(Int4.empty(spec, shape, torch.bfloat16))  # type: ignore[arg-type]


def test_columns_of_any_group() -> None:
    """GPTQ's g_idx: a table of the columns' groups."""
    spec = Spec("int4", 1, 8, zeros=True, indexed=True)
    generator = torch.Generator().manual_seed(0)
    codes = Codes(
        torch.randint(0, 16, (3, 5, 24), generator=generator, dtype=torch.uint8),
        torch.rand(3, 5, 3, generator=generator),
        torch.randint(0, 17, (3, 5, 3), generator=generator, dtype=torch.uint8),
        torch.randint(0, 3, (3, 24), generator=generator, dtype=torch.int32),
    )
    matrix = KINDS["int4"](spec, (3, 5, 24), torch.float32, KINDS["int4"].encode(codes))
    for e in range(3):
        assert codes.zero is not None and codes.group is not None
        one = Codes(codes.q[e], codes.scale[e], codes.zero[e], codes.group[e])
        assert torch.equal(matrix.one(e), by_element(one, spec).float())
        assert torch.equal(matrix.dense()[e], matrix.one(e))


@pytest.mark.parametrize("spec", SPECS, ids=Spec.describe)
def test_a_part_of_a_matrix(spec: Spec) -> None:
    """What one of several devices holds; a cut must start at a whole block."""
    codes = codes_of(KINDS[spec.kind].of(random(256, 256), spec))
    rows, columns = slice(128, 256), slice(128, 200)
    cut = part(codes, spec, rows, columns)
    assert torch.equal(dequantize(cut, spec), dequantize(codes, spec)[rows, columns])
    cuts: dict[str, Any] = {}
    if spec.rows > 1:
        cuts["rows"] = (slice(4, 256), columns)
    if spec.columns > 1:
        cuts["columns"] = (rows, slice(4, 200))
    for cut_rows, cut_columns in cuts.values():
        with pytest.raises(InputError, match="splits a block of .* numbers"):
            part(codes, spec, cut_rows, cut_columns)


@pytest.mark.skipif(bool(Machine.here().why_not("compile")), reason="torch.compile can't run here")
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_blocks_at_the_edge_compiled(kind: str) -> None:
    """By the real compiler: that of torch 2.13 for CPUs left the last block's part unwritten."""
    weight = KINDS[kind].of(torch.randn(72, 160), USUAL[kind])
    torch._dynamo.reset()
    compiled = torch.compile(lambda: weight.dense(torch.float32))
    torch.testing.assert_close(compiled(), weight.dense(torch.float32))
