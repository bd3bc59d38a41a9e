"""Draw the figures of r1/README.md as SVG files.

    python tools/draw/draw_figures.py

They go to r1/figures. Their numbers come from r1's own code: R1's sizes from its config, bytes from
r1/roofline.py, the router's scores and the drafts from a tour of tiny-r1 (python -m r1.tour).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from figures_attention import absorption, latent_attention
from figures_memory import bytes_of_a_token, cache
from figures_router import router
from figures_speculation import speculation

FOLDER = shared.ROOT / "r1" / "figures"
FIGURES: dict[str, Callable[[], str]] = {
    "latent-attention": latent_attention,
    "absorption": absorption,
    "router": router,
    "cache": cache,
    "speculation": speculation,
    "bytes": bytes_of_a_token,
}
"""What draws each file."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.run(__file__, work, shared.parser(__doc__).parse_args(argv))


def work(_arguments: argparse.Namespace) -> int:
    for name, draw in FIGURES.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
