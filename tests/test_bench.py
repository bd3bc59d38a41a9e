"""bench.py and what it is made of: which arms, what a row says, parity's gate, the roofline's
arithmetic, the machine table.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import REFERENCE, WORK, beside_baseline, made_row

import bench
from r1.bench import ablation, arms, flags, measure, plan, timeline
from r1.bench.arms import TEXTBOOK, Arm
from r1.bench.process import Answer, Process, signals
from r1.bench.rates import Rates, bottleneck
from r1.bench.report.aligned import aligned
from r1.bench.report.fields import FIELDS, SCHEMA
from r1.bench.report.render import render
from r1.bench.report.rows import row as make_row
from r1.bench.report.table import COLUMNS, table
from r1.bench.report.text import drafts, markdown
from r1.bench.routing import make_uniform
from r1.bench.session import Session
from r1.bench.upcast import upcast
from r1.bench.worker import steps, timing
from r1.bench.worker.serve import COMMANDS
from r1.bench.worker.subject import Subject
from r1.bench.workload import SIZES, Workload
from r1.build import from_shape
from r1.errors import InputError
from r1.model import attend
from r1.model.moe import MoE
from r1.model.router import Router
from r1.model.shapes import shape
from r1.model.transformer import Transformer
from r1.roofline import draft_work, expected_experts, expected_tokens, speculation, step_work
from r1.run.compiled import matrix_vector_backend
from r1.run.runner import Runner
from r1.switches.backend import Backend
from r1.switches.machine import Machine, explain, fp8_format
from r1.switches.resolve import resolve

H100 = Machine(cuda=True, name="NVIDIA H100", capability=(9, 0), memory=80 * 10**9)
MI300 = Machine(cuda=True, hip="7.0", name="AMD Instinct MI300X", arch="gfx942", memory=192 * 10**9)
T4 = Machine(cuda=True, name="Tesla T4", capability=(7, 5), memory=16 * 10**9)
CPU = Machine(name="a CPU", memory=10**10)


# --------------------------------------------------------------------------------- arms
def test_given_switches_alone_and_together() -> None:
    found = arms.from_switches({"compile": True, "amp": "bf16"})
    assert [(a.name, a.kind) for a in found] == [
        ("baseline", "baseline"), ("compile", "alone"), ("amp=bf16", "alone"),
        ("compile + amp=bf16", "together"),
    ]  # fmt: skip
    assert all(
        a.backend.dtype == "fp32" for a in found
    )  # amp casts fp32 weights, so its baseline has them
    assert found[0].backend == Backend(dtype="fp32", quant="none")
    assert len(arms.from_switches({"compile": True})) == 2 and len(arms.from_switches({})) == 1


def test_arms_of_the_same_switches_have_names_of_their_own() -> None:
    """Each switch given is named, also where another one is of the same kind."""
    given = {
        "attention": "naive",
        "prefill_attention": "naive",
        "moe": "triton",
        "prefill_moe": "triton",
        "kernels": "triton",
    }
    names = [arm.name for arm in arms.from_switches(given, ("alone", "together", "all-but-one"))]
    assert len(names) == len(set(names)) == 12
    assert (
        "attention=naive + prefill_attention=naive + moe=triton + prefill_moe=triton + "
        "kernels=triton" in names
    )


def test_given_switches_all_but_one() -> None:
    given = {"cuda_graphs": True, "kernels": "triton", "tune": True}
    found = arms.from_switches(given, ("together", "all-but-one"))
    assert [a.name for a in found] == [
        "baseline", "cuda_graphs + kernels=triton + tune", "all but cuda_graphs",
        "all but kernels=triton", "all but tune",
    ]  # fmt: skip
    switches = [(a.backend.cuda_graphs, a.backend.kernels, a.backend.tune) for a in found[1:]]
    assert switches == [
        (True, "triton", True),
        (False, "triton", True),
        (True, "torch", False),
        (True, "triton", False),
    ]
    assert [a.name for a in arms.from_switches(given, ("all-but-kernels",))] == [
        "baseline",
        "all but kernels=triton",
    ]
    assert [a.name for a in ablation.ablation({}, CPU, 1, ("all-but-moe",))] == [
        "baseline",
        "all but moe=gather",
    ]


@pytest.mark.parametrize("kind", ["all-but-compile", "together"])
def test_a_kind_without_an_arm_is_refused(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--amp", "bf16", "--only", kind]) == 2
    assert (
        capsys.readouterr().err.strip()
        == f"bench: --only {kind}: with these switches no arm is of this kind"
    )


def test_kinds_are_named_as_flags_are() -> None:
    assert flags.kinds("together,all-but-one,all-but-cuda-graphs") == (
        "together",
        "all-but-one",
        "all-but-cuda_graphs",
    )


@pytest.mark.parametrize(
    ("flag", "wrong", "said"),
    [
        *(("--only", kind, "give alone, together, ladder, all-but-one, pairs or all-but-SWITCH "
           "(as in all-but-moe), with commas")
          for kind in ("foo", "all-but-nothing", "cuda-graphs", "all-but-", "")),
        *((flag, value, "give whole numbers above 0, with commas between")
          for flag in ("--batch", "--prompt", "--new")
          for value in ("x", "1,", "0", "8,-1", "1.5")),
        *(("--depth", value, "give whole numbers of 0 or more, with commas between")
          for value in ("x", "-1", "")),
        *(("--price", value, "give amounts of money, with commas between")
          for value in ("cheap", "2,")),
        *(("--seed", value, "give a whole number from 0 to 2^63 - 1")
          for value in ("x", "-1", str(2**63))),
    ],
)  # fmt: skip
def test_a_flag_says_what_it_takes(
    flag: str, wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([flag, wrong])
    assert caught.value.code == 2
    assert f"bench: {flag}: {wrong!r}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("machine", "batch"), [(CPU, 1), (H100, 1), (H100, 32), (MI300, 1), (MI300, 32), (T4, 1)]
)
@pytest.mark.parametrize("name", ["moonlight-16b", "r1-distill-llama-8b"])
def test_ablation_has_every_rung_and_every_step_left_out(
    name: str, machine: Machine, batch: int
) -> None:
    found = ablation.ablation({}, machine, batch, config=shape(name))
    steps = ablation.ladder_steps({}, machine, batch, shape(name))
    assert (
        found[0].kind == "baseline"
        and found[0].backend.moe == ("loop" if shape(name).experts.n_routed_experts else "auto")
        and found[0].backend.attention == "naive"
    )
    ladder = [a for a in found if a.kind == "ladder"]
    assert len(ladder) == len(steps)
    full = ladder[-1].backend
    assert all(
        getattr(full, k) == v for k, v in {k: v for step in steps for k, v in step.items()}.items()
    )
    backends = {a.backend for a in found if a.timed}
    assert len(backends) == sum(a.timed for a in found)  # nothing is timed twice
    for step in steps:  # a later step may set again what an earlier one did
        others = [s for s in steps if s is not step and not ("kernels" in step and "tune" in s)]
        off = dataclasses.replace(found[0].backend, **{k: v for s in others for k, v in s.items()})
        assert off in backends, f"all but {step} is lacking"
    # what can't be had is refused by resolve, in a sentence; all that a GPU's ladder is made of can
    for arm in found:
        if arm.kind == "ladder" or (machine.cuda and arm.kind != "all-but-one"):
            resolve(arm.backend, shape(name), machine, batch=batch)
    names = [a.name for a in found]
    assert len(set(names)) == len(names)
    alone = ablation.ablation({}, machine, batch, ("all-but-one",), config=shape(name))
    assert all(
        arm.backend != full for arm in alone
    )  # what a later step sets anew can't be left out


def test_gpu_only_steps_stay_away_from_a_cpu() -> None:
    assert not any(
        step.keys() & {"cuda_graphs", "memory"} for step in ablation.ladder_steps({}, CPU, 1)
    )
    assert not any(
        "cuda_graphs" in step for step in ablation.ladder_steps({"device": "cpu"}, H100, 1)
    )
    assert {"cuda_graphs": True} in ablation.ladder_steps({}, H100, 1)


@pytest.mark.parametrize("machine", [H100, MI300, T4])
def test_the_ladder_has_prompts_of_our_kernels_and_captured(machine: Machine) -> None:
    steps = ablation.ladder_steps({}, machine, 1)
    assert {"prefill_moe": "triton"} in steps and any("prefill_graphs" in step for step in steps)
    for where, given in (
        (CPU, {}),
        (machine, {"device": "cpu"}),
        (machine, {"amp": "bf16"}),
        (machine, {"dtype": "fp32"}),
    ):
        steps = ablation.ladder_steps(given, where, 1)
        assert not any(
            "prefill_graphs" in step or step.get("prefill_moe") == "triton" for step in steps
        )


# --------------------------------------------------------------------------------- the reference
def test_reference_of_widened_weights_is_fp32s() -> None:
    config = shape("tiny")
    tokens = torch.arange(30)[None]
    fp32, bf16 = (
        resolve(Backend(device="cpu", dtype=dtype, **TEXTBOOK), config)
        for dtype in ("fp32", "bf16")
    )
    wanted = Runner(from_shape(config, fp32), fp32).logits(tokens)
    model = from_shape(config, bf16)
    upcast(model)
    runner = Runner(model, bf16)
    runner.cache_dtype = torch.float32
    assert torch.equal(runner.logits(tokens), wanted)
    cache = runner.cache(1, 32)
    runner.prefill([list(range(29))], cache)
    assert (
        float((runner.decode(torch.tensor([[29]]), cache)[0, 0] - wanted[0, -1]).abs().max()) < 1e-4
    )


# --------------------------------------------------------------------------------- compiled decode
def test_matrix_vector_rules_give_the_same_logits() -> None:
    """What a GPU's decode step is compiled with, here on a CPU."""
    if torch.cuda.is_available():  # then others compile, and a process may do so so often
        torch._dynamo.reset()
    config = shape("tiny").change(num_hidden_layers=2)
    backend = resolve(Backend(device="cpu", dtype="fp32"), config)
    model = from_shape(config, backend)
    plain, ruled = Runner(model, backend), Runner(model, backend)
    ruled.blocks["decode"] = [
        torch.compile(b, fullgraph=True, dynamic=False, backend=matrix_vector_backend)
        for b in model.layers
    ]
    got = []
    for runner in (plain, ruled):
        cache = runner.cache(1, 16)
        runner.prefill([[1, 2, 3]], cache)
        got.append(torch.cat([runner.decode(torch.tensor([[t]]), cache) for t in (4, 5)]))
    assert float((got[0] - got[1]).abs().max()) < 1e-5


