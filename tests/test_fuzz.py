"""Breaks every file that is read, in hundreds of ways: only InputError is right.

Holds to account: r1/files, r1/text, r1/bench (results and problems) and r1/kernels/launches.py.

Each message is one line without control characters. A mutant that is still sound is read, and what
it makes is used. The choices are seeded, so a failure comes again: it names the mutant's number.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from cases import ROOT
from folders import load
from mutants import mutate
from refusals import CPU, refused
from test_hostile_files import in_time  # noqa: F401

import r1
from r1 import InputError
from r1.bench import exam, merge
from r1.bench.load_result import load as load_result
from r1.bench.plot import figure
from r1.bench.report.render import render
from r1.files.config_json import load_config
from r1.files.generation_config import read_stop_ids
from r1.files.shards import INDEX
from r1.model.rope import frequencies

MUTANTS = 150
"""Mutants of each file. All together take half a minute."""
RESULTS = ROOT / "tools" / "measure" / "results"

Use = Callable[[Path], object]


def use_tokenizer(path: Path) -> None:
    tokenizer = r1.Tokenizer.load(path.parent)
    ids = tokenizer.encode("Hi, é你 <s>12\n")
    tokenizer.decode([*ids, 0, 1, 10**6])
    tokenizer.encode("Hi <s>", control=True)
    if tokenizer.template:
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}])


def use_config(path: Path) -> None:
    frequencies(load_config(path.parent).attention)


def use_folder(path: Path) -> None:
    r1.load(path.parent, CPU, quiet=True)


def use_result(path: Path) -> None:
    merge.compare([path, path])
    result = load_result(path, complete=True)
    for form in ("md", "json", "jsonl", "csv"):
        assert "\x1b" not in render(result, form)
    if random.Random(path.read_bytes()).random() < 0.1:  # it takes long
        figure.draw(result, path.with_name("x.png"))


def use_launches(_: Path) -> None:
    from r1.kernels import launches

    launches.load("A")
    launches.keep("B", {})


# ---------------------------- the sound files
def sentencepiece_model(folder: Path) -> Path:
    file = io.BytesIO()
    words = ["hello world and all", "one two three é", "numbers 1 2 3 4 5 6 7 8 9 0"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=file, vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, user_defined_symbols=["<think>", "[x]"], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return folder / "tokenizer.model"


def tiktoken_model(folder: Path) -> Path:
    tokens = [bytes([i]) for i in range(256)] + [b"hi", b"\xe4\xbd", b"\xe4\xbd\xa0"]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    config = {"added_tokens_decoder": {"300": {"content": "[EOS]"}}, "eos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tiktoken.model"


def result(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(RESULTS / "h100" / name, folder))


def launches_json(folder: Path) -> Path:
    launch = {"LatentLaunch 1 16 128 512 2": {"rows": 16, "columns": 64, "warps": 4}}
    (folder / "launches.json").write_text(json.dumps({"A": launch}))
    return folder / "launches.json"


def generation_config(folder: Path) -> Path:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_p": 0.95}')
    return folder / "generation_config.json"


def exam_json(folder: Path) -> Path:
    exam.write(folder, [exam.Question("1+1", 2, 9), exam.Question("1+2", 3, 9)])
    return folder / exam.FILE


def special_tokens(folder: Path) -> Path:
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    return folder / "special_tokens_map.json"


FILES: dict[str, tuple[Callable[[Path], Path], Use]] = {
    "config.json": (lambda folder: folder / "config.json", use_config),
    "generation_config.json": (generation_config, lambda path: read_stop_ids(path.parent)),
    "index": (lambda folder: folder / INDEX, use_folder),
    "shard": (lambda folder: min(folder.glob("*.safetensors")), lambda path: load(path.parent)),
    "tokenizer.json": (lambda folder: folder / "tokenizer.json", use_tokenizer),
    "tokenizer_config.json": (lambda folder: folder / "tokenizer_config.json", use_tokenizer),
    "special_tokens_map.json": (special_tokens, use_tokenizer),
    "tokenizer.model": (sentencepiece_model, use_tokenizer),
    "tiktoken.model": (tiktoken_model, use_tokenizer),
    "tiktoken's config": (
        lambda folder: tiktoken_model(folder).with_name("tokenizer_config.json"),
        use_tokenizer,
    ),
    "exam.json": (exam_json, lambda path: exam.load(path.parent)),
    "ladder": (result("ladder.json"), use_result),
    "speculation": (result("speculation-tiny.json"), use_result),
    "launches.json": (launches_json, use_launches),
}
"""Each file that is read: how a sound one is made, and how it is used."""


def check_mutant(use: Use, path: Path) -> bool:
    """Use a mutant. Returns whether it is refused, in one printable line."""
    try:
        use(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and 20 < len(message) < 5000, ascii(message)
        return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_broken_files(
    name: str, sound: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make, use = FILES[name]
    if "model" in name or "tiktoken" in name:
        for path in sound.glob("tokenizer*"):
            path.unlink()
    if name == "launches.json":
        pytest.importorskip("triton", reason="the kernels need the triton package")
    monkeypatch.setenv("R1_CACHE", str(sound))
    path = make(sound)
    content = path.read_bytes()
    assert not check_mutant(use, path), "the sound file is refused"
    count = 0
    for number in range(MUTANTS):
        path.write_bytes(mutate(content, random.Random(f"{name} {number}")))
        try:
            count += check_mutant(use, path)
        except Exception as error:
            raise AssertionError(f"mutant {number} of {name}") from error
    assert count > MUTANTS // 10, "the mutants are too tame"


def test_a_bug_is_noticed(tmp_path: Path) -> None:
    """The check can fail: by another exception, and by a message with a terminal's codes."""

    def crash(_: Path) -> Any:
        raise KeyError("x")

    def clear_the_terminal(_: Path) -> Any:
        error = InputError("a message that is long enough")
        error.args = ("a message that is long enough\x1b[2J",)
        raise error

    with pytest.raises(KeyError):
        check_mutant(crash, tmp_path)
    with pytest.raises(AssertionError):
        check_mutant(clear_the_terminal, tmp_path)


@pytest.mark.parametrize("wrong", [b"\xff\x96\x81", b"\xe2\x96\xff", b"\xed\xa0\x80", b"\x80ab"])
def test_pieces_that_are_not_utf8(wrong: bytes, sound: Path) -> None:
    """The library reads such a model, and fails when it is asked for the piece."""
    for path in sound.glob("tokenizer*"):
        path.unlink()
    path = sentencepiece_model(sound)
    path.write_bytes(path.read_bytes().replace("▁".encode(), wrong))
    with refused("tokenizer.model can't be read"):
        use_tokenizer(path)


@pytest.mark.parametrize("wrong", [b"\xff\xfe", b"\xff 7\n", b"aGk= \xd9\xa1\xff\n"])
def test_a_tiktoken_file_that_is_not_utf8(wrong: bytes, sound: Path) -> None:
    for path in sound.glob("tokenizer*"):
        path.unlink()
    path = tiktoken_model(sound)
    path.write_bytes(path.read_bytes() + wrong)
    with refused("tiktoken.model can't be read"):
        use_tokenizer(path)
