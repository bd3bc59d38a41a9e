"""Compile every Triton kernel for GPUs that aren't here, as it would be launched there.

    python tools/check/compile_kernels.py --shape moonlight-16b,r1 --batch 1,32 --target sm_90,gfx942

The launches are not listed anywhere: the fused block runs on tensors without storage, with a chip
that writes launches down instead of making them. Fails where a program wants more shared memory
than the target has; says what was spilled. Where kernels may start before the one ahead has ended
(chip.py), it says in which order a program waits for that one, lets the next start and writes,
branch after branch, and fails where the first thing it does is write."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
os.environ.setdefault(
    "TRITON_DEFAULT_FP_FUSION", "1"
)  # as it was before Triton asked for an answer, with a warning

import torch

from r1 import Config, InputError
from r1.model.shapes import SHAPES, shape

CONTEXT = 4096
"""Tokens of the cache that the attention is launched for, and of a prompt."""
KB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU that people have, as Triton names it, and the facts that r1/kernels/chip.py asks of
    one."""

    backend: str
    arch: int | str
    warp: int
    processors: int
    shared: int
    dependent_launch: bool = False


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 * KB),  # A100
    "sm_86": Target("cuda", 86, 32, 84, 99 * KB),  # RTX 3090, A10
    "sm_89": Target("cuda", 89, 32, 128, 99 * KB),  # RTX 4090, L40
    "sm_90": Target("cuda", 90, 32, 132, 227 * KB, dependent_launch=True),  # H100
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * KB),  # MI300X
    "gfx1100": Target("hip", "gfx1100", 32, 96, 64 * KB),  # RX 7900
}


@dataclass
class Launch:
    """One kernel as it was to be launched."""

    kernel: Any
    signature: dict[str, str]
    aligned: tuple[int, ...]
    """Numbers of the arguments that are multiples of 16, which makes wide loads: the launcher would
    tell the compiler too."""
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What is compiled once."""
        name = self.kernel.fn.__name__
        return (
            name,
            *self.signature.items(),
            self.aligned,
            *self.constants.items(),
            self.warps,
            self.stages,
        )


@dataclass
class Recorder:
    """Stands in for r1.kernels.Chip: writes launches down instead of making them, with the defaults
    of a chip like `target`."""

    processors: int
    shared: int
    dependent_launch: bool
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
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        constants |= {"PDL": self.dependent_launch}
        constants |= {
            name: value
            for name, value in given.items()
            if value is None or (type(value) is int and value == 1)
        }
        signature = {
            name: "constexpr" if name in constants else type_of(given[name])
            for name in kernel.arg_names
        }
        aligned = tuple(
            i
            for i, name in enumerate(kernel.arg_names)
            if name not in constants and is_aligned(given[name])
        )
        self.launches.append(Launch(kernel, signature, aligned, constants, warps, stages))


def type_of(value: Any) -> str:
    """An argument's type by Triton's name."""
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.int64: "i64",
        torch.int32: "i32",
    }
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def is_aligned(value: Any) -> bool:
    """Whether an address (of a tensor whose storage would be aligned) or a whole number is a
    multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def launches(config: Config, batch: int, target: Target) -> list[Launch]:
    """What one decode step of `batch` tokens launches, in bf16, with a dense layer and then a
    sparse one."""
    from r1.kernels import DecodeBlock, begin_step, head
    from r1.model.transformer import Block, Step

    recorder = Recorder(target.processors, target.shared, target.dependent_launch)
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    frequency = torch.empty(config.attention.qk_rope_head_dim // 2, device="meta")
    positions, cos, sin = begin_step(recorder, lengths, 1, frequency, 1.0)  # type: ignore[arg-type]
    step = Step("decode", positions, cos, sin, None, None, positions)
    cache = torch.empty(
        batch, CONTEXT, config.attention.latent_dim, dtype=torch.bfloat16, device="meta"
    )
    x = torch.empty(batch, 1, config.hidden_size, dtype=torch.bfloat16, device="meta")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            blocks = [Block(config, layer) for layer in (0, config.num_hidden_layers - 1)]
            lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    finally:
        torch.set_default_dtype(default)
    for block in blocks:
        DecodeBlock(block, recorder)(x, step, (cache,))  # type: ignore[arg-type]
    head(lm_head, recorder, x)  # type: ignore[arg-type]
    return recorder.launches


def launches_of_experts(config: Config, batch: int, target: Target) -> list[Launch]:
    """What `moe=triton`, or `prefill_moe=triton`, launches for `batch` tokens: the routed experts
    alone, in bf16.

    (`attention=triton` is the block's.)
    """
    from r1.kernels.experts import Matrices, experts
    from r1.model.moe import Experts

    recorder = Recorder(target.processors, target.shared, target.dependent_launch)
    chosen = (batch, config.experts.num_experts_per_tok)
    with torch.device("meta"):
        weights = Experts(config).bfloat16()
        x = torch.empty(batch, config.hidden_size, dtype=torch.bfloat16)
        indices, shares = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen)
        experts(recorder, x, indices, shares, Matrices(weights.gate_up_proj, weights.down_proj))  # type: ignore[arg-type]
    return recorder.launches


