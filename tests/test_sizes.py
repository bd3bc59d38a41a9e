"""Tests that sizes are checked before anything is made.

Holds to account: r1/bench/sizes.py, r1/bench/plan.py and r1/switches/resolve.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import make_checkpoint
import pytest
import torch
from models import TINY
from refusals import check_sentence, refused

import bench
from r1.__main__ import main
from r1.bench import measure, sizes
from r1.bench.sizes import check_sizes, work_bytes
from r1.bench.workload import Workload
from r1.errors import flags_spelling
from r1.files.config_json import load_config
from r1.files.embedded import EMBEDDED
from r1.model.config import Config
from r1.switches.backend import Backend
from r1.switches.resolve import resolve

HUGE = ["1000000000", "1000000000000"]
TOO_LONG = {
    **{f"--prompt {n[:9]}": (["--prompt", n], "more than the context of 10240") for n in HUGE},
    **{f"--new {n[:9]}": (["--new", n], "more than the context of 10240") for n in HUGE},
    **{f"--depth {n[:9]}": (["--depth", n], "more than the context of 10240") for n in HUGE},
    **{f"--batch {n[:9]}": (["--batch", n], "needs .* GB free: use a smaller") for n in HUGE},
    **{f"--problems {n[:9]}": (["--problems", n], "exam.json has 100") for n in (*HUGE, "9" * 20)},
    "drafts": (
        ["--speculate", "mtp", "--draft-tokens", "1000000"],
        "makes a step more than the context of 10240",
    ),
    "a shape": (["--shape", "r1", "--layers", "1", "--prompt", "10" * 6], "more than the context"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_a_size_that_is_too_large(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, before a process is started."""
    arguments, said = TOO_LONG[case]
    for name in ("make_reference", "CompilerChecks"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("something was made"))
    assert bench.main(["--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    check_sentence(err.removeprefix("bench: ").strip())
    with refused(said):
        raise bench.InputError(err.removeprefix("bench: ").strip())


@pytest.mark.parametrize("flag", ["--batch", "--prompt", "--new", "--depth"])
@pytest.mark.parametrize("digits", [20, 400, 9999])
def test_a_number_without_end(flag: str, digits: int) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--device", "cpu", flag, "9" * digits])
    assert ended.value.code == 2


def test_drafts_in_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--speculate", "mtp", "--draft-tokens", "1000000", "hi"]
    assert main(arguments) == 2
    assert "makes a step more than the context" in capsys.readouterr().err


def test_the_memory_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the model's estimate and the work's: one byte less is too little."""
    w = Workload(None, "tiny", None, 8, 100, 20, 0, 0)
    backend = resolve(Backend(device="cpu", dtype="fp32"), TINY)
    weights = sizes.weight_bytes(TINY, backend) + sizes.HEADROOM
    needed = weights + work_bytes(w, TINY, backend)
    monkeypatch.setattr(sizes, "available_bytes", lambda _: needed)
    check_sizes(w, TINY, backend)
    monkeypatch.setattr(sizes, "available_bytes", lambda _: needed - 1)
    with refused("--batch 8 of 120 tokens needs", "beside the model's"):
        check_sizes(w, TINY, backend)
    check_sizes(w, TINY, backend, loaded=True)


def test_advice_for_a_baseline_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what makes the baseline smaller: --quant int4 is an arm's switch."""
    w = Workload(None, "tiny", None, 8, 100, 20, 0, 0)
    packed = load_config(EMBEDDED)

    def advice(config: Config, free: int, model: str | None = None, **switches: Any) -> str:
        backend = resolve(Backend(device="cpu", quant="none", **switches), config)
        monkeypatch.setattr(sizes, "available_bytes", lambda _: free)
        with flags_spelling(), refused("^the model of the baseline needs 0") as caught:
            check_sizes(replace(w, model=model), config, backend)
        return str(caught.value).rpartition(": use ")[2]

    fp32 = sizes.weight_bytes(TINY, resolve(Backend(device="cpu"), TINY)) + sizes.HEADROOM
    assert advice(TINY, fp32 - 1) == "--dtype bf16 or --layers N or a larger machine"
    assert advice(TINY, fp32 - 1, model="x") == "--dtype bf16 or a larger machine"
    assert advice(TINY, 1, dtype="bf16") == "--layers N or a larger machine"
    less = sizes.weight_bytes(packed, resolve(Backend(device="cpu", quant="fp8"), packed))
    enough = less + sizes.HEADROOM
    assert advice(packed, enough, "x") == "--quant auto or a larger machine"
    assert advice(packed, enough - 1, "x") == "a larger machine"


def test_the_caches_bytes_are_those_of_a_cache() -> None:
    """A prompt that needs less than HEADROOM adds nothing; a long one of many rows does."""
    from models import model, runner

    w = Workload(None, "tiny", None, 3, 200, 50, 0, 0)
    made = runner(model(TINY, dtype="fp32"))
    cache = made.cache(3, 250)
    assert work_bytes(w, TINY, made.backend) == cache.nbytes + 3 * 250 * sizes.TOKEN
    assert isinstance(cache.lengths, torch.Tensor)
    many = Workload(None, "tiny", None, 64, 4096, 0, 0, 0)
    rest = work_bytes(many, TINY, made.backend) - 64 * 4096 * sizes.TOKEN
    assert rest > made.token_bytes() * 64 * 4096 + 2**26


@pytest.mark.parametrize("size", ["1e308", "inf", "nan", "0", "-1", "1e10"])
def test_the_size_of_a_shard(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_checkpoint.main(["tiny", "/nowhere/x", "--shard-mb", size]) == 2
    assert "--shard-mb" in capsys.readouterr().err