# --------------------------------------------------------------------------------- roofline
def as_resolved(**switches: Any) -> Backend:
    """A backend as `resolve` would make it, on a machine that need not be here."""
    settings = {"attention": "absorbed", "prefill_attention": "expand", "join": "on", **switches}
    return Backend(**settings)


def test_moonlights_bytes_are_the_published_count() -> None:
    """5.17 GB a token, so 584 tokens/s at 3.02 TB/s (issue 3); batch 8 and 32 by the experts
    expected to be hit.
    """
    config, backend = (
        shape("moonlight-16b"),
        as_resolved(device="cuda", dtype="bf16"),
    )
    for rows, hit, limit in (
        (1, 6.0, 584),
        (8, expected_experts(config, 8), 1330),
        (32, expected_experts(config, 32), 3220),
    ):
        work = step_work(config, backend, rows, 1, 0, hit)
        assert rows * 3.02e12 / work.nbytes == pytest.approx(limit, rel=0.01)


def test_weights_counted_are_the_models() -> None:
    """All experts hit: every parameter is read but the norms, the bias and what of the embedding
    isn't looked up.
    """
    for name in ("tiny", "v2-lite"):
        config, backend = shape(name, 2), as_resolved(dtype="fp32")
        with torch.device("meta"):
            from r1.model.transformer import Transformer

            model = Transformer(config)
        counted = sum(
            p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n
        )
        work = step_work(config, backend, 1, 1, 0, config.experts.n_routed_experts)
        assert work.weight_bytes == 4 * (counted + config.hidden_size)


