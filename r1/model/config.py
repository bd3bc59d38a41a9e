"""One model's sizes and arithmetic, as a frozen dataclass of parts.

Fields have the names of Hugging Face's `config.json`, so a checkpoint's config reads like ours.
files/config_json.py reads and writes that file; shapes.py holds the published shapes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from r1.storage.spec import Spec


@dataclass(frozen=True)
class Yarn:
    """YaRN's settings (arXiv 2309.00071; V2 paper, section 3.1.4), config.json's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    llama_4_scaling_beta: float = 0.0  # Mistral 4's: temper.py

    def temperature(self, weight: float) -> float:
        """`0.1 weight ln(factor) + 1`: section 3.4's sqrt(1/t), where t divides the scores."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def table_factor(self) -> float:
        """Multiplies cos and sin. It is 1 for R1, whose two mscales are equal."""
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Multiplies the softmax scale: 1/t, which is 1.87 for R1."""
        return self.temperature(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class AttentionShape:
    """Latent attention (V3 paper, arXiv 2412.19437, section 2.1.1). Sizes in elements."""

    num_attention_heads: int
    q_lora_rank: int | None  # size of the compressed query; None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    yarn: Yarn | None

    rope_interleave: ClassVar[bool] = True  # which elements of a vector are rotated: see rope.py

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements of `c_kv` and `k_pe`, which a token leaves in the cache of one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's settings for long contexts, config.json's `rope_scaling`; see rope.py."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class GroupedShape:
    """Grouped-query attention (arXiv 2305.13245), see gqa.py. Sizes in elements."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    yarn: Yarn | None = None
    llama3: Llama3 | None = None
    attention_bias: bool = False  # whether q_proj, k_proj and v_proj add a bias, as Qwen2's do
    qk_norm: bool = False  # whether each head's query and key are normed, as Qwen3's are

    rope_interleave: ClassVar[bool] = False

    @property
    def qk_rope_head_dim(self) -> int:
        """The rotated elements of a query or key: all."""
        return self.head_dim

    @property
    def qk_head_dim(self) -> int:
        """Elements of one head's query or key."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Elements of one head's value."""
        return self.head_dim

    @property
    def group(self) -> int:
        """How many query heads share one head of keys and values."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class ExpertShape:
    """Router and experts (V3 paper, section 2.1.2). The defaults mean: no experts."""

    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 1
    n_group: int = 1
    topk_group: int = 1  # how many groups a token may choose experts from
    first_k_dense_replace: int = 0  # how many first layers have a dense feed-forward instead
    topk_method: str = "noaux_tc"  # see router.py
    scoring_func: str = "sigmoid"  # or "softmax"
    norm_topk_prob: bool = True  # whether a token's weights are divided by their sum
    routed_scaling_factor: float = 1.0  # multiplies the weights


@dataclass(frozen=True)
class FileFormat:
    """How the checkpoint's files store weights."""

    fp8_block: tuple[int, int] | None = None  # rows, columns that share a scale; None: no FP8
    stored: tuple[tuple[Spec, frozenset[str]], ...] = ()
    """The formats that memory can keep, each with the names of its matrices.

    A stack of experts has one name, its modules' without their numbers. config.json does not tell
    this: the shards' headers do (files/quantized)."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Regular expressions of tensors' names that the model goes without, each with the reason."""

    @property
    def kind(self) -> str | None:
        """The kind of storage that memory can keep: all formats are of one. None: there is none."""
        return self.stored[0][0].kind if self.stored else None

    def spec(self, name: str) -> Spec | None:
        """The format of a matrix, or of a stack of experts. None: it is not quantized."""
        return next((spec for spec, names in self.stored if name in names), None)


@dataclass(frozen=True)
class Config:
    """One model. Sizes are in elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention: Any  # AttentionShape or GroupedShape, as `latent` and `grouped` are typed
    experts: ExpertShape = field(default_factory=ExpertShape)
    files: FileFormat = field(default_factory=FileFormat)
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0  # MTP layers, which the checkpoint numbers after the others
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    shortened: str = ""  # why max_position_embeddings is less than the file says, if it is

    @property
    def context(self) -> str:
        """The most tokens of a row, in words for messages: "2048", and why, if they are few."""
        why = f" ({self.shortened})" if self.shortened else ""
        return f"{self.max_position_embeddings}{why}"

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` has experts. (MTP layers: `num_hidden_layers` and on.)"""
        return self.experts.n_routed_experts > 0 and layer >= self.experts.first_k_dense_replace

    @property
    def latent(self) -> AttentionShape:
        """`attention` of a model with latent attention. Raises TypeError for another one."""
        if not isinstance(self.attention, AttentionShape):
            raise TypeError(f"{self.model_type} has no latent attention")
        return self.attention

    @property
    def grouped(self) -> GroupedShape:
        """`attention` of a model with grouped-query attention. Raises TypeError for another one."""
        if not isinstance(self.attention, GroupedShape):
            raise TypeError(f"{self.model_type} has no grouped-query attention")
        return self.attention

    def change(self, **values: Any) -> Config:
        """A copy with other values: `config.change(num_hidden_layers=4, n_routed_experts=16)`.

        Fields of `attention`, `experts` and `files` are named directly. Others raise TypeError.
        """
        own = {f.name for f in dataclasses.fields(self)}
        changed = {name: value for name, value in values.items() if name in own}
        for part in ("attention", "experts", "files"):
            before = changed.get(part, getattr(self, part))
            names = {f.name for f in dataclasses.fields(before)} & values.keys()
            changed[part] = dataclasses.replace(before, **{name: values[name] for name in names})
            own |= names
        if unknown := values.keys() - own:
            raise TypeError(f"Config has no {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changed)
