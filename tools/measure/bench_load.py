"""Measure r1.load: its speed against a plain read of the same files, its peak memory against the
finished model.

    # makes a checkpoint of 5 GB in bf16 and in FP8, and deletes it
    python tools/measure/bench_load.py
    # makes it there, or reuses what is there
    python tools/measure/bench_load.py --keep /data/bench

Three arms, each run in a process of its own, interleaved over the repetitions, the page cache warm
for all of them:

- read: every file of the bf16 checkpoint whole, by readinto, each into a buffer of its own, all kept: the same bytes
  to memory that is as fresh as the model's, without anything that makes a model of them;
- bf16: r1.load of that checkpoint to bf16;
- fp8: r1.load of the same shape stored as FP8 blocks, to bf16.

GB are 10^9 bytes of the files. Peak memory is the process's highest RSS, which counts mapped file
pages too, less its RSS before. The bounds: bf16 at 0.8 of read or more, and both at most the
finished model + 1 GB; else the exit status is
1. Linux only, as the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
from make_checkpoint import make

import r1
from r1.build import parameters
from r1.files.config_json import load_config
from r1.model.shapes import shape
from r1.model.transformer import Transformer
from r1.switches.backend import Backend
from r1.switches.machine import cpu_name

SHAPE = "moonlight-16b"
ARMS = {"read": "bf16", "bf16": "bf16", "fp8": "fp8"}
"""Each arm, and the folder that it reads."""
MIN_SHARE, MAX_EXCESS = 0.8, 10**9


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def prepare(directory: Path, layers: int) -> None:
    """Make the two checkpoints in `directory` unless they are there. Raises InputError."""
    config = shape(SHAPE, layers).change(fp8_block=None)
    configs = {"bf16": config, "fp8": config.change(fp8_block=(128, 128))}
    missing = [name for name in configs if not (directory / name).is_dir()]
    for name in configs.keys() - missing:
        if load_config(directory / name) != configs[name]:
            raise r1.InputError(
                f"{directory / name} is not {SHAPE} of {layers} layers in {name}: give --keep another folder"
            )
    with torch.device("meta"):
        needed = 2 * parameters(Transformer(config)) * len(missing)  # bytes; FP8 takes less
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise r1.InputError(
            f"{directory} has {free / 1e9:.1f} GB free and the checkpoints take up to {needed / 1e9:.1f} GB: "
            "name another folder with --dir, or take fewer --layers"
        )
    for name in missing:
        print(f"making {directory / name}", file=sys.stderr)
        make(configs[name], directory / name)


def read(directory: Path) -> list[bytearray]:
    """The plain read."""
    buffers = []
    for path in files(directory):
        buffer = bytearray(path.stat().st_size)  # of untouched pages, as the model's
        rest = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while rest:
                rest = rest[file.readinto(rest) :]  # one call reads 2 GiB at most
        buffers.append(buffer)
    return buffers


def run_arm(arm: str, directory: Path, device: str) -> dict[str, float]:
    """In the arm's own process: seconds, of the clock and of all cores, and bytes: the files', the
    model's, the peaks'."""
    nbytes = sum(path.stat().st_size for path in files(directory))
    cuda = arm != "read" and device == "cuda"
    if cuda:
        torch.cuda.init()
    Path("/proc/self/clear_refs").write_text("5")  # the highest RSS starts anew
    before, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
    if arm == "read":
        buffers = read(directory)
        model = sum(map(len, buffers))
    else:
        engine = r1.load(directory, Backend(device=device, dtype="bf16"), quiet=True)
        model = sum(parameter.nbytes for parameter in engine.model.parameters())
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "file_bytes": nbytes,
        "model_bytes": model,
    }
    result["host_peak"] = memory("VmHWM") - before
    return result | ({"device_peak": torch.cuda.max_memory_allocated()} if cuda else {})


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    )
    return int(fields[name].split()[0]) * 1024


def excess(run: dict[str, float]) -> float:
    """Bytes over the finished model at the peak: on its device, and on a GPU the host's as well,
    the larger of both."""
    if "device_peak" in run:
        return max(run["device_peak"] - run["model_bytes"], run["host_peak"])
    return run["host_peak"] - run["model_bytes"]


def measure(directory: Path, device: str, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Each arm's runs; exits as an arm does that finds its input unusable."""
    for name in set(ARMS.values()):
        read(directory / name)  # into the page cache
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repetitions):
        for arm, folder in ARMS.items():
            command = [
                sys.executable,
                __file__,
                "--arm",
                arm,
                "--dir",
                str(directory / folder),
                "--device",
                device,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode == 2:
                sys.exit(2)  # it has said why
            done.check_returncode()
            runs[arm].append(json.loads(done.stdout))
    return runs


def summarize(runs: dict[str, list[dict[str, float]]]) -> tuple[list[str], bool]:
    """The table's lines, and whether the bounds hold."""
    lines = [
        f"{'arm':6} {'files':>8} {'seconds, median (min-max)':>27} {'GB/s':>6} {'peak over the model, highest':>29}"
    ]
    for arm, results in runs.items():
        seconds = sorted(run["seconds"] for run in results)
        size, middle = results[0]["file_bytes"] / 1e9, statistics.median(seconds)
        spread = f"{middle:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
        lines.append(
            f"{arm:6} {size:5.2f} GB {spread:>27} {size / middle:6.2f} {max(map(excess, results)) / 1e9:26.3f} GB"
        )
    shares = sorted(
        a["seconds"] / b["seconds"] for a, b in zip(runs["read"], runs["bf16"], strict=True)
    )
    share, worst = statistics.median(shares), max(map(excess, runs["bf16"] + runs["fp8"]))
    fast, small = share >= MIN_SHARE, worst <= MAX_EXCESS
    lines += [
        f"bf16 loads at {share:.2f} ({shares[0]:.2f}-{shares[-1]:.2f}) of the plain read's speed;"
        f" the bound, {MIN_SHARE}, is {'held' if fast else 'missed'}",
        f"peak memory is the finished model + {worst / 1e9:.2f} GB;"
        f" the bound, + {MAX_EXCESS / 1e9:.0f} GB, is {'held' if small else 'missed'}",
    ]
    return lines, fast and small


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a bound is missed, or 2 for input that can't be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        metavar="N",
        help=f"of {SHAPE}; 4, the default, are 5 GB in bf16",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="where the temporary checkpoints go"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="make them in DIR, or reuse those there; they stay"
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=["text", "json"],
        default="text",
        help="json: every run's raw numbers",
    )
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.arm:
            print(json.dumps(run_arm(arguments.arm, arguments.dir, arguments.device)))
            return 0
        if arguments.repetitions < 1:
            raise r1.InputError(f"-r {arguments.repetitions}: take 1 or more")
        if not Path("/proc/self/clear_refs").exists():
            raise r1.InputError(
                "the peak memory is read from /proc, which this system lacks: run it on Linux"
            )
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            return report(arguments.keep, arguments)
        with tempfile.TemporaryDirectory(prefix="r1-bench-", dir=arguments.dir) as directory:
            return report(Path(directory), arguments)
    except (r1.InputError, OSError) as error:
        print(f"bench_load: {error}", file=sys.stderr)
        return 2


def report(directory: Path, arguments: argparse.Namespace) -> int:
    """Prepare, measure, print; the exit status."""
    prepare(directory, arguments.layers)
    runs = measure(directory, arguments.device, arguments.repetitions)
    lines, held = summarize(runs)
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "kernel": platform.release(),
    }
    if arguments.output == "json":
        print(
            json.dumps(
                {
                    "machine": machine,
                    "shape": SHAPE,
                    "layers": arguments.layers,
                    "held": held,
                    "runs": runs,
                },
                indent=1,
            )
        )
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items() if value))
        print(
            f"{SHAPE}, {arguments.layers} layers, page cache warm, device {arguments.device}\n",
            *lines,
            sep="\n",
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
