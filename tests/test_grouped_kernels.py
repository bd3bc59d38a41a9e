"""Compares the Triton kernels of grouped-query attention with their torch twins.

Holds to account: r1/kernels/grouped.py, grouped_kernels.py and, for these models, block.py.

Run as in test_kernels.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, unit_gain
from tolerances import atol
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from test_kernels import (
    CHIP,
    DEVICE,
    DTYPES,
    SWITCHES,
    both,
    close,
    compile_kernels,
    decoded,
    draw,
    intact,
    run_here,
)

from r1 import Config
from r1.kernels.block import DecodeBlock
from r1.kernels.grouped import (
    GroupedLaunch,
    grouped,
    grouped_step,
    grouped_step_torch,
    grouped_torch,
    heads,
    heads_torch,
)
from r1.model.gqa import GQA
from r1.model.rope import angles
from r1.model.step import Step

MODELS = {"qwen2": TINY_QWEN2, "llama": TINY_LLAMA, "qwen3": TINY_GROUPED}
A, U, H = 12, 3, 9


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---------------------------- one kernel each
def layer_of(config: Config, dtype: str, heads: int = H, groups: int = U, size: int = A) -> GQA:
    """One layer's attention, with odd vectors."""
    layer = GQA(config.change(num_attention_heads=heads, num_key_value_heads=groups, head_dim=size))
    layer = layer.requires_grad_(False).to(DEVICE, DTYPES[dtype])
    for name, vector in layer.named_parameters():
        if vector.dim() == 1:
            vector.copy_(torch.randn(vector.shape) * 0.3 + (0 if name.endswith("bias") else 1))
    return layer


def empty_cache(
    rows: int, capacity: int, dtype: str, groups: int = U, size: int = A
) -> tuple[Tensor, Tensor]:
    """Keys and values whose heads lie before slots, as in a real cache, between NaNs."""
    shape = (rows, groups, capacity, size)
    keys, values = (draw(*shape, dtype=dtype).movedim(2, 1) for _ in range(2))
    return keys, values


def step_at(positions: Tensor, size: int = A) -> Step:
    frequency = 100.0 ** -(torch.arange(0, size, 2, device=DEVICE) / size)
    cos, sin = angles(positions, frequency, 1.1, interleave=False)
    rows = torch.arange(len(positions), device=DEVICE)[:, None]
    return Step("decode", positions, cos, sin, rows)


@both
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("positions", [[[0]], [[3], [19]], [[5, 6], [17, 18]]], ids=str)
def test_heads(positions: list[list[int]], family: str, dtype: str) -> None:
    """Biases, norms, rotation, and what is written to the cache; nothing beside it."""
    layer, step = layer_of(MODELS[family], dtype), step_at(torch.tensor(positions, device=DEVICE))
    tokens = step.positions.numel()
    joined = draw(tokens, (H + 2 * U) * A + 3, dtype=dtype)[:, : (H + 2 * U) * A]
    q, k, v = joined.split([H * A, U * A, U * A], dim=-1)  # rows with a stride
    cache = empty_cache(len(positions), 20, dtype)
    theirs = tuple(each.clone() for each in cache)
    close(
        heads(CHIP, q, k, v, layer, step, cache), heads_torch(q, k, v, layer, step, theirs), dtype
    )
    for ours, twin in zip(cache, theirs, strict=True):
        close(ours, twin, dtype)
        assert intact(ours)


def test_a_position_behind_the_cache_writes_nothing() -> None:
    layer, step = layer_of(TINY_QWEN2, "fp32"), step_at(torch.tensor([[20]], device=DEVICE))
    cache = empty_cache(1, 20, "fp32")
    before = copy.deepcopy(cache)
    q, k, v = (draw(1, n * A, dtype="fp32") for n in (H, U, U))
    heads(CHIP, q, k, v, layer, step, cache)
    for ours, old in zip(cache, before, strict=True):
        assert torch.equal(ours, old) and intact(ours)


def attention_inputs(lengths: list[list[int]], dtype: str, capacity: int = 70) -> dict[str, Any]:
    """Rows whose tokens attend to so many slots; the rest of the cache is poison."""
    positions = torch.tensor(lengths, device=DEVICE) - 1  # (B, S)
    cache = empty_cache(len(lengths), capacity, dtype)
    for row, longest in enumerate(positions.amax(dim=1).tolist()):
        for each in cache:
            each[row, longest + 1 :] = float("nan")
    q = draw(positions.numel(), H, A, dtype=dtype, scale=0.6)  # bf16 rounds the twin's scores
    return {"q": q, "cache": cache, "positions": positions, "scale": 0.3}


def attention_twin(given: dict[str, Any]) -> Tensor:
    """The twin looks at the whole cache, where 0 times NaN is NaN."""
    cache = tuple(each.nan_to_num(0.0) for each in given["cache"])
    return grouped_torch(**{**given, "cache": cache})


