"""Hugging Face's `config.json` -> one frozen dataclass, and the shapes that people know by name.

Two families share this code: `deepseek_v3` (R1, V3, V3.1, Moonlight, Kimi-K2) and `deepseek_v2`
(V2, V2-Lite). Fields keep the names they have in `config.json`, so a checkpoint's config reads like
ours."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1.errors import InputError

FAMILIES = {"deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3", "deepseek_v2": "deepseek_v2"}

# What transformers and the published modeling files assume when a family's config.json does not
# name a field.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}

# A field that we don't know is ignored (configs carry notes and training settings) unless its name
# speaks of the arithmetic: a model with an indexer, a soft cap or a sliding window must not load as
# if it had none.
ARITHMETIC = re.compile(
    r"attn|attention|rope|rotary|norm|expert|moe|gate|gating|router|rout|score|scal|cap|window|bias|head|rank|dim|size|"
    r"act\b|activation|layer|topk|top_k|index|mtp|nextn|residual|quant|hash|conv|embed|logit|group|hidden|position|hc_"
)
HARMLESS = frozenset(
    """
    _attn_implementation _experts_implementation add_cross_attention architectures attention_dropout
    attn_implementation auto_map aux_loss_alpha bad_words_ids base_model_ep_plan base_model_pp_plan
    base_model_tp_plan begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty dtype embd_pdrop encoder_no_repeat_ngram_size eos_token_id ep_size
    experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout initializer_range is_decoder is_encoder_decoder layerdrop max_length min_length
    model_parallel_size no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id pretraining_tp remove_invalid_values
    resid_pdrop return_dict_in_generate router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id
    seq_aux task_specific_params tensor_parallel_size tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
    torch_dtype torchscript transformers_version typical_p unsloth_fixed use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
# Known fields whose other values would need arithmetic that no published checkpoint of these
# families uses.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1, 1.0),
}


