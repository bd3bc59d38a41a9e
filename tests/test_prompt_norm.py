"""A prompt's norm that also rounds (r1/kernels/prompt_norm.py) is the norm, and then the rounding.

Holds to account: r1/kernels/prompt_norm.py.

Run as in test_kernels.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from test_kernels import DEVICE, DTYPES, close, draw
from test_narrow import ABLE, CHIP

from r1.kernels.chip import Chip
from r1.kernels.prompt_norm import norm_and_round
from r1.model.layers import RMSNorm
from r1.storage.activations import as_fp8

pytestmark = ABLE


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("length", [128, 384])
def test_norm_and_round(length: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups need not be a power of two, and one of only zeros has a scale. x has a stride."""
    monkeypatch.setattr(Chip, "of", lambda _: CHIP)
    torch.manual_seed(0)
    norm = RMSNorm(length, 1e-5).to(DEVICE, DTYPES[dtype]).requires_grad_(False)
    norm.weight.copy_(draw(length, dtype=dtype))
    x = draw(5, length + 8, dtype=dtype)[:, :length]
    x[0], x[1, :128] = 0, 0
    normed, (numbers, scales) = norm_and_round(norm, x)
    close(normed, norm(x), dtype)
    wanted, wanted_scales = as_fp8(normed)
    assert torch.equal(numbers.float(), wanted.float()) and torch.equal(scales, wanted_scales)
    compiled = torch.compile(norm_and_round, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(compiled(norm, x)[0], normed)
