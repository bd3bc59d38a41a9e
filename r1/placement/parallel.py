"""Tensor and expert parallel: each rank of a mesh holds its part of every layer.

| part of the model | shared by | how | what is exchanged |
|---|---|---|---|
| attention | `tp` ranks | each has some heads | one sum after o_proj |
| routed experts | `ep` x `tp` ranks | some experts; of each, some inner values | the sum below |
| dense and shared feed-forward | all ranks | each has some inner values | one sum after the layer |
| embedding, output head, MTP's eh_proj | all ranks | each has some rows | a sum; the outputs |

Every rank holds the norms, the router and the latent cache (of grouped-query attention the cache of
its own heads), and sees every token. So all ranks choose the same experts, and each adds what it
can to the one sum after the layer. With `ep` alone attention is whole on every rank, and there is
one sum a layer and not two. The output head's parts are put together on every rank, so that all
ranks draw the same token from all logits: of R1 it is half a megabyte a row, once a step.

Prompts are added up in the same way, and not by an all-to-all, which would send a token to the
ranks of its experts only. Of n ranks each sends 2 (n - 1) / n vectors a token for the sum. For the
all-to-all each takes an n-th of the tokens. If a token's experts lie on m other ranks, that is 2 m
/ n vectors there and back, and (n - 1) / n more until every rank has all tokens again, as the next
attention wants them. So it sends less where m is below (n - 1) / 2. On two ranks m is 0.98 for
Moonlight (limit 0.5); R1's groups on eight ranks have m = 3.5, just the limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from r1.errors import InputError, setting
from r1.model.config import Config
from r1.model.gqa import GQA
from r1.model.mla import MLA
from r1.model.moe import Experts, MoE
from r1.model.transformer import Block
from r1.placement.collectives import Gather, Group, SpreadRows, Sum
from r1.placement.cuts import CUTS, ROWS, block_of, share
from r1.placement.mesh import Mesh
from r1.placement.placement import Part, Placement
from r1.storage.dense import Dense
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec


class RankExperts(Experts):
    """The routed experts of one rank. A choice that another rank holds is of no expert here.

    `combine` does nothing: the block adds up the ranks' outputs together with the shared experts'.
    """

    def __init__(self, config: Config, ids: range) -> None:
        super().__init__(config, ids)
        self.all = config.experts.n_routed_experts

    def here(self, indices: Tensor, weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        # Few operators, as a decode step waits for each. Other ranks' are `count` or more.
        local = (indices - self.ids.start).remainder(self.all)  # (N, K)
        return [(local.clamp(max=self.count), weights)]


class Parallel(Placement):
    """One rank's part of a model."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        specs: Iterable[Spec],
        make_sum: Callable[[Mesh, Group], Sum] | None = None,
    ) -> None:
        """`specs`: the formats in which the model stores matrices; their blocks stay whole.

        `make_sum`: what adds up for a group of ranks (r1/switches/allreduce.py); None: for sizes
        only. All layers share it, with its memory. Raises InputError.
        """
        self.config, self.mesh, self.block = config, mesh, block_of(specs)
        make = make_sum or (lambda _, group: Sum(group))
        self.sum_stage = self.sum_heads = make(mesh, mesh.stage_group)
        if 1 < mesh.tp < mesh.parts:  # else heads are shared by the same ranks
            self.sum_heads = make(mesh, mesh.tp_group)
        self.cut: dict[int, Matrix] = {}
        """The cut matrices by the whole one's id: a tied embedding is cut once."""
        self.whole: list[Matrix] = []
        """Keeps the whole ones, so that no other object gets their ids."""

    def arrange(self, model: Any) -> None:
        """Give each layer its share of heads and experts, and the slots that add up."""
        mesh = self.mesh
        for module in model.modules():
            if isinstance(module, Block):
                if mesh.tp > 1:
                    module.sum_heads = self.sum_heads
                if mesh.parts > 1:
                    module.sum_inner = self.sum_stage
                module.leads_heads, module.leads_inner = mesh.tp_rank == 0, mesh.part == 0
            elif isinstance(module, MLA):
                heads = self.config.attention.num_attention_heads // mesh.tp
                module.shape = dataclasses.replace(module.shape, num_attention_heads=heads)
                module.kv_b_proj.heads = heads
            elif isinstance(module, GQA):
                self._share_heads(module)
            elif isinstance(module, MoE) and mesh.ep > 1:
                each = self.config.experts.n_routed_experts // mesh.ep
                ids = range(mesh.ep_rank * each, (mesh.ep_rank + 1) * each)
                module.experts = RankExperts(self.config, ids)

    def _share_heads(self, module: GQA) -> None:
        """Leave a rank's heads of grouped-query attention, and the biases that belong to them."""
        shape, tp = self.config.grouped, self.mesh.tp
        module.shape = dataclasses.replace(
            shape,
            num_attention_heads=shape.num_attention_heads // tp,
            num_key_value_heads=shape.num_key_value_heads // tp,
        )
        for layer in (module.q_proj, module.k_proj, module.v_proj):
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(layer.bias.data[: len(layer.bias) // tp].clone())

    def matrix(self, path: str, matrix: Matrix) -> Matrix:
        """This rank's part of a matrix, without numbers. Raises InputError if it splits a block."""
        name = path.rpartition(".")[2]
        rank, ranks = self._among(path)
        if name not in CUTS or ranks == 1:
            return matrix
        if id(matrix) not in self.cut:
            part = share(name, tuple(matrix.shape), rank, ranks, self._block(path))
            small = _empty(path, matrix, tuple(cut.stop - cut.start for cut in part))
            if CUTS[name].of in ("words", "outputs"):
                group = self.mesh.stage_group
                small = SpreadRows(small, rank, self.sum_stage, Gather(group, ranks))
            self.cut[id(matrix)] = small
            self.whole.append(matrix)
        return self.cut[id(matrix)]

    def part(self, key: str, shape: tuple[int, ...]) -> Part:
        path, _, ending = key.rpartition(".")
        name, among = path.rpartition(".")[2], self._among(path)
        if ending == "bias" and name in CUTS and CUTS[name].dim == ROWS:
            one = (*shape, 1)  # as a matrix of one column
            return share(name, one, *among, self._block(path))[:1]
        return share(name, shape, *among, self._block(path))

    def _block(self, path: str) -> int:
        """The block in which a matrix's inner values are shared. Shared experts lie side by side in
        one matrix. Where the same ranks share them and the routed ones, a rank gets a multiple of
        its share of a routed expert: so kernels read its part as whole experts of its own.
        """
        alike = ".shared_experts." in path and self.mesh.parts == self.mesh.tp
        return self.block * (self.config.experts.n_shared_experts if alike else 1)

    def _among(self, path: str) -> tuple[int, int]:
        """This process's number among the ranks that share a matrix, and how many they are."""
        mesh, name = self.mesh, path.rpartition(".")[2]
        if ".experts." in path or (name in CUTS and CUTS[name].of == "heads"):
            return mesh.tp_rank, mesh.tp
        return mesh.part, mesh.parts


def _empty(path: str, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
    """A matrix of the same storage and this shape, without numbers.

    Raises InputError where heads or words end within a block. (Inner values are shared in blocks.)
    """
    if not isinstance(matrix, Quantized):
        like = matrix.dense()
        return Dense(torch.empty(shape, dtype=like.dtype, device=like.device))
    spec, inner = matrix.spec, CUTS[path.rpartition(".")[2]].of == "inner values"
    for side, block, cut, whole in zip(
        ("rows", "columns"), (spec.rows, spec.columns), shape[-2:], matrix.shape[-2:], strict=True
    ):
        if cut != whole and block and cut % block and not inner:
            raise InputError(
                f"{path} is stored in blocks of {block} {side} that share a scale, and a device's "
                f"{cut} {side} would split one: use fewer devices, or {setting('quant', 'none')}"
            )
    if spec.indexed and shape[-1] != matrix.shape[-1]:
        raise InputError(
            f"{path} has a table (g_idx) that spreads its columns over all groups of numbers, so "
            f"devices can't share them: use {setting('quant', 'none')}"
        )
    return type(matrix).empty(spec, shape, matrix.dtype)