@both
@pytest.mark.parametrize("lengths", [[[1]], [[70]], [[1], [33], [70]], [[5, 6], [69, 70]]], ids=str)
def test_attention(lengths: list[list[int]], dtype: str) -> None:
    given = attention_inputs(lengths, dtype)
    twin = attention_twin(given)
    for launch in (None, GroupedLaunch(16, 1, 4, 1), GroupedLaunch(16, 8, 4, 2)):
        close(grouped(CHIP, **given, launch=launch), twin, dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "dtype"),
    [
        (20, 1, 12, "fp32"), (34, 2, 40, "fp32"), (3, 3, 2, "fp32"),
        (20, 1, 12, "fp16"), (34, 2, 40, "bf16"),
    ],
)  # fmt: skip
def test_any_heads(heads: int, groups: int, size: int, dtype: str) -> None:
    """Groups beyond a tile of 16, one head of keys, a head for each query; and a row that has
    outgrown its cache, as one that a graph decodes beyond its batch.
    """
    positions = torch.tensor([[0], [19], [25]], device=DEVICE)
    keys, values = (draw(3, groups, 20, size, dtype=dtype).movedim(2, 1) for _ in range(2))
    q = draw(3, heads, size, dtype=dtype, scale=0.6)
    twin = grouped_torch(q, (keys, values), positions, 0.3)
    for launch in (None, GroupedLaunch(16, 4, 4, 2)):
        close(grouped(CHIP, q, (keys, values), positions, 0.3, launch), twin, dtype)


# ---------------------------- heads and attention in one kernel
def step_inputs(
    positions: list[list[int]], family: str, dtype: str, shape: tuple[int, int, int] = (H, U, A)
) -> dict[str, Any]:
    """Rows whose new tokens stand at `positions`; what is not written yet is poison."""
    count, groups, size = shape
    at = torch.tensor(positions, device=DEVICE)
    widths = [n * size for n in (count, groups, groups)]
    joined = draw(at.numel(), sum(widths) + 3, dtype=dtype)[:, : sum(widths)]
    q, k, v = joined.split(widths, dim=-1)  # rows with a stride
    cache = empty_cache(len(positions), 70, dtype, groups, size)
    for row, first in enumerate(at[:, 0].tolist()):
        for each in cache:
            each[row, first:] = float("nan")
    layer = layer_of(MODELS[family], dtype, *shape)
    layer.scale /= 2  # bf16 rounds the twin's scores
    return {"q": q, "k": k, "v": v, "layer": layer, "step": step_at(at, size), "cache": cache}


def check_step(given: dict[str, Any], dtype: str, launch: GroupedLaunch | None = None) -> None:
    """The output is the twin's, and the cache's content is what `heads` writes, bit for bit. (Of
    fp32, a GPU's compiler may join a product and a sum in one of the kernels alone.)
    """
    cache, separate, theirs = (tuple(map(torch.clone, given["cache"])) for _ in range(3))
    ours = grouped_step(CHIP, **{**given, "cache": cache}, launch=launch)
    heads(CHIP, **{**given, "cache": separate})
    for new, old in zip(cache, separate, strict=True):
        free = dtype == "fp32" and DEVICE.type == "cuda"
        torch.testing.assert_close(new, old, rtol=1e-6 * free, atol=1e-6 * free, equal_nan=True)
    cleared = tuple(each.nan_to_num_(0.0) for each in theirs)  # the twin looks at the whole cache
    close(ours, grouped_step_torch(**{**given, "cache": cleared}), dtype)


@pytest.mark.parametrize(
    ("position", "family", "dtype"),
    [
        *((position, "qwen3", "fp32") for position in (0, 15, 32, 69)),
        *((0, family, "fp32") for family in ("qwen2", "llama")),
        *((16, family, dtype) for family in MODELS for dtype in DTYPES),
    ],
)
def test_a_step_of_one_token(position: int, family: str, dtype: str) -> None:
    """The first token of an empty cache, and new slots at the borders of tiles and of splits."""
    given = step_inputs([[position]], family, dtype)
    for launch in (GroupedLaunch(32, 1, 4, 1), GroupedLaunch(16, 8, 4, 2)):
        check_step(given, dtype, launch)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "fp32") for family in MODELS), ("qwen2", "bf16"), ("qwen3", "fp16")],
)
@pytest.mark.parametrize("positions", [[[0], [33], [64], [5]], [[5, 6], [0, 1]]], ids=str)
def test_a_step_of_ragged_rows(positions: list[list[int]], family: str, dtype: str) -> None:
    """Several rows with one token each, and with several, which keep kernels of their own."""
    given = step_inputs(positions, family, dtype)
    for launch in (None, GroupedLaunch(16, 2, 4, 2)):
        check_step(given, dtype, launch)


