"""The processes that share a model, in a grid of `pp` x `ep` x `tp`, and what they agree on.

Consecutive ranks share a layer, ep x tp of them: these are a stage. Number `part` of a stage is
number part % tp among those that share heads, and number part // tp among those that share experts.
The grid is made of the process group that is there (ranks.py): importing r1 starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from r1.errors import InputError, setting

T = TypeVar("T")


class SharedError(InputError):
    """An InputError that every rank raises, so that rank 0 may tell it for all."""


@dataclass(frozen=True)
class Mesh:
    """The grid, and this process's place in it.

    Without groups it only tells sizes: those of rank 0, which has the largest share.
    """

    tp: int = 1
    ep: int = 1
    rank: int = 0
    tp_group: Any = None
    group: Any = None
    """All ranks."""
    pp: int = 1
    stage_group: Any = None
    """The ranks of this stage, which share each of its layers."""
    pp_group: Any = None
    """The ranks of all stages that have this one's number in theirs, by stage."""

    @property
    def ranks(self) -> int:
        return self.pp * self.parts

    @property
    def parts(self) -> int:
        """The ranks of a stage."""
        return self.tp * self.ep

    @property
    def stage(self) -> int:
        return self.rank // self.parts

    @property
    def part(self) -> int:
        """This rank's number in its stage."""
        return self.rank % self.parts

    @property
    def tp_rank(self) -> int:
        return self.part % self.tp

    @property
    def ep_rank(self) -> int:
        return self.part // self.tp

    @staticmethod
    def here(tp: int, ep: int, device: str, pp: int = 1) -> Mesh:
        """The grid of the processes that torch.distributed connects. `device` is torch's name.

        Raises InputError if they are more or fewer than the grid has places.
        """
        ranks = pp * ep * tp
        if ranks == 1:  # whoever else is there goes on alone, too
            return Mesh()
        there = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if there != ranks:
            given = {"tp": tp, "ep": ep, "pp": pp}
            asked = " and ".join(setting(name, n) for name, n in given.items() if n > 1)
            raise InputError(
                f"{asked} needs {ranks} processes, and {there} {'were' if there > 1 else 'was'} "
                f"started: use torchrun --nproc-per-node {ranks}"
            )
        from torch.distributed.device_mesh import init_device_mesh  # some builds of torch lack it

        heads = init_device_mesh(device, (pp * ep, tp)).get_group(1)
        if pp == 1:
            return Mesh(tp, ep, dist.get_rank(), heads, dist.group.WORLD, 1, dist.group.WORLD)
        across, stage = init_device_mesh(device, (pp, ep * tp)).get_all_groups()
        return Mesh(tp, ep, dist.get_rank(), heads, dist.group.WORLD, pp, stage, across)

    def shared(self, value: T) -> T:
        """Rank 0's value, on every rank. (It is pickled: only ranks of one command talk here.)"""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def together(self, call: Callable[[], T]) -> T:
        """Call it on every rank. If it raises InputError on one of them, every rank raises it.

        None goes on before all have called it.
        """
        if self.group is None:
            return call()
        wrong: str | None = None
        try:
            result = call()
        except SharedError:  # every rank knows
            raise
        except InputError as error:
            wrong = str(error)
        for rank, sentence in enumerate(self.gather(wrong)):
            if sentence is not None:
                raise SharedError(sentence if rank == 0 else f"rank {rank}: {sentence}")
        return result

    def check_alike(
        self, what: str, value: object, advice: str, *, in_stages: bool = False
    ) -> None:
        """Raise InputError on every rank where a rank has another value than rank 0.

        With `in_stages` each rank is compared with the first one of its stage.

        `what` has the value, as in "the prompts". Of two dicts the sentence shows what differs.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            leader = rank - rank % self.parts if in_stages else 0
            first = values[leader]
            if other != first:
                told = ""
                if isinstance(first, dict) and isinstance(other, dict):
                    names = [name for name in first if first[name] != other.get(name)]
                    ours, theirs = (
                        ", ".join(setting(name, each.get(name)) for name in names)
                        for each in (other, first)
                    )
                    told = f" ({ours}, and not {theirs})"
                raise SharedError(
                    f"rank {rank} differs from rank {leader} in {what}{told}: {advice}"
                )

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values