def test_drafts_bytes_are_the_mtp_layers() -> None:
    """All experts hit: a pass reads every matrix of the layer and the output head; the gate is
    fp32, as all is here.
    """
    for name, batch in (("tiny", 400), ("v2-lite", 2000)):
        config = shape(name, 2).change(num_nextn_predict_layers=1)
        with torch.device("meta"):
            from r1.model.mtp import MTPLayer

            counted = (
                sum(p.numel() for p in MTPLayer(config).parameters() if p.dim() > 1)
                + config.vocab_size * config.hidden_size
            )
        for k in (1, 3):
            work = draft_work(
                config,
                as_resolved(dtype="fp32", speculate="mtp", draft_tokens=k),
                batch,
                0,
            )
            looked_up = batch * (k + 1 + k - 1) * config.hidden_size
            assert work.weight_bytes == pytest.approx(4 * (k * counted + looked_up), rel=1e-6)


def test_when_speculation_pays() -> None:
    assert (
        expected_tokens(0.8, 1) == 1.8
        and expected_tokens(0.5, 3) == 1.875
        and expected_tokens(0.0, 2) == 1
    )
    config = shape("moonlight-16b").change(num_nextn_predict_layers=1)
    for rows, k in ((1, 1), (1, 3), (8, 2), (64, 1)):
        backend = as_resolved(dtype="bf16", speculate="mtp", draft_tokens=k)
        model = speculation(config, backend, rows, 256)
        assert model.turn.nbytes == model.verify.nbytes + model.draft.nbytes > model.plain.nbytes
        edge = model.pays_from()
        assert edge is not None and model.speedup(expected_tokens(edge, k)) == pytest.approx(1)
    # One row: a second token brings its own experts along, 11.4 of 64 instead of 6. Many rows: they
    # are read anyway.
    one, many = (
        speculation(config, as_resolved(dtype="bf16", speculate="mtp"), rows, 256)
        for rows in (1, 64)
    )
    assert 1.05 < one.speedup(1.8) < 1.15 and many.speedup(1.8) > 1.6
    verified = step_work(config, as_resolved(dtype="bf16"), 1, 2, 0, 11.4375)
    experts = (11.4375 - 6) * 26 * 3 * 2048 * 1408 * 2
    assert (
        verified.weight_bytes
        - step_work(config, as_resolved(dtype="bf16"), 1, 1, 0, 6.0).weight_bytes
        == experts + 2 * 2048
    )
    small = speculation(
        config.change(num_hidden_layers=1),
        as_resolved(dtype="bf16", speculate="mtp"),
        1,
        0,
    )
    assert (
        small.pays_from() is None and small.speedup(2) < 1
    )  # the drafter is as large as the model


def test_bottleneck_names_the_largest() -> None:
    rates = Rates(copy=3e12, matmul=8e14, launch=8e-6, replay=1.2e-6)
    work = step_work(shape("moonlight-16b"), as_resolved(dtype="bf16"), 1, 1, 256, 6)
    assert work == step_work(
        shape("moonlight-16b"),
        as_resolved(dtype="bf16", kernels="triton", attention="triton"),
        1,
        1,
        256,
        6,
    )
    assert bottleneck(work, rates, 1400, False, 0.04) == "launches"
    assert bottleneck(work, rates, 650, True, 0.0036) == "memory"
    prompt = step_work(shape("moonlight-16b"), as_resolved(dtype="bf16"), 1, 65536, 0, 64)
    assert bottleneck(prompt, rates, 1400, False, 1.0) == "compute"
    assert bottleneck(work, rates, None, False, 1.0) == "framework"


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_are_counted_alike_in_kernels_and_in_torch(drafts: int) -> None:
    """absorbed and triton compute the same function, in a step, in a verification, in drafts."""
    config = shape("moonlight-16b").change(num_nextn_predict_layers=1)
    switches = {"dtype": "bf16", "speculate": "mtp", "draft_tokens": drafts}
    torch_, triton_ = (
        speculation(config, as_resolved(**switches, **kernels), 8, 256)
        for kernels in ({}, {"kernels": "triton", "attention": "triton"})
    )
    assert torch_ == triton_


