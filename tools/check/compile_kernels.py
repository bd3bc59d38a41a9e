"""Compile every Triton kernel for GPUs that this machine does not have, as they would launch it.

    python tools/check/compile_kernels.py --shape r1 --batch 1,32 --target sm_90,gfx942

There is no list of launches. The fused block runs on tensors without storage, and a recorder stands
in for the chip: it records each launch and launches nothing.

For each kernel the tool prints the shared memory, the registers, and how much the compiler spilled.
A kernel fails if it needs more shared memory than the target has. For NVIDIA's GPUs it also counts
the load instructions, by the bytes that a thread loads with one: weights should come 16 at a time.

On some GPUs a kernel may start before the one ahead of it has ended (r1/kernels/chip.py). There the
tool prints the order, branch after branch, in which the program waits for the kernel ahead, lets
the next one start, and writes. A kernel fails if it writes before it waits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is
# Triton's old default. Without an answer, new versions warn.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import shared
import torch

from r1 import Backend, Config, InputError, build
from r1.model.cache import Cache
from r1.model.config import AttentionShape
from r1.storage.activations import NEVER
from r1.storing import join_matrices
from r1.switches.strategies import attention_of

CONTEXT = 4096
"""Tokens in the cache of a decode step, and tokens of a prompt."""
DEVICES = 2
"""How many share a layer, for the sum over them."""
KB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, with the facts that r1/kernels/chip.py needs."""

    backend: str
    arch: int | str
    warp: int
    """Threads of a warp."""
    processors: int
    shared: int
    """Bytes of shared memory that a program may use."""
    dependent_launch: bool = False

    def recorder(self) -> Recorder:
        """What stands in for its chip."""
        ptx = self.backend == "cuda" and int(self.arch) >= 89
        nvidia = self.backend == "cuda"
        return Recorder(self.processors, self.shared, self.dependent_launch, ptx, nvidia)


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 * KB),  # A100
    "sm_86": Target("cuda", 86, 32, 84, 99 * KB),  # RTX 3090, A10
    "sm_89": Target("cuda", 89, 32, 128, 99 * KB),  # RTX 4090, L40
    "sm_90": Target("cuda", 90, 32, 132, 227 * KB, dependent_launch=True),  # H100
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * KB),  # MI300X
    "gfx1100": Target("hip", "gfx1100", 32, 96, 64 * KB),  # RX 7900
}


QUANTS = {kind: kind for kind in ("none", "fp8", "int8", "int4")}


@dataclass
class Launch:
    """One launch of a kernel, recorded."""

    kernel: Any
    signature: dict[str, Any]
    aligned: tuple[tuple[int, ...], ...]
    """The places of arguments that are multiples of 16. The compiler uses wide loads for them;
    a real launch tells it too."""
    constants: dict[tuple[int, ...], Any]
    """By place: an argument's number, and in an operand (r1/kernels/tiles.py) a field's number."""
    warps: int
    stages: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Launches with equal keys need one compilation."""
        types, constants = self.signature.items(), self.constants.items()
        return (self.name, *types, self.aligned, *constants, self.warps, self.stages)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass
class Recorder:
    """Stands in for r1.kernels.Chip: it records launches, with a target's default parameters."""

    processors: int
    shared: int
    dependent_launch: bool
    ptx: bool
    byte_products: bool
    launches: list[Launch] = field(default_factory=list)

    def launch(self, kind: Any, *sizes: int) -> Any:
        return kind.default(sizes, self)

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        warps: int,
        stages: int = 1,
        **constants: Any,
    ) -> None:
        from triton.language import constexpr

        constants |= {"PDL": self.dependent_launch}
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        given |= {name: constexpr(value) for name, value in constants.items()}
        signature = {name: type_of(given[name]) for name in kernel.arg_names}
        leaves = {
            (i, *place): leaf
            for i, name in enumerate(kernel.arg_names)
            for place, leaf in fields(given[name])
        }
        fixed = {
            place: leaf.value if isinstance(leaf, constexpr) else leaf
            for place, leaf in leaves.items()
            if type_of(leaf) == "constexpr"
        }
        aligned = tuple(
            place for place, leaf in leaves.items() if place not in fixed and is_aligned(leaf)
        )
        self.launches.append(Launch(kernel, signature, aligned, fixed, warps, stages))


