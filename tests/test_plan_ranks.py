"""plan_ranks.py: every rank's share, without GPUs, and the command that would measure it.

Holds to account: tools/check/plan_ranks.py, and what it asks of r1/build.py (check_memory),
r1/bench/sizes.py and r1/guide/layouts.py (fastest).
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import plan_ranks
import pytest
from plan_ranks import Rank, rank_of
from ranks import Ranks
from test_parallel import H100, SPREAD, frequency, named, run

from r1 import Backend, Config, build
from r1.__main__ import EMBEDDED
from r1.bench import flags, plan
from r1.footprint import least
from r1.guide import gpus
from r1.model.shapes import shape
from r1.placement.placement import Placement
from r1.switches.flags import given
from r1.switches.resolve import resolve

MTP = {"speculate": "mtp"}
EIGHT: list[dict[str, Any]] = [{"tp": 8}, {"tp": 2, "ep": 4}, {"tp": 4, "pp": 2} | MTP]
FOUR = [{"tp": 4}, {"ep": 4}, {"tp": 2, "ep": 2}, {"tp": 2, "pp": 2}]
HEADS = r"\.(q_proj|q_b_proj|kv_b_proj|o_proj)\."
INNER = r"\.(gate_proj|up_proj|down_proj|eh_proj)\.|^lm_head\.|^embed_tokens\."


# ---------------------------- bytes
def ranks_of(config: Config, backend: Backend, free: int = 10**12) -> list[Rank]:
    return [rank_of(config, backend, rank, [], free) for rank in range(backend.ranks)]


def with_copies(config: Config, backend: Backend) -> tuple[int, int]:
    """The whole model's bytes, and those of all ranks together: this test's own account.

    Several ranks hold what belongs to heads if only experts are spread (`ep`), and all of a stage
    the norms, the router and the projections to the latents. All stages have the final norm, and
    the last one the embedding too if the MTP layer reads it.
    """
    drafts = backend.speculate == "mtp"
    model = build.sketch(config, backend, mtp=drafts, placement=Placement())
    once = copied = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        copies = backend.tp * backend.ep
        if re.search(INNER, name):
            copies = 1
        elif re.search(HEADS, name):
            copies = backend.ep
        if name == "norm.weight":
            copies *= backend.pp
        elif name.startswith("embed_tokens.") and drafts and backend.pp > 1:
            copies *= 2
        once, copied = once + tensor.nbytes, copied + copies * tensor.nbytes
    return once, copied


@pytest.mark.parametrize("mesh", EIGHT, ids=named)
def test_all_ranks_of_r1_hold_the_model_and_known_copies(mesh: dict[str, Any]) -> None:
    """All 61 layers in FP8. The largest rank is what the loader's estimate is about."""
    config = shape("r1")
    backend = resolve(Backend(dtype="bf16", quant="fp8", **mesh), config, H100)
    found = [rank.weight_bytes for rank in ranks_of(config, backend)]
    once, copied = with_copies(config, backend)
    drafts = backend.speculate == "mtp"
    assert once > (685e9 if drafts else 673e9)
    assert sum(found) == copied
    assert max(found) == build.weight_bytes(config, backend, mtp=drafts)


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("mesh", FOUR, ids=named)
def test_ranks_of_a_small_model(mesh: dict[str, Any], quant: str) -> None:
    """Scales of rows lie on every rank that has some of their columns."""
    backend = resolve(Backend(device="cpu", quant=quant, **mesh), SPREAD)
    ranks, (_, copied) = ranks_of(SPREAD, backend), with_copies(SPREAD, backend)
    total = sum(rank.weight_bytes for rank in ranks)
    assert total == copied if quant == "none" else copied < total < 1.1 * copied
    assert sum(len(rank.layers) for rank in ranks) == SPREAD.num_hidden_layers * (
        backend.tp * backend.ep
    )
    experts = {expert for rank in ranks for expert in rank.experts}
    assert experts == set(range(SPREAD.experts.n_routed_experts))


def made(config: Config, switches: dict[str, Any]) -> int:
    """The bytes of a rank's model, really made."""
    model = build.from_shape(config, resolve(Backend(**switches), config))
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("mesh", FOUR, ids=named)
def test_processes_hold_what_was_planned(ranks: Ranks, mesh: dict[str, int]) -> None:
    """Beside it only the rotation's table, which is computed."""
    switches: dict[str, Any] = {"device": "cpu", "dtype": "fp32", **mesh}
    planned = ranks_of(SPREAD, resolve(Backend(**switches), SPREAD))
    found = run(ranks, mesh, made, SPREAD, switches)
    assert found == [rank.weight_bytes + frequency(SPREAD) for rank in planned]


