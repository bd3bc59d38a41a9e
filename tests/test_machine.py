"""What a machine has: the table of features, and what is read of the system.

Holds r1/switches/machine.py and r1/device.py to account. The files and the GPUs are made up.
"""

from __future__ import annotations

import builtins
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY

from r1 import Backend, build, device
from r1.device import available_bytes
from r1.switches import machine
from r1.switches.machine import Machine, clocks_and_power, cpu_name, explain
from r1.switches.resolve import resolve

GPU = torch.device("cuda")
CPU = torch.device("cpu")
NVIDIA = Machine(cuda=True, name="a GPU")
AMD = Machine(cuda=True, hip="7.0", name="a GPU")


def having(feature: str, machines: dict[Any, Machine]) -> set[Any]:
    return {name for name, made in machines.items() if made.why_not(feature) is None}


def test_features_by_compute_capability() -> None:
    """From NVIDIA's tables: bf16 since Ampere, FP8 since Ada, torch's grouped_mm on 9 and 10."""
    all_ = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    machines = {each: replace(NVIDIA, capability=each) for each in all_}
    assert having("bf16", machines) == set(all_) - {(7, 5)}
    assert having("fp8", machines) == {(8, 9), (9, 0), (10, 0), (12, 0)}
    assert having("grouped_mm", machines) == {(9, 0), (10, 0)}
    for feature in ("compile", "cuda_graphs", "memory", "triton"):
        assert having(feature, machines) == set(all_)
        lacking = {each: replace(made, compiler=False) for each, made in machines.items()}
        kept = feature in ("cuda_graphs", "memory")
        assert having(feature, lacking) == (set(all_) if kept else set())


def test_features_by_architecture() -> None:
    """From AMD's: FP8 products on CDNA 3 and 4, and on RDNA 4."""
    all_ = ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1200", "gfx1201")
    machines = {each: replace(AMD, arch=each) for each in all_}
    assert having("fp8", machines) == {"gfx942", "gfx950", "gfx1200", "gfx1201"}
    assert having("bf16", machines) == set(all_) and having("grouped_mm", machines) == set()


