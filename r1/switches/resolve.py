"""Turn what is asked into what really runs, or say why not. Nothing here falls back in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from r1.device import DTYPES
from r1.errors import InputError, setting
from r1.model.config import Config, Yarn
from r1.model.strategy import Strategy, Use
from r1.storage import int4_cpu
from r1.storage.kinds import kind_of
from r1.switches import offload
from r1.switches.backend import Backend
from r1.switches.devices import check_devices, choose_sum
from r1.switches.machine import Machine
from r1.switches.precision import check_activations, spec_of
from r1.switches.strategies import ATTENTION, EXPERTS, GROUPED, attention_of, check_tables

BEST_ATTENTION = {
    "decode": ("absorbed", "grouped", "naive"),
    "prefill": ("expand", "sdpa", "naive"),
}
"""Attention strategies, the best first. A model's kind of attention has some of them."""


def resolve(
    backend: Backend, config: Config, machine: Machine | None = None, *, batch: int = 1
) -> Backend:
    """Turn every "auto" into what really runs for `config`, with `batch` rows in a decode step.

    Raises InputError for a switch that the machine can't do, or that contradicts another.
    """
    check_tables()
    machine = machine or Machine.here()
    device = _device(backend, machine)
    machine = machine if device != "cpu" else machine.without_gpu()
    backend = dataclasses.replace(backend, device=device, dtype=_dtype(backend, machine))
    _check_machine(backend, machine)
    check_devices(backend, config)
    backend = choose_sum(backend, machine)
    offload.check_strategies(backend, config)
    backend = _kernels(backend, machine)
    _check_fused(backend, config)
    backend = dataclasses.replace(backend, quant=_quant(backend, config))
    if backend.quant_head != "none" and config.tie_word_embeddings:
        head = setting("quant_head", backend.quant_head)
        raise InputError(f"{head}: this model's output head is its embedding too: leave it out")
    check_activations(backend, config, machine)
    _check_speculation(backend, config)
    offload.check(backend, config)
    uses = {
        phase: _use(backend, config, machine, phase, batch * backend.step_tokens)
        for phase in ("decode", "prefill")
    }
    attention, prefill_attention = _attention(backend, uses)
    moe, prefill_moe = (
        _experts(slot, getattr(backend, slot), use, backend)
        for slot, use in (("moe", uses["decode"]), ("prefill_moe", uses["prefill"]))
    )
    return dataclasses.replace(
        backend, attention=attention, prefill_attention=prefill_attention,
        moe=moe, prefill_moe=prefill_moe, join="off" if backend.join == "off" else "on",
    )  # fmt: skip


def _device(backend: Backend, machine: Machine) -> str:
    if backend.device in ("auto", machine.device):
        return machine.device
    if backend.device == "cpu":
        return "cpu"
    asked = setting("device", backend.device)
    if machine.cuda:
        drives = f"drives {machine.device}: use {setting('device', machine.device)}"
        raise InputError(f"{asked}: this torch ({machine.torch_version}) {drives}")
    sees = f"torch {machine.torch_version} sees no such GPU here: use {setting('device', 'cpu')}"
    raise InputError(f"{asked}: {sees}")


def _dtype(backend: Backend, machine: Machine) -> str:
    if backend.dtype != "auto":
        return backend.dtype
    if not machine.cuda or backend.amp != "off":
        return "fp32"
    return "fp16" if machine.why_not("bf16") else "bf16"


def _check_machine(backend: Backend, machine: Machine) -> None:
    """Features that the machine lacks, and switches that contradict each other."""
    wanted = {
        "bf16": "bf16" in (backend.dtype, backend.amp),
        "compile": backend.compile,
        "cuda_graphs": backend.cuda_graphs,
        "memory": backend.memory != "default",
    }
    for feature, asked in wanted.items():
        if asked and (why := machine.why_not(feature)):
            raise InputError(why)
    captures = setting("prefill_graphs")
    if backend.prefill_graphs and (why := machine.why_not("cuda_graphs")):
        raise InputError(f"{captures}: {why}")
    if backend.prefill_graphs and backend.memory == "empty-cache":
        raise InputError(
            f"{setting('memory', 'empty-cache')} gives back what a prompt took, and {captures} "
            "keeps it: leave one of them out"
        )
    if backend.amp != "off" and backend.dtype != "fp32":
        asked_dtype = setting("dtype", backend.dtype)
        raise InputError(
            f"{setting('amp', backend.amp)} casts fp32 weights as it goes, but {asked_dtype}: use "
            f"{setting('dtype', 'fp32')}, or {setting('amp', 'off')}"
        )