def fields(value: Any) -> list[tuple[tuple[int, ...], Any]]:
    """An operand's fields with their numbers; another argument as it is."""
    if isinstance(value, tuple):
        return [((i,), field) for i, field in enumerate(value)]
    return [((), value)]


def type_of(value: Any) -> Any:
    """Triton's name for an argument's type; for an operand, those of its fields."""
    from triton.language import constexpr

    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.int64: "i64",
        torch.int32: "i32",
        torch.int16: "i16",
        torch.int8: "i8",
        torch.uint8: "u8",
        torch.float8_e4m3fn: "fp8e4nv",
    }
    if isinstance(value, tuple):
        return type(value)(*map(type_of, value))
    if value is None or isinstance(value, constexpr) or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def is_aligned(value: Any) -> bool:
    """Whether a whole number or a tensor's address is a multiple of 16.

    The tensor has no storage here. A real storage is aligned.
    """
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def launches(
    config: Config, batch: int, target: Target, quant: str = "none", new: int = 1,
    round_x: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of one decode step of `batch` rows with `new` tokens each, in bf16: the first
    layer, which is dense, and the last one, which is sparse where the model has experts.
    `round_x`: with inputs of FP8.
    """
    from r1.kernels.allreduce import TURNS, all_reduce
    from r1.kernels.block import DecodeBlock, output_head
    from r1.kernels.greedy import likeliest
    from r1.kernels.step import begin_step
    from r1.model.step import Step
    from r1.placement.symmetric import limit

    recorder = target.recorder()
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    frequency = torch.empty(config.attention.qk_rope_head_dim // 2, device="meta")
    interleave = config.attention.rope_interleave
    given = (lengths, new, frequency, 1.0, interleave, True)
    positions, cos, sin = begin_step(recorder, *given)  # type: ignore[arg-type]
    step = Step("decode", positions, cos, sin, positions)
    entry = attention_of(config.attention)["triton"].entry(config.attention)
    cache = Cache(entry, batch, CONTEXT, 1, device=lengths.device, dtype=torch.bfloat16)
    x = torch.empty(batch, new, config.hidden_size, dtype=torch.bfloat16, device="meta")
    model = build.sketch(config, Backend(dtype="bf16", join="on", quant=quant))
    for layer in (model.layers[0], model.layers[-1]):
        block = DecodeBlock(layer, recorder, 1 if round_x else NEVER)  # type: ignore[arg-type]
        block(x, step, cache.layers[0])
    logits = output_head(model.lm_head, recorder, x, model.norm)  # type: ignore[arg-type]
    likeliest(recorder, logits, positions)  # type: ignore[arg-type]
    with lengths.device:  # the sum over so many devices
        peers, turns = torch.empty(DEVICES, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
        slots = TURNS.value * DEVICES * limit("triton", DEVICES)
        buffer = torch.empty(slots, dtype=torch.uint8)
    all_reduce(recorder, x, buffer, peers, turns, 0)  # type: ignore[arg-type]
    return recorder.launches


def launches_of_drafts(config: Config, batch: int, target: Target) -> list[Launch]:
    """Kernels that only rows with several new tokens launch: those of grouped-query attention."""
    only = ("heads_kernel", "grouped_split_kernel")
    return [each for each in launches(config, batch, target, new=2) if each.name in only]


def launches_of_experts(config: Config, batch: int, target: Target) -> list[Launch]:
    """The launches of `moe=triton` or `prefill_moe=triton`: the routed experts alone, in bf16.

    (`attention=triton` launches kernels that the block launches too.) None for a dense model.
    """
    if not config.experts.n_routed_experts:
        return []
    from r1.kernels.experts import experts
    from r1.model.moe import Experts

    recorder = target.recorder()
    chosen = (batch, config.experts.num_experts_per_tok)
    with torch.device("meta"):
        weights = Experts(config).bfloat16()
        join_matrices(weights)
        x = torch.empty(batch, config.hidden_size, dtype=torch.bfloat16)
        indices, shares = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen)
        for weights.partial in (False, True):
            experts(recorder, x, indices, shares, weights)  # type: ignore[arg-type]
    return recorder.launches


def launches_of_router(config: Config, target: Target) -> list[Launch]:
    """The launches of a prompt's router. None for a dense model."""
    if not config.experts.n_routed_experts:
        return []
    from r1.kernels.choice import Rule
    from r1.kernels.prompt_router import launch

    recorder, count = target.recorder(), config.experts.n_routed_experts
    with torch.device("meta"):
        x = torch.empty(CONTEXT, config.hidden_size, dtype=torch.bfloat16)
        weight, bias = torch.empty(count, config.hidden_size), torch.empty(count)
    chip: Any = recorder
    launch(chip, x, weight, bias, None, 1.0, list(Rule.of(config.experts)))
    return recorder.launches


def launches_of_prompts(
    config: Config, target: Target, quant: str, round_x: bool = False
) -> list[Launch]:
    """The launches that make a dense layer's packed matrices dense for a long prompt, in bf16; with
    `round_x` those that multiply by them with inputs of FP8, and those of the experts.

    (What a short prompt launches, a decode step of as many rows launches, too.)
    """
    from r1.kernels.experts import experts
    from r1.kernels.prompt import multiply
    from r1.model.layers import Linear

    recorder = target.recorder()
    model = build.sketch(config, Backend(dtype="bf16", join="on", quant=quant))
    for layer in model.layers[0].modules():
        if isinstance(layer, Linear):
            shape = CONTEXT, layer.matrix.shape[1]
            x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            multiply(recorder, layer.matrix, x, round_x)  # type: ignore[arg-type]
    if round_x and config.experts.n_routed_experts:
        chosen = (CONTEXT, config.experts.num_experts_per_tok)
        with torch.device("meta"):
            x = torch.empty(CONTEXT, config.hidden_size, dtype=torch.bfloat16)
            indices, shares = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen)
        mlp: Any = model.layers[-1].mlp
        chip: Any = recorder
        experts(chip, x, indices, shares, mlp.experts, round_x=round_x)
    return recorder.launches