# --------------------------------------------------------------------------------- the machine
def test_capabilities_of_made_up_machines() -> None:
    assert H100.device == "cuda" and MI300.device == "rocm" and CPU.device == "cpu"
    assert (
        fp8_format(H100) == torch.float8_e4m3fn
        and fp8_format(MI300) == torch.float8_e4m3fnuz
        and fp8_format(T4) is None
    )
    assert (
        fp8_format(dataclasses.replace(MI300, arch="gfx950")) == torch.float8_e4m3fn
        and fp8_format(CPU) is None
    )
    assert H100.why_not("grouped_mm") is None and "only, not for Tesla T4" in str(
        T4.why_not("grouped_mm")
    )
    assert "8.0" in str(T4.why_not("bf16")) and MI300.why_not("bf16") is None
    assert "use compile" in str(CPU.why_not("cuda_graphs")) and MI300.why_not("cuda_graphs") is None
    for machine in (H100, MI300, T4, CPU):
        text = explain(machine)
        assert machine.name in text and f"device={machine.device}" in text and "None" not in text
    assert "ROCm 7.0" in explain(MI300) and "e4m3fnuz" in explain(MI300)
    with pytest.raises(InputError, match="memory is the policy of the GPU's allocator"):
        resolve(Backend(memory="expandable"), shape("tiny"), CPU)


# --------------------------------------------------------------------------------- rows
def test_a_row_says_what_the_fields_promise() -> None:
    row = beside_baseline(made_row())
    assert list(row) == list(FIELDS)
    assert (
        row["tpot_ms"] == pytest.approx(20)
        and row["ttft_ms"] == pytest.approx(100)
        and row["decode_tok_s"] == pytest.approx(50)
    )
    assert row["speedup"] == pytest.approx(2) and row["within_noise"] is False
    assert (
        row["start_cold_s"] == 10 and row["start_warm_s"] == 2 and row["break_even_tokens"] == 500
    )
    assert (
        row["mbu"] == pytest.approx(row["step_gb"] * 1e9 / 0.02 / 1e10) and 0 < row["floor_ms"] < 20
    )


def test_no_speedup_without_parity_or_beyond_the_noise() -> None:
    failed = beside_baseline(made_row(passes=False))
    assert (
        failed["speedup"] is None
        and failed["break_even_tokens"] is None
        and failed["parity"] is False
    )
    assert beside_baseline(made_row(beside=0.02), 0.02)["within_noise"] is True
    slow = beside_baseline(made_row(beside=0.01), 0.01)
    assert slow["speedup"] == pytest.approx(0.5) and slow["break_even_tokens"] is None


def test_every_form_of_output() -> None:
    rows, sizes = [beside_baseline(made_row()), made_row(passes=False)], dict.fromkeys(SIZES, 1)
    rows.append(
        make_row(
            Arm("cuda_graphs", "alone", Backend()),
            WORK,
            {"refused": "no GPU here"},
            REFERENCE,
            shape("tiny"),
        )
    )
    for name in ("moe=triton", "+ moe=triton"):
        rows.append(
            make_row(
                Arm(name, "alone", Backend()),
                WORK,
                {"refused": "moe=triton: none here"},
                REFERENCE,
                shape("tiny"),
            )
        )
    result = {
        "machine": {"name": "M", "torch": "2", "python": "3"}, "repetitions": 3, "workload": "w",
        "rows": rows, "notes": ["said"], "pairs": [{"pair": "a & b", **sizes, "refused": None,
        "parity": True, "mean_kl": 1e-9}],
    }  # fmt: skip
    text = render(result, "md")
    assert (
        "\nmoe=triton: n/a: none here\n" in text and "\n+ moe=triton: n/a: none here\n" in text
    )  # what is named is not named again
    assert (
        "cuda_graphs: n/a: no GPU here" in text
        and "PARITY FAILS" in text
        and "a & b: passes" in text
        and "said" in text
    )
    assert json.loads(render(result, "json"))["rows"][0]["speedup"] == pytest.approx(2)
    lines = [json.loads(line) for line in render(result, "jsonl").splitlines()]
    assert len(lines) == 5 and all(line["machine"] == "M" for line in lines)
    table = list(csv.DictReader(io.StringIO(render(result, "csv"))))
    assert table[2]["refused"] == "no GPU here" and float(table[0]["tpot_ms"]) == pytest.approx(20)


def test_the_command_end_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    """Two arms in processes of their own; a wrong formula can't be put into those, so only what is
    right is seen here.
    """
    arguments = [
        "--moe",
        "grouped",
        "--device",
        "cpu",
        "--new",
        "4",
        "--prompt",
        "120",
        "-r",
        "2",
        "--problems",
        "2",
    ]
    assert bench.main([*arguments, "-o", "json"]) == 0
    out, err = capfd.readouterr()
    assert "bench: arm 1 of 2: baseline\n" in err and " s left: moe=grouped\n" in err
    result = json.loads(out)
    baseline, arm = result["rows"]
    assert arm["speedup"] == pytest.approx(baseline["tpot_ms"] / arm["tpot_ms"])
    assert result["machine"]["load"] >= 0 and result["machine"]["threads"] >= 1
    assert (
        all((row["accuracy"], row["problems"]) == (1.0, 2) for row in result["rows"])
        and not result["notes"]
    )
    assert (baseline["arm"], arm["arm"]) == ("baseline", "moe=grouped")
    assert (
        baseline["parity"] and arm["parity"] and arm["speedup"] > 0 and len(arm["repetitions"]) == 2
    )
    assert arm["backend"]["moe"] == "grouped" and baseline["backend"]["moe"] == "gather"
    assert result["machine"]["copy_gb_s"] > 0 and 0 < arm["experts_hit"] <= 16


