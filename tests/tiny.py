"""Checkpoints of a few kilobytes, made in a moment: what test_bad_input.py, test_checkpoint.py and
test_transformers.py share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1 import Backend, build
from r1.files import checkpoint
from r1.files.config_json import load_config
from r1.model.config import Config, Yarn
from r1.model.shapes import R1, SHAPES
from r1.model.transformer import Transformer
from r1.switches.backend import resolve

V3 = R1.change(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=20,
    kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, intermediate_size=40,
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
    first_k_dense_replace=1, max_position_embeddings=64, yarn=Yarn(40.0, 8, mscale=1.0,
    mscale_all_dim=1.0), fp8_block=None,
)  # fmt: skip
"""R1's arithmetic, with an MTP layer, in bf16; `V3.change(fp8_block=(16, 16))` has ragged blocks
at every edge."""

V2 = V3.change(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
    norm_topk_prob=False, routed_scaling_factor=3.0, num_nextn_predict_layers=0, yarn=Yarn(40.0, 8,
    mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip

assert SHAPES["tiny"].files.fp8_block, "tiny-r1 is FP8; these are smaller still"


def model(
    config: Config, *, seed: int = 0, dtype: str = "bf16", mtp: bool = False, **switches: Any
) -> Transformer:
    """Random weights that hide no mistake: sharp attention, a gate bias of all 24 bits, norms that
    aren't 1."""
    made = build.from_shape(
        config, resolve(Backend(device="cpu", dtype=dtype, **switches), config), seed=seed, mtp=mtp
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in made.named_parameters():
        mean, deviation = (
            (0.0, 0.2)
            if parameter.dim() > 1
            else (0.0, 0.3)
            if name.endswith("bias")
            else (1.0, 0.3)
        )
        values = torch.randn(parameter.shape, generator=generator) * deviation + mean
        # The gate's weight is fp32 in memory only: what is written in `dtype` comes back the same
        # if it had no more bits.
        parameter.copy_(values if name.endswith("bias") else values.to(made.norm.weight.dtype))
    return made


def load(
    folder: Path, *, mtp: bool = False, **switches: Any
) -> tuple[Transformer, checkpoint.Report]:
    """A folder's model on the CPU, and what the load did."""
    config = load_config(folder)
    return build.from_checkpoint(
        folder, config, resolve(Backend(device="cpu", **switches), config), mtp=mtp, quiet=True
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a folder's safetensors hold."""
    return {
        key: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let `change` edit the folder's tensors, and write them back as one file."""
    found = {key: tensor.clone() for key, tensor in tensors(folder).items()}
    change(found)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(found, folder / checkpoint.SINGLE, metadata={"format": "pt"})
