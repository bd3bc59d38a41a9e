"""Ways to store weights that r1 does not read: told by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from r1.errors import InputError
from r1.files.folder import check_file
from r1.reading import read_json

MODELOPT = "hf_quant_config.json"
"""NVIDIA's ModelOpt describes its quantization here, and not in config.json."""
FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Endings of the tensors in which transformers 5 keeps all experts of a layer."""


def check_quantizer(directory: Path) -> None:
    """Raise InputError for a folder that ModelOpt quantized.

    It comes before the index is read, for that may not list the quantized tensors.
    """
    path = directory / MODELOPT
    if not check_file(path):
        return
    try:
        algorithm = read_json(path)["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError):
        algorithm = "an unknown format"
    raise InputError(
        f"{path}: the weights are quantized by ModelOpt ({algorithm}), which r1 does not read: get "
        "the model's own repository, in bf16 or FP8 blocks"
    )


def check_fused(directory: Path, keys: Iterable[str]) -> None:
    """Raise InputError for experts that are saved as one tensor for a layer."""
    fused = next((key for key in keys if key.endswith(FUSED)), None)
    if fused:
        raise InputError(
            f"{directory} has {fused}: the experts of a layer are fused, as transformers 5 keeps "
            "them in memory, and r1 reads one matrix for each expert: save the model again with "
            "save_pretrained(..., save_original_format=True)"
        )