def test_later_signals_do_not_disturb_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on the Ctrl-C that a terminal has sent to all: the second one comes while the
    ranks find out which one speaks.
    """
    asked = []

    def first() -> bool:
        asked.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(bench.ranks, "first_to_speak", first)
    with pytest.raises(KeyboardInterrupt), signals(bench.interrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # a handler runs before this ends
    assert asked == [True]


def test_an_interrupt_keeps_what_is_finished(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second arm is measured: the first one's row is there, and the baseline's,
    and nothing hangs: for a model of gigabytes nothing more is asked of the baseline, whose MoE
    layers would take seconds.
    """
    calls, once, handler = itertools.count(1), Session.once, signal.getsignal(signal.SIGINT)

    def interrupted(session: Session) -> dict[str, Any]:
        if next(calls) == 6:
            assert isinstance(session.process, Process)
            session.process.pipe.send(("measure",))  # a question whose answer nobody waits for
            session.process.busy = True
            os.kill(os.getpid(), signal.SIGINT)
        return once(session)

    monkeypatch.setattr(Session, "once", interrupted)
    arguments = [
        "--moe",
        "grouped",
        "--prefill-moe",
        "loop",
        "--device",
        "cpu",
        "--new",
        "4",
        "--prompt",
        "6",
        "-r",
        "2",
    ]
    assert bench.main([*arguments, "-o", "json"]) == 130
    result = json.loads(capfd.readouterr().out)
    assert [row["arm"] for row in result["rows"]] == [
        "baseline",
        "moe=grouped",
    ] and "Interrupted" in result["notes"][-1]
    assert [row["moe_layer_us"] is None for row in result["rows"]] == [True, False] and result[
        "rows"
    ][0]["host_gb"] > 0
    assert (
        all(row["accuracy"] is None for row in result["rows"])
        and "No problem of exam.json fits 10" in result["notes"][0]
    )
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("switched", [[], ["--moe", "grouped"]])
def test_room_for_one_model_only(
    switched: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline is measured before its process makes room for the next, also where no other arm
    comes after it.
    """
    monkeypatch.setattr(measure, "how_many_fit", lambda *_: 1)
    arguments = ["--device", "cpu", "--new", "4", "--prompt", "120", "-r", "2", "--problems", "1"]
    assert bench.main([*switched, *arguments, "-o", "json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["kind"] for row in result["rows"]] == ["baseline", "alone"][: 1 + bool(switched)]
    assert all(
        row["parity"] and len(row["repetitions"]) == 2 and row["accuracy"] == 1
        for row in result["rows"]
    )
    assert "Only one model fits" in result["notes"][0]


def test_a_baseline_that_breaks_down_after_it_was_measured(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why in its row, and the command fails."""
    ask = Process.ask

    def broken(process: Process, command: str, *arguments: object) -> Answer:
        return (
            ask(process, command, "one argument too many")
            if command == "moe_layer"
            else ask(process, command, *arguments)
        )

    monkeypatch.setattr(Process, "ask", broken)
    assert bench.main(["--device", "cpu", "--new", "3", "--prompt", "4", "-r", "1"]) == 1
    assert "baseline: BROKE DOWN: moe_layer failed with TypeError" in capfd.readouterr().out


def test_a_kept_result_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = {
        "schema": SCHEMA, "machine": {"name": "M", "torch": "2", "python": "3"},
        "config": {}, "repetitions": 3, "workload": "w", "rows": [made_row()], "notes": [],
        "pairs": [],
    }  # fmt: skip
    kept, before = tmp_path / "kept.json", copy.deepcopy(result)
    kept.write_text(render(result, "json"))
    assert bench.main(["--show", str(kept)]) == 0
    assert capsys.readouterr().out.rstrip() == render(result, "md")
    del result["rows"][0]["assumed"]  # a field that came later is null in an older file
    kept.write_text(render(result, "json"))
    assert bench.main(["--show", str(kept)]) == 0 and capsys.readouterr().out.rstrip() == render(
        before, "md"
    )
    del result["rows"][0]["mean_kl"]
    kept.write_text(render(result, "json"))
    assert bench.main(["--show", str(kept)]) == 2
    assert "row 1: it has no mean_kl" in capsys.readouterr().err


def test_what_each_kernel_adds() -> None:
    """Kernels overlap; what each adds makes up the step. The same function on another grid is
    another line.
    """

    def event(
        name: str, start: float, end: float, grid: list[int] | None = None, cat: str = "kernel"
    ) -> dict[str, Any]:
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": start,
            "dur": end - start,
            "args": {"grid": grid} if grid else {},
        }

    trace = {
        "traceEvents": [
            event("launch", 0, 900, cat="cuda_runtime"), {"ph": "M", "name": "process_name"},
            event("vector_kernel", 100, 110, [8, 1, 1]), event("vector_kernel", 105, 119, [2, 1,
            2]), event("void at::native::(anonymous namespace)::copy<int, f(long)>(int)", 108, 121,
            [2, 1, 1]), event("vector_kernel", 120, 120.5, [8, 1, 1]),
            event("Memcpy DtoD (Device -> Device)", 130, 131, cat="gpu_memcpy"),
        ]
    }  # fmt: skip
    parts = timeline.parts(trace)
    assert [(part["kernel"], part["calls"], part["us"]) for part in parts] == [
        (
            "vector_kernel, 8 programs",
            2,
            11.5,
        ),  # 10 before anybody else, and what it ends behind the other grid
        ("vector_kernel, 4 programs", 1, 9.0),
        (timeline.IDLE, 0, 9.0),
        ("Memcpy DtoD (Device -> Device)", 1, 1.0),
        ("copy, 2 programs", 1, 0.5),  # from the end of the last but one, beside which it ran
    ]
    _head, _rule, first, others, whole = timeline.table(parts, most=1)
    assert "vector_kernel, 8 programs" in first and "5.8" in first and "37.1%" in first
    assert "4 others" in others and "19.5" in others
    assert "the step" in whole and "31.0" in whole and " 5 " in whole
    assert timeline.parts({"traceEvents": []}) == []