@dataclass(frozen=True)
class Yarn:
    """YaRN's settings (arXiv 2309.00071; DeepSeek-V2 paper section 3.1.4), as in `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def temperature(self, weight: float) -> float:
        """The attention temperature `0.1 weight ln(factor) + 1` (arXiv 2309.00071, section 3.4)."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def table_factor(self) -> float:
        """What multiplies cos and sin. It is 1 for R1, whose two mscales are equal; not the
        softmax's factor."""
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """What multiplies the softmax scale: the temperature squared, 1.87 for R1."""
        return self.temperature(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Config:
    """One model's shape and arithmetic. Sizes are in elements; see DeepSeek-V3's paper (arXiv
    2412.19437), section 2."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    # attention (section 2.1.1)
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # feed-forward and experts (section 2.1.2)
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    # everything else
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None
    """Shape of the blocks that share one scale, where the checkpoint stores FP8 weights; None where
    it does not."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements that one token leaves in the latent cache of one layer: `c_kv` and `k_pe`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (MTP layers count on from `num_hidden_layers`) has
        experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @staticmethod
    def load(directory: str | Path) -> Config:
        """Read `directory/config.json`. Raises InputError that names the folder or the field at
        fault."""
        directory = Path(directory)
        path = directory / "config.json"
        try:
            found = path.is_file()
        except OSError as error:
            raise InputError(
                f"{directory} can't be read ({error.strerror}): give a folder that you may read"
            ) from None
        if not directory.is_dir():
            raise InputError(
                f"there is no folder {directory}: give a checkpoint's folder (config.json + *.safetensors)"
            )
        if not found:
            raise InputError(
                f"{directory} has no config.json: a checkpoint's folder holds config.json and *.safetensors"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{path} can't be read as JSON ({error}): download it again") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path} holds no JSON object: download it again")
        return Config.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str = "config") -> Config:
        """Build and check a Config from `config.json`'s fields. Raises InputError that names the
        field at fault."""
        return _Reader(raw, where).config()

    def to_dict(self) -> dict[str, Any]:
        """The same as published `config.json` fields, such that `Config.from_dict(c.to_dict()) ==
        c`."""
        out = dataclasses.asdict(self)
        yarn, block, eos = out.pop("yarn"), out.pop("fp8_block"), out.pop("eos_token_ids")
        out["architectures"] = [
            "DeepseekV3ForCausalLM" if self.model_type == "deepseek_v3" else "DeepseekV2ForCausalLM"
        ]
        out["num_key_value_heads"] = self.num_attention_heads
        out |= {
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
        }
        out["rope_scaling"] = {"type": "yarn", **yarn} if yarn else None
        out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        if block:
            out["quantization_config"] = {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": list(block),
            }  # fmt: skip
        return out


class _Reader:
    """Reads fields one by one and remembers which, so that the rest can be judged at the end."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where, self.used = raw, where, set[str]()

    def fail(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.where}: {field} {problem}")

    def get(self, field: str, default: Any = None) -> Any:
        self.used.add(field)
        value = self.raw.get(field)
        return default if value is None else value

    def integer(
        self, field: str, default: int | None = None, least: int = 1, most: int = 10**6
    ) -> int:
        """A size within `most`, such that no product of three overflows torch's 64 bits, and no
        loop over it goes on for ever."""
        value = self.get(field, default)
        if value is None:
            raise self.fail(field, "is missing: it is part of the model's shape")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(field, f"is {value!r}, which is no whole number of at least {least}")
        if value > most:
            raise self.fail(
                field, f"is {value}, which is larger than in any model: r1 takes at most {most}"
            )
        return value

    def number(
        self, field: str, default: float | None = None, source: dict[str, Any] | None = None
    ) -> float:
        value = self.get(field, default) if source is None else source.get(field, default)
        if value is None:
            raise self.fail(field, "is missing: it is part of the model's arithmetic")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value <= sys.float_info.max
        ):
            raise self.fail(field, f"is {value!r}, which is no finite number of at least 0")
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, which is neither true nor false")
        return value

    def choice(self, field: str, default: str, allowed: tuple[str, ...], why: str) -> str:
        value = self.get(field, default)
        if value not in allowed:
            raise self.fail(field, f"is {value!r}, but {why} takes {' or '.join(allowed)}")
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        value = self.get(field)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(field, f"is {value!r}, which is neither a token id nor a list of them")
        return ids

    def config(self) -> Config:
        model_type = self.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise self.fail(
                "model_type", f"is {model_type!r}, but r1 runs only {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        defaults = DEFAULTS[family]
        for field, allowed in ONLY.items():
            if self.get(field, allowed[0]) not in allowed:
                raise self.fail(
                    field, f"is {self.raw[field]!r}, but r1 implements only {allowed[0]!r}"
                )
        for field in ("swa", "sliding_window"):
            if self.get(field):
                raise self.fail(field, "asks for windowed attention, which r1 does not implement")

        v3 = family == "deepseek_v3"
        methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
        theta, yarn = self.rope()
        mtp = (
            "num_mtp_layers" if "num_mtp_layers" in self.raw else "num_nextn_predict_layers"
        )  # transformers 5, DeepSeek
        bos = self.token_ids("bos_token_id")
        for field in (
            "q_lora_rank",
            "n_routed_experts",
        ):  # null says none; nothing at all says nothing
            if field not in self.raw:
                raise self.fail(
                    field, "is missing: it is part of the model's shape (null for none)"
                )
        experts = self.integer("n_routed_experts", 0, least=0)
        config = Config(
            model_type=family,
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            num_hidden_layers=self.integer("num_hidden_layers", most=1000),
            num_attention_heads=self.integer("num_attention_heads"),
            q_lora_rank=self.integer("q_lora_rank")
            if self.get("q_lora_rank") is not None
            else None,
            kv_lora_rank=self.integer("kv_lora_rank"),
            qk_nope_head_dim=self.integer("qk_nope_head_dim"),
            qk_rope_head_dim=self.integer("qk_rope_head_dim"),
            v_head_dim=self.integer("v_head_dim"),
            intermediate_size=self.integer("intermediate_size"),
            moe_intermediate_size=self.integer("moe_intermediate_size", None if experts else 1),
            n_routed_experts=experts,
            n_shared_experts=self.integer("n_shared_experts", 0, least=0),
            num_experts_per_tok=self.integer("num_experts_per_tok", None if experts else 1),
            n_group=self.integer("n_group", None if v3 and experts else 1),
            topk_group=self.integer("topk_group", None if v3 and experts else 1),
            first_k_dense_replace=self.integer(
                "first_k_dense_replace", None if experts else 0, least=0
            ),
            topk_method=self.choice("topk_method", defaults["topk_method"], methods, family),
            scoring_func=self.choice(
                "scoring_func", defaults["scoring_func"], (defaults["scoring_func"],), family
            ),
            norm_topk_prob=self.boolean("norm_topk_prob", defaults["norm_topk_prob"]),
            routed_scaling_factor=self.number(
                "routed_scaling_factor", None if v3 and experts else 1.0
            ),
            max_position_embeddings=self.integer("max_position_embeddings", most=10**9),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            yarn=yarn,
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            num_nextn_predict_layers=self.integer(mtp, 0, least=0, most=1000),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self.token_ids("eos_token_id"),
            fp8_block=self.fp8_block(),
        )
        self.contradictions(config)
        self.unknown()
        return config

    def rope(self) -> tuple[float, Yarn | None]:
        """Both spellings: `rope_theta` + `rope_scaling` (published) and `rope_parameters`
        (transformers 5)."""
        scaling, parameters = self.get("rope_scaling"), self.get("rope_parameters")
        for field, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if value is not None and not isinstance(value, dict):
                raise self.fail(field, f"is {value!r}, which is no JSON object")
        if parameters is not None and "full_attention" in parameters:
            raise self.fail(
                "rope_parameters",
                "has one entry per layer type, but every layer of this family is alike",
            )
        both = {**(scaling or {}), **(parameters or {})}
        for key, value in (scaling or {}).items():
            if both[key] != value:
                raise self.fail(
                    "rope_scaling", f"says {key} = {value!r} and rope_parameters {both[key]!r}"
                )
        theta = self.number("rope_theta", both.get("rope_theta", 10000.0))
        if both.get("rope_theta", theta) != theta:
            raise self.fail(
                "rope_theta", f"is {theta}, but rope_parameters says {both['rope_theta']}"
            )
        if theta <= 1:
            raise self.fail(
                "rope_theta",
                f"is {theta}, but the rotation's wavelengths are its powers: more than 1",
            )

        kind = both.get("rope_type", both.get("type", "default"))
        if "type" in both and both["type"] != kind:
            raise self.fail("rope_scaling", f"has type {both['type']!r} and rope_type {kind!r}")
        known = {"type", "rope_type", "rope_theta"}
        if kind == "default":
            self.no_more(
                "rope_parameters",
                {k: v for k, v in both.items() if k != "partial_rotary_factor" or v != 1},
                known,
            )
            return theta, None
        if kind != "yarn":
            raise self.fail("rope_scaling", f"has type {kind!r}, but r1 implements only yarn")
        known |= {field.name for field in dataclasses.fields(Yarn)} | {
            "truncate",
            "attention_factor",
            "partial_rotary_factor",
        }
        self.no_more("rope_scaling", both, known)
        if both.get("truncate", True) is not True:
            raise self.fail(
                "rope_scaling",
                "has truncate = false, but r1 implements only YaRN's truncated range",
            )
        if both.get("partial_rotary_factor", 1) != 1:
            raise self.fail(
                "rope_scaling",
                f"has partial_rotary_factor = {both['partial_rotary_factor']}, not 1",
            )
        original = both.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 10**9:
            raise self.fail(
                "rope_scaling",
                f"has original_max_position_embeddings = {original!r}, not 1 to 1000000000",
            )
        yarn = Yarn(
            factor=self.number("factor", source=both),
            original_max_position_embeddings=original,
            beta_fast=self.number("beta_fast", 32.0, both),
            beta_slow=self.number("beta_slow", 1.0, both),
            mscale=self.number("mscale", 1.0, both),
            mscale_all_dim=self.number("mscale_all_dim", 0.0, both),
        )
        if yarn.factor < 1:
            raise self.fail(
                "rope_scaling", f"has factor = {yarn.factor}, but YaRN stretches: at least 1"
            )
        if not 0 < yarn.beta_slow <= yarn.beta_fast:
            betas = f"beta_slow = {yarn.beta_slow} and beta_fast = {yarn.beta_fast}"
            raise self.fail(
                "rope_scaling", f"has {betas}, but YaRN wants 0 < beta_slow <= beta_fast"
            )
        stated = (
            None
            if both.get("attention_factor") is None
            else self.number("attention_factor", source=both)
        )
        if stated is not None and not math.isclose(stated, yarn.table_factor, rel_tol=1e-6):
            raise self.fail(
                "rope_scaling",
                f"has attention_factor = {stated}, but its mscales give {yarn.table_factor:.6g}",
            )
        return theta, yarn

    def no_more(self, field: str, found: dict[str, Any], known: set[str]) -> None:
        surplus = sorted(key for key in found if key not in known and found[key] is not None)
        if surplus:
            raise self.fail(field, f"has {', '.join(surplus)}, which r1 does not know")

    def fp8_block(self) -> tuple[int, int] | None:
        quantization = self.get("quantization_config")
        if quantization is None:
            return None
        field = "quantization_config"
        if not isinstance(quantization, dict):
            raise self.fail(field, f"is {quantization!r}, which is no JSON object")
        method = quantization.get("quant_method")
        if method != "fp8":
            raise self.fail(
                field,
                f"has quant_method = {method!r}, but r1 reads only fp8 (e4m3, one scale a block)",
            )
        if quantization.get("fmt", "e4m3") != "e4m3":
            raise self.fail(field, f"has fmt = {quantization['fmt']!r}, but r1 reads only e4m3")
        block = quantization.get("weight_block_size")
        if not (
            isinstance(block, list)
            and len(block) == 2
            and all(isinstance(b, int) and b > 0 for b in block)
        ):
            raise self.fail(
                field,
                f"has weight_block_size = {block!r}, not two whole numbers such as [128, 128]",
            )
        return block[0], block[1]

    def contradictions(self, c: Config) -> None:
        if self.get("num_key_value_heads", c.num_attention_heads) != c.num_attention_heads:
            raise self.fail(
                "num_key_value_heads",
                f"is {self.raw['num_key_value_heads']}, but latent attention has as many as num_attention_heads, "
                f"{c.num_attention_heads}",
            )
        if self.get("qk_head_dim", c.qk_head_dim) != c.qk_head_dim:
            raise self.fail(
                "qk_head_dim",
                f"is {self.raw['qk_head_dim']}, not qk_nope_head_dim + qk_rope_head_dim",
            )
        if self.get("head_dim", c.qk_rope_head_dim) not in (c.qk_rope_head_dim, c.qk_head_dim):
            raise self.fail(
                "head_dim",
                f"is {self.raw['head_dim']}, but the rotated part has {c.qk_rope_head_dim}",
            )
        if self.get("num_local_experts", c.n_routed_experts) != c.n_routed_experts:
            raise self.fail(
                "num_local_experts",
                f"is {self.raw['num_local_experts']}, not n_routed_experts, {c.n_routed_experts}",
            )
        if c.qk_rope_head_dim % 2:
            raise self.fail(
                "qk_rope_head_dim",
                f"is {c.qk_rope_head_dim}, but rotation takes pairs: it must be even",
            )
        for name, value in (("bos_token_id", (c.bos_token_id,)), ("eos_token_id", c.eos_token_ids)):
            if any(i is not None and i >= c.vocab_size for i in value):
                raise self.fail(
                    name, f"is {self.raw[name]}, outside the vocabulary of {c.vocab_size}"
                )
        if not c.n_routed_experts:
            return
        grouped = c.topk_method != "greedy"
        if grouped and c.n_routed_experts % c.n_group:
            raise self.fail(
                "n_group",
                f"is {c.n_group}, which does not divide the {c.n_routed_experts} routed experts",
            )
        if grouped and c.topk_group > c.n_group:
            raise self.fail(
                "topk_group", f"is {c.topk_group}, more than the {c.n_group} groups there are"
            )
        if c.topk_method == "noaux_tc" and c.n_routed_experts < 2 * c.n_group:
            raise self.fail(
                "n_group",
                f"is {c.n_group}: noaux_tc scores a group by its two best experts, and it has one",
            )
        reachable = (
            c.n_routed_experts // c.n_group * c.topk_group if grouped else c.n_routed_experts
        )
        if c.num_experts_per_tok > reachable:
            raise self.fail(
                "num_experts_per_tok",
                f"is {c.num_experts_per_tok}, but only {reachable} experts can be chosen",
            )

    def unknown(self) -> None:
        for field, value in self.raw.items():
            known = field in self.used or field in HARMLESS or field.startswith("_")
            if value and not known and ARITHMETIC.search(field):
                raise self.fail(
                    field,
                    f"= {str(value)[:60]} is unknown to r1, and its name says that it changes the arithmetic",
                )


_R1_YARN = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)

R1 = Config(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61,
    num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432, moe_intermediate_size=2048,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
    first_k_dense_replace=3, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, max_position_embeddings=163840, rms_norm_eps=1e-6,
    rope_theta=10000.0, yarn=_R1_YARN, num_nextn_predict_layers=1, bos_token_id=0, eos_token_ids=(1,
    ), fp8_block=(128, 128),
)  # fmt: skip

SHAPES: dict[str, Config] = {
    "r1": R1,
    "kimi-k2": dataclasses.replace(
        R1, vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1,
        topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827,
        max_position_embeddings=131072, rope_theta=50000.0, yarn=dataclasses.replace(_R1_YARN,
        factor=32.0, beta_fast=1.0), num_nextn_predict_layers=0, bos_token_id=163584,
        eos_token_ids=(163585, ),
    ),
    "moonlight-16b": dataclasses.replace(
        R1, vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
        q_lora_rank=None, intermediate_size=11264, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.446, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=50000.0, yarn=None, num_nextn_predict_layers=0, fp8_block=None,
        bos_token_id=163584, eos_token_ids=(163585, ),
    ),
    "v2-lite": dataclasses.replace(
        R1, model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, topk_method="greedy",
        scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0, yarn=Yarn(40.0,
        4096, mscale=0.707, mscale_all_dim=0.707), num_nextn_predict_layers=0, fp8_block=None,
        bos_token_id=100000, eos_token_ids=(100001, ),
    ),
    "tiny": dataclasses.replace(
        R1, vocab_size=320, hidden_size=160, num_hidden_layers=5, num_attention_heads=4,
        q_lora_rank=96, kv_lora_rank=80, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        intermediate_size=416, moe_intermediate_size=72, n_routed_experts=16, num_experts_per_tok=4,
        n_group=4, topk_group=2, first_k_dense_replace=1, max_position_embeddings=10240,
        yarn=dataclasses.replace(_R1_YARN, original_max_position_embeddings=256),
    ),
}  # fmt: skip


def shape(name: str, layers: int | None = None) -> Config:
    """The Config of a published shape, optionally cut to its first `layers` layers. Raises
    InputError."""
    if name not in SHAPES:
        raise InputError(f"there is no shape {name!r}: choose one of {', '.join(SHAPES)}")
    config = SHAPES[name]
    if layers is None:
        return config
    if layers < 1 or layers > config.num_hidden_layers:
        raise InputError(
            f"--layers {layers}: {name} has {config.num_hidden_layers} layers, take 1 to that many"
        )
    return dataclasses.replace(config, num_hidden_layers=layers)
