"""Compare r1 with a reference, layer by layer, and name the first tensor that diverges.

    python tools/check/diff_layers.py tests/reference/v3-yarn
    python tools/check/diff_layers.py tests/reference/v3-yarn --prefill-moe loop --tolerance 1e-5

The folder is a checkpoint (config.json, *.safetensors) that also holds reference.safetensors. That
file has `tokens` (B, S) and the tensors that another implementation computed from them, under the
names that r1/run/trace.py lists. r1 runs in fp32 on the CPU unless a switch changes that.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from r1 import Backend, Config, InputError, build
from r1.files.config_json import load_config
from r1.run.runner import Runner
from r1.run.trace import Difference, compare, first_divergence, trace
from r1.switches import flags
from r1.switches.resolve import resolve

REFERENCE = "reference.safetensors"


def read_reference(directory: Path, config: Config) -> dict[str, Tensor]:
    """The reference's tensors, floats as fp32.

    Raises InputError for a file that can't be compared with a model of `config`.
    """
    path = directory / REFERENCE
    if not path.is_file():
        raise InputError(
            f"{directory} has no {REFERENCE}: tools/check/make_reference.py makes such folders"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut off or corrupt ({error}): make it again") from None
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise InputError(f"{path} has no int64 tensor `tokens` (batch, sequence): make it again")
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise InputError(
            f"{path} has tokens outside config.json's vocabulary of {config.vocab_size}"
        )
    if len(tensors) == 1:
        raise InputError(f"{path} holds tokens and nothing to compare: make it again")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def differences(
    directory: Path, backend: Backend, tolerance: float
) -> tuple[list[Difference], list[str]]:
    """Compare each traced tensor with its reference, in the order of computation.

    Also returns the names that only one side has.
    """
    config = load_config(directory)
    theirs = read_reference(directory, config)
    tokens = theirs.pop("tokens")
    backend = resolve(backend, config)
    model, _ = build.from_checkpoint(directory, config, backend, quiet=True)
    ours = trace(Runner(model, backend), tokens)
    try:
        return compare(ours, theirs, tolerance), sorted(ours.keys() ^ theirs.keys())
    except KeyError:
        raise InputError(
            f"{directory / REFERENCE} has none of the names that r1/run/trace.py lists: "
            "make it again"
        ) from None


def table(rows: list[Difference]) -> str:
    """One line for each tensor. For router indices, the difference counts tokens that differ."""
    wide = max(len(row.name) for row in rows)
    lines = [f"{'tensor':{wide}}  {'max abs diff':>12}  {'scale':>9}"]
    for row in rows:
        exact = row.name.startswith("router_indices") and math.isfinite(row.max_abs)
        gap = f"{row.max_abs:.0f} tokens" if exact else f"{row.max_abs:.2e}"
        verdict = "DIVERGES" if row.diverges else "ok"
        lines.append(f"{row.name:{wide}}  {gap:>12}  {row.scale:>9.3g}  {verdict}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 all agree, 1 something diverges, 2 input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument(
        "directory", type=Path, metavar="CASE_DIR", help="a checkpoint with a reference.safetensors"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference allowed (default 1e-4)",
    )
    flags.add_flags(parser)
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.tolerance < math.inf:
        raise InputError(f"--tolerance {arguments.tolerance}: give 0 or more")
    chosen = {"device": "cpu", "dtype": "fp32"} | flags.given(arguments)
    rows, alone = differences(arguments.directory, Backend(**chosen), arguments.tolerance)
    print(table(rows))
    if alone:
        print(f"not compared, one side has none: {', '.join(alone)}")
    first = first_divergence(rows)
    if first is None:
        print(f"all {len(rows)} agree within {arguments.tolerance:g}")
        return 0
    print(f"first divergence: {first.name}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
