"""Experts in a checkpoint's files (`experts=disk`) give what all on the device give.

Holds r1/files/direct.py, r1/files/experts.py and r1/placement/sources.py to account. The slots of
the device are tested in test_offload.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from decoding import PROMPTS, read
from folders import rewrite
from models import TINY, V3, model
from refusals import check_sentence, refused, snapshot
from test_families import stack
from test_offload import GPU, even, streamed_layers
from tolerances import atol

import r1
from r1 import Backend, InputError, build
from r1.__main__ import main
from r1.files import direct
from r1.files.config_json import load_config
from r1.files.direct import Files
from r1.files.embedded import EMBEDDED
from r1.files.experts import LayerReader
from r1.files.save import save
from r1.placement.mesh import Mesh
from r1.placement.offload import expert_width, rest_bytes, staging_bytes
from r1.placement.slots import Slots
from r1.placement.sources import InFiles
from r1.run.engine import Engine
from r1.switches import draft, offload
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

DISK: dict[str, Any] = {"experts": "disk", "expert_slots": 4}
SPARSE = V3.change(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=16, q_lora_rank=24,
    kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_attention_heads=4,
    vocab_size=256,
)  # fmt: skip


def loaded(folder: Path = EMBEDDED, held: int = 0, **switches: Any) -> Engine:
    """A folder's model in fp32, unless `switches` say otherwise.

    `held`: experts of each layer in the cache; 0: all.
    """
    asked = {"device": "cuda" if GPU else "cpu", "dtype": "fp32", **switches}
    if held:
        config = load_config(folder)
        width = expert_width(build.sketch(config, resolve(Backend(**asked), config)))
        asked["expert_cache_gb"] = (held + 0.5) * width / 1e9
    return r1.load(folder, Backend(**asked), quiet=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    save(model(SPARSE, mtp=True, dtype="bf16"), folder)
    return folder


def sources(engine: Engine) -> list[InFiles]:
    found = [layer.outside[1] for layer in streamed_layers(engine.model)]
    return [each for each in found if isinstance(each, InFiles)]


def check(folder: Path, held: int, **switches: Any) -> Engine:
    """The same logits as with all experts on the device."""
    text, logits = read(loaded(folder, **switches).runner)
    engine = loaded(folder, held, **switches, **DISK)
    if held:
        assert {len(each.rows) for each in sources(engine)} == {held}
    ours = read(engine.runner, text)[1]
    row = "algebra fp32" if switches.get("dtype", "fp32") == "fp32" else "ranks bf16"
    torch.testing.assert_close(ours, logits, atol=atol(row), rtol=0)
    return engine


# ---------------------------- the same numbers
@pytest.mark.parametrize("held", [1, 3, 0])
@pytest.mark.parametrize("quant", ["none", "fp8", "int4"])
def test_the_same_text(quant: str, held: int) -> None:
    """The embedded model's greedy answers: a cache of one expert a layer, of a few, of all.

    Its files are FP8; int4 is made anew at each reading.
    """
    answers = []
    for switches in ({}, {**DISK, "held": held}):
        engine = loaded(quant=quant, **switches)
        prompts = [engine.encode(each) for each in ("17 * 23 = ?", "9 + 8")]
        answers.append([done.tokens for done in engine.generate(prompts, 12, temperature=0.0)])
    assert answers[1] == answers[0]


@pytest.mark.parametrize("held", [1, 3, 0])
@pytest.mark.parametrize("policy", ["last", "most"])
def test_long_prompts(policy: str, held: int) -> None:
    """Nearly all experts are needed: they pass through the staging, and what empty rows can hold is
    read before a layer has chosen.
    """
    right = even(loaded().runner)
    run = even(loaded(held=held, **DISK, expert_policy=policy).runner)
    for chunk in (90, 50):
        run.prefill_chunk = right.prefill_chunk = chunk
        ours, theirs = (each.prefill([list(range(90))], each.cache(1, 96)) for each in (run, right))
        # Logits of 14 are 1e-6 from the next number, and another order of sums is some of these.
        torch.testing.assert_close(ours, theirs, atol=atol("algebra fp32"), rtol=2e-6)


@pytest.mark.parametrize("name", writers.FORMATS)
def test_quantized_checkpoints(name: str, plain: Path, tmp_path: Path) -> None:
    """Packed as they are, and dequantized while they are read."""
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    writers.write(folder, name)
    for quant in (writers.FORMATS[name][0].kind, "none"):
        engine = check(folder, 2, quant=quant)
        notes = [layer.traffic.values() for layer in streamed_layers(engine.model)]
        assert all(sum(note.read for note in each) > 0 for each in notes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("join", ["on", "off"])
def test_plain_checkpoints(dtype: str, join: str, plain: Path) -> None:
    check(plain, 2, dtype=dtype, join=join)


def test_stacks(tmp_path: Path) -> None:
    """An expert is some rows of a stack, as transformers 5 writes them."""
    save(model(SPARSE, mtp=True, dtype="bf16"), tmp_path / "model")
    rewrite(tmp_path / "model", stack)
    check(tmp_path / "model", 2)


@pytest.mark.parametrize("policy", ["last", "most"])
def test_policies_and_guesses(policy: str, plain: Path) -> None:
    """A guess is read ahead, into the cache."""
    text, logits = read(loaded(plain).runner)
    engine = loaded(plain, 5, **DISK, expert_policy=policy, guess_experts=True)
    torch.testing.assert_close(
        read(engine.runner, text)[1], logits, atol=atol("algebra fp32"), rtol=0
    )


@pytest.mark.parametrize("moe", ["loop", "grouped"])
def test_one_slot_and_one_row(moe: str, plain: Path) -> None:
    """Every expert is read and copied anew, and nothing is read twice at once."""
    text, logits = read(loaded(plain, moe=moe).runner)
    engine = loaded(plain, 1, moe=moe, experts="disk", expert_slots=1)
    ours = read(engine.runner, text)[1]
    torch.testing.assert_close(ours, logits, atol=atol("algebra fp32"), rtol=0)


@pytest.mark.parametrize("grid", [{"tp": 2}, {"ep": 2}])
def test_a_rank_reads_its_part(grid: dict[str, Any], plain: Path) -> None:
    """The second rank's rows are those that it would hold in host memory."""
    config, rows = load_config(plain), []
    mesh = Mesh(grid.get("tp", 1), grid.get("ep", 1), rank=1)
    for where in ("host", "disk"):
        asked = Backend(device="cpu", dtype="fp32", experts=where, **grid)
        backend = resolve(asked, config)
        placement = build.placement_of(config, backend, mesh)
        made, _ = build.from_checkpoint(plain, config, backend, quiet=True, placement=placement)
        for layer in streamed_layers(made):
            source = layer.outside[1]
            experts = source.begin(range(len(layer.ids)))
            rows.append(torch.stack([source.row(expert).clone() for expert in sorted(experts)]))
    assert len(rows) == 2 and torch.equal(rows[0], rows[1])