def _check_speculation(backend: Backend, config: Config) -> None:
    drafts = setting("draft_tokens", backend.draft_tokens)
    if backend.speculate == "mtp" and not config.num_nextn_predict_layers:
        has = f"this model has none: use {setting('speculate', 'off')}"
        raise InputError(f"{setting('speculate', 'mtp')} drafts with the MTP layer, and {has}")
    if backend.step_tokens > config.max_position_embeddings:
        context = f"more than the context of {config.context}: draft fewer"
        raise InputError(f"{drafts} makes a step {context}")
    if backend.speculate == "off" and backend.draft_tokens != 1:
        use = f"is of no use without drafts: add {setting('speculate', 'mtp')}, or leave it out"
        raise InputError(f"{drafts} {use}")


def _kernels(backend: Backend, machine: Machine) -> Backend:
    """kernels=triton brings its own attention and experts of a decode step."""
    triton = setting("kernels", "triton")
    if backend.kernels != "triton":
        if backend.tune:
            tune = setting("tune")
            search = f"{tune} searches the launch parameters of {triton}"
            raise InputError(f"{search}: add {triton}, or leave {tune} out")
        return backend
    if why := machine.why_not("triton"):
        raise InputError(f"{triton}: {why}")
    if backend.amp != "off":
        reads = "reads weights as they are stored, not under amp"
        instead = f"use {setting('dtype', backend.amp)}, no {setting('amp')}"
        raise InputError(f"{triton} {reads}: {instead}")
    for name in ("attention", "moe"):
        value = getattr(backend, name)
        if value not in ("auto", "triton"):
            fuses = f"fuses its own {name} into a step, not {setting(name, value)}"
            raise InputError(f"{triton} {fuses}: leave {setting(name)} at auto")
    return dataclasses.replace(backend, attention="triton", moe="triton")


def _check_fused(backend: Backend, config: Config) -> None:
    """Whether the fused blocks compute this model."""
    yarn = config.attention.yarn
    tempered = isinstance(yarn, Yarn) and yarn.llama_4_scaling_beta > 0
    if backend.kernels == "triton" and tempered:
        use = f"use {setting('attention', 'triton')} and {setting('moe', 'triton')} instead"
        raise InputError(
            f"{setting('kernels', 'triton')} lacks the factor of this model's queries, which "
            f"depends on their positions (llama_4_scaling_beta): {use}"
        )


def _quant(backend: Backend, config: Config) -> str:
    """The storage of quantized matrices: for "auto" the files' own, where it can be used."""
    if backend.quant == "auto":
        kind = config.files.kind
        slow = kind == "fp8" and backend.device == "cpu"  # no FP8 products, and enough memory
        return "none" if kind is None or slow else kind
    return backend.quant


def _use(backend: Backend, config: Config, machine: Machine, phase: str, tokens: int) -> Use:
    captured = backend.cuda_graphs if phase == "decode" else backend.prefill_graphs
    fused = phase == "decode" and backend.kernels == "triton"  # then only prompts are compiled
    return Use(
        config, phase, DTYPES[backend.compute], tokens, gpu=backend.device != "cpu",
        amp=backend.amp != "off", compiled=backend.compile and not fused, captured=captured,
        machine=machine.why_not, quant=backend.quant,
    )  # fmt: skip


def _choose(
    slot: str, table: Mapping[str, Strategy], asked: str, use: Use, auto: Sequence[str]
) -> str:
    """The strategy that is asked for, or for "auto" the first of `auto` that can run."""
    if asked == "auto":
        reasons = {name: table[name].why_not(use) for name in auto}
        for name, why in reasons.items():
            if why is None:
                return name
        cannot = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise InputError(f"{setting(slot, 'auto')} has no strategy to choose, {cannot}")
    if why := table[asked].why_not(use):
        raise InputError(f"{setting(slot, asked)}: {why}")
    return asked