@pytest.mark.parametrize(("family", "dtype"), zip(MODELS, DTYPES, strict=True))
@pytest.mark.parametrize("shape", [(8, 2, 64), (7, 1, 80), (14, 2, 128), (18, 1, 64)], ids=str)
def test_a_step_of_published_sizes(shape: tuple[int, int, int], family: str, dtype: str) -> None:
    """Sizes of heads that are a power of two and not, and more query heads than a tile has."""
    given = step_inputs([[40], [0]], family, dtype, shape)
    check_step(given, dtype, GroupedLaunch(16, 2, 4, 2))


def test_a_step_behind_the_cache_writes_nothing() -> None:
    """A row that has outgrown its cache attends to all of it, as `grouped` does."""
    given = step_inputs([[70], [3], [75]], "qwen2", "fp32")
    before = copy.deepcopy(given["cache"])
    ready = heads(CHIP, **{**given, "cache": copy.deepcopy(before)})
    o = grouped_step(CHIP, **given)
    for each, old in zip(given["cache"], before, strict=True):
        assert torch.equal(each[[0, 2]], old[[0, 2]]) and intact(each)
    attended = grouped(CHIP, ready, given["cache"], given["step"].positions, given["layer"].scale)
    close(o, attended, "fp32")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_wrong_step_is_seen(name: str) -> None:
    """Each of the new token's vectors counts, in the split that has its slot."""
    given = step_inputs([[2], [16]], "qwen3", "fp32")
    wrong = {**given, name: given[name].roll(1, dims=1), "cache": copy.deepcopy(given["cache"])}
    o = grouped_step(CHIP, **wrong)
    with pytest.raises(AssertionError, match="off by"):
        close(o, grouped_step(CHIP, **given), "fp32")


def wrong_length(given: dict[str, Any]) -> Tensor:
    return grouped(CHIP, **{**given, "positions": given["positions"] - 1})


def wrong_scale(given: dict[str, Any]) -> Tensor:
    return grouped(CHIP, **{**given, "scale": given["scale"] * 1.3})


def wrong_heads(given: dict[str, Any]) -> Tensor:
    return grouped(CHIP, **{**given, "q": given["q"].roll(1, dims=1)}).roll(-1, dims=1)


@both
@pytest.mark.parametrize("wrong", [wrong_length, wrong_scale, wrong_heads])
def test_wrong_attention_is_seen(wrong: Callable[[dict[str, Any]], Tensor], dtype: str) -> None:
    given = attention_inputs([[2], [9], [70]], dtype)
    with pytest.raises(AssertionError, match="off by"):
        close(wrong(given), attention_twin(given), dtype)


def test_poison_is_seen() -> None:
    given = attention_inputs([[2], [9]], "fp32")
    given["positions"] += 1
    assert grouped(CHIP, **given).isnan().any()


# ---------------------------- a whole model
@pytest.mark.parametrize(
    ("switch", "family", "rows", "new", "steps"),
    [
        ("attention", "qwen2", 3, 1, 2),
        ("attention", "qwen3", 2, 3, 1),
        ("kernels", "llama", 1, 1, 1),
        ("kernels", "qwen2", 3, 1, 2),
        ("kernels", "qwen3", 1, 1, 2),
        ("kernels", "qwen3", 2, 2, 1),
    ],
)
def test_a_model_decodes_as_torch_does(
    switch: str, family: str, rows: int, new: int, steps: int
) -> None:
    made = unit_gain(MODELS[family], device=DEVICE.type)
    plain = decoded(run_here(made, "fp32"), rows, new, steps)
    fused = decoded(run_here(made, "fp32", **SWITCHES[switch]), rows, new, steps)
    assert float(plain.std()) > 0.2
    assert float((fused - plain).abs().max()) < atol("algebra fp32")


@pytest.mark.parametrize("family", MODELS)
def test_the_fused_block_of_twins_is_the_block(family: str) -> None:
    """The composition, without a kernel."""
    made = unit_gain(MODELS[family], device=DEVICE.type)
    run = run_here(made, "fp32")
    plain = decoded(run, 3)
    run.blocks["decode"] = [DecodeBlock(block, None) for block in made.layers]
    assert float((decoded(run, 3) - plain).abs().max()) < atol("algebra fp32")


# ---------------------------- for GPUs that aren't here
def test_kernels_compile() -> None:
    """For every target. With biases, without experts; no kernel writes before it has waited."""
    targets = ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942", "gfx1100")
    done = compile_kernels(
        "--shape", "r1-distill-qwen-7b", "--batch", "1", "--target", ",".join(targets),
        "--quant", "none",
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    assert done.out.endswith("all kernels fit\n")
    for target in targets:
        for kernel in ("heads", "grouped_split", "grouped_step", "grouped_sum"):
            assert re.search(rf"^{target} +{kernel}_kernel", done.out, re.MULTILINE), target