def launches_of_norm_and_heads(config: Config, target: Target) -> list[Launch]:
    """The launches that norm a prompt with inputs of FP8, and finish its heads where attention is
    latent, in bf16. None where no FP8 is multiplied.
    """
    from r1.kernels.prompt_attention import finish
    from r1.kernels.prompt_norm import launch

    chip: Any = target.recorder()
    if not chip.ptx:
        return []
    a, like = config.attention, torch.empty(0, dtype=torch.bfloat16, device="meta")
    x = like.new_empty(CONTEXT, config.hidden_size)
    launch(chip, x, x[0], 1e-5)
    if isinstance(a, AttentionShape):
        shape = 1, CONTEXT, a.num_attention_heads, a.qk_head_dim
        q, k = (like.new_empty(shape) for _ in range(2))
        k_pe = like.new_empty(1, CONTEXT, a.qk_rope_head_dim)
        angles = k_pe[:, :, None].float()
        finish(chip, q, k, k_pe, angles, angles)
    return list(chip.launches)


@dataclass
class Compiled:
    """The compiler's report on one kernel."""

    shared: int
    registers: int
    spilled: int
    """NVIDIA: bytes of stack per thread; AMD: registers."""
    order: tuple[str, ...] = ()
    """On targets with dependent launches: "wait", "let" and "write" in the order of the code."""
    loads: Counter[int] = field(default_factory=Counter)
    """NVIDIA: how many instructions load so many bytes for a thread from global memory."""

    @property
    def writes_early(self) -> bool:
        """Whether the program writes before it waits for the kernel ahead."""
        return self.order[:1] == ("write",) or self.order[:2] == ("let", "write")


