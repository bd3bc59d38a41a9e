"""Placement (r1/placement): experts lie elsewhere, and strategies and kernels stay as they are.

A way to spread experts over two processes is a class of some 35 lines, and gives what a model with
everything here gives. Holds r1/placement, `Experts.here` and `combine`, and the loader's parts to
account. (Experts in host memory: test_offload.py.)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from decoding import PROMPTS, read
from models import TINY, sharp_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerances import atol
from torch import Tensor, nn

from r1 import Backend, InputError, build
from r1.files.names import places
from r1.files.save import save
from r1.kernels.block import DecodeBlock
from r1.model.config import Config
from r1.model.layers import Embedding, Linear
from r1.model.moe import Experts, MoE
from r1.model.transformer import Block
from r1.placement.cuts import CUTS, share
from r1.placement.placement import Part, Placement
from r1.run.runner import Runner
from r1.storage import fp8
from r1.storage.dense import Dense
from r1.storage.matrix import Matrix
from r1.switches.resolve import resolve


# ---------------------------- expert parallel
class RankExperts(Experts):
    """The experts of one rank. A choice that another rank holds gets weight 0 here."""

    def here(self, indices: Tensor, weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        local = indices - self.ids.start
        held = (local >= 0) & (local < self.count)
        return [(local.where(held, torch.zeros_like(local)), weights * held)]

    def combine(self, y: Tensor) -> Tensor:
        dist.all_reduce(y)
        return y

    @property
    def leads(self) -> bool:  # type: ignore[override]
        return self.ids.start == 0


class ExpertParallel(Placement):
    """Each rank holds an even share of every layer's experts, in order."""

    def __init__(self, config: Config, rank: int, ranks: int) -> None:
        share = config.experts.n_routed_experts // ranks
        self.config, self.ids = config, range(rank * share, (rank + 1) * share)

    def arrange(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, MoE):
                module.experts = RankExperts(self.config, self.ids)


# ---------------------------- tests
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sharp logits, in fp32."""
    path = tmp_path_factory.mktemp("placement") / "model"
    config = TINY.change(fp8_block=None)
    save(sharp_logits(device="cpu", config=config).model, path)
    return path


def load(folder: Path, placement: Placement | None = None, **switches: Any) -> Runner:
    from r1.files.config_json import load_config

    config = load_config(folder)
    backend = resolve(Backend(**{"device": "cpu", "dtype": "fp32", **switches}), config)
    model, _ = build.from_checkpoint(folder, config, backend, quiet=True, placement=placement)
    return Runner(model, backend)


STRATEGIES = ("loop", "gather", "grouped")


def rank_main(rank: int, folder: Path, scratch: Path) -> None:
    """One of two processes: every strategy's logits, those of fused blocks, and the bytes held."""
    torch.set_num_threads(1)
    store = f"file://{scratch / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results: dict[str, Tensor] = {}
    for moe in STRATEGIES:
        run = load(folder, ExpertParallel(TINY, rank, 2), moe=moe, prefill_moe=moe)
        results[moe] = read(run, fixed_text())[1]
    results["fused"] = fused(run)
    results["bytes"] = torch.tensor(sum(t.nbytes for t in places(run.model).values()))
    save_file(results, scratch / f"{rank}.safetensors")
    dist.destroy_process_group()


def fixed_text() -> Tensor:
    return torch.arange(6 * len(PROMPTS)).view(6, -1) % TINY.vocab_size


def fused(run: Runner) -> Tensor:
    """A decode step through fused blocks (the kernels' torch twins)."""
    cache = run.cache(len(PROMPTS), 64)
    run.prefill(PROMPTS, cache)
    step = run.next_step(cache, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(PROMPTS), 1, TINY.hidden_size, generator=generator)
    with run.context():
        for block, layer in zip(run.model.layers, cache.layers, strict=True):
            x = DecodeBlock(block, None)(x, step, layer)
    return x.clone()