def test_a_row_of_speculation(tmp_path: Path) -> None:
    """What a worker does, in this process. A coin of 1 accepts everything: k + 1 tokens a step, and
    no text is compared.
    """
    rows = []
    cases: list[tuple[dict[str, Any], float | None]] = [
        ({}, None), ({"speculate": "mtp", "draft_tokens": 2}, None), ({"speculate": "mtp"}, 1.0)
    ]  # fmt: skip
    for switched, assumed in cases:
        work = Workload(None, "tiny", 2, 2, 6, 8, 0, 0, assumed=assumed)
        plain = Subject(Backend(device="cpu"), work, tmp_path)
        found = Subject(Backend(device="cpu", **switched), work, tmp_path)
        COMMANDS["build_reference"](plain)
        reference = REFERENCE | {"reference": COMMANDS["reference"](plain, [])}
        answers: dict[str, Any] = {
            "build": found.build(),
            "measure": [COMMANDS["measure"](found)],
            "beside": [],
            "cold": None,
        }
        answers |= {
            name: COMMANDS[name](found) for name in ("warm", "parity", "kernels", "moe_layer")
        }
        assert "aten::" in COMMANDS["trace"](found)["table"]
        rows.append(
            make_row(Arm("it", "alone", found.backend), work, answers, reference, work.config())
        )
    baseline, real, coin = rows
    assert (baseline["acceptance"], baseline["tokens_per_step"], baseline["same_text"]) == (
        None,
        1,
        1,
    )
    assert (
        0 <= real["acceptance"] < 1
        and real["same_text"] == 1
        and real["arm"] == "it"
        and real["assumed"] is None
    )
    assert (coin["acceptance"], coin["tokens_per_step"], coin["assumed"], coin["same_text"]) == (
        1,
        2,
        1,
        None,
    )
    assert coin["arm"] == "it (acceptance of 1 assumed)"
    # The logits are read as many at a time as a turn reads them: all are the reference's, in the
    # reference's order.
    assert all(r["parity"] and r["mean_kl"] < 1e-9 and r["positions"] == 16 for r in rows)
    machine = {"name": "M", "torch": "2", "python": "3"}
    result = {
        "machine": machine,
        "repetitions": 1,
        "workload": "w",
        "rows": rows,
        "notes": [],
        "pairs": [],
    }
    text = markdown(result)
    assert (
        "100% of drafts accepted (ASSUMED, by a coin of 1: its text means nothing), "
        "2.00 tokens a step; by bytes" in text
    )
    assert text.count("of drafts accepted") == 2 and "(by the model)" in text
    assert (
        text.count("greedy text") == 1
        and "Its greedy text is the fp32 reference's to the end." in text
    )


def test_the_drafter_reads_the_depth_along(tmp_path: Path) -> None:
    """Without entries of its own up to the depth, it would draft worse than it does."""
    work = dataclasses.replace(WORK, depth=6)
    subject = Subject(Backend(device="cpu", speculate="mtp"), work, tmp_path)
    subject.build()
    subject.fill()
    (entries,) = subject.cache.layers[-1]  # the drafter's, (B, T, C + R)
    assert bool(entries[:, : work.depth].any(dim=-1).all())
    assert not bool(entries[:, work.depth :].any())


