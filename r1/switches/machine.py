"""The features that this machine supports, and reasons for those that it lacks.

The switches consult this table, and `bench.py --explain` prints it. Torch calls the GPUs of both
NVIDIA and AMD "cuda". Only a ROCm build of torch, for AMD, has a version in `torch.version.hip`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1.errors import setting
from r1.model.strategy import without_kernels


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that the table needs.

    `Machine.here()` describes this machine. Tests describe other ones.
    """

    cuda: bool = False
    """Whether torch has a GPU: NVIDIA's or, in a ROCm build, AMD's."""
    hip: str | None = None
    """The ROCm version that torch was built for. None without ROCm."""
    torch_version: str = torch.__version__
    name: str = "CPU"
    capability: tuple[int, int] = (0, 0)
    """NVIDIA's compute capability."""
    arch: str = ""
    """AMD's architecture, such as gfx942."""
    memory: int = 0
    """Bytes of memory: the GPU's, or the host's if there is no GPU."""
    compiler: bool = True
    """Whether torch.compile has its compiler: C++ for a CPU, Triton for a GPU."""

    @staticmethod
    def here() -> Machine:
        """The machine that runs this process. The first GPU counts."""
        if not torch.cuda.is_available():
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return Machine(name=cpu_name(), memory=memory, compiler=_has_cxx())
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            cuda=True,
            hip=torch.version.hip,
            name=properties.name,
            capability=torch.cuda.get_device_capability(),
            arch=getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else "",
            memory=properties.total_memory,
            compiler=_has_triton(),
        )

    @property
    def device(self) -> str:
        """The device that device=auto chooses: cuda, rocm or cpu."""
        return ("rocm" if self.hip else "cuda") if self.cuda else "cpu"

    def without_gpu(self) -> Machine:
        """The same machine for device=cpu."""
        if not self.cuda:
            return self
        return Machine(torch_version=self.torch_version, compiler=_has_cxx())

    def why_not(self, feature: str) -> str | None:
        """Why this machine lacks one of FEATURES, and what to do instead. None if it has it."""
        return FEATURES[feature](self)


def _bf16(m: Machine) -> str | None:
    if not m.cuda or m.hip or m.capability >= (8, 0):
        return None
    return f"bf16 needs compute capability 8.0, and {m.name} has {m.capability}: use fp16 or fp32"


def _fp8(m: Machine) -> str | None:
    if not m.cuda:
        return "a CPU has no FP8 products: FP8 checkpoints are dequantized while loading"
    if m.hip:
        has_fp8 = m.arch in ("gfx942", "gfx950", "gfx1200", "gfx1201")
        return None if has_fp8 else f"{m.arch} has no FP8 products: use bf16"
    if m.capability >= (8, 9):
        return None
    return f"FP8 products need compute capability 8.9, and {m.name} has {m.capability}: use bf16"


def fp8_format(m: Machine) -> torch.dtype | None:
    """The 8-bit float format that this machine can multiply. None if it can multiply none.

    On gfx942 it is e4m3fnuz. The same byte has half the value there that it has in e4m3fn.
    """
    if _fp8(m):
        return None
    return torch.float8_e4m3fnuz if m.arch == "gfx942" else torch.float8_e4m3fn


def _grouped(m: Machine) -> str | None:
    if not m.cuda or (not m.hip and m.capability[0] in (9, 10)):
        return None
    return f"torch's grouped_mm has a kernel for compute capability 9 and 10 only, not for {m.name}"


def _compile(m: Machine) -> str | None:
    if m.compiler:
        return None
    needs = (
        "Triton on a GPU: install triton"
        if m.cuda
        else "a C++ compiler on a CPU: install g++ (or set CXX)"
    )
    compile_ = setting("compile")
    return f"{compile_} needs {needs}, or leave {compile_} off"


def _graphs(m: Machine) -> str | None:
    if m.cuda:
        return None
    captures = f"{setting('cuda_graphs')} captures launches on a GPU"
    return f"{captures}, and this runs on a CPU, which has none: use {setting('compile')}"


def _memory(m: Machine) -> str | None:
    if m.cuda:
        return None
    policy = f"{setting('memory')} is the policy of the GPU's allocator"
    return f"{policy}, and this runs on a CPU: leave it at default"


def _triton(m: Machine) -> str | None:
    if m.cuda and m.compiler:
        return None
    return f"Triton's kernels need a GPU and the triton package: {without_kernels()}"


FEATURES: dict[str, Callable[[Machine], str | None]] = {
    "bf16": _bf16,
    "fp8": _fp8,
    "grouped_mm": _grouped,
    "compile": _compile,
    "cuda_graphs": _graphs,
    "memory": _memory,
    "triton": _triton,
}
"""Each feature by name, and the function that says why a machine lacks it (None if it has it)."""


def explain(m: Machine) -> str:
    """The table as text: a line for the machine, then a line for each feature."""
    gpu = m.arch or "no GPU"
    if m.cuda and not m.hip:
        gpu = f"compute capability {m.capability[0]}.{m.capability[1]}"
    hip = f", ROCm {m.hip}" if m.hip else ""
    lines = [
        f"{m.name} ({gpu}, {m.memory / 1e9:.0f} GB), torch {m.torch_version}{hip}, "
        f"device={m.device}",
        "",
    ]
    details = {
        "fp8": str(fp8_format(m)).removeprefix("torch."),
        "grouped_mm": "in bf16" if m.cuda else "a loop over experts",
    }
    for feature in FEATURES:
        why = m.why_not(feature)
        yes = f"yes ({details[feature]})" if feature in details else "yes"
        answer = f"no: {why}" if why else yes
        lines.append(f"{feature:<12} {answer}")
    return "\n".join(lines)


def clocks_and_power() -> dict[str, float]:
    """The GPU's current clocks (MHz), power (W) and temperature (degrees C), from nvidia-smi.

    Empty without a GPU, without nvidia-smi, or if it does not report all of them.
    """
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return {}
    query = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "power_w": "power.draw",
        "temperature_c": "temperature.gpu",
    }
    result = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(query.values())}", "--format=csv,noheader,nounits",
        "-i", "0"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        return dict(zip(query, (float(value) for value in result.stdout.split(",")), strict=True))
    except ValueError:
        return {}


def cpu_name() -> str:
    """The processor's name if the system provides it, and the number of CPUs."""
    name = "CPU"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass  # not Linux, or /proc/cpuinfo has no such line
    count = os.cpu_count() or 1
    return f"{name}, {count} CPU{'s' * (count != 1)}"


def _has_cxx() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