def _attention(backend: Backend, uses: Mapping[str, Use]) -> tuple[str, str]:
    """Both phases share one cache, so their strategies must keep the same of a token."""
    shape = uses["decode"].config.attention
    table = attention_of(shape)
    kept = {name: [tuple(each) for each in s.entry(shape)] for name, s in table.items()}
    asked = {"decode": backend.attention, "prefill": backend.prefill_attention}
    auto = {phase: [n for n in best if n in table] for phase, best in BEST_ATTENTION.items()}
    for slot, name in (("attention", asked["decode"]), ("prefill_attention", asked["prefill"])):
        if name not in ("auto", *table):
            kinds = {id(ATTENTION): "latent", id(GROUPED): "grouped-query"}
            has = f"this model has {kinds[id(table)]} attention, for which there is no {name}"
            phase = "decode" if slot == "attention" else "prefill"
            could = ", ".join(n for n, each in table.items() if phase in each.phases)
            raise InputError(f"{setting(slot, name)}: {has}: choose {could}")
    chosen = []
    for phase, other, slot in (
        ("decode", "prefill", "attention"),
        ("prefill", "decode", "prefill_attention"),
    ):
        fixed = asked[other]
        fitting: Sequence[str] = auto[phase]
        if fixed != "auto":  # one with a cache of its own serves both phases
            fitting = [n for n in (*auto[phase], fixed) if kept[n] == kept[fixed]]
        chosen.append(_choose(slot, table, asked[phase], uses[phase], fitting))
    decode, prefill = chosen
    if kept[decode] != kept[prefill]:
        keeps = {name: table[name].keeps for name in chosen}
        if keeps[decode] == keeps[prefill]:  # words that a subclass inherited don't tell
            keeps = {name: f"{keeps[name]} as {kept[name]}" for name in chosen}
        both = f"{setting('attention', decode)} and {setting('prefill_attention', prefill)}"
        raise InputError(
            f"{both} can't share a cache: {decode} keeps {keeps[decode]}, {prefill} "
            f"{keeps[prefill]}; use strategies that keep the same"
        )
    return decode, prefill


def _experts(slot: str, asked: str, use: Use, backend: Backend) -> str:
    sparse = use.config.experts.n_routed_experts > 0
    return _choose(slot, EXPERTS, asked, use, _auto_experts(use, backend)) if sparse else "auto"


def _multiplies_packed(use: Use) -> bool:
    """Whether `grouped` needs no dequantized experts on a CPU."""
    experts, hidden = use.config.experts, use.config.hidden_size
    if use.gpu or kind_of(use.quant) != "int4":
        return not use.gpu and kind_of(use.quant) == "int8"
    stack = f"model.layers.{experts.first_k_dense_replace}.mlp.experts.down_proj"
    spec = spec_of(stack, use.config.files, use.quant)
    shapes = ((hidden, experts.moe_intermediate_size), (experts.moe_intermediate_size, hidden))
    fits = spec is not None and all(int4_cpu.takes(spec, shape) for shape in shapes)
    return fits and use.dtype == torch.bfloat16


def _auto_experts(use: Use, backend: Backend) -> Sequence[str]:
    """Expert strategies, the best first.

    gather copies an expert for each choice of every token, also where another of `ep` devices holds
    it. grouped has to sort, but reads each expert once. On a CPU it may multiply by packed numbers,
    which gather would have to dequantize; elsewhere it makes every packed expert dense, for any
    prompt, and triton does not.
    """
    if _multiplies_packed(use):
        return ("grouped", "loop", "gather")
    experts = use.config.experts
    visits = use.tokens * experts.num_experts_per_tok
    few = use.tokens == 1 or 4 * visits <= experts.n_routed_experts
    if use.phase == "decode" and few:
        return ("gather",) if backend.ep == 1 else ("grouped", "gather")
    if use.phase == "decode":
        return ("grouped", "loop", "gather")
    best = ("grouped", "triton", "gather") if use.captured else ("grouped", "loop", "gather")
    packed = backend.kernels == "triton" and use.quant != "none"
    return ("triton", *best) if packed else best