def test_how_far_a_text_with_drafts_is_the_references() -> None:
    """It is no share of right tokens: one that differs ends it, and where the baseline parts as
    early, drafts did nothing.
    """
    drafted = dict(
        acceptance=0.5,
        assumed=None,
        tokens_per_step=1.5,
        predicted_speedup=1.1,
        pays_from=0.4,
        same_text=0.25,
    )
    row, base = made_row() | drafted, made_row() | {"kind": "baseline", "same_text": 0.5}
    parts = (
        "the fp32 reference's up to the first token that differs, 25.0% into the tokens compared"
    )
    assert drafts(row, [base | {"prompt": 9}, row]).endswith(
        f" {parts}."
    )  # that baseline did other work
    assert drafts(row, [base | {"prompt": 9}, base, row]).endswith(
        f" {parts} (the baseline's, without drafts: 50.0%)."
    )
    assert drafts(row | {"batch": 2}, [base, row]).endswith(f" {parts} on average.")
    assert drafts(row | {"same_text": 1.0}, [base]).endswith(
        "reference's to the end (the baseline's, without drafts: 50.0%)."
    )
    assert "greedy" not in drafts(row | {"same_text": None}, [base])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-r", "0"], "give a whole number above 0"),
        (["--layers", "2"], "--layers cuts a --shape"),
        (["--shape", "tiny", "--layers", "9"], "take 1 to that many"),
        (["--model", "/nonexistent"], "there is no folder"),
        (["--prompt", "20000"], "more than the context"),
        (["--assume-acceptance", "0.8"], "add --speculate mtp"),
        (["--assume-acceptance", "1.5", "--speculate", "mtp"], "give a probability"),
        (
            [
                "--cuda-graphs",
                "--attention",
                "naive",
                "--prefill-attention",
                "absorbed",
                "--depth",
                "99999",
            ],
            "more than the context",
        ),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernels", "triton"], "--kernels triton: Triton's kernels need a GPU"),
        (["--cuda-graphs", "--batch", "1,8"], "--cuda-graphs captures launches on a GPU"),
        (
            ["--cuda-graphs", "--kernels", "triton"],
            "which has none: use --compile; --kernels triton: Triton's kernels",
        ),
        (
            ["--moe", "grouped", "--cuda-graphs", "--only", "together"],
            "--cuda-graphs captures launches on a GPU",
        ),
        (["--draft-tokens", "2"], "--draft-tokens 2 is of no use without drafts"),
    ],
)
def test_what_can_not_run_here_is_refused_before_anything_is_measured(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    err = refusal(arguments, capsys, monkeypatch)
    assert err.startswith("bench: nothing beside the baseline can be run: ") and said in err
    assert err.count(said) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "llama-3.2-1b", "--routing", "uniform"], "--routing uniform draws experts"),
        (["--warm-start"], "--warm-start starts arms that compile a second time, and none does"),
        (["--warm-start", "--moe", "gather"], "add --compile, or leave it out"),
        (["--ablate", "--moe", "gather"], "--ablate takes every switch by itself: leave --moe out"),
        (["--ablate", "--cuda-graphs"], "leave --cuda-graphs out"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert said in refusal(arguments, capsys, monkeypatch)


def refusal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The one line with which a CPU's bench.py refuses these, before it measures anything."""
    monkeypatch.delattr(measure, "measure")
    assert bench.main([*arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


@pytest.mark.parametrize("where", ["a file", "a file/in it"])
def test_a_profile_that_can_not_be_written_is_refused(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_text("")
    assert bench.main(["--profile", str(tmp_path / where)]) == 2
    err = capsys.readouterr().err
    assert "no folder can be made there" in err and err.count("\n") == 1


def test_a_refused_command_leaves_no_profile_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        bench.main(["--device", "cpu", "--prompt", "100000", "--profile", str(tmp_path / "traces")])
        == 2
    )
    assert "more than the context" in capsys.readouterr().err and not (tmp_path / "traces").exists()


def test_what_can_run_here_is_measured_beside_what_can_not() -> None:
    def plans(given: dict[str, Any], *batches: int) -> list[tuple[Workload, list[Arm]]]:
        return [
            (dataclasses.replace(WORK, batch=batch), arms.from_switches(given)) for batch in batches
        ]

    plan.check_possible(plans({"cuda_graphs": True, "moe": "grouped"}, 1, 8), shape("tiny"), CPU)
    plan.check_possible(plans({"cuda_graphs": True}, 1, 8), shape("tiny"), H100)
    plan.check_possible(plans({}, 1), shape("tiny"), CPU)  # the baseline alone
    with pytest.raises(
        InputError, match="^device=cuda: torch .* sees no such GPU here"
    ):  # that the baseline can't be had
        plan.check_possible(plans({"device": "cuda", "cuda_graphs": True}, 1), shape("tiny"), CPU)


def test_strategies_are_what_the_flags_offer() -> None:
    from r1.switches.backend import ATTENTION

    assert {each.name for each in attend.STRATEGIES} | {"triton"} == set(ATTENTION)


# --------------------------------------------------------------------------------- routing
def gates(model: Transformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def test_uniform_routing_spreads_and_is_the_same_in_every_arm() -> None:
    config = shape("tiny")
    backend = resolve(Backend(device="cpu"), config)
    model, again = (
        from_shape(config, backend),
        from_shape(config, dataclasses.replace(backend, moe="grouped")),
    )
    crowded = torch.ones(
        512, config.hidden_size
    )  # one hidden state for all, as random weights nearly give
    gate = gates(model)[-1]
    assert gate(crowded)[0].unique().numel() == config.experts.num_experts_per_tok
    for each in (model, again):
        make_uniform(each, seed=3)
    layers, others = (
        [module for module in each.modules() if isinstance(module, MoE)] for each in (model, again)
    )
    moe, same = layers[-1], others[-1]
    indices, weights = moe.gate(crowded, moe.draws)
    load = indices.flatten().bincount(minlength=config.experts.n_routed_experts)
    assert load.min() > 0.5 * load.float().mean()
    assert torch.equal(indices, same.gate(crowded, same.draws)[0])
    # The weights are still the token's own, normed.
    assert weights.sum(dim=-1).allclose(torch.tensor(config.experts.routed_scaling_factor))
    assert not torch.equal(indices, layers[-2].gate(crowded, layers[-2].draws)[0])
    asked: list[torch.Tensor | None] = []
    moe.gate.register_forward_pre_hook(lambda _module, inputs: asked.append(inputs[1]))
    moe(crowded[None, :3], "decode")
    assert asked[0] is moe.draws, "the layer gives them to its router"


def test_what_a_table_says_beside_its_numbers() -> None:
    """Only what lies within the noise is listed so; a pair that broke down was not refused."""
    rows = [beside_baseline(made_row())]
    rows += [{**beside_baseline(made_row(beside=0.02), 0.02), "arm": "within"}]
    sizes = dict.fromkeys(SIZES, 1)
    pairs = [
        {"pair": name, **sizes, "refused": "why", "crashed": name == "a & b"}
        for name in ("a & b", "c & d")
    ]
    machine = {"name": "M", "torch": "2", "python": "3"}
    text = markdown(
        {"machine": machine, "repetitions": 3, "workload": "w", "rows": rows, "notes": [],
         "pairs": pairs}
    )  # fmt: skip
    assert "No difference from the baseline beyond the noise: within." in text
    assert "- a & b: BROKE DOWN: why\n- c & d: refused: why" in text


def test_cells_of_a_table_stand_in_columns() -> None:
    """Numbers to the right, words to the left, and no cell ends its column early."""
    assert aligned({"arm": ["a|b", "c"], "tok/s": ["1", "200"]}) == [
        "| arm  | tok/s |", "| ---  | ---:  |", "| a\\|b | 1     |", "| c    | 200   |",
    ]  # fmt: skip


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [made_row(), {**made_row(), "prompt": 9}]
    head = table(rows, COLUMNS)[0]
    assert (
        " prompt " in head and " batch " in head and " depth " not in head and "MoE layer" in head
    )
    assert " prompt " not in table(rows[:1], COLUMNS)[0]
    assert "MoE layer" not in table([{**rows[0], "moe_layer_us": None}], COLUMNS)[0]
    assert table(rows, ["correct?"])[2:] == ["| yes      |"] * 2 and rows[0]["accuracy"] is None
    examined = table([{**rows[0], "accuracy": 0.75, "problems": 16}, rows[0]], COLUMNS)
    assert " yes, 12 of 16 " in examined[2]


def test_the_moe_layers_floor_is_one_layers_work() -> None:
    row, config = made_row(), shape("tiny")
    backend = resolve(Backend(device="cpu", compile=True), config, CPU)
    rates = Rates(**REFERENCE["rates"]["fp32"])
    shape_of, e, d = config.attention, config.experts, config.hidden_size
    heads, rank = shape_of.num_attention_heads, shape_of.q_lora_rank or 0
    layer = (d + heads * shape_of.qk_head_dim) * rank + d * shape_of.latent_dim
    layer += shape_of.kv_lora_rank * heads * (shape_of.qk_nope_head_dim + shape_of.v_head_dim)
    layer += heads * shape_of.v_head_dim * d
    layer += (4 + e.n_shared_experts) * 3 * d * e.moe_intermediate_size
    context = (WORK.prompt + WORK.new / 2 + 1) * config.attention.latent_dim
    nbytes = 4 * (layer + config.experts.n_routed_experts * config.hidden_size + context)
    assert row["moe_layer_floor_us"] == pytest.approx(1e6 * nbytes / rates.copy) and row[
        "moe_layer_us"
    ] == pytest.approx(500)
    assert backend.dtype == "fp32"


def test_few_moe_layers_run_several_times_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a layer's time is not that of a graph's launch. But only where that measures what a
    step has: cold weights, and experts that are all there.
    """

    def found(name: str, layers: int, moe_layers: int, cache: int = 50 * 2**20, **how: Any) -> int:
        config = dataclasses.replace(shape(name), num_hidden_layers=layers)
        asked = Backend(device="cuda", dtype="bf16", quant="int4", **how)
        return timing.passes(config, resolve(asked, config, H100), moe_layers, cache)

    assert [found("r1", 3 + n, n) for n in (1, 2, 5, 15, 16, 58)] == [16, 8, 4, 2, 1, 1]
    assert found("moonlight-16b", 27, 26) == 1 and found("r1", 4, 0) == 1  # a stage without one
    assert found("tiny", 2, 1) == 1  # in the cache
    assert found("moonlight-16b", 2, 1) == 1 and found("moonlight-16b", 6, 5) == 4  # 40 MB a layer
    assert found("r1", 4, 1, experts="host") == 1 and found("r1", 4, 1, cache=0) == 1
    # The time is of one layer, however often it runs; and it runs so often.
    subject = Subject(Backend(device="cpu"), Workload(None, "tiny", 2, 1, 6, 8, 0, 0), tmp_path)
    subject.build()
    given: list[list[int]] = []

    def chain(_subject: Subject, layers: list[int]) -> Any:
        given.append(layers)
        return lambda: time.sleep(1e-3 * len(layers))

    monkeypatch.setattr(steps, "moe_chain", chain)
    monkeypatch.setattr(timing, "passes", lambda *_: 3)
    seconds = timing.moe_layer(subject)["seconds"]
    assert given == [[1, 1, 1]] and 1e-3 <= seconds < 2e-3


def test_a_breakdown_is_no_refusal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that doesn't work: the other arms are still measured, and the command fails."""
    monkeypatch.setenv("CXX", "/bin/false")
    assert (
        bench.main(["--compile", "--device", "cpu", "--new", "3", "--prompt", "4", "-r", "1"]) == 1
    )
    out = capfd.readouterr().out
    assert "compile: BROKE DOWN" in out and "| baseline " in out


def test_kinds_of_an_ablation() -> None:
    for kinds in (("ladder",), ("pairs",), ("alone", "all-but-one")):
        found = ablation.ablation({}, CPU, 1, kinds)
        assert found[0].kind == "baseline" and {a.kind for a in found[1:]} == set(kinds)
    pairs = ablation.ablation({}, CPU, 1, ("ladder", "pairs"))
    steps = ablation.ladder_steps({}, CPU, 1)
    assert (
        sum(a.kind == "pairs" for a in pairs) == len(steps) * (len(steps) - 1) / 2
    )  # also those that a rung has timed