def compile_one(launch: Launch, target: Target) -> Compiled:
    """Compile for a GPU that this machine need not have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {place: [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if target.dependent_launch:
        options["launch_pdl"] = True
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    program = triton.compile(source, target=gpu, options=options)
    if target.backend == "hip":
        text = program.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(program.metadata.shared, registers, spilled)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    order = order_of(program.asm["ptx"]) if target.dependent_launch else ()
    return Compiled(program.metadata.shared, registers, stack, order, loads_of(program.asm["ptx"]))


def loads_of(ptx: str) -> Counter[int]:
    """The `loads` of a compiled program, from its assembly."""
    plain = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+)", ptx)
    return Counter(int(many or 1) * int(bits) // 8 for many, bits in plain) + Counter(
        int(nbytes, 16) for nbytes in copies
    )


def order_of(ptx: str) -> tuple[str, ...]:
    """The `order` of a compiled program, from its assembly. Repeated words are one."""
    words = {"griddepcontrol.wait": "wait", "griddepcontrol.launch_dependents": "let"}
    stores = re.findall(r"griddepcontrol\.\w+|\b(?:st|red|atom)\.(?:\w+\.)*global", ptx)
    order = (words.get(instruction, "write") for instruction in stores)
    return tuple(word for word, _repeated in itertools.groupby(order))


def wanted(
    shapes: dict[str, Config], batches: list[int], quants: list[str], target: Target
) -> Iterator[tuple[str, Launch]]:
    """Every different launch, with the shape and size that it is for."""
    seen: set[tuple[Any, ...]] = set()
    for name, config in shapes.items():
        plain = "none" in quants
        prompt = launches_of_experts(config, CONTEXT, target) + launches_of_router(config, target)
        found = [(f"{name} prompt", prompt)] if plain else []
        for quant, batch in itertools.product(quants, batches):
            step = launches(config, batch, target, quant)
            if quant == "none":
                step += launches_of_experts(config, batch, target)
                step += launches_of_drafts(config, batch, target)
            weights = "" if quant == "none" else f" {quant}"
            found.append((f"{name}{weights} batch {batch}", step))
        for quant in quants:
            if quant != "none":
                found.append((f"{name} {quant} prompt", launches_of_prompts(config, target, quant)))
        if "fp8" in quants:  # and inputs of FP8
            found.append((f"{name} W8A8 prompt", launches_of_prompts(config, target, "fp8", True)))
            found.append((f"{name} W8A8 prompt", launches_of_norm_and_heads(config, target)))
            for batch in batches:
                step = launches(config, batch, target, "fp8", round_x=True)
                found.append((f"{name} W8A8 batch {batch}", step))
        for where, recorded in found:
            for launch in recorded:
                if launch.key not in seen:
                    seen.add(launch.key)
                    yield where, launch


def verdict(launch: Launch, target: Target) -> tuple[str, bool]:
    """Compile one launch. Returns the text of its line, and whether the kernel is fit for use."""
    try:
        program = compile_one(launch, target)
    except Exception as error:  # the compiler's own errors have no common type
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}", False
    over = program.shared > target.shared
    unit = "B" if target.backend == "cuda" else "registers"
    text = f"{program.shared / KB:.1f} KB shared, {program.registers} registers"
    text += f", SPILLS {program.spilled} {unit}" if program.spilled else ""
    if program.loads:
        sizes = sorted(program.loads.items(), reverse=True)
        text += f", loads {' + '.join(f'{count} x {size}' for size, count in sizes)} bytes"
    text += f" ({' '.join(program.order)})" if program.order else ""
    text += f", TOO MUCH: {target.shared / KB:.0f} KB there are" if over else ""
    text += ", WRITES BEFORE IT WAITS" if program.writes_early else ""
    return text, not over and not program.writes_early


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a kernel doesn't fit a target, 2 for bad input."""
    parser = shared.parser(__doc__)
    shared.add_shapes_and_batches(parser, "moonlight-16b,r1", "1,32")
    parser.add_argument(
        "--target",
        default=",".join(TARGETS),
        metavar="GPU,..",
        help=f"of {', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument(
        "--quant",
        default=",".join(QUANTS),
        metavar="KIND,..",
        help=f"how weights are stored, of {', '.join(QUANTS)} (default: all)",
    )
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    if find_spec("triton") is None:
        raise InputError("the triton package is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise InputError("TRITON_INTERPRET is set, which makes Python of the kernels: unset it")
    shapes = shared.shapes(arguments.shape)
    batches = shared.numbers("--batch", arguments.batch)
    quants = shared.names("--quant", arguments.quant, QUANTS)
    failures = 0
    for name in shared.names("--target", arguments.target, TARGETS):
        target = TARGETS[name]
        for where, launch in wanted(shapes, batches, quants, target):
            text, fits = verdict(launch, target)
            failures += not fits
            size = f"{launch.warps} warps, {launch.stages} stages"
            print(f"{name:8} {launch.name:20} {where:24} {size}: {text}", flush=True)
    print(f"{failures} of the kernels failed" if failures else "all kernels fit")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
