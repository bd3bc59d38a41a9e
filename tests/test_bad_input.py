"""Tests bad prompts, arguments and switches: one clear sentence as `r1.InputError`.

Holds to account: r1/switches, r1/run, r1/model/shapes.py and r1/__main__.py.

From the command they give exit status 2.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY_GROUPED, V3
from refusals import CPU, check_sentence, refused

import r1
from r1 import Backend, Config, Engine, InputError, build
from r1.__main__ import main
from r1.errors import flags_spelling
from r1.files.embedded import EMBEDDED
from r1.model import shapes
from r1.run import runner
from r1.switches.allreduce import ALLREDUCE
from r1.switches.backend import choices
from r1.switches.machine import Machine
from r1.switches.resolve import resolve


@pytest.fixture(scope="module")
def engine(made: Path) -> Engine:
    return r1.load(made, CPU, quiet=True)


# ---------------------------- prompts
CONTEXT = V3.max_position_embeddings
PROMPTS: dict[str, tuple[Any, str]] = {
    "none": ([], "there is no prompt"),
    "empty": ([[]], "prompt 0 is empty"),
    "one empty": ([[1, 2], []], "prompt 1 is empty"),
    "too long": (
        [[1], [2] * (CONTEXT + 1)],
        f"prompt 1 has {CONTEXT + 1} tokens, more than the context of {CONTEXT}",
    ),
    "no room": ([[2] * CONTEXT], f"a prompt of {CONTEXT} tokens leaves no room"),
    "id too large": ([[1, 300, 2]], "prompt 0 holds token 300, outside the vocabulary of 300"),
    "id negative": ([[1], [5, -1]], "prompt 1 holds token -1, outside the vocabulary"),
    "id without end": ([[10**30]], "outside the vocabulary"),
    "id a fraction": ([[1, 2.0]], "prompt 0 holds 2.0, which is no token id"),
    "id a bool": ([[1, True]], "prompt 0 holds True"),
    "text": (["hi"], "prompt 0 holds 'h', which is no token id"),
    "a word": ([["a"]], "'a', which is no token id"),
    "one prompt, no list of them": ([1, 2], r"\[\[0, 5, 7\]\], not \[0, 5, 7\]"),
    "none in it": ([[None]], "prompt 0 holds None"),
}
ARGUMENTS: dict[str, list[Any]] = {
    "max_new_tokens": [0, -5, True],
    "temperature": [-0.1, float("nan"), float("inf"), "a"],
    "top_p": [0.0, -1.0, 1.01, float("nan")],
    "seed": [1.5],
}
LOGITS = {
    "flat": torch.tensor([1, 2]),
    "int32": torch.tensor([[1, 2]], dtype=torch.int32),
    "float": torch.tensor([[1.0, 2.0]]),
    "empty": torch.zeros(1, 0, dtype=torch.int64),
    "no rows": torch.zeros(0, 3, dtype=torch.int64),
    "id too large": torch.tensor([[1, 300]]),
    "id negative": torch.tensor([[-1]]),
    "too long": torch.ones(1, CONTEXT + 1, dtype=torch.int64),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt(case: str, engine: Engine) -> None:
    prompts, said = PROMPTS[case]
    with refused(said):
        engine.generate(prompts, max_new_tokens=2)


def test_sampling_arguments(engine: Engine) -> None:
    for name, values in ARGUMENTS.items():
        for value in values:
            with refused(re.escape(f"{name}={value!r}")):
                engine.generate([[1, 2]], **{name: value})
    with refused(r"from 0 to 2\^63 - 1"):
        engine.generate([[1, 2]], seed=2**64)


def test_logits(engine: Engine) -> None:
    for tokens in LOGITS.values():
        with refused("LongTensor|prompt 0"):
            engine.logits(tokens)


def test_prompts_at_the_edge_are_fine(engine: Engine) -> None:
    """The longest prompt, the last id: refused is only what must be."""
    assert len(engine.generate([[299] * (CONTEXT - 1)], max_new_tokens=5)[0].tokens) == 1
    assert engine.logits(torch.full((1, CONTEXT), 299)).shape == (1, CONTEXT, 300)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["word " * 40], "your question has 205 tokens, and it must fit the context of 64"),
        (["--system", "be kind", "word " * 40], "the conversation has"),
        (["--attention", "naive", "--prefill-attention", "expand", "hi"], "can't share a cache"),
    ],
)
def test_command_refuses(
    flags: list[str], said: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(made), "--device", "cpu", *flags]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("r1: ") and said in last and "Traceback" not in err
    check_sentence(last)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--new", "0", "hi"], "--new 0: give"),
        (["--temperature", "-1", "hi"], "--temperature: '-1': give 0 (greedy) or more"),
        (["--temperature", "nan", "hi"], "--temperature: 'nan': give"),
        (["--top-p", "3"], "--top-p: '3': give"),
        (["What", "is", "2+2?"], "the question has 3 parts: put quotes around it"),
        (["--draft-tokens", "0", "hi"], "--draft-tokens 0: give a whole number"),
        ([""], "the question is empty"),
        (["  "], "the question is empty"),
    ],
)
def test_command_refuses_before_it_loads(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no model could use is told before the model's folder is so much as looked at; loading R1
    takes minutes.
    """
    try:
        status: object = main(["--model", "/nowhere", *flags])
    except SystemExit as end:  # of the parser
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith(f"r1: {said}") and err.count("\n") == 1
    check_sentence(err.rstrip("\n"))


