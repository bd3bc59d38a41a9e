"""The reference cases of tests/reference, run through our model, fp32 on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import TINY, for_experts
from safetensors.torch import load_file
from tolerances import atol
from torch import Tensor
from torch.nn import functional as F

from r1 import Backend, Config, build
from r1.files.config_json import load_config
from r1.model.dispatch import Dispatch, Grouped
from r1.model.moe import Experts, MoE
from r1.model.transformer import Transformer
from r1.run.runner import Runner
from r1.run.trace import Difference, compare, first_divergence, trace
from r1.storage.dense import Dense
from r1.storage.joined import join
from r1.switches.resolve import resolve
from r1.switches.strategies import attention_of

torch.set_num_threads(
    1
)  # the models are tiny: a second thread costs more than it brings, tenfold on a busy machine

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"
CASES = sorted(path.name for path in REFERENCE.iterdir() if path.is_dir())
PER_LAYER = ("attn", "mlp", "hidden")


@cache
def reference(case: str) -> dict[str, Tensor]:
    """What transformers put out; the names are r1/run/trace.py's, and `tokens`."""
    return load_file(REFERENCE / case / "reference.safetensors")


@cache
def config(case: str) -> Config:
    return load_config(REFERENCE / case)


def attention_names(case: str) -> list[str]:
    """The attention strategies of the case's model that run on a CPU."""
    table = attention_of(config(case).attention)
    return [name for name in table if name != "triton"]


@cache
def _model(case: str) -> Transformer:
    return build.from_checkpoint(REFERENCE / case, config(case), _resolved(case, {}), quiet=True)[0]


def _resolved(case: str, switches: dict[str, Any]) -> Backend:
    asked = {"device": "cpu", "dtype": "fp32", "prefill_moe": "loop", **switches}
    return resolve(Backend(**for_experts(config(case), asked)), config(case))


def runner(case: str, **switches: Any) -> Runner:
    """Our model of a case, fp32 on the CPU, loaded once: the strategies asked for last are those of
    every runner of the case.

    What a switch can't do raises InputError.
    """
    backend = _resolved(case, switches)
    return Runner(build.finish(_model(case), backend), backend)


def fresh(case: str, **switches: Any) -> Runner:
    """The same, built and loaded anew: to be changed, or built by wrong formulas."""
    backend = _resolved(case, switches)
    return Runner(
        build.from_checkpoint(REFERENCE / case, config(case), backend, quiet=True)[0], backend
    )


def differences(
    case: str, run: Runner | None = None, first: int | None = None, row: str = "reference fp32"
) -> list[Difference]:
    """Each layer's outputs beside the reference's; `first`: only for so many tokens of each row (a
    causal model's).
    """
    run = run or runner(case)
    theirs = {name: tensor[:, :first] for name, tensor in reference(case).items()}
    tokens = theirs.pop("tokens")
    ours = trace(run, tokens)
    assert ours.keys() == theirs.keys(), (
        f"{case}: not everything is compared: {ours.keys() ^ theirs.keys()}"
    )
    return compare(ours, theirs, atol(row))


def check(case: str, run: Runner | None = None) -> None:
    """Fail with the name of the first layer that is off."""
    first = first_divergence(differences(case, run))
    assert first is None, (
        f"{case}: first divergence at {first.name}: "
        f"off by {first.max_abs:.2e}, values to {first.scale:.2g}"
    )


class GroupedPadded(Grouped):
    """`grouped` for odd sizes: weights and tokens are widened with zeros, to a multiple of 4.

    The zeros add nothing to any sum.
    """

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        dim, inner = x.shape[-1], experts.down_proj.shape[-1]
        wide, deep = -dim % 4, -inner % 4
        padded = Experts(
            TINY.change(
                hidden_size=dim + wide,
                moe_intermediate_size=inner + deep,
                n_routed_experts=experts.count,
            )
        )
        gate, up = (
            Dense(F.pad(matrix.dense(), (0, wide, 0, deep)))
            for matrix in (experts.gate_proj, experts.up_proj)
        )
        padded.gate_proj, padded.up_proj = join(gate, up)
        padded.down_proj = Dense(F.pad(experts.down_proj.dense(), (0, deep, 0, wide)))
        return super().__call__(padded, F.pad(x, (0, wide)), indices, weights)[:, :dim]


def use_dispatch(run: Runner, dispatch: Dispatch) -> Runner:
    """Put one dispatch into both slots of every MoE layer."""
    for module in run.model.modules():
        if isinstance(module, MoE):
            module.dispatch = {"prefill": dispatch, "decode": dispatch}
    return run