@pytest.mark.parametrize("tells", [True, False])
def test_growing_segments_keep_the_users_settings(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setter takes all others back; torch 2.10 does not tell what they are."""
    told, given = "max_split_size_mb:64", "garbage_collection_threshold:0.5"
    kept: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", kept.append)
    for name in device.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    for before in (told, ""):
        getter = "_accelerator_getAllocatorSettings"
        monkeypatch.setattr(torch._C, getter, lambda before=before: before, raising=False)
        if not tells:
            monkeypatch.delattr(torch._C, getter)
        device.grow_segments()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    device.grow_segments()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    device.grow_segments()
    grows = "expandable_segments:True"
    if tells:
        assert kept == [f"{told},{grows}", grows, grows, grows]
    else:
        assert kept == [grows, grows, f"{given},{grows}", f"{given},{grows}"]


def test_only_the_switch_lets_segments_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", kept.append)
    for memory, times in (("default", 0), ("empty-cache", 0), ("expandable", 1)):
        backend = resolve(Backend(device="cpu", dtype="fp32", join="off"), TINY)
        backend = replace(backend, memory=memory)  # which `resolve` refuses to a CPU
        build.allocate(TINY, backend, mtp=False)
        assert len(kept) == times


def test_a_cpu_in_place_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """device=cpu on a machine with a GPU: what the CPU has counts, its own compiler too."""
    for cxx, there in ((True, None), (False, "install g\\+\\+")):
        monkeypatch.setattr(machine, "_has_cxx", lambda cxx=cxx: cxx)
        cpu = replace(NVIDIA, torch_version="9.9").without_gpu()
        assert (cpu.device, cpu.torch_version, cpu.compiler) == ("cpu", "9.9", cxx)
        assert (cpu.why_not("compile") is None) == (there is None)
    assert having("grouped_mm", {"cpu": cpu}) and not having("cuda_graphs", {"cpu": cpu})


def test_the_table_as_text() -> None:
    """Sizes in powers of ten, as vendors give them."""
    text = explain(replace(NVIDIA, capability=(9, 0), memory=80 * 10**9))
    assert "a GPU (compute capability 9.0, 80 GB)" in text
    assert "grouped_mm   yes (in bf16)" in text and "fp8          yes (float8_e4m3fn)" in text
    cpu = explain(Machine(memory=10 * 10**9))
    assert "CPU (no GPU, 10 GB)" in cpu and "grouped_mm   yes (a loop over experts)" in cpu


# ---------------------------- what is read of the system
def test_the_compiler_that_cxx_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name == "mine" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, there in (("mine", True), ("another", False)):
        monkeypatch.setenv("CXX", name)
        assert Machine.here().compiler is there
    assert Machine.here().memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("hip", "arch"), [(None, ""), ("7.0", "gfx942")])
def test_the_first_gpu(hip: str | None, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's name of an architecture goes on with its options."""
    facts = SimpleNamespace(name="a GPU", total_memory=7, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: [facts][number])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(machine, "_has_triton", lambda: not hip)
    here = Machine.here()
    assert (here.device, here.hip, here.arch) == ("rocm" if hip else "cuda", hip, arch)
    assert (here.name, here.memory, here.capability) == ("a GPU", 7, (9, 4))
    assert here.compiler is (hip is None)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes files of /proc and of the control group; None takes one away."""
    folders = {"/proc/": tmp_path / "proc", "/sys/fs/cgroup": tmp_path / "cgroup"}
    for folder in folders.values():
        folder.mkdir()
    opened = builtins.open

    def opening(path: Any, *given: Any, **named: Any) -> Any:
        path = str(path)
        if path.startswith("/proc/"):
            path = str(folders["/proc/"] / path.removeprefix("/proc/"))
        return opened(path, *given, **named)

    for module in (device, machine):
        monkeypatch.setattr(module, "open", opening, raising=False)
    monkeypatch.setattr(device, "Path", lambda path: folders[path])

    def make(**files: str | None) -> None:
        for name, text in files.items():
            folder = folders["/proc/" if name in ("meminfo", "cpuinfo") else "/sys/fs/cgroup"]
            path = folder / name.replace("memory_", "memory.")
            if text is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(text)

    return make


def test_free_memory(system: Callable[..., None]) -> None:
    """What the host has, and what a control group leaves: its limit less what is used, but for the
    files that the kernel keeps until the memory is needed.
    """
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes(CPU) == whole
    system(meminfo="MemTotal:  90 kB\nMemFree:  20 kB\nMemAvailable:  70 kB\n")
    assert available_bytes(CPU) == 70 * 1024
    stat = "anon 1\nactive_file 5\ninactive_file 2000\n"
    system(memory_max="50000", memory_current="42000", memory_stat=stat)
    assert available_bytes(CPU) == 50000 - 42000 + 2000
    system(memory_max="500000")
    assert available_bytes(CPU) == 70 * 1024, "the group's limit is above what the host has"
    system(memory_max="max")
    assert available_bytes(CPU) == 70 * 1024


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3, 80))
    assert available_bytes(GPU) == 3


def test_the_processors_name(system: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cpu_name() == "CPU, 3 CPUs"
    system(cpuinfo="vendor_id : V\n")
    assert cpu_name() == "CPU, 3 CPUs"
    system(cpuinfo="vendor_id : V\nmodel name\t: A: B\nmodel name\t: C\n")
    assert cpu_name() == "A: B, 3 CPUs"


def test_clocks_and_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is asked for by nvidia-smi's own name, and comes in that order."""
    answers = {"clocks.sm": "1980", "clocks.mem": "2619", "power.draw": "345.6",
               "temperature.gpu": "41"}  # fmt: skip

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        (query,) = [word for word in words if word.startswith("--query-gpu=")]
        names = query.removeprefix("--query-gpu=").split(",")
        return SimpleNamespace(stdout=", ".join(answers[name] for name in names) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clocks_and_power() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert clocks_and_power() == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 345.6, "temperature_c": 41.0,
    }  # fmt: skip
    answers["power.draw"] = "[N/A]"
    assert clocks_and_power() == {}
    answers["power.draw"] = "3, 4"
    assert clocks_and_power() == {}
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert clocks_and_power() == {}