def test_chat_without_a_tokenizer(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sound / "tokenizer.json").unlink()
    engine = r1.load(sound, CPU, quiet=True)
    with refused("no tokenizer", "token ids"):
        engine.chat([{"role": "user", "content": "hi"}])
    with refused("no tokenizer"):
        engine.encode("hi")
    assert main(["--model", str(sound), "--device", "cpu", "hi"]) == 2
    assert "no tokenizer" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "messages",
    [[], [{}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": 3}], ["hi"]],
)
def test_messages(messages: Any, engine: Engine) -> None:
    with refused():
        engine.chat(messages)


def test_a_cache_that_does_not_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda _: 1000)
    with refused(r"the cache of 2 x 128 tokens needs 0\.\d GB and 0\.\d GB are free"):
        engine.generate([[1], [2]], max_new_tokens=4)


def test_advice_for_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what can help: layers are left out of a shape alone, and bf16 halves what is fp32."""
    config = shapes.shape("tiny")
    needed = build.count_parameters(config) * 4 + build.HEADROOM

    def advice(free: int, **switches: Any) -> str:
        monkeypatch.setattr(build, "available_bytes", lambda _: free)
        backend = resolve(Backend(device="cpu", **switches), config)
        with pytest.raises(InputError) as caught:
            build.from_shape(config, backend)
        return str(caught.value).rpartition(": use ")[2]

    assert advice(needed - 1) == "dtype=bf16 or quant=int4 or layers=N or a larger machine"
    assert advice(needed // 2 - 1) == advice(needed // 2 - 1, dtype="bf16")
    assert advice(needed - 1, amp="bf16") == "quant=int4 or layers=N or a larger machine"
    assert "int4" not in advice(1, quant="int4")
    with flags_spelling():
        assert advice(1) == "--layers N or a larger machine"
    monkeypatch.setattr(build, "available_bytes", lambda _: needed - 1)
    with refused("use dtype=bf16 or quant=int4 or a larger machine$"):
        r1.load(EMBEDDED, CPU)


# ---------------------------- switches
ALIGNED = V3.change(hidden_size=32, moe_intermediate_size=16)
ODD = V3.change(moe_intermediate_size=18)
H100 = Machine(cuda=True, name="H100", capability=(9, 0))
T4 = Machine(cuda=True, name="Tesla T4", capability=(7, 5))
MI300 = Machine(cuda=True, hip="6.2", name="MI300X")
BARE = Machine(compiler=False)
SWITCHES: dict[str, tuple[dict[str, Any], Machine, Config, str]] = {
    "cuda without a GPU": (
        {"device": "cuda"},
        Machine(),
        V3,
        "device=cuda: torch .* sees no such GPU here: use device=cpu",
    ),
    "rocm without a GPU": (
        {"device": "rocm"},
        Machine(),
        V3,
        "device=rocm: torch .* sees no such GPU here",
    ),
    "rocm on NVIDIA": ({"device": "rocm"}, H100, V3, "drives cuda: use device=cuda"),
    "cuda on AMD": ({"device": "cuda"}, MI300, V3, "drives rocm: use device=rocm"),
    "bf16 on an old GPU": ({"dtype": "bf16"}, T4, V3, r"Tesla T4 has \(7, 5\): use fp16 or fp32"),
    "amp bf16 on an old GPU": ({"amp": "bf16"}, T4, V3, "bf16 needs compute capability 8.0"),
    "amp over bf16": (
        {"amp": "bf16", "dtype": "bf16"},
        Machine(),
        V3,
        "dtype=bf16: use dtype=fp32, or amp=off",
    ),
    "amp over fp16": (
        {"amp": "bf16", "dtype": "fp16"},
        Machine(),
        V3,
        "use dtype=fp32, or amp=off",
    ),
    "FP8 inputs of plain numbers": (
        {"quant_activations": "fp8"},
        H100,
        V3,
        "here is none: add quant=fp8, or leave it out",
    ),
    "FP8 inputs of int4": (
        {"quant_activations": "fp8", "quant": "int4", "kernels": "triton"},
        H100,
        V3,
        "here is none: add quant=fp8",
    ),
    "FP8 inputs of small blocks": (
        {"quant_activations": "fp8", "device": "cuda"},
        H100,
        V3.change(fp8_block=(16, 16)),
        "a scale for 128 columns or a multiple, and here is none",
    ),
    "FP8 inputs on an old GPU": (
        {"quant_activations": "fp8", "quant": "fp8"},
        T4,
        V3,
        "FP8 products need compute capability 8.9",
    ),
    "FP8 inputs on AMD": (
        {"quant_activations": "fp8", "quant": "fp8"},
        replace(MI300, arch="gfx942"),
        V3,
        "the kernels multiply FP8 on NVIDIA's GPUs only",
    ),
    "FP8 inputs and experts on the CPU": (
        {"quant_activations": "fp8", "quant": "fp8", "experts": "cpu"},
        H100,
        V3,
        "experts=cpu multiplies unrounded inputs: leave one out",
    ),
    "naive decode": (
        {"attention": "naive", "prefill_attention": "expand"},
        Machine(),
        V3,
        "can't share a cache",
    ),
    "naive prefill": (
        {"attention": "absorbed", "prefill_attention": "naive"},
        Machine(),
        V3,
        "use strategies that keep the same",
    ),
    "grouped, odd": (
        {"moe": "grouped"},
        Machine(),
        ODD,
        "moe=grouped: .*multiple of 16 bytes, and moe_intermediate_size is 18",
    ),
    "grouped prefill, odd": (
        {"prefill_moe": "grouped"},
        Machine(),
        ODD,
        "prefill_moe=grouped: .*use gather",
    ),
    "grouped under amp": (
        {"moe": "grouped", "amp": "bf16"},
        Machine(),
        V3.change(hidden_size=36),
        "hidden_size is 36 in torch.bfloat16",
    ),
    "loop compiled": (
        {"moe": "loop", "compile": True},
        Machine(),
        V3,
        "moe=loop: it reads its counts on the host, .*use gather",
    ),
    "loop prefill compiled": (
        {"prefill_moe": "loop", "compile": True},
        H100,
        V3,
        "prefill_moe=loop",
    ),
    "compile without g\\+\\+": (
        {"compile": True},
        BARE,
        V3,
        "needs a C\\+\\+ compiler on a CPU.*install g\\+\\+",
    ),
    "graphs on a CPU": (
        {"cuda_graphs": True},
        Machine(),
        V3,
        "cuda_graphs captures launches on a GPU.*use compile",
    ),
    "graphs of a loop": (
        {"cuda_graphs": True, "moe": "loop"},
        H100,
        V3,
        "moe=loop: it .* no graph can hold: use gather",
    ),
    "graphs of grouped fp32": (
        {"cuda_graphs": True, "moe": "grouped", "dtype": "fp32"},
        H100,
        ALIGNED,
        "kernel for bf16 only, not for fp32",
    ),
    "graphs of grouped on AMD": (
        {"cuda_graphs": True, "moe": "grouped"},
        MI300,
        ALIGNED,
        "which no graph can hold: use gather",
    ),
    "captured prompts on a CPU": (
        {"prefill_graphs": True},
        Machine(),
        V3,
        "^prefill_graphs: cuda_graphs captures .*use compile",
    ),
    "captured prompts of a loop": (
        {"prefill_graphs": True, "prefill_moe": "loop"},
        H100,
        V3,
        "^prefill_moe=loop: .*, or leave prefill_graphs off",
    ),
    "captured prompts of grouped fp32": (
        {"prefill_graphs": True, "prefill_moe": "grouped", "dtype": "fp32"},
        H100,
        ALIGNED,
        "^prefill_moe=grouped: it reads .*: use gather or triton, or leave prefill_graphs off",
    ),
    "captured prompts of grouped on AMD": (
        {"prefill_graphs": True, "prefill_moe": "grouped"},
        MI300,
        ALIGNED,
        "^prefill_moe=grouped: .* leave prefill_graphs off",
    ),
    "captured prompts given back": (
        {"prefill_graphs": True, "memory": "empty-cache"},
        H100,
        V3,
        "leave one of them out",
    ),
    "attention=triton on a CPU": (
        {"attention": "triton"},
        Machine(),
        V3,
        "^attention=triton: Triton's kernels need a GPU",
    ),
    "kernels=triton on a CPU": (
        {"device": "cpu", "kernels": "triton"},
        H100,
        V3,
        "^kernels=triton: .*leave attention, moe, ",
    ),
    "prefill_moe=triton under amp": (
        {"prefill_moe": "triton", "amp": "bf16"},
        H100,
        V3,
        "^prefill_moe=triton: it reads weights",
    ),
    "moe=triton without Triton": (
        {"moe": "triton"},
        replace(H100, compiler=False),
        V3,
        "the triton package",
    ),
    "kernels=triton under amp": (
        {"kernels": "triton", "amp": "bf16"},
        H100,
        V3,
        "not under amp: use dtype=bf16, no amp",
    ),
    "attention=triton under amp": (
        {"attention": "triton", "amp": "bf16"},
        H100,
        V3,
        "^attention=triton: it reads weights",
    ),
    "kernels=triton, gather": (
        {"kernels": "triton", "moe": "gather"},
        H100,
        V3,
        "not moe=gather: leave moe at auto",
    ),
    "kernels=triton, absorbed": (
        {"kernels": "triton", "attention": "absorbed"},
        H100,
        V3,
        "not attention=absorbed",
    ),
    "attention=triton, naive": (
        {"attention": "triton", "prefill_attention": "naive"},
        H100,
        V3,
        "can't share a cache",
    ),
    **{
        f"{name}={value} without experts": (
            {name: value},
            H100,
            TINY_GROUPED,
            f"^{name}={value} chooses how experts are computed, and this model has none: leave",
        )
        for name, value in [
            ("moe", "loop"),
            ("moe", "triton"),
            ("prefill_moe", "grouped"),
            ("prefill_moe", "triton"),
        ]
    },
    "compile without Triton": (
        {"compile": True},
        replace(H100, compiler=False),
        V3,
        "needs Triton on a GPU.*install triton",
    ),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_switch(case: str) -> None:
    switches, machine, shape, said = SWITCHES[case]
    with refused(said):
        resolve(Backend(**switches), shape, machine)


def test_a_model_without_experts_gets_no_strategy_for_them() -> None:
    """Also with kernels that bring their own; what was resolved can be resolved again."""
    asked: list[dict[str, Any]] = [{}, {"kernels": "triton"}, {"compile": True}]
    for switches in asked:
        found = resolve(Backend(**switches), TINY_GROUPED, H100)
        assert (found.moe, found.prefill_moe) == ("auto", "auto")
    plain = resolve(Backend(device="cpu"), TINY_GROUPED)
    assert resolve(plain, TINY_GROUPED) == plain


SETTINGS = {field.name for field in fields(Backend)}
PYTHON = re.compile(rf"\b(?:{'|'.join(SETTINGS)})=|\b(?:\w+_graphs|draft_tokens|prefill_\w+)\b")
"""A setting as one writes it in Python."""


@pytest.mark.parametrize("case", SWITCHES)
def test_a_command_speaks_of_flags(case: str) -> None:
    """The same refusals, as somebody reads them who typed flags."""
    switches, machine, shape, _ = SWITCHES[case]
    with flags_spelling(), pytest.raises(InputError) as caught:
        resolve(Backend(**switches), shape, machine)
    message = str(caught.value)
    check_sentence(message)
    assert not PYTHON.search(message), message
    flags = set(re.findall(r"--([a-z-]+)", message))
    assert {flag.replace("-", "_") for flag in flags} <= SETTINGS, message
    with pytest.raises(InputError) as caught:
        resolve(Backend(**switches), shape, machine)
    assert "--" not in str(caught.value)  # outside of the context nothing has changed


def test_switches_at_the_edge_are_fine() -> None:
    """The neighbours of what is refused above."""
    for switches, machine, shape in (
        ({"device": "cuda"}, H100, V3),
        ({"device": "rocm"}, MI300, V3),
        ({"dtype": "bf16"}, MI300, V3),
        ({"dtype": "fp16"}, T4, V3),
        ({"amp": "bf16", "dtype": "fp32"}, Machine(), V3),
        ({"attention": "naive"}, Machine(), V3),
        ({"attention": "absorbed", "prefill_attention": "expand"}, Machine(), V3),
        ({"moe": "grouped"}, Machine(), ALIGNED),
        ({"moe": "grouped"}, Machine(), V3.change(hidden_size=36)),
        ({"moe": "loop"}, Machine(), V3),
        ({}, BARE, ODD),
        ({"attention": "triton"}, H100, V3),
        ({"moe": "triton", "compile": True}, H100, ODD),
        ({"moe": "triton", "cuda_graphs": True}, MI300, V3),
        ({"prefill_moe": "triton", "compile": True}, MI300, ODD),
        ({"kernels": "triton", "compile": True, "cuda_graphs": True}, H100, V3),
        ({"prefill_graphs": True}, H100, V3),
        ({"prefill_graphs": True, "prefill_moe": "triton", "dtype": "fp32"}, MI300, V3),
        ({"prefill_graphs": True, "moe": "loop"}, H100, V3),
        ({"cuda_graphs": True, "prefill_moe": "loop"}, H100, V3),
    ):
        resolved = resolve(Backend(**switches), shape, machine)
        assert all(getattr(resolved, name) == value for name, value in switches.items())
        assert "auto" not in vars(resolved).values()
        assert resolved.allreduce == "off", "one device has nothing to add up"


@pytest.mark.parametrize(
    ("switches", "machine", "chosen"),
    [
        ({}, H100, "grouped"),
        ({}, MI300, "triton"),
        ({"dtype": "fp32"}, H100, "triton"),
        ({"dtype": "fp16"}, T4, "triton"),
        ({"amp": "bf16"}, H100, "grouped"),
        ({"amp": "fp16"}, H100, "gather"),
        ({}, replace(MI300, compiler=False), "gather"),
    ],
)
def test_captured_prompts_have_experts_that_a_graph_can_hold(
    switches: dict[str, Any], machine: Machine, chosen: str
) -> None:
    assert resolve(Backend(prefill_graphs=True, **switches), ALIGNED, machine).prefill_moe == chosen


def test_fused_kernels_are_of_decode() -> None:
    """But grouped would make every packed expert dense, for a prompt of any length."""
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"kernels": "triton"}, "grouped"),
        ({"kernels": "triton", "quant": "fp8"}, "triton"),
        ({"kernels": "triton", "quant": "int4", "prefill_graphs": True}, "triton"),
        ({"kernels": "triton", "quant": "int4", "ep": 2}, "triton"),
        ({"kernels": "triton", "quant": "int4", "prefill_moe": "grouped"}, "grouped"),
        ({"kernels": "triton", "quant": "int4", "compile": True}, "triton"),
        ({"quant": "fp8"}, "grouped"),
    )
    for switches, chosen in cases:
        assert resolve(Backend(**switches), ALIGNED, H100).prefill_moe == chosen, switches


def test_a_gpu_that_is_not_here(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the API and through the command, on a machine made up to have none."""
    monkeypatch.setattr(Machine, "here", lambda: Machine())
    for device in ("cuda", "rocm"):
        with refused(f"device={device}", "use device=cpu"):
            r1.load(made, Backend(device=device), quiet=True)
        assert main(["--model", str(made), "--device", device, "hi"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


NO_VALUES: dict[str, list[Any]] = {
    **{name: ["nonsense", "", None, ["loop"]] for name in choices()},
    "prefill_attention": ["triton", "nonsense"],  # its kernels are built for decode steps
    **{name: ["yes", 1, None] for name in ("compile", "cuda_graphs", "prefill_graphs")},
    **{name: [0, -1, 2.0, "2", True] for name in ("draft_tokens",)},
}


def test_values_that_no_switch_has() -> None:
    for name, values in NO_VALUES.items():
        for value in values:
            with refused(f"^{name}=", "choose|give"):
                Backend(**{name: value})


def test_no_flag_always_refuses() -> None:
    """Each value of each switch can be had by some machine and model, with what else it needs."""
    rocm = Machine(cuda=True, hip="7.0", arch="gfx942", name="MI300X")
    needs: dict[str, dict[str, Any]] = {
        "attention=naive": {"prefill_attention": "naive"},
        "prefill_attention=naive": {"attention": "naive"},
        **{f"expert_policy={kind}": {"experts": "host"} for kind in ("most", "resident")},
        "quant_activations=fp8": {"quant": "fp8"},
        **{f"allreduce={kind}": {"tp": 2} for kind in ALLREDUCE},
        "expert_policy=pinned": {"experts": "host", "expert_profile": "routing.json"},
    }
    for name, values in choices().items():
        for value in values:
            asked = Backend(**{name: value, **needs.get(f"{name}={value}", {})})
            reasons = []
            for machine, config in itertools.product(
                (Machine(), H100, rocm), (ALIGNED, TINY_GROUPED)
            ):
                try:
                    resolve(asked, config, machine)
                    break
                except InputError as error:
                    reasons.append(str(error))
            else:
                pytest.fail(f"{name}={value} is always refused: {reasons}")


def test_unknown_flags_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--device", "tpu"], ["--no-such-flag"], ["--new", "many"]):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("r1: ") and flags[0] in err and err.count("\n") == 1


def test_shape_that_is_not_there() -> None:
    with refused("no shape 'r2'", "moonlight-16b"):
        shapes.shape("r2")
    for layers in (0, -1, 62):
        with refused(f"layers={layers}", "61 layers"):
            shapes.shape("r1", layers)
        with flags_spelling(), refused(f"--layers {layers}", "61 layers"):
            shapes.shape("r1", layers)
