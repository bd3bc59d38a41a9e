"""Read the fields of a config.json that describe the rotary embedding, for long contexts too."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from r1.files.json_fields import Fields
from r1.model.config import Llama3, Yarn


def read_rope(f: Fields) -> tuple[float, Yarn | Llama3 | None]:
    """Read the rotation's base and its settings for long contexts.

    There are two spellings: `rope_theta` with `rope_scaling` (published checkpoints), and
    `rope_parameters` (newer versions of transformers).
    """
    scaling, parameters = f.get("rope_scaling"), f.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise f.fail(name, f"is {value!r}, which is no JSON object")
    if parameters is not None and "full_attention" in parameters:
        problem = "has one entry per layer type, but every layer of this family is alike"
        raise f.fail("rope_parameters", problem)
    both = {**(scaling or {}), **(parameters or {})}
    for key, value in (scaling or {}).items():
        if both[key] != value:
            problem = f"says {key} = {value!r} and rope_parameters {both[key]!r}"
            raise f.fail("rope_scaling", problem)
    theta = f.number("rope_theta", both.get("rope_theta", 10000.0))
    if both.get("rope_theta", theta) != theta:
        raise f.fail("rope_theta", f"is {theta}, but rope_parameters says {both['rope_theta']}")
    if theta <= 1:
        problem = f"is {theta}, but the rotation's wavelengths are its powers: more than 1"
        raise f.fail("rope_theta", problem)

    kind = both.get("rope_type", both.get("type", "default"))
    if "type" in both and both["type"] != kind:
        raise f.fail("rope_scaling", f"has type {both['type']!r} and rope_type {kind!r}")
    if kind == "default":
        rest = {k: v for k, v in both.items() if k != "partial_rotary_factor" or v != 1}
        f.no_more("rope_parameters", rest, {"type", "rope_type", "rope_theta"})
        return theta, None
    if kind == "llama3":
        return theta, read_llama3(f, both)
    if kind != "yarn":
        raise f.fail("rope_scaling", f"has type {kind!r}, but r1 implements only yarn and llama3")
    return theta, read_yarn(f, both)


def read_llama3(f: Fields, both: dict[str, Any]) -> Llama3:
    """Read Llama 3's settings. `both` holds the fields of rope_scaling and rope_parameters."""
    known = {"type", "rope_type", "rope_theta"} | {x.name for x in dataclasses.fields(Llama3)}
    f.no_more("rope_scaling", both, known)
    llama3 = Llama3(
        factor=f.number("factor", source=both),
        original_max_position_embeddings=read_original(f, both),
        low_freq_factor=f.number("low_freq_factor", source=both),
        high_freq_factor=f.number("high_freq_factor", source=both),
    )
    if llama3.factor < 1:
        problem = f"has factor = {llama3.factor}, but llama3 stretches: at least 1"
        raise f.fail("rope_scaling", problem)
    if not 0 < llama3.low_freq_factor < llama3.high_freq_factor:
        factors = f"{llama3.low_freq_factor} and high_freq_factor = {llama3.high_freq_factor}"
        problem = f"has low_freq_factor = {factors}, but llama3 wants 0 < low < high"
        raise f.fail("rope_scaling", problem)
    return llama3


def read_original(f: Fields, both: dict[str, Any]) -> int:
    """Read the length of the first training."""
    original = both.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 10**9:
        problem = f"has original_max_position_embeddings = {original!r}, not 1 to 1000000000"
        raise f.fail("rope_scaling", problem)
    return original


def read_yarn(f: Fields, both: dict[str, Any]) -> Yarn:
    """Read YaRN's settings. `both` holds the fields of rope_scaling and rope_parameters."""
    known = {"type", "rope_type", "rope_theta", "truncate", "attention_factor"}
    # R1-0528-Qwen3-8B has attn_factor = 1 / (0.1 ln 4 + 1), which would cancel YaRN's factor on cos
    # and sin. transformers, our reference, does not read this name (attention_factor is its own).
    known |= {"partial_rotary_factor", "attn_factor"} | {
        field.name for field in dataclasses.fields(Yarn)
    }
    f.no_more("rope_scaling", both, known)
    if both.get("truncate", True) is not True:
        problem = "has truncate = false, but r1 implements only YaRN's truncated range"
        raise f.fail("rope_scaling", problem)
    if both.get("partial_rotary_factor", 1) != 1:
        problem = f"has partial_rotary_factor = {both['partial_rotary_factor']}, not 1"
        raise f.fail("rope_scaling", problem)
    yarn = Yarn(
        factor=f.number("factor", source=both),
        original_max_position_embeddings=read_original(f, both),
        beta_fast=f.number("beta_fast", 32.0, both),
        beta_slow=f.number("beta_slow", 1.0, both),
        mscale=f.number("mscale", 1.0, both),
        mscale_all_dim=f.number("mscale_all_dim", 0.0, both),
        llama_4_scaling_beta=f.number("llama_4_scaling_beta", 0.0, both),
    )
    if yarn.factor < 1:
        problem = f"has factor = {yarn.factor}, but YaRN stretches: at least 1"
        raise f.fail("rope_scaling", problem)
    if not 0 < yarn.beta_slow <= yarn.beta_fast:
        betas = f"beta_slow = {yarn.beta_slow} and beta_fast = {yarn.beta_fast}"
        raise f.fail("rope_scaling", f"has {betas}, but YaRN wants 0 < beta_slow <= beta_fast")
    given = both.get("attention_factor") is not None
    stated = f.number("attention_factor", source=both) if given else yarn.table_factor
    if not math.isclose(stated, yarn.table_factor, rel_tol=1e-6):
        problem = f"has attention_factor = {stated}, but its mscales give {yarn.table_factor:.6g}"
        raise f.fail("rope_scaling", problem)
    return yarn
