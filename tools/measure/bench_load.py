"""Measure the speed and the peak memory of r1.load.

    # make a checkpoint of 5 GB in bf16 and in FP8, measure, and delete it
    python tools/measure/bench_load.py
    # make it in this folder and keep it, or reuse the one that is there
    python tools/measure/bench_load.py --keep /data/bench

It compares three arms:

- read: read every file of the bf16 checkpoint, whole, into a new buffer of its own. These are the
  same bytes, and the memory is as fresh as the model's, but no model is made
- bf16: r1.load of that checkpoint to bf16
- fp8: r1.load of the same shape stored as FP8 blocks, to bf16

Each run has a process of its own. The arms alternate, and the page cache is warm for all of them.
GB are 10^9 bytes of the files. The peak memory is the highest RSS of the process, which also counts
mapped file pages, less its RSS before.

There are two bounds: bf16 has 0.8 or more of the speed of read, and no peak exceeds the finished
model by more than 1 GB. Where one is missed, the exit status is 1. The peak is read from /proc, so
the tool needs Linux.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import safetensors
import shared
import torch
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
                f"{directory / name} is not {SHAPE} of {layers} layers in {name}: "
                "give --keep another folder"
            )
    with torch.device("meta"):
        needed = 2 * parameters(Transformer(config)) * len(missing)  # bytes; FP8 takes less
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise r1.InputError(
            f"{directory} has {free / 1e9:.1f} GB free and the checkpoints take up to "
            f"{needed / 1e9:.1f} GB: name another folder with --dir, or take fewer --layers"
        )
    for name in missing:
        print(f"making {directory / name}", file=sys.stderr)
        make(configs[name], directory / name)


def read(directory: Path) -> list[bytearray]:
    """Read every file whole into memory: what r1.load is compared with."""
    buffers = []
    for path in files(directory):
        buffer = bytearray(path.stat().st_size)  # pages untouched so far, as the model's are
        rest = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while rest:
                rest = rest[file.readinto(rest) :]  # one call reads 2 GiB at most
        buffers.append(buffer)
    return buffers


def run_arm(arm: str, directory: Path, device: str) -> dict[str, float]:
    """One run, in the arm's own process.

    Returns seconds (by the clock, and of all cores) and bytes (files, model and peaks).
    """
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
    """Bytes of the peak over the finished model. On a GPU: the larger of GPU's and host's."""
    if "device_peak" in run:
        return max(run["device_peak"] - run["model_bytes"], run["host_peak"])
    return run["host_peak"] - run["model_bytes"]


def measure(directory: Path, device: str, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Run all arms in turn. Returns each arm's runs; exits with 2 if an arm refuses its input."""
    for name in set(ARMS.values()):
        read(directory / name)  # into the page cache
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repetitions):
        for arm, folder in ARMS.items():
            command = [sys.executable, __file__, "--arm", arm, "--device", device]
            command += ["--dir", str(directory / folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode == 2:
                sys.exit(2)  # the arm has printed why
            done.check_returncode()
            runs[arm].append(json.loads(done.stdout))
    return runs


def summarize(runs: dict[str, list[dict[str, float]]]) -> tuple[list[str], bool]:
    """The table's lines, and whether the bounds hold."""
    titles = ("files", "seconds, median (min-max)", "GB/s", "peak over the model, highest")
    lines = [f"{'arm':6} {titles[0]:>8} {titles[1]:>27} {titles[2]:>6} {titles[3]:>29}"]
    for arm, results in runs.items():
        seconds = sorted(run["seconds"] for run in results)
        size, middle = results[0]["file_bytes"] / 1e9, statistics.median(seconds)
        spread = f"{middle:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
        peak = f"{max(map(excess, results)) / 1e9:26.3f} GB"
        lines.append(f"{arm:6} {size:5.2f} GB {spread:>27} {size / middle:6.2f} {peak}")
    pairs = zip(runs["read"], runs["bf16"], strict=True)
    shares = sorted(read["seconds"] / bf16["seconds"] for read, bf16 in pairs)
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
    parser = shared.parser(__doc__)
    parser.add_argument(
        "--layers",
        type=int,
        default=4,
        metavar="N",
        help=f"only the first N layers of {SHAPE} (default 4: 5 GB in bf16)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="make the temporary checkpoints in this folder"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="make the checkpoints in DIR and keep them, or reuse",
    )
    shared.add_output(parser, "write every run's figures as JSON")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    if arguments.arm:
        print(json.dumps(run_arm(arguments.arm, arguments.dir, arguments.device)))
        return 0
    if arguments.repetitions < 1:
        raise r1.InputError(f"-r {arguments.repetitions}: take 1 or more")
    if not Path("/proc/self/clear_refs").exists():
        raise r1.InputError(
            "the peak memory is read from /proc, which this system lacks: run it on Linux"
        )
    shared.check_output(arguments.output)
    try:
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            return report(arguments.keep, arguments)
        with tempfile.TemporaryDirectory(prefix="r1-bench-", dir=arguments.dir) as directory:
            return report(Path(directory), arguments)
    except OSError as error:  # a folder that can't be made, a full disk
        raise r1.InputError(str(error)) from error


def report(directory: Path, arguments: argparse.Namespace) -> int:
    """Prepare, measure, print. Returns the exit status."""
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
    if arguments.output:
        result = {"machine": machine, "shape": SHAPE, "layers": arguments.layers}
        result |= {"held": held, "runs": runs}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    how = f"{SHAPE}, {arguments.layers} layers, page cache warm, device {arguments.device}"
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value))
    print(f"{how}\n", *lines, sep="\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
