"""Recorded routing: the file, what records it, what replays it, and the policy that pins by it.

Holds r1/placement/profile.py, r1/placement/slots.py, r1/bench/routing.py and
tools/measure/record_routing.py to account.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import record_routing
import torch
from models import TINY, sharp_logits
from refusals import refused
from test_offload import check, streamed_layers

import bench
import r1
from r1 import Backend, build
from r1.bench import plan, routing
from r1.bench.flags import parser
from r1.bench.workload import Workload
from r1.files.embedded import EMBEDDED
from r1.model.moe import MoE
from r1.model.transformer import Transformer
from r1.placement.profile import Profile, load
from r1.placement.slots import Recorded
from r1.run.runner import Runner
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

EXPERTS, CHOSEN = TINY.experts.n_routed_experts, TINY.experts.num_experts_per_tok
LAYERS = [layer for layer in range(TINY.num_hidden_layers) if TINY.is_moe(layer)]


def skewed(tokens: int = 1000) -> Profile:
    """Expert e of layer l is chosen in proportion to 1 / (1 + (e + l) mod E), at most always."""
    counts = {}
    for layer in LAYERS:
        weights = [1 / (1 + (expert + layer) % EXPERTS) for expert in range(EXPERTS)]
        scale = CHOSEN * tokens / sum(weights)
        counts[layer] = [min(tokens, scale * each) for each in weights]
    return Profile(tokens, CHOSEN, counts, "made")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "skew.json"
    skewed().write(path)
    return path


# ---------------------------- the file
def test_there_and_back(file: Path) -> None:
    found = load(file, TINY)
    assert found == skewed()
    for layer in LAYERS:
        assert max(found.shares(layer)) <= 1 and sum(found.shares(layer)) <= CHOSEN + 1e-9
    assert found.found(EXPERTS) == pytest.approx(sum(found.shares(LAYERS[0])) / CHOSEN)
    assert 0 == found.found(0) < found.found(4) < found.found(8)
    assert found.found(4) > 4 / EXPERTS


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "can't be read as JSON"),
    "a list": ("[]", "can't be read as JSON"),
    "nested": ("[" * 10**5, "can't be read as JSON"),
    "no counts": ({"counts": None}, 'it has no object "counts"'),
    "a layer less": ({"counts": {"1": [1] * EXPERTS}}, r"layer \d+ is missing"),
    "few experts": ([1.0] * (EXPERTS - 1), f"has {EXPERTS - 1} counts, and this model has"),
    "no list": (7, "has no list of counts"),
    "NaN": ([float("nan")] * EXPERTS, "has the count nan"),
    "endless": ([1e400] * EXPERTS, "has the count inf"),
    "negative": ([-1] * EXPERTS, "has the count -1"),
    "text": (["1"] * EXPERTS, "has the count '1'"),
    "zeros": ([0] * EXPERTS, "was chosen"),
    "chosen": ({"chosen": 3}, "and this model's tokens choose"),
    "tokens": ({"tokens": 0}, '"tokens" is 0'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, file: Path) -> None:
    """One sentence: in the library, as a policy, and in bench.py before anything is measured."""
    content, said = WRONG[case]
    if isinstance(content, str):
        file.write_text(content)
    else:
        fields = json.loads(file.read_text())
        if isinstance(content, dict):
            fields |= content
        else:
            fields["counts"][str(LAYERS[1])] = content
        file.write_text(json.dumps(fields))
    with refused(said):
        load(file, TINY)
    asked = Backend(device="cpu", experts="host", expert_policy="pinned", expert_profile=str(file))
    with refused(said):
        build.placement_of(TINY, resolve(asked, TINY))
    arguments = parser(EMBEDDED).parse_args(["--shape", "tiny", "--routing", str(file)])
    with refused(said):
        plan.check_of_use(arguments, TINY, [])


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refused(r"none\.json can't be read \(No such file or directory\)"):
        load(tmp_path / "none.json", TINY)
    with pytest.raises(SystemExit) as end:
        bench.main(["--routing", "none.json"])
    assert end.value.code == 2
    said = "'none.json' is no file: choose model, uniform, fresh, or give a recording's file"
    assert said in capsys.readouterr().err
    assert record_routing.main(["--model", str(tmp_path / "none")]) == 2
    assert "none is no folder: give a checkpoint's" in capsys.readouterr().err


# ---------------------------- recorded, and replayed
def test_a_recording_of_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each token is counted once in each layer; a cache does not count a prompt again."""
    path = tmp_path / "made.json"
    assert record_routing.main(["-n", "1", "--new", "5", "--device", "cpu", "-o", str(path)]) == 0
    engine = r1.load(EMBEDDED, Backend(device="cpu"), quiet=True)
    found = load(path, engine.config)
    (question,) = record_routing.questions_of(
        record_routing.argparse.Namespace(text=None, model=EMBEDDED, n=1)
    )
    prompt = engine.encode(question)
    (done,) = engine.generate([prompt], 5, temperature=0.0)
    assert found.tokens == len(prompt) + len(done.tokens) - 1, "the last one is not read"
    assert found.model == "tiny-r1"
    for counts in found.counts.values():
        assert sum(counts) == found.tokens * found.chosen
    assert "most chosen experts" in capsys.readouterr().out