def test_the_loaders_check_to_the_byte() -> None:
    """Of every rank, with its own bytes: the first stage of this cut R1 is smaller."""
    config = shape("r1", 8)
    backend = resolve(Backend(dtype="bf16", quant="fp8", tp=4, pp=2), config, H100)
    small, large = (rank_of(config, backend, n, [], 10**12) for n in (3, 4))
    assert (small.layers.stop, large.layers.start, small.refused) == (5, 5, None)
    needed = small.weight_bytes + least(build.sketch(config, backend), backend)
    assert rank_of(config, backend, 3, [], needed).refused is None
    refused = rank_of(config, backend, 3, [], needed - 1).refused
    assert refused and f"needs {needed / 1e9:.1f} GB in bf16 and fp8" in refused
    assert rank_of(config, backend, 4, [], needed).refused


# ---------------------------- the command line
def planned(words: str, path: Path) -> tuple[int, Any]:
    """The exit status, and the result file."""
    status = plan_ranks.main([*words.split(), "-o", str(path)])
    return status, json.loads(path.read_text(encoding="utf-8"))


COMMANDS = ["--tp 8", "--ep 8", "--pp 2 --tp 4", "--tp 8 --speculate mtp --draft-tokens 2"]


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_is_one_that_runs_as_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    """bench.py takes it, and its switches are resolved to those of the plan."""
    status, found = planned(f"--shape r1 --layers 4 --batch 1,8 {words}", tmp_path / "plan.json")
    start, _, rest = found["command"].partition(" bench.py ")
    assert status == 0 and capsys.readouterr().out.endswith(f"\n\n{found['command']}\n")
    assert start == "python -m torch.distributed.run --nproc-per-node 8"
    arguments = flags.parser(EMBEDDED).parse_args(shlex.split(rest))
    plan.check(arguments)
    machine = gpus.gpu("h200").as_machine()
    backend = resolve(Backend(**given(arguments)), plan.workloads(arguments)[0].config(), machine)
    assert vars(backend) == found["setup"]
    assert [w.batch for w in plan.workloads(arguments)] == [1, 8] and arguments.no_baseline


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks of a kind share a line; a step takes its floor and its sums."""
    words = "--shape r1 --layers 8 --pp 2 --tp 4 --batch 1,32"
    status, found = planned(words, tmp_path / "plan.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert status == 0 and found["refusals"] == []
    assert ["0-3", "0", "0-4", "32", "256", "512", "6.748", "yes"] in lines
    assert ["4-7", "1", "5-7", "32", "256", "512", "9.163", "yes"] in lines
    assert [rank["layers"] for rank in found["ranks"]] == [[0, 5]] * 4 + [[5, 8]] * 4
    for speed in found["speeds"]:
        step = speed["floor_ms"] + speed["sums_ms"]
        assert speed["tokens_per_s"] == pytest.approx(1e3 * speed["batch"] / step)
    one, many = (need["cache"] for need in found["ranks"][0]["needs"])
    assert many == 32 * one > 0


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loader refuses each rank, and bench.py each workload."""
    words = "--shape moonlight-16b --tp 2 --gpu 3060 --batch 1"
    status, found = planned(words, tmp_path / "plan.json")
    assert status == 1 and all(rank["refused"] for rank in found["ranks"])
    assert [bool(speed["refused"]) for speed in found["speeds"]] == [True]
    assert capsys.readouterr().out.count("\n\nrefused: the model ") == 2


REFUSED = {
    "--tp 3": "--tp 3: this model has 128 heads",
    "--ep 3": "--ep 3: this model has 256 experts",
    "--pp 62": "--pp 62: this model has 61 layers",
    "--tp 0": "--tp 0: give a whole number",
    "--tp 8 --ep 8": "16 blocks of 128, which can't be shared by 64 devices",
    "--draft-tokens 2": "--draft-tokens 2 is of no use without drafts",
    "--batch 0": "--batch 0: give whole numbers",
    "--speculate mtp --assume-acceptance 2": "--assume-acceptance 2.0: give 0 to 1",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_ranks.main(["--shape", "r1", "--quant", "fp8", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("plan_ranks: ") and err.count("\n") == 1
    assert REFUSED[words] in err
