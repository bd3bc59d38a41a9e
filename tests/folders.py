"""A checkpoint's folder: load it, read its tensors, change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from r1 import Backend, build
from r1.files.config_json import load_config
from r1.files.load import Report
from r1.files.shards import SINGLE
from r1.model.transformer import Transformer
from r1.switches.resolve import resolve


def load(folder: Path, *, mtp: bool = False, **switches: Any) -> tuple[Transformer, Report]:
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
    save_file(found, folder / SINGLE, metadata={"format": "pt"})