def drawn(profile: Profile, seed: int = 0) -> Runner:
    backend = resolve(Backend(dtype="fp32"), TINY)
    made = build.from_shape(TINY, backend)
    routing.make_recorded(made, seed, profile)
    return Runner(made, backend)


def chosen(made: Transformer) -> dict[int, torch.Tensor]:
    """The share of ROWS tokens that choose each expert, by layer, as the routers choose."""
    found = {}
    for number, layer in routing.sparse_layers(made).items():
        assert layer.draws is not None
        indices = layer.gate.choose(layer.draws)
        found[number] = indices.flatten().bincount(minlength=EXPERTS) / len(layer.draws)
    return found


def test_replayed_as_recorded() -> None:
    """Each expert as often as in the file, though groups bind the choices; by position and row."""
    profile = skewed()
    run = drawn(profile)
    run.prefill([list(range(250)) for _ in range(4)], run.cache(4, 256))
    for number, shares in chosen(run.model).items():
        wanted = torch.tensor(profile.shares(number))
        assert (shares.cpu() - wanted).abs().max() < 0.08
        assert shares.cpu().sum() == pytest.approx(CHOSEN)
    first = [layer.draws for layer in routing.sparse_layers(run.model).values()]
    again = drawn(profile)
    again.prefill([list(range(250)) for _ in range(4)], again.cache(4, 256))
    for a, layer in zip(first, routing.sparse_layers(again.model).values(), strict=True):
        assert a is not None and layer.draws is not None and torch.equal(a, layer.draws)


def test_a_row_names_its_recording(file: Path) -> None:
    work = Workload(None, "tiny", None, 1, 8, 4, 0, 0, routing=str(file))
    assert work.name == "tiny, random weights, routing skew.json"


# ---------------------------- the policy
def test_pinned_by_a_recording(file: Path) -> None:
    """What was chosen most there stays, whatever is chosen here; and no number changes."""
    slots = Recorded(2, 4)
    slots.expect([5, 1, 9, 7])
    slots.count([1], [1000])
    assert slots.order([0, 1, 2, 3]) == [1, 0, 3, 2]
    slots.take(2, ()), slots.take(1, ())
    assert slots.take(0, ()) == 1, "1 is chosen least"
    assert slots.take(3, ()) == 1 and set(slots.slot) == {2, 3}
    switches: dict[str, Any] = {"experts": "host", "expert_slots": 6}
    run = sharp_logits(**switches, expert_policy="pinned", expert_profile=str(file))
    check(sharp_logits(), run)
    run.prefill([list(range(200))], run.cache(1, 256))
    profile = skewed()
    for number, layer in zip(LAYERS, streamed_layers(run.model), strict=True):
        counts = profile.counts[number]
        assert isinstance(layer.slots, Recorded) and layer.slots.counts == counts


def test_its_hits_are_the_recordings(file: Path) -> None:
    """Replayed and pinned: the share that the recording foretells, above that of even choices."""
    asked = Backend(
        dtype="fp32", experts="host", expert_slots=6, expert_policy="pinned",
        expert_profile=str(file),
    )  # fmt: skip
    backend = resolve(asked, TINY)
    made = build.from_shape(TINY, backend)
    profile = skewed()
    routing.make_recorded(made, 0, profile)
    run = Runner(made, backend)
    cache = run.cache(1, 400)
    run.prefill([list(range(64))], cache)
    for layer in streamed_layers(made):
        layer.traffic.clear()
    for token in range(200):
        run.decode(torch.tensor([[token]], device=run.device), cache)
    hits, visits = (
        sum(getattr(layer.traffic[1], name) for layer in streamed_layers(made))
        for name in ("hits", "visits")
    )
    even = 6 / EXPERTS
    assert hits / visits > even + 0.1
    assert profile.found(6 - CHOSEN) - 0.05 < hits / visits < profile.found(6) + 0.05


def test_a_profile_and_its_policy_go_together() -> None:
    host: dict[str, Any] = {"device": "cpu", "experts": "host"}
    with refused("expert_profile=FILE is of no use without expert_policy=pinned"):
        resolve(Backend(**host, expert_profile="a.json"), TINY)
    with refused("expert_policy=pinned needs a recording: add expert_profile=FILE"):
        resolve(Backend(**host, expert_policy="pinned"), TINY)
    with refused("expert_profile=3: give a file's path"):
        Backend(expert_profile=3)  # type: ignore[arg-type]
    assert all(
        isinstance(layer, MoE) for layer in routing.sparse_layers(drawn(skewed()).model).values()
    )
