"""The kernels as strategies for the slots `attend` and `dispatch`.

Triton is optional, so nothing here imports it until a strategy is put into a slot.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from r1.errors import setting
from r1.model.attend import Attend, UpProjection
from r1.model.cache import LayerCache
from r1.model.config import AttentionShape
from r1.model.dispatch import Dispatch
from r1.model.gqa_attend import GroupedAttend
from r1.model.moe import Experts
from r1.model.step import Step
from r1.model.strategy import Use


def _why_not(use: Use) -> str | None:
    """Why no kernel can run in such a use."""
    if why := use.machine("triton"):
        return why
    if use.amp:
        reads = "it reads weights as they are stored, not under amp"
        return f"{reads}: use {setting('dtype', use.dtype_name)}, no {setting('amp')}"
    return None


class TritonAttend(Attend):
    """`Absorbed` as kernels, for decode steps: attention.py."""

    name, needs, phases = "triton", None, ("decode",)
    attend: Callable[..., Tensor]

    def why_not(self, use: Use) -> str | None:
        return _why_not(use)

    def prepare(self) -> None:
        from r1.kernels.attention import attend

        self.attend = attend

    def flops(self, shape: AttentionShape) -> float:
        return 2.0 * shape.num_attention_heads * (shape.latent_dim + shape.kv_lora_rank)

    def query_numbers(self, shape: AttentionShape) -> int:
        return shape.qk_head_dim + shape.latent_dim + shape.kv_lora_rank

    def key_numbers(self, shape: AttentionShape) -> int:
        return 0

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        return self.attend(q_nope, q_pe, c_kv, k_pe, up, scale, step, cache)


class TritonGrouped(GroupedAttend):
    """`Grouped` as kernels, for decode steps: grouped.py."""

    name, needs, phases = "triton", None, ("decode",)
    attend: Callable[..., Tensor]

    def why_not(self, use: Use) -> str | None:
        return _why_not(use)

    def prepare(self) -> None:
        from r1.kernels.grouped import attend

        self.attend = attend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
    ) -> Tensor:
        return self.attend(q, k, v, scale, step, cache)


class TritonDispatch(Dispatch):
    """The chosen experts as kernels, which read each in place: experts.py; and a prompt's router:
    prompt_router.py.
    """

    name, rounds = "triton", True
    dispatch: Callable[..., Tensor]

    def why_not(self, use: Use) -> str | None:
        return _why_not(use)

    def prepare(self) -> None:
        from r1.kernels.experts_dispatch import dispatch
        from r1.kernels.prompt_router import route

        self.dispatch, self.route = dispatch, route

    def scratch(
        self, experts: Experts, tokens: int, chosen: int, itemsize: int, *, compiled: bool
    ) -> int:
        dim, inner = experts.down_proj.shape[1:]
        return tokens * (chosen * (dim + inner) + dim) * itemsize

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.dispatch(experts, x, indices, weights)