def test_experts_over_two_processes(folder: Path, tmp_path: Path) -> None:
    """Each rank reads its own experts only; together they give what one process gives."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_main, args=(rank, folder, tmp_path), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for moe in STRATEGIES:
        right = read(load(folder, moe=moe, prefill_moe=moe), fixed_text())[1]
        for each in found:
            torch.testing.assert_close(each[moe], right, atol=atol("experts fp32"), rtol=0)
    whole = load(folder)
    for each in found:
        torch.testing.assert_close(each["fused"], fused(whole), atol=atol("experts fp32"), rtol=0)
    experts = sum(t.nbytes for key, t in places(whole.model).items() if ".experts." in key)
    everything = sum(t.nbytes for t in places(whole.model).values())
    assert [int(each["bytes"]) for each in found] == [everything - experts // 2] * 2


class Half(Placement):
    """One of two devices' share of each matrix that the table cuts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def arrange(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, (Linear, Embedding)) and name in CUTS:
                module.matrix = self.half(module.matrix, name)
            elif isinstance(module, Experts):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    setattr(module, name, self.half(getattr(module, name), name))

    def half(self, matrix: Matrix, name: str) -> Matrix:
        shape = list(matrix.shape)
        shape[CUTS[name].dim - 2] //= 2
        return Dense.empty(*shape)

    def part(self, key: str, shape: tuple[int, ...]) -> Part:
        return share(name_of(key), shape, self.rank, 2)


def name_of(key: str) -> str:
    """The last part of a matrix's name."""
    return key.removesuffix(".weight").rpartition(".")[2]


def test_cuts_add_up(folder: Path) -> None:
    """Of each tensor two ranks' parts are the whole, once; and the table names only real
    matrices.
    """
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set()
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            name = name_of(key)
            cuts = [share(name, tuple(tensor.shape), rank, 2) for rank in range(2)]
            if name in CUTS:
                names.add(name)
                parts = [tensor[cut] for cut in cuts]
                assert torch.equal(torch.cat(parts, dim=CUTS[name].dim), tensor)
            else:
                assert all(torch.equal(tensor[cut], tensor) for cut in cuts)
    other = {"q_proj": "of models without a low rank of q", "eh_proj": "of MTP layers"}
    other |= dict.fromkeys(("k_proj", "v_proj"), "of grouped-query attention")
    assert names == CUTS.keys() - other.keys(), other


def test_only_a_part_is_loaded(folder: Path) -> None:
    """A rank's tensors are its parts of the file's."""
    whole = places(load(folder).model)
    for rank in range(2):
        halves = places(load(folder, Half(rank)).model)
        for key, tensor in halves.items():
            right = whole[key][share(name_of(key), tuple(whole[key].shape), rank, 2)]
            assert torch.equal(tensor, right), key


def test_a_cut_layer(folder: Path) -> None:
    """A feed-forward cut by the table: each half's inner values, and outputs that add up."""
    mlp: Any = cast(Block, load(folder).model.layers[0]).mlp
    x = torch.randn(3, 5, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    halves = []
    for rank in range(2):
        w = {
            name: (matrix := getattr(mlp, name).matrix.dense())[
                share(name, tuple(matrix.shape), rank, 2)
            ]
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        h = nn.functional.silu(x @ w["gate_proj"].T) * (x @ w["up_proj"].T)
        halves.append(h @ w["down_proj"].T)
    torch.testing.assert_close(sum(halves), mlp(x), atol=atol("algebra fp32"), rtol=0)


def test_uneven_cuts_are_refused() -> None:
    with pytest.raises(InputError, match="7 rows, which 2 devices"):
        share("q_b_proj", (7, 4), 0, 2)
    assert share("norm", (7,), 1, 2) == (slice(0, 7),)


def test_heads_are_cut_by_rows_of_their_up_projection() -> None:
    """Each head's W_UK and W_UV lie together, so a device's heads are rows, as in q_b_proj."""
    for name in ("q_proj", "q_b_proj", "kv_b_proj"):
        cut = share(name, (8, 6), 1, 2)
        assert cut == (slice(4, 8), slice(0, 6))


@pytest.mark.parametrize("start", [(1, 0), (0, 1)])
def test_a_cut_through_an_fp8_block_is_refused(start: tuple[int, int]) -> None:
    """Its scales would be read for other numbers than theirs."""
    scale = torch.arange(6.0).view(2, 3)
    whole = fp8.part(scale, (4, 4), slice(4, 7), slice(4, 12))
    assert torch.equal(whole, scale[1:, 1:])
    rows, columns = (slice(first, first + 4) for first in start)
    with pytest.raises(InputError, match="splits a block"):
        fp8.part(scale, (4, 4), rows, columns)
