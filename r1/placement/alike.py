"""Whether the processes that share a model loaded parts of the same checkpoint."""

from __future__ import annotations

import zlib

from torch import nn

from r1.model.layers import RMSNorm
from r1.model.router import Router
from r1.model.transformer import Transformer
from r1.placement.mesh import Mesh


def check_weights(model: Transformer, mesh: Mesh) -> None:
    """Raise InputError on every process if one loaded another checkpoint than the others.

    Seen by what several of them hold whole: all have the final norm, a stage's the same layers.
    """
    if mesh.ranks > 1:
        what, advice = "its weights", "give every rank the same checkpoint"
        mesh.check_alike(what, fingerprint(model.norm), advice)
        mesh.check_alike(what, fingerprint(model), advice, in_stages=True)


def fingerprint(part: nn.Module) -> int:
    """A checksum of the norms and routers, which devices that share a layer hold whole."""
    total = 0
    for module in part.modules():
        if isinstance(module, (RMSNorm, Router)):
            numbers = module.weight.detach().float().cpu().contiguous()
            total = zlib.crc32(numbers.numpy().tobytes(), total)
    return total