@dataclass
class Compiled:
    """What the compiler says of one kernel."""

    shared: int
    registers: int
    spilled: int
    """NVIDIA: bytes of stack per thread; AMD: registers."""
    order: tuple[str, ...] = ()
    """Where the launch is dependent: "wait", "let" and "write" as the code has them, branch after
    branch."""


def compile_one(launch: Launch, target: Target) -> Compiled:
    """Compile for a GPU that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if target.dependent_launch:
        options["launch_pdl"] = True
    found = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp), options=options
    )
    if target.backend == "hip":
        text = found.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(found.metadata.shared, registers, spilled)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", said)[-1]) for name in ("REG", "STACK"))
    return Compiled(
        found.metadata.shared,
        registers,
        stack,
        order_of(found.asm["ptx"]) if target.dependent_launch else (),
    )


def order_of(ptx: str) -> tuple[str, ...]:
    """What Compiled calls order."""
    words = {"griddepcontrol.wait": "wait", "griddepcontrol.launch_dependents": "let"}
    found = re.findall(r"griddepcontrol\.\w+|\b(?:st|red|atom)\.(?:\w+\.)*global", ptx)
    return tuple(
        word for word, _repeated in itertools.groupby(words.get(each, "write") for each in found)
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--shape", default="moonlight-16b,r1", help="comma list of " + ", ".join(SHAPES)
    )
    made.add_argument("--batch", default="1,32", help="comma list of rows in a decode step")
    made.add_argument("--target", default=",".join(TARGETS), help="comma list (default: all)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a kernel doesn't fit a target, 2 for input that can't be
    used."""
    arguments = parser().parse_args(argv)
    try:
        try:
            import triton  # noqa: F401
        except ImportError:
            raise InputError("the triton package is not installed: pip install triton") from None
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise InputError("TRITON_INTERPRET is set, which makes Python of the kernels: unset it")
        shapes = {name: shape(name) for name in arguments.shape.split(",")}
        if not all(each.isdecimal() and int(each) for each in arguments.batch.split(",")):
            raise InputError(
                f"--batch {arguments.batch}: give whole numbers of at least 1, such as 1,32"
            )
        if unknown := [name for name in arguments.target.split(",") if name not in TARGETS]:
            raise InputError(f"--target {unknown[0]}: choose of {', '.join(TARGETS)}")
    except InputError as error:
        print(f"compile_kernels: {error}", file=sys.stderr)
        return 2
    failures = 0
    for name in arguments.target.split(","):
        target = TARGETS[name]
        wanted: dict[tuple[Any, ...], tuple[str, Launch]] = {}
        for label, config in shapes.items():
            for each in launches_of_experts(config, CONTEXT, target):
                wanted.setdefault(each.key, (f"{label} prompt", each))
            for batch in map(int, arguments.batch.split(",")):
                for each in launches(config, batch, target) + launches_of_experts(
                    config, batch, target
                ):
                    wanted.setdefault(each.key, (f"{label} batch {batch}", each))
        for where, launch in wanted.values():
            what = f"{name:8} {launch.kernel.fn.__name__:20} {where:24} {launch.warps} warps, {launch.stages} stages"
            try:
                found = compile_one(launch, target)
            except Exception as error:  # the compiler's own errors have no common type
                failures += 1
                print(
                    f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}",
                    flush=True,
                )
                continue
            over, early = (
                found.shared > target.shared,
                found.order[:1] == ("write",) or found.order[:2] == ("let", "write"),
            )
            failures += over or early
            unit = "B" if target.backend == "cuda" else "registers"
            spills = f", SPILLS {found.spilled} {unit}" if found.spilled else ""
            order = f" ({' '.join(found.order)})" if found.order else ""
            verdict = f", TOO MUCH: {target.shared / KB:.0f} KB there are" if over else ""
            verdict += ", WRITES BEFORE IT WAITS" if early else ""
            print(
                f"{what}: {found.shared / KB:.1f} KB shared, {found.registers} registers{spills}{order}{verdict}",
                flush=True,
            )
    print(f"{failures} of the kernels failed" if failures else "all kernels fit")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
