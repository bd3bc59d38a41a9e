"""Money and energy of a million tokens. Every name says its unit."""

from __future__ import annotations

from dataclasses import dataclass

from r1.guide.gpus import Gpu

HOURS_PER_YEAR = 365.25 * 24


@dataclass(frozen=True)
class Terms:
    """What an owner pays and how long."""

    usd_per_kwh: float
    years: float = 3.0
    """How long a purchase is used."""
    busy_share: float = 1.0
    """The share of these years in which the machine makes tokens."""


@dataclass(frozen=True)
class Cost:
    """Of decoded tokens only. None where no price has a source."""

    rent_usd_per_million_tokens: float | None
    own_usd_per_million_tokens: float | None
    joules_per_token: float
    """At most: the board takes all the power that it may. Owning is counted so too."""
    expected_joules_per_token: float | None = None
    """With the share of that power which the row that the time starts from took, if it is known."""

    @property
    def least_usd_per_million_tokens(self) -> float | None:
        """The cheaper way."""
        both = (self.rent_usd_per_million_tokens, self.own_usd_per_million_tokens)
        return min((each for each in both if each is not None), default=None)


def cost(
    gpu: Gpu, count: int, tokens_per_s: float, terms: Terms, power_share: float | None = None
) -> Cost:
    """Of `count` machines that together make so many tokens a second.

    `power_share`: the share of the board's power that is expected, if it is known.
    """
    watts = gpu.figures["board_w"] * count
    rent, purchase = gpu.get("rent_usd_per_hour"), gpu.get("purchase_usd")
    return Cost(
        rent and rent_usd_per_million_tokens(rent * count, tokens_per_s),
        purchase and own_usd_per_million_tokens(purchase * count, watts, tokens_per_s, terms),
        watts / tokens_per_s,
        power_share and power_share * watts / tokens_per_s,
    )


def rent_usd_per_million_tokens(rent_usd_per_hour: float, tokens_per_s: float) -> float:
    """Rental of machines that never idle."""
    tokens_per_hour = tokens_per_s * 3600
    return rent_usd_per_hour / tokens_per_hour * 1e6


def own_usd_per_million_tokens(
    purchase_usd: float, watts: float, tokens_per_s: float, terms: Terms
) -> float:
    """A purchase, spread over the tokens of its life, and the power while it works."""
    busy_hours = terms.years * HOURS_PER_YEAR * terms.busy_share
    purchase_usd_per_hour = purchase_usd / busy_hours
    power_usd_per_hour = watts / 1000 * terms.usd_per_kwh
    return rent_usd_per_million_tokens(purchase_usd_per_hour + power_usd_per_hour, tokens_per_s)
