"""A prompt's router as kernels (r1/kernels/prompt_router.py) chooses as the model's own.

Run as in test_kernels.py: under the interpreter on a CPU, as machine code on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import V3, unit_gain
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from test_kernels import CHIP, DEVICE, ROUTERS, SWITCHES, close, router, run_here
from test_rounded import watched

from r1.kernels import prompt_router
from r1.kernels.chip import Chip
from r1.kernels.choice import Rule
from r1.kernels.prompt_router import TOKENS, logits_kernel, route
from r1.model.router import Router


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(tokens: int, columns: int = 75) -> Tensor:
    return torch.randn(tokens, columns, device=DEVICE).bfloat16()


def check(gate: Router, x: Tensor, draws: Tensor | None = None, run: Any = route) -> None:
    (indices, weights), (right, wanted) = run(gate, x, draws), gate(x, draws)
    (found, order), (right, twin_order) = indices.sort(dim=1), right.sort(dim=1)
    assert torch.equal(found, right)
    close(weights.gather(1, order), wanted.gather(1, twin_order), "fp32")


@pytest.mark.parametrize("tokens", [1, TOKENS + 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_choices(name: str, tokens: int) -> None:
    check(router(name), draw(tokens))
    check(router(name), draw(tokens), torch.rand(7, router(name).weight.shape[0], device=DEVICE))


def test_other_numbers_are_left_to_the_router() -> None:
    gate, x = router("r1"), torch.randn(3, 75, device=DEVICE)
    assert all(torch.equal(*pair) for pair in zip(route(gate, x), gate(x), strict=True))


def test_logits_have_the_bits_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """More experts than a program has, and weights of many sizes: 2 of 3 parts would be off more.
    x has a stride.
    """
    weight = torch.randn(70, 200, device=DEVICE) * torch.exp(4 * torch.randn(70, 200)).to(DEVICE)
    x = draw(5, 300)[:, :200]
    kept: list[Tensor] = []

    def keep(chip: Chip, kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        run(chip, kernel, grid, *given, **constants)
        if kernel is logits_kernel:
            kept.append(given[2])

    run = Chip.run
    monkeypatch.setattr(Chip, "run", keep)
    rule = Rule(70, 128, 128, 2, 2, 1, 1, 1, SIGMOID=1, NORMED=1)
    prompt_router.launch(CHIP, x, weight, None, None, 1.0, list(rule))
    right = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    # Hopper's matrix units cut each of their 12 sums of a step to fp32.
    assert bool(((kept[0].double().sum(dim=0) - right).abs() <= 2.0**-19 * sizes).all())


def test_a_row_of_nan_has_experts_that_exist() -> None:
    x = draw(3)
    x[0] = float("nan")
    indices, weights = route(router("r1"), x)
    assert sorted(set(indices[0].tolist())) == sorted(indices[0].tolist())
    assert int(indices.min()) >= 0 and int(indices.max()) < 16
    assert bool(weights[0].isnan().all()) and bool(weights[1:].isfinite().all())


def test_compiled() -> None:
    """As one operator."""
    run = torch.compile(route, fullgraph=True, dynamic=True, backend="eager")
    for name in ("r1", "v2"):
        check(router(name), draw(9), run=run)


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts take the kernels with prefill_moe=triton, steps never. Who watches the router sees
    its choices; and the same model without the switch has its own router again.
    """
    seen: Any = watched()
    monkeypatch.setattr(Chip, "of", lambda _: seen)
    made = unit_gain(V3, dtype="bf16", device=DEVICE.type)
    kernels = {"logits_kernel", "choose_kernel"}
    shown: list[Tensor] = []
    last: Any = made.layers[-1]
    last.mlp.gate.register_forward_hook(lambda _gate, _x, y: shown.append(y[0]))
    ours = run_here(made, "bf16", **SWITCHES["prefill_moe"])
    cache = ours.cache(1, 16)
    ours.prefill([[5, 9, 20]], cache)
    assert kernels <= seen.ran and len(shown) == 1
    seen.ran.clear()
    ours.decode(torch.tensor([[3]], device=DEVICE), cache)
    plain = run_here(made, "bf16")
    plain.prefill([[5, 9, 20]], plain.cache(1, 16))
    assert not kernels & seen.ran
