"""r1/text with the published tokenizers and chat templates of each family in README's table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from models import V3, model
from real_files import ALL, FAMILIES, folder, library, tokenizer
from test_tokenizer import HARD

import r1
from r1.files.save import save
from r1.model.config import Config

# -- vocabularies ----------------------------------------------------------------------------------

V2 = V3.change(
    model_type="deepseek_v2",
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    num_nextn_predict_layers=0,
    bos_token_id=100000,
    eos_token_ids=(100001,),
)
CONFIGS = {
    "V2": V2.change(vocab_size=102400),
    "V2.5": V2.change(vocab_size=102400),
    "V3": V3.change(vocab_size=129280),
    "R1": V3.change(vocab_size=129280),
    "V3.1": V3.change(vocab_size=129280),
}
"""Small models that have the published vocabulary's size and ids."""

CONTROL_IDS = {"V2": (100000, 100001), "V2.5": (100000, 100001)}
"""(BOS, EOS), where they are not 0 and 1."""


def checkpoint(family: str, config: Config, directory: Path) -> Path:
    """A small model beside a family's real tokenizer."""
    save(model(config), directory)
    for path in folder(family).iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_the_real_tokenizer_loads_and_chats(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, CONFIGS[family], tmp_path / "model")
    engine = r1.load(path, r1.Backend(device="cpu", dtype="fp32"), quiet=True)
    assert engine.tokenizer is not None
    bos, eos = CONTROL_IDS.get(family, (0, 1))
    assert (engine.tokenizer.bos_id, engine.tokenizer.eos_id) == (bos, eos)
    assert engine.stop_ids == {eos}
    messages = [{"role": "user", "content": "17 * 23 = ? 汉字 👍🏽"}]
    assert engine.tokenizer.chat_prompt(messages)[0] == bos
    assert engine.chat(messages, max_new_tokens=4, temperature=0.0).tokens


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("family", ALL)
def test_the_real_tokenizer_agrees_with_the_library(family: str, text: str) -> None:
    ids = library(family).encode(text, add_special_tokens=False).ids
    assert tokenizer(family).encode(text) == ids
    decoded = library(family).decode(ids, skip_special_tokens=False)
    assert tokenizer(family).decode(ids) == decoded


@pytest.mark.parametrize("family", ALL)
def test_every_character_can_be_encoded(family: str) -> None:
    """One character of each leading and of each following byte, and the last one."""
    every = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x333), 0x10000, 0x10FFFF]))
    ours = tokenizer(family)
    for text in (every, *every[:0x800:7]):
        ids = library(family).encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library(family).decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", ALL)
def test_no_text_becomes_a_control_token(family: str) -> None:
    ours = tokenizer(family)
    for name, token in ours.control.items():
        assert ours.encode(name, control=True) == [token]
        ids = ours.encode(name)
        assert not ours.control_ids & set(ids), name
        assert ours.decode(ids) == name