# ---------------------------- what is read
def test_what_is_held_is_not_read(plain: Path) -> None:
    """With room for all, a prompt reads each expert once, and a second prompt none."""
    engine = loaded(plain, **DISK)
    for _ in range(2):
        engine.runner.prefill([list(range(60))], engine.runner.cache(1, 64))
    each = [source.nbytes for source in sources(engine)]
    notes = [layer.traffic[60] for layer in streamed_layers(engine.model)]
    chosen = [len(source.cache.slot) for source in sources(engine)]
    assert [note.read for note in notes] == [n * k for n, k in zip(each, chosen, strict=True)]
    assert all(note.copied > note.read for note in notes), "slots are few, so copies are more"
    inner = SPARSE.experts.moe_intermediate_size
    assert set(each) == {3 * SPARSE.hidden_size * inner * 2}


def test_what_is_on_the_device_leaves_the_cache_first() -> None:
    """Or else a cache as small as the slots would hold nothing that they do not."""
    cache = Slots(2, 8)
    cache.take(5, ()), cache.take(6, ())
    assert cache.take(7, (), elsewhere={6: 0}) == 1, "5 is older, but 6 is on the device"
    assert cache.take(4, (), elsewhere={}) == 0


@pytest.mark.parametrize("buffered", [False, True])
def test_reads_of_any_range(
    buffered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aligned or not, side by side or apart, to the last byte of the file."""
    if buffered:
        monkeypatch.setattr(direct, "_reads", lambda _: False)
    monkeypatch.setattr(direct, "CHUNK", 3 * direct.BLOCK)
    draw = random.Random(0)
    contents = {tmp_path / name: draw.randbytes(size) for name, size in (("a", 300_001), ("b", 5))}
    for path, content in contents.items():
        path.write_bytes(content)
    files = Files(contents)
    assert not (buffered and any(files.direct.values()))
    for _ in range(40):
        ranges = []
        for path in draw.choices(list(contents), k=draw.randint(1, 6)):
            start, stop = sorted(draw.randint(0, len(contents[path])) for _ in range(2))
            ranges.append((path, start, max(stop, start + 1) if start < 5 else stop))
        ranges = [each for each in ranges if each[1] < each[2] <= len(contents[each[0]])]
        if ranges:
            found = [bytes(each.tolist()) for each in files.read(ranges)]
            assert found == [contents[path][start:stop] for path, start, stop in ranges]
    with refused("ends before byte 300002"):
        files.read([(tmp_path / "a", 299_000, 300_002)])


# ---------------------------- files that change
CHANGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "replaced": lambda path: os.replace(shutil.copy(path, path.with_suffix(".new")), path),
    "written": lambda path: path.write_bytes(path.read_bytes()),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_change_after_loading(change: str, plain: Path, tmp_path: Path) -> None:
    """In the middle of a text: one sentence, and no completion."""
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    engine = loaded(folder, 1, **{**DISK, "expert_slots": 1})  # every step reads
    arrived: list[list[int | None]] = []

    def disturb(tokens: list[int | None]) -> None:
        arrived.append(tokens)
        if len(arrived) == 3:
            CHANGES[change](next(folder.glob("*.safetensors")))

    for _ in range(2):  # later calls do not take a half read expert for a whole one
        with refused("load the model again"):
            engine.generate(PROMPTS, 30, temperature=0.0, ignore_stop=True, on_tokens=disturb)
    assert len(arrived) in (3, 4)


def test_a_read_that_fails_once(plain: Path) -> None:
    """Afterwards the expert is read again: no slot and no row is said to hold it."""
    right = loaded(plain).generate(PROMPTS, 8, temperature=0.0, ignore_stop=True)
    engine = loaded(plain, 2, **DISK)
    source = sources(engine)[0]
    whole, calls = source.fill, []

    def fails(expert: int, row: int, matrix: str) -> None:
        calls.append(expert)
        if len(calls) == 5:
            raise InputError("the drive has gone: plug it in")
        assert whole is not None
        whole(expert, row, matrix)

    source.fill = fails
    with refused("the drive has gone"):
        engine.generate(PROMPTS, 8, temperature=0.0, ignore_stop=True)
    found = engine.generate(PROMPTS, 8, temperature=0.0, ignore_stop=True)
    assert [each.tokens for each in found] == [each.tokens for each in right]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that ends in the middle is followed by one sentence, and status 2."""
    flags = ["--experts", "disk", "--expert-slots", "4", "--expert-cache-gb", "0.003"]
    asked = ["--device", "cpu", "--temperature", "0", *flags, "9 + 8"]
    assert main(asked) == 0
    whole = capsys.readouterr().out
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    old, calls = LayerReader.__call__, []

    def disturbed(reader: LayerReader, expert: int, row: int, matrix: str) -> None:
        calls.append(expert)
        if len(calls) == 100:
            for path in folder.glob("*.safetensors"):
                os.truncate(path, 1000)
        old(reader, expert, row, matrix)

    monkeypatch.setattr(LayerReader, "__call__", disturbed)
    assert main(["--model", str(folder), *asked]) == 2
    out, err = capsys.readouterr()
    assert len(out) < len(whole) and whole.startswith(out.rstrip())
    assert err.startswith("r1: ") and err.count("\n") == 1
    check_sentence(err.removeprefix("r1: ").strip())


# ---------------------------- what is left behind
def test_files_and_memory_are_given_back(plain: Path) -> None:
    """With the model: no descriptor stays open, and no thread."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    engine = loaded(plain, 2, **DISK)
    read(engine.runner)
    assert set(os.listdir("/proc/self/fd")) > before and readers()
    del engine
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)  # the pool tells its threads that it has gone
    assert set(os.listdir("/proc/self/fd")) <= before and not readers()


def readers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("experts")]


SHARED = Path("/dev/shm")


def test_a_killed_process_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    """Nothing is written beside the checkpoint, to /dev/shm, or to the folder for such files.

    Other processes use /dev/shm meanwhile. A file there is the killed one's only if it is new and
    no living process has it open or mapped, and none comes to remove it.
    """
    lines = (
        "import r1",
        f"e = r1.load({str(plain)!r}, r1.Backend(device='cpu', experts='disk'), quiet=True)",
        "print('ready', flush=True)",
        "e.generate([[1, 2]], 60, ignore_stop=True, on_tokens=lambda _: print(1, flush=True))",
    )
    before, shared = snapshot(plain), own_files(SHARED)
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n" and process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert snapshot(plain) == before and not any(tmp_path.iterdir())
    assert not abandoned(shared)


def test_an_abandoned_file_is_seen() -> None:
    """One that a process leaves, and none that a living one has open or mapped."""
    shared = own_files(SHARED)
    script = (
        "import mmap, os, sys; f = open(sys.argv[1], 'w+b'); f.write(b'1' * 4096); f.flush()\n"
        "m = mmap.mmap(f.fileno(), 4096); f.close(); print('ready', flush=True); input()"
    )
    path = SHARED / f"r1-test-{os.getpid()}"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            assert path.name in held(SHARED)
            assert path.name not in abandoned(shared, wait=0)
            process.kill()
            process.wait()
            assert path.name in abandoned(shared, wait=0)
        finally:
            process.kill()
            path.unlink(missing_ok=True)


def own_files(folder: Path) -> set[str]:
    """The names of this user's files."""
    found = set()
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # it has gone
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.add(entry.name)
    return found


def held(folder: Path) -> set[str]:
    """The names of a folder's files that a living process has open or mapped."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            lines = (process / "maps").read_text().splitlines()
            places = {line.split(maxsplit=5)[-1] for line in lines}
            places |= {os.readlink(each) for each in (process / "fd").iterdir()}
            found |= {Path(place).name for place in places if Path(place).parent == folder}
    return found


def abandoned(before: set[str], wait: float = 10) -> set[str]:
    """New files in SHARED that no living process has. Those of an end under way go in `wait` s."""
    deadline = time.monotonic() + wait
    while found := own_files(SHARED) - before - held(SHARED):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return found


# ---------------------------- memory and refusals
def test_the_cache_is_counted(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any memory is taken: everything else, the slots, and the cache."""
    config = load_config(plain)
    asked = Backend(device="cpu", dtype="fp32", **DISK)
    width = expert_width(build.sketch(config, resolve(asked, config)))
    backend = resolve(dataclasses.replace(asked, expert_cache_gb=3.5 * width / 1e9), config)
    placement = build.placement_of(config, backend)
    made = build.sketch(config, backend, placement=placement)
    found = placement.sizes(made, torch.device("cuda"))
    slots = 4 * width + staging_bytes(made, 4)
    assert found == {"cuda": rest_bytes(made) + slots, "cpu": 3 * width}
    needed = found["cuda"] + found["cpu"] + build.HEADROOM
    monkeypatch.setattr(build, "available_bytes", lambda _: needed - 1)
    with refused("needs .* in fp32 and cpu has"):
        build.allocate(config, backend, mtp=False)
    monkeypatch.setattr(build, "available_bytes", lambda _: needed)
    build.allocate(config, backend, mtp=False)


def test_a_draft_lies_on_the_device() -> None:
    """None of the switches of experts elsewhere is a small model's."""
    assert {"experts", *offload.OWN} <= draft.OWN.keys()
    for name in ("experts", *offload.OWN):
        assert draft.OWN[name] == getattr(Backend, name)


def test_what_is_refused(plain: Path, tmp_path: Path) -> None:
    with refused("random weights have none: use experts=host"):
        build.from_shape(TINY, resolve(Backend(device="cpu", **DISK), TINY))
    with refused("expert_cache_gb=1e-09 can't hold one expert of each layer"):
        loaded(plain, **DISK, expert_cache_gb=1e-9)
    with refused("expert_cache_gb=2 is of no use without experts=disk"):
        loaded(plain, experts="host", expert_cache_gb=2)
    with refused("expert_cache_gb=2 is of no use without experts=disk"):
        loaded(plain, expert_cache_gb=2)
    with refused("expert_cache_gb='2'.*give a number"):
        Backend(expert_cache_gb="2")  # type: ignore[arg-type]
    engine = loaded(plain, **DISK)
    with refused("its experts stay in files: load it with experts=device or experts=host"):
        save(engine.model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
