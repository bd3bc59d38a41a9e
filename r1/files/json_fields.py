"""Read the fields of a config.json one by one: check their values, and refuse unknown fields."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from r1.errors import InputError

# An unknown field is refused if its name suggests that it changes the arithmetic. A model with an
# indexer, a soft cap or a sliding window must not load as if it had none. Other unknown fields are
# ignored, because configs contain notes and training settings.
ARITHMETIC = re.compile(
    r"attn|attention|rope|rotary|norm|expert|moe|gate|gating|rout|score|scal|cap|window|"
    r"bias|head|rank|dim|size|act\b|activation|layer|topk|top_k|index|mtp|nextn|residual|quant|"
    r"hash|conv|embed|logit|group|hidden|position|hc_"
)
# Fields whose names suggest arithmetic, and that change none: of training, of other kinds of
# models, of how a library spreads or calls a model.
HARMLESS = frozenset(
    """
    add_cross_attention attention_dropout attn_implementation chunk_size_feed_forward
    cross_attention_hidden_size encoder_no_repeat_ngram_size ep_size experts_implementation
    hidden_dropout layerdrop model_parallel_size no_repeat_ngram_size num_beam_groups
    output_attentions output_hidden_states output_router_logits output_scores router_aux_loss_coef
    router_jitter_noise router_z_loss_coef tensor_parallel_size top_k
    """.split()  # noqa: SIM905
)


class Fields:
    """Reads fields one by one.

    It remembers which fields were read. In the end, `unknown` checks all the others. A null field
    counts as missing. Every method but `fail` raises InputError for an unsuitable value.
    """

    def __init__(
        self, raw: dict[str, Any], where: str, names: Mapping[str, str] | None = None
    ) -> None:
        """`where` names the file in error messages; `names`: ours of a field -> the file's."""
        self.raw, self.where, self.used = raw, where, set[str]()
        self.names = names or {}

    def fail(self, field: str, problem: str) -> InputError:
        """The error for a field, ready to be raised."""
        return InputError(f"{self.where}: {self.names.get(field, field)} {problem}")

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field, of any type."""
        self.used.add(field)
        value = self.raw.get(field)
        return default if value is None else value

    def integer(
        self, field: str, default: int | None = None, least: int = 1, most: int = 10**6
    ) -> int:
        """A whole number from `least` to `most`. Without a default, the field is required.

        `most` is low enough that a product of three sizes fits in torch's 64 bits, and that a loop
        over a size ends in reasonable time.
        """
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
        """A finite number of at least 0, from `source` if given. Without a default: required."""
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
        """True or false."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, which is neither true nor false")
        return value

    def choice(self, field: str, default: str, allowed: tuple[str, ...], family: str) -> str:
        """One of the values that models of `family` allow."""
        value = self.get(field, default)
        if value not in allowed:
            raise self.fail(field, f"is {value!r}, but {family} takes {' or '.join(allowed)}")
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """Token ids: the file gives one, a list of them, or none."""
        value = self.get(field)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail(field, f"is {value!r}, which is neither a token id nor a list of them")
        return ids

    def no_more(self, field: str, entries: dict[str, Any], known: set[str]) -> None:
        """Refuse an object that has entries other than the `known` ones."""
        surplus = sorted(key for key in entries if key not in known and entries[key] is not None)
        if surplus:
            raise self.fail(field, f"has {', '.join(surplus)}, which r1 does not know")

    def unknown(self) -> None:
        """Refuse fields that were not read and whose names suggest the arithmetic."""
        for field, value in self.raw.items():
            known = field in self.used or field in HARMLESS or field.startswith("_")
            if value and not known and ARITHMETIC.search(field):
                raise self.fail(
                    field,
                    f"= {str(value)[:60]} is unknown to r1, and its name says that it changes the "
                    "arithmetic",
                )
