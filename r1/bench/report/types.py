"""The type of each field of a result: a test, and the words for a message.

A result may come from somebody else's machine. It is checked once, where it is read
(../load_result.py), so that tables and plots may rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST = 1e15
"""No measurement and no size is larger, and sums and products of these are finite."""
SMALLEST = 1e-9
"""No time and no rate that is not 0 is smaller: one that is would have no place on an axis."""
LONGEST = 10_000
"""The most characters of a text."""


@dataclass(frozen=True)
class Type:
    """The values that a field may have."""

    words: str
    """As in "speedup is 'fast', no number"."""
    holds: Callable[[Any], bool]
    """Whether a value, which is not null, has this type."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


def _is_measurement(value: Any) -> bool:
    return _is_number(value) and (value == 0 or value >= SMALLEST)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_difference(value: Any) -> bool:
    """A wrong arm's logits may be NaN or infinite."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_shares(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_share, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def _is_switches(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, bool) or _is_text(each) or _is_number(each) for each in value.values()
    )


def _is_rates(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_measurement, value.values()))


def _is_repetitions(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and _is_number(each.get("ttft"))
        and _is_number(each.get("total"))
        and math.isfinite(each["total"] - each["ttft"])
        for each in value
    )


def _is_kernel_times(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and _is_text(each.get("kernel"))
        and _is_whole(each.get("calls"))
        and type(each.get("us")) in (int, float)
        for each in value
    )


NUMBER = Type("number", _is_number)
MEASUREMENT = Type("number", _is_measurement)
WHOLE = Type("whole number", _is_whole)
DIFFERENCE = Type("number", _is_difference)
SHARE = Type("share from 0 to 1", _is_share)
TEXT = Type("text", _is_text)
FLAG = Type("truth value", lambda value: isinstance(value, bool))
OBJECT = Type("object", lambda value: isinstance(value, dict))
TEXTS = Type("list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
RATES = Type("object of numbers", _is_rates)

_SIZES = dict.fromkeys(("batch", "prompt", "new", "depth"), WHOLE)

ROW: dict[str, Type] = {
    **dict.fromkeys(("arm", "kind", "model", "refused", "bottleneck"), TEXT),
    **_SIZES,
    **dict.fromkeys(("crashed", "parity", "within_noise", "interactive", "predicted"), FLAG),
    **dict.fromkeys(
        (
            "ttft_ms", "tpot_ms", "tpot_p90_ms", "tpot_p99_ms", "tpot_low_ms", "tpot_high_ms",
            "beside_ms", "floor_ms", "decode_tok_s", "prefill_tok_s",
        ),
        MEASUREMENT,
    ),
    **dict.fromkeys(
        ("acceptance", "assumed", "top1", "quant_top1", "same_text", "accuracy", "expert_hits",
         "expert_hits_even", "expert_hits_recorded", "host_computed", "guesses_right",
         "exchange_exposed"), SHARE
    ),
    **dict.fromkeys(
        (
            "kl_bound", "median_kl", "mean_kl_bound", "mean_kl", "excess", "max_logit_diff",
            "quant_kl",
        ),
        DIFFERENCE,
    ),
    **dict.fromkeys(
        (
            "kernels", "break_even_tokens", "positions", "problems", "outliers", "outliers_bound",
            "wrong_tokens", "expert_slots",
        ),
        WHOLE,
    ),
    **dict.fromkeys(
        (
            "speedup", "speedup_low", "speedup_high", "tokens_per_step", "predicted_speedup",
            "pays_from", "mbu", "mfu_prefill", "step_gb", "moe_layer_us", "moe_layer_floor_us",
            "experts_hit", "allocated_gb", "reserved_gb", "host_gb", "start_cold_s",
            "start_warm_s", "load_s", "sm_mhz", "power_w", "mean_power_w", "joules_per_token",
            "link_mb", "link_share", "prompt_link_share", "disk_mb", "disk_share",
            "prompt_disk_share", "host_mb", "host_share", "exchange_ms", "exchange_mb",
        ),
        NUMBER,
    ),
    "acceptance_by_place": Type("list of shares", _is_shares),
    "kernel_times": Type("list of kernels", _is_kernel_times),
    "backend": Type("object of switches", _is_switches),
    "repetitions": Type("list of repetitions", _is_repetitions),
}  # fmt: skip
"""The types of a row's fields (fields.py). Each of them may be null."""
TOGETHER: dict[str, tuple[str, ...]] = {
    "tpot_ms": ("decode_tok_s",),
    "moe_layer_us": ("moe_layer_floor_us",),
    "acceptance": ("tokens_per_step", "predicted_speedup"),
    "accuracy": ("problems",),
    "quant_kl": ("quant_top1",),
    "outliers": ("outliers_bound",),
}
"""Fields that a row has if it has another one, which is neither null nor 0."""
PAIR: dict[str, Type] = {
    **dict.fromkeys(("pair", "refused"), TEXT),
    **_SIZES,
    **dict.fromkeys(("crashed", "parity"), FLAG),
    "mean_kl": DIFFERENCE,
}
"""The types of a pair's fields."""
MACHINE: dict[str, Type] = {
    **dict.fromkeys(("name", "torch", "python", "system"), TEXT),
    **dict.fromkeys(("memory_gb", "copy_gb_s", "link_gb_s", "disk_gb_s", "ram_gb_s"), MEASUREMENT),
    **dict.fromkeys(("cpus", "threads"), WHOLE),
    "load": NUMBER,
    "matmul_tflop_s": RATES,
}
"""The types of the machine's fields."""
RESULT: dict[str, Type] = {
    **dict.fromkeys(("when", "command", "workload"), TEXT),
    "repetitions": WHOLE,
    "notes": TEXTS,
    "config": OBJECT,
}
"""The types of a result's own fields."""


def wrong(fields: dict[str, Any], types: dict[str, Type]) -> str | None:
    """The first field whose value is not null and has another type, as a clause. None: all fit."""
    for name, type_ in types.items():
        value = fields.get(name)
        if value is not None and not type_.holds(value):
            return f"{name} is {_short(value)}, no {type_.words}"
    return None


def missing(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The fields of `names` that are null, as a clause. None: there are none."""
    lacking = [name for name in names if fields.get(name) is None]
    return f"it has no {', '.join(lacking)}" if lacking else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
