"""Make a checkpoint of random weights in R1's own format: any named shape, FP8 blocks, shards, MTP
layer, tokenizer.

    python tools/train/make_checkpoint.py tiny /tmp/random                # the embedded one's shape
    python tools/train/make_checkpoint.py moonlight-16b /data/moonlight --layers 4

Random weights say nothing, but they are read, dequantized and computed with as real ones are. The
gate's bias is not zero, so that an implementation that forgets it is found out."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch

from r1 import InputError, build
from r1.files import checkpoint
from r1.model.config import Config
from r1.model.shapes import SHAPES, shape
from r1.switches import flags
from r1.switches.backend import Backend, resolve

sys.path.insert(0, str(Path(__file__).parent))
from make_tokenizer import make_tokenizer


def make(
    config: Config,
    directory: Path,
    *,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    dtype: str = "bf16",
) -> None:
    """Write a checkpoint of `config`'s shape to the new folder `directory`. Raises InputError."""
    backend = resolve(Backend(device="cpu", dtype=dtype), config)
    model = build.from_shape(config, backend, seed=seed, mtp=config.num_nextn_predict_layers > 0)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.1, generator=generator)
    checkpoint.save(model, directory, shard_bytes=shard_bytes)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="a new folder")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--seed", type=flags.seed, default=0)
    parser.add_argument(
        "--shard-mb", type=float, metavar="MB", help="largest shard (default 5000; tiny: 1)"
    )
    parser.add_argument(
        "--no-fp8",
        action="store_true",
        help="store bf16 where the shape's own checkpoint stores FP8 blocks",
    )
    arguments = parser.parse_args(argv)
    try:
        config = shape(arguments.shape, arguments.layers)
        if arguments.no_fp8:
            config = config.change(fp8_block=None)
        shard_mb = (
            (1 if arguments.shape == "tiny" else 5000)
            if arguments.shard_mb is None
            else arguments.shard_mb
        )
        if not 0 < shard_mb < math.inf:
            raise InputError(f"--shard-mb {shard_mb}: give megabytes, more than 0")
        make(config, arguments.directory, seed=arguments.seed, shard_bytes=int(shard_mb * 1e6))
        if config.vocab_size == SHAPES["tiny"].vocab_size:
            make_tokenizer(arguments.directory)
    except InputError as error:
        shutil.rmtree(
            arguments.directory.with_name(arguments.directory.name + ".partial"), ignore_errors=True
        )
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in arguments.directory.iterdir())
    print(
        f"{arguments.directory}: {len(list(arguments.directory.glob('*.safetensors')))} shards, {size / 1e6:.2f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
