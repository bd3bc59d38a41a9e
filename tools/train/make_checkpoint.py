"""Make a checkpoint of random weights, of any named shape, in R1's own format.

    # the embedded checkpoint's shape
    python tools/train/make_checkpoint.py tiny /tmp/random
    python tools/train/make_checkpoint.py moonlight-16b /data/moonlight --layers 4

The format includes FP8 blocks, shards and the MTP layer. The `tiny` shape gets its tokenizer too.

Random weights write no meaningful text. But a program reads, dequantizes and multiplies them as it
does real ones. The gate's bias is not zero, so a program that forgets the bias gives other logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from make_tokenizer import make_tokenizer

from r1 import InputError, build
from r1.files.save import save
from r1.model.config import Config
from r1.model.shapes import SHAPES, shape
from r1.switches import flags
from r1.switches.backend import Backend
from r1.switches.resolve import resolve
from r1.writing import check_new

MOST_SHARD_MB = 10**9


def make(
    config: Config,
    directory: Path,
    *,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    dtype: str = "bf16",
    add_files: Callable[[Path], object] | None = None,
) -> None:
    """Write a checkpoint of `config`'s shape to the new folder `directory`. Raises InputError.

    `add_files` puts more files into the folder before it appears.
    """
    backend = resolve(Backend(device="cpu", dtype=dtype), config)
    model = build.from_shape(config, backend, seed=seed, mtp=config.num_nextn_predict_layers > 0)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.1, generator=generator)
    save(model, directory, shard_bytes=shard_bytes, add_files=add_files)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="a new folder")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the weights (default 0)")
    parser.add_argument(
        "--shard-mb", type=float, metavar="MB", help="largest shard (default 5000; tiny: 1)"
    )
    parser.add_argument(
        "--no-fp8",
        action="store_true",
        help="store bf16 where the shape's own checkpoint stores FP8 blocks",
    )
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    config, directory = shape(arguments.shape, arguments.layers), arguments.directory
    if arguments.no_fp8:
        config = config.change(fp8_block=None)
    shard_mb = arguments.shard_mb
    if shard_mb is None:
        shard_mb = 1 if arguments.shape == "tiny" else 5000
    if not 0 < shard_mb <= MOST_SHARD_MB:
        raise InputError(
            f"--shard-mb {shard_mb}: give megabytes, more than 0 and at most {MOST_SHARD_MB}"
        )
    check_new(directory)  # before a large model is made
    has_tokenizer = config.vocab_size == SHAPES["tiny"].vocab_size
    make(
        config, directory, seed=arguments.seed, shard_bytes=int(shard_mb * 1e6),
        add_files=make_tokenizer if has_tokenizer else None,
    )  # fmt: skip
    shards = len(list(directory.glob("*.safetensors")))
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {shards} shards, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
