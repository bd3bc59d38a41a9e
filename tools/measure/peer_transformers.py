"""transformers' side of compare_peers.py: its model with random weights, and its process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from r1.bench.process import Answer, answer_commands
from r1.device import DTYPES, synchronize, torch_device
from r1.files.config_json import dump_config
from r1.model.config import Config
from r1.model.shapes import shape
from r1.switches import flags
from r1.switches.backend import Backend
from r1.switches.resolve import resolve

Measure = Callable[[], dict[str, float]]


def generate(config: Config, arguments: argparse.Namespace, *, static: bool) -> Measure:
    """transformers' `generate`, on its model of the same family with random weights."""
    backend = resolve(Backend(**flags.given(arguments)), config, batch=arguments.batch)
    device, dtype = torch_device(backend.device), DTYPES[backend.dtype]
    model = random_model(config, device, dtype)
    tokens = _prompts(config, arguments).to(device)
    options: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(tokens),
    }
    if static:
        options["cache_implementation"] = "static"
        options["compile_config"] = _compile_anywhere()

    def timed(new: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        synchronize(device)
        return time.perf_counter() - start

    def measure() -> dict[str, float]:
        whole = timed(arguments.new)  # the longer run first: its static cache serves both
        first = timed(1)
        return {"ttft": first, "tpot": (whole - first) / (arguments.new - 1)}

    return measure


def _compile_anywhere() -> Any:
    """transformers' default way to compile, on a CPU too."""
    from transformers import CompileConfig

    how = CompileConfig()
    how._compile_all_devices = True
    return how


def random_model(config: Config, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of the family, allocated on the device without a copy on the host."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dump_config(config)
    raw.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()  # an output head that is the embedding has become a tensor of its own
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        for tensor in model.buffers():  # the gate's bias
            tensor.zero_()
    # Its frequencies are computed, not stored, so the meta device lost them.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=model.config).to(device)
    return model.eval()


def serve(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """The main function of transformers' process. It answers three commands:

    - "start": make the model, and warm up twice
    - "measure": one repetition
    - "memory": the GPU's peak
    """
    measure: Measure

    def start() -> Answer:
        nonlocal measure
        config = shape(arguments.shape, arguments.layers)
        measure = generate(config, arguments, static="static" in name)
        begin = time.perf_counter()
        measure()
        first = time.perf_counter() - begin
        measure()
        return {"first_call_s": first}

    def memory() -> Answer:
        gpu = torch.cuda.is_available()
        return {"allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0}

    answer_commands(pipe, {"start": start, "measure": lambda: measure(), "memory": memory})


def _prompts(config: Config, arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        config.vocab_size, (arguments.batch, arguments.prompt), generator=generator
    )
