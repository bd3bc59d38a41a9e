"""Sentences below an answer's tables: what its numbers start from, and what they leave out."""

from __future__ import annotations

import math

from r1.guide.answer import Answer, Speed
from r1.guide.gpus import MEASURED
from r1.guide.predict import Predictor
from r1.guide.setup import Setup


def number(value: float | None) -> str:
    """About three digits; nothing for what is not known."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(answer: Answer, predictor: Predictor, smaller: Answer | None) -> list[str]:
    """All of them, as items of a list. `smaller`: one GPU for the same model, if that was asked."""
    setup = answer.setup
    assert setup
    lines = [_floor(answer, predictor), *(_slowest(speed) for speed in answer.speeds)]
    lines += [*_experts(setup, answer.first), *_sharing(setup, answer)]
    for speed in answer.speeds:
        lines += _starts(speed, "Calibrated: " if predictor.calibrated else "")
    return [f"- {line}" for line in [*lines, *_lacking(setup, answer.first), *_instead(smaller)]]


def _floor(answer: Answer, predictor: Predictor) -> str:
    setup, rates = answer.setup, predictor.rates(answer.gpu)
    assert setup
    products = "unknown"
    if rates.matmul < math.inf:
        products = f"{rates.matmul / 1e12:.0f} TFLOP/s in bf16"
    line = f"Floor: copy {rates.copy / 1e9:.0f} GB/s, matrix products {products}"
    if setup.streams and rates.link:
        line += f", host link {rates.link / 1e9:.0f} GB/s"
    if setup.places.experts == "disk":
        line += f", drive {rates.disk / 1e9:.3g} GB/s"
    return line + "."


def _slowest(speed: Speed) -> str:
    times = speed.times
    each = ", ".join(f"{name} {number(ms)} ms" for name, ms in times.parts_ms.items())
    return (
        f"A step at batch {speed.sizes.rows} takes at least: {each}. "
        f"The slowest is: {times.slowest}."
    )


def _experts(setup: Setup, speed: Speed) -> list[str]:
    """Of experts that lie elsewhere."""
    if not setup.streams:
        return []
    slots, experts = speed.times.slots, setup.config.experts.n_routed_experts // setup.backend.ep
    where = f"{setup.elsewhere_bytes / 1e9:.0f} GB of host memory"
    whole = setup.file_bytes * setup.backend.tp * setup.config.experts.n_routed_experts
    if setup.places.experts == "disk":
        where = f"{whole / 1e9:.0f} GB of files, with a cache in host memory of "
        where += f"{setup.cached()} of {experts} experts a layer"
    return [
        f"Experts take {where}; each GPU has slots for {slots} of {experts} in each layer "
        f"(`--experts {setup.places.experts} --expert-slots {slots}`). If routing is even, "
        f"{1 - min(1.0, slots / experts):.0%} of the experts that a step visits have to be "
        "copied. Real routing repeats experts, and then fewer are."
    ]


def _sharing(setup: Setup, answer: Answer) -> list[str]:
    lines = []
    if setup.backend.pp > 1:
        best = answer.best
        staged = best.times.staged_floor_ms
        assert staged
        lines.append(
            f"Stages take turns: a token waits for all {setup.backend.pp}. With as many parts of a "
            "batch under way at a time, which r1 does not do, batch "
            f"{best.sizes.rows} would have at most {best.sizes.rows * 1e3 / staged:,.0f} tokens/s."
        )
    if setup.count > 1:
        lines.append("r1 was run on one and two GPUs. More are tested on CPUs only.")
    return lines


def _starts(speed: Speed, word: str) -> list[str]:
    """The measured rows that expected times start from."""
    lines, row, prompt = [], speed.times.step_row, speed.times.prompt_row
    if row:
        part = f"{row.share:.0%} of its floor's rates"
        if row.whole or row.experts != "device":
            beside = "bytes" if row.whole else "experts' copies"
            part = f"{1e3 * row.layer_ms:.3g} us a layer beside its {beside}"
        lines.append(
            f"{word}TPOT at batch {speed.sizes.rows} starts from the measured row "
            f"{row.describe()}: {part}."
        )
    if prompt:
        lines.append(
            f"{word}TTFT at batch {speed.sizes.rows} starts from {prompt.describe()}, which "
            f"took {prompt.ttft_ms:.1f} ms, {prompt.prompt_share:.0%} of the floor's rates."
        )
    return lines


def _lacking(setup: Setup, speed: Speed) -> list[str]:
    """Why something is not expected, or is an assumption."""
    lines, gpu = [], setup.gpu
    if why := speed.times.only_floor:
        lines.append(f"Floor only: {why}.")
    elif not speed.times.step_row:
        what = "such a device"
        if setup.streams or setup.backend.pp > 1:
            what = f"such a layout ({setup.layout})"
        lines.append(
            f"Nothing is expected: no row was measured on {what}. Give one of your own "
            "with --calibrate FILE.json."
        )
    elif setup.count > 1 and gpu.get("link_latency_us") is None:
        lines.append(
            f"The latency of a sum between GPUs is the one measured on two {MEASURED.upper()}s."
        )
    if gpu.device == "cpu" and "Mac" in gpu.title:
        lines.append("r1 has no Metal backend: the floor is the memory's, r1 runs on the CPU.")
    if gpu.device == "rocm":
        lines.append("No AMD GPU has run these kernels yet; they are compiled for it.")
    return lines


def _instead(smaller: Answer | None) -> list[str]:
    """One GPU with experts in RAM, instead of several."""
    if smaller is None or smaller.setup is None:
        return []
    rate = number(smaller.first.floor_tokens_per_s / smaller.first.sizes.rows)
    return [
        f"Or one {smaller.gpu.title}, {smaller.setup.stored}, "
        f"experts {smaller.setup.place}: at most {rate} tokens/s of each row at batch "
        f"{smaller.first.sizes.rows} (`--count 1 --experts host` tells more)."
    ]
