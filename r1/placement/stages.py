"""Pipeline parallel: each stage of a mesh holds a range of layers, and hands its output on.

| part of the model | where it lies |
|---|---|
| embedding | first stage; last stage too if the MTP layer, or a tied output head, reads it |
| decoder layers, and their cache | each stage has a range of them |
| output head, MTP layer | last stage |
| final norm, rotation table | every stage: they are small |

All stages run the same code on the same tokens. What a stage lacks gives zeros that nobody reads.
Only two things travel: hidden states, from a stage to the next one, and logits, from the last stage
to all others. So all ranks draw the same token, and accept the same drafts, as all of them have the
same logits and the same random numbers. Each stage may itself be shared by ranks (parallel.py):
rank number i of a stage talks with the ranks number i of the others.

A stage sends and receives with plain calls, and not by torch.distributed.pipelining. That runs a
schedule over microbatches of one batch, of shapes that it fixes before, and its stages keep no
cache. A decode step has no microbatches: its token waits for every stage, one after the other, so a
schedule would add only its own work. Of a prompt, read in chunks, a stage reads the next chunk
while the stages after it still read the ones before. The order of plain calls does that by itself.

Shapes: B rows, S tokens of a row, D hidden_size, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1.model.layers import Linear, Multiply, matmul
from r1.placement.mesh import Mesh
from r1.placement.parallel import Parallel
from r1.storage.matrix import Matrix


class Stages(Parallel):
    """One rank's part of a model whose layers lie on several stages."""

    layers = range(0)  # until `arrange`
    embeds = False

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.mesh.stage == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.mesh.stage == self.mesh.pp - 1

    def arrange(self, model: Any) -> None:
        """Keep this stage's layers, and let the model receive, send and share the logits."""
        sizes = [_elements(block) for block in model.layers]
        sizes[0] += _elements(model.embed_tokens)
        sizes[-1] += _elements(model.lm_head) + _elements(model.mtp)
        self.layers = ranges(sizes, self.mesh.pp)[self.mesh.stage]
        reads = len(model.mtp) > 0 or self.config.tie_word_embeddings
        self.embeds = self.first or (self.last and reads)
        model.first_layer = self.layers.start
        model.layers = nn.ModuleList(model.layers[layer] for layer in self.layers)
        if not self.first:
            model.receive = Receive(self.mesh)
        if not self.last:
            model.send = Send(self.mesh)
            model.mtp = nn.ModuleList()
        model.lm_head = StageHead(model.lm_head, self.mesh)
        super().arrange(model)

    def matrix(self, path: str, matrix: Matrix) -> Matrix:
        here = {"embed_tokens": self.embeds, "lm_head": self.last}.get(path, True)
        return super().matrix(path, matrix) if here else Absent(matrix)

    def holds(self, key: str) -> bool:
        layer = key.removeprefix("model.layers.").partition(".")[0]
        if key.startswith("model.layers.") and layer.isdecimal():
            decoder = int(layer) < self.config.num_hidden_layers
            return int(layer) in self.layers if decoder else self.last
        if key.startswith("model.embed_tokens."):
            return self.embeds
        return self.last or not key.startswith("lm_head.")


def ranges(sizes: Sequence[int], stages: int) -> list[range]:
    """The layers of each stage, in order, so that the largest stage is as small as it can be.

    `sizes` has each layer's size. Every stage has a layer; there are at least as many layers.
    """
    before = [0, *accumulate(sizes)]
    # best[n]: the largest stage's size and the stages' ends, of the first n layers
    best: dict[int, tuple[int, tuple[int, ...]]]
    best = {n: (before[n], (n,)) for n in range(1, len(sizes) + 1)}
    for stage in range(1, stages):
        best = {
            n: min(
                (max(best[m][0], before[n] - before[m]), (*best[m][1], n)) for m in range(stage, n)
            )
            for n in range(stage + 1, len(sizes) + 1)
        }
    _, ends = best[len(sizes)]
    return [range(start, stop) for start, stop in zip((0, *ends), ends, strict=False)]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Receive:
    """Takes the hidden states of the stage before. For the slot of a Transformer."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, D), which only tells shape and dtype -> (B, S, D)."""
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.recv(received, group=self.mesh.pp_group, group_src=self.mesh.stage - 1)
        return received


class Send:
    """Hands the hidden states to the stage after. For the slot of a Transformer."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, D) -> the same."""
        dist.send(x.contiguous(), group=self.mesh.pp_group, group_dst=self.mesh.stage + 1)
        return x


class StageHead(Linear):
    """The output head, which the last stage has: its logits go to all stages, in fp32."""

    def __init__(self, head: Linear, mesh: Mesh) -> None:
        super().__init__(head.matrix.shape[1], head.matrix.shape[0])
        self.matrix, self.words, self.mesh = head.matrix, head.matrix.shape[0], mesh

    def forward(self, x: Tensor, multiply: Multiply = matmul) -> Tensor:
        """(..., D) -> (..., W), on every stage the last one's."""
        last = self.mesh.pp - 1
        if self.mesh.stage == last:
            logits = super().forward(x, multiply).float().contiguous()
        else:
            logits = x.new_empty(*x.shape[:-1], self.words, dtype=torch.float32)
        dist.broadcast(logits, group=self.mesh.pp_group, group_src=last)
        return logits


class Absent(Matrix):
    """A matrix that only other stages hold. It has no numbers, and looking up a row gives zeros."""

    like: Tensor  # of no elements: it has the dtype and the device

    def __init__(self, whole: Matrix) -> None:
        super().__init__()
        self.shape = whole.shape
        self.register_buffer("like", whole.pick(torch.zeros(0, dtype=torch.int64)), False)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_zeros(len(ids), self.shape[1], dtype=dtype)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        return {}
