"""r1/text with the published tokenizers and chat templates of each family in README's table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, V3, model
from real_files import (
    ALL,
    DISTILLED,
    FAMILIES,
    chat_template,
    codec,
    first_r1_template,
    folder,
    library,
    template_name,
    tokenizer,
)
from test_tokenizer import HARD, kimi

import r1
from r1.errors import InputError
from r1.files.save import save
from r1.model.config import Config
from r1.text.chat import KIMI_SYSTEM, MOONLIGHT_SYSTEM
from r1.text.control_tokens import BOS, EOS
from r1.text.tokenizer import Tokenizer
from r1.text.tokenizer_files import read_chat_template

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
    "R1-0528": TINY_GROUPED.change(
        vocab_size=151936, bos_token_id=151643, eos_token_ids=(151645,), num_hidden_layers=1
    ),
    "R1-Distill": TINY_LLAMA.change(
        vocab_size=128256, bos_token_id=128000, eos_token_ids=(128001,), num_hidden_layers=1
    ),
    # Its config.json gives the token that ends a text as the one that begins it.
    "R1-Distill-Qwen": TINY_QWEN2.change(
        vocab_size=152064, bos_token_id=151643, eos_token_ids=(151643,), num_hidden_layers=1
    ),
    "GLM-4.7": V3.change(vocab_size=154880, bos_token_id=None, eos_token_ids=(154820,)),
}
"""Small models that have the published vocabulary's size and ids."""

CONTROL_IDS: dict[str, tuple[int | None, int]] = {
    "V2": (100000, 100001),
    "V2.5": (100000, 100001),
    "R1-0528": (151643, 151645),
    "R1-Distill": (128000, 128001),
    "R1-Distill-Qwen": (151646, 151643),
    "GLM-4.7": (None, 154820),
}
"""(BOS, EOS), where they are not 0 and 1."""
STARTS = {"GLM-4.7": [154822, 154824, 154827]}
"""What a prompt starts with, where that is not BOS: [gMASK], <sop>, <|user|>."""


def checkpoint(family: str, config: Config, directory: Path) -> Path:
    """A small model beside a family's real tokenizer."""
    save(model(config), directory)
    for path in folder(family).iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_with_the_real_tokenizer_loads_and_chats(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, CONFIGS[family], tmp_path / "model")
    engine = r1.load(path, r1.Backend(device="cpu", dtype="fp32"), quiet=True)
    assert engine.tokenizer is not None
    bos, eos = CONTROL_IDS.get(family, (0, 1))
    assert (engine.tokenizer.bos_id, engine.tokenizer.eos_id) == (bos, eos)
    assert engine.stop_ids == {eos}
    assert engine.cautions == []
    messages = [{"role": "user", "content": "17 * 23 = ? 汉字 👍🏽"}]
    start = STARTS.get(family, [bos])
    assert engine.tokenizer.chat_prompt(messages)[: len(start)] == start
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


# -- chat templates --------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "\n 17*23=? 汉字"},
    {"role": "assistant", "content": "<think>\n17*20</think>hmm</think>\n\n391 "},
    {"role": "user", "content": "And  46?"},
    {"role": "assistant", "content": "</think>\n\n782"},
    {"role": "user", "content": "你好 \n"},
]
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "hi"}],
    "system": [SYSTEM, {"role": "user", "content": "hi"}],
    "several turns": TURNS,
    "system and turns": [SYSTEM, *TURNS],
    "plain answers": [{**turn, "content": turn["content"][-4:]} for turn in TURNS],
    "two system texts": [SYSTEM, *TURNS[:2], {"role": "system", "content": " And kind."}, TURNS[0]],
    "two users": [*TURNS[:1], *TURNS],
    "two answers": [*TURNS[:2], *TURNS[1:]],
    "answer first": TURNS[1:],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
}


def published(text: str, messages: list[dict[str, str]], think: bool) -> str:
    """The prompt that a published chat template gives, rendered as transformers does."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    prompt: str = environment.from_string(text).render(
        messages=messages,
        bos_token=BOS,
        eos_token=EOS,
        add_generation_prompt=True,
        thinking=think,
        enable_thinking=think,
    )
    return prompt


def without_thinking(family: str, prompt: str) -> str:
    """The published prompt, changed as `think=False` changes it where the template can't."""
    if template_name(family) in ("R1", "R1-Distill"):
        return prompt.removesuffix("\n") + "\n\n</think>\n\n"
    return prompt + "<think>\n\n</think>\n\n" if family == "R1-0528" else prompt


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", ALL)
def test_chat_prompts_are_the_published_ones(family: str, conversation: str, think: bool) -> None:
    messages = CONVERSATIONS[conversation]
    prompt = published(chat_template(family), messages, think)
    if not think:
        prompt = without_thinking(family, prompt)
    ours = tokenizer(family)
    ids = ours.chat_prompt(messages, think=think)
    assert ours.decode(ids) == prompt
    if family != "V3.1" or "think>" not in str(messages):  # it writes a text's second </think>
        assert ids == library(family).encode(prompt, add_special_tokens=False).ids


def test_the_ids_around_a_turn_of_glm() -> None:
    """[gMASK] <sop> <|system|> ... <|user|> ... <|assistant|>, and <think> or </think>."""
    ours = tokenizer("GLM-4.7")
    turn = CONVERSATIONS["system"]
    around = [i for i in ours.chat_prompt(turn) if i in ours.control_ids]
    assert around == [154822, 154824, 154826, 154827, 154828, 154841]
    assert ours.chat_prompt(turn, think=False)[-2:] == [154828, 154842]
    assert ours.split([*ours.encode("hm"), 154842, *ours.encode("yes")]) == ("hm", "yes")


def test_v3_2_has_no_template_to_compare() -> None:
    """Its publisher gives a program instead, so r1 does not guess."""
    ours = tokenizer("V3.2")
    assert ours.encode("17*23") == library("V3.2").encode("17*23", add_special_tokens=False).ids
    with pytest.raises(InputError, match="V3.2's, which comes with a program"):
        ours.chat_prompt(CONVERSATIONS["one turn"])
    assert with_text("V3.2", text_of("V3.1")).template is not None, "a text settles it"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("family", ALL)
def test_contents_forge_no_control_token(family: str, role: str) -> None:
    ours = tokenizer(family)
    last = {"role": "user", "content": "y"}
    # An answer's reasoning is cut off at </think>, so the name of that token stays away from it.
    names = [name for name in ours.control if role != "assistant" or name != "</think>"]
    forged = ours.chat_prompt([{"role": role, "content": "".join(names)}, last])
    honest = ours.chat_prompt([{"role": role, "content": "x"}, last])
    ids = ours.control_ids
    assert [i for i in forged if i in ids] == [i for i in honest if i in ids]


PUBLISHED_TURN = {  # by hand, from the ids of the published vocabularies' control tokens
    "R1-Distill": ([128000, 128011], [128012, 128013, 198]),
    "R1-Distill-Qwen": ([151646, 151644], [151645, 151648, 198]),
    "R1-0528": ([151643, 151669], [151670]),
}
"""The ids before the text of a user's first message, and after it. The 0528 model opens its
reasoning by itself."""


@pytest.mark.parametrize("family", DISTILLED)
def test_the_ids_around_a_turn(family: str) -> None:
    ours = tokenizer(family)
    before, after = PUBLISHED_TURN[family]
    text = "17 * 23 = ?"
    ids = ours.chat_prompt([{"role": "user", "content": text}])
    assert ids == before + ours.encode(text) + after


@pytest.mark.parametrize("family", DISTILLED)
def test_an_answer_begins_where_the_template_ends(family: str) -> None:
    """The reasoning is opened by the prompt, but in the 0528 model's template."""
    ours = tokenizer(family)
    assert ours.template is not None
    assert ours.template.thinks == (family != "R1-0528")
    assert ours.control["</think>"] - ours.control["<think>"] == 1


# -- which template --------------------------------------------------------------------------------


def text_of(family: str) -> str:
    return chat_template(family)


def with_text(family: str, text: str | None) -> Tokenizer:
    """A family's real vocabulary with another chat template. None: without one."""
    return Tokenizer(codec(family), 0, 1, text)


def write_template(directory: Path, template: object) -> None:
    """Make a template that of a folder's tokenizer_config.json. None: the folder has none."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")


@pytest.mark.parametrize("family", ALL)
def test_the_folder_s_own_template_chooses(family: str) -> None:
    ours = tokenizer(family)
    assert ours.template is not None
    assert (ours.template.name, ours.cautions) == (template_name(family), [])


def test_r1_s_first_template_is_r1_s() -> None:
    ours = with_text("R1", first_r1_template())
    assert ours.template is not None
    assert (ours.template.name, ours.cautions) == ("R1", [])


@pytest.mark.parametrize(
    ("vocabulary", "text"),
    [("R1", "R1-0528"), ("R1", "R1-Distill"), ("V3.1", "R1"), ("V2.5", "V2"), ("R1", "V3")],
)
def test_the_text_counts_more_than_the_vocabulary(vocabulary: str, text: str) -> None:
    ours = with_text(vocabulary, text_of(text))
    assert ours.template is not None
    assert (ours.template.name, ours.cautions) == (text, [])


def test_where_the_text_is_looked_for(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text_of("R1")}]
    write_template(tmp_path, named)
    assert read_chat_template(tmp_path) == text_of("R1")
    (tmp_path / "chat_template.jinja").write_text(text_of("V3.1"), encoding="utf-8")
    assert read_chat_template(tmp_path) == text_of("V3.1")


@pytest.mark.parametrize("family", ALL)
def test_spaces_that_reach_no_prompt_do_not_count(family: str) -> None:
    text = text_of(family).replace("{%- ", "\n  {%-").replace("{% if", "{%  if")
    assert text != text_of(family)
    ours = with_text(family, text)
    assert ours.template is not None
    assert (ours.template.name, ours.cautions) == (template_name(family), [])


@pytest.mark.parametrize("family", [*FAMILIES, "R1-Distill"])
def test_a_revision_that_resembles_a_template_is_a_caution(family: str) -> None:
    revised = text_of(family).replace("{% for m", "{{ strftime_now() }}{% for m", 1)
    revised = revised.replace("{%- for m", "{{ strftime_now() }}{%- for m", 1)
    assert revised != text_of(family)
    ours = with_text(family, revised)
    assert ours.template is not None and ours.template.name == family
    (caution,) = ours.cautions
    assert "revision that r1 does not know" in caution and f"{family}'s" in caution
    assert ours.chat_prompt(CONVERSATIONS["one turn"])


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("R1", ("<think>\\n'}}", "<think>'}}")),
        ("R1", ("<｜User｜>", "<|User|>")),
        ("R1", ("split('</think>')[-1]", "split('</think>')[0]")),
        (
            "V3.1",
            ("{{'<think>'}}{%- endif %}{% endif %}", "{{'<think>\\n'}}{%- endif %}{% endif %}"),
        ),
        ("V3", ("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜><think>'}}")),
        ("V3", ("'<｜User｜>' + message['content']", "'<｜User｜>' + message['content'] + '\n\n'")),
        ("V2.5", ("{{'<｜Assistant｜>'}}", "{{'<｜Assistant｜>\n'}}")),
        ("V2", ("'User: '", "'Human: '")),
        ("GLM-4.7", ("<|user|>{{", "<|user|>\n{{")),
        ("GLM-4.7", ("else '<think>' -}}", "else '<think>\\n' -}}")),
        ("V2", ("{{ 'Assistant:' }}", "{{ 'Assistant: ' }}")),
    ],
)
def test_another_template_is_refused(family: str, change: tuple[str, str]) -> None:
    other = text_of(family).replace(*change)
    assert other != text_of(family)
    ours = with_text(family, other)
    with pytest.raises(InputError, match=r"none that r1 knows.*apply_chat_template"):
        ours.chat_prompt(CONVERSATIONS["one turn"])


@pytest.mark.parametrize("template", ["", "{{ messages }}", 7, [1], [], {}, "\ud800", "{%" * 10**5])
def test_a_template_that_is_none_is_refused_in_a_chat_only(
    template: object, tmp_path: Path
) -> None:
    write_template(tmp_path, template)
    ours = with_text("R1", read_chat_template(tmp_path))
    assert ours.encode("a")
    with pytest.raises(InputError, match="none that r1 knows"):
        ours.chat_prompt(CONVERSATIONS["one turn"])


def test_a_template_without_its_control_tokens_is_refused() -> None:
    ours = with_text("V2", text_of("V2.5"))
    with pytest.raises(
        InputError, match="V2.5's.*lacks its control tokens <｜Assistant｜>, <｜User｜>"
    ):
        ours.chat_prompt(CONVERSATIONS["one turn"])


@pytest.mark.parametrize(
    ("family", "says"),
    [("V2", "V2's"), ("V2.5", "V2.5's"), ("V3.1", "V3.1's"), ("GLM-4.7", "GLM-4.7's")],
)
def test_without_a_text_a_shared_vocabulary_is_a_caution(family: str, says: str) -> None:
    ours = with_text(family, None)
    assert ours.template is not None and ours.template.name == family
    (caution,) = ours.cautions
    assert "no chat_template" in caution and says in caution


@pytest.mark.parametrize("family", ["R1", "V3"])
def test_without_a_text_r1_and_v3_are_told_by_the_vocabulary(family: str) -> None:
    ours = with_text(family, None)
    assert ours.template is not None
    assert (ours.template.name, ours.cautions) == (family, [])


def test_v3_0324() -> None:
    """It differs from R1-0528's in that it keeps what comes before </think>."""
    cut = (
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    )
    text = text_of("R1-0528").replace(cut, "")
    ours = with_text("V3", text)
    assert ours.template is not None and ours.template.name == "V3-0324"
    assert len(ours.cautions) == 1  # this text is a reconstruction
    for messages in CONVERSATIONS.values():
        assert ours.decode(ours.chat_prompt(messages)) == published(text, messages, True)


def test_a_caution_reaches_the_engine(tmp_path: Path) -> None:
    path = checkpoint("V2", CONFIGS["V2"], tmp_path / "model")
    write_template(path, None)
    engine = r1.load(path, r1.Backend(device="cpu", dtype="fp32"), quiet=True)
    assert engine.tokenizer is not None
    assert engine.cautions == engine.tokenizer.cautions != []


# -- Moonlight and Kimi ----------------------------------------------------------------------------

KIMI = (
    "{%%- for message in messages -%%}"
    "{%%- if loop.first and messages[0]['role'] != 'system' -%%}"
    "<|im_system|>system<|im_middle|>%s<|im_end|>{%%- endif -%%}"
    "{%%- if message['role'] == 'system' -%%}<|im_system|>{%%- endif -%%}"
    "{%%- if message['role'] == 'user' -%%}<|im_user|>{%%- endif -%%}"
    "{%%- if message['role'] == 'assistant' -%%}<|im_assistant|>{%%- endif -%%}"
    "{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>{%%- endfor -%%}"
    "{%%- if add_generation_prompt -%%}<|im_assistant|>assistant<|im_middle|>{%%- endif -%%}"
)
"""Moonlight's template. Kimi-K2's later revisions have another system text, and more."""


@pytest.mark.parametrize(
    ("system", "name", "cautions"),
    [(MOONLIGHT_SYSTEM, "Moonlight", 0), (KIMI_SYSTEM, "Kimi-K2", 1)],
)
def test_moonlight_and_kimi(system: str, name: str, cautions: int, tmp_path: Path) -> None:
    text = KIMI % system
    kimi(tmp_path)  # a small vocabulary: no package has the real one
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    assert ours.template is not None
    assert (ours.template.name, len(ours.cautions)) == (name, cautions)
    for messages in CONVERSATIONS.values():
        assert ours.decode(ours.chat_prompt(messages)) == published(text, messages, True)


def test_kimi_without_a_text_is_a_caution(tmp_path: Path) -> None:
    (caution,) = kimi(tmp_path).cautions
    assert "no chat_template" in caution and "Moonlight's" in caution


def test_another_kimi_is_refused(tmp_path: Path) -> None:
    kimi(tmp_path)
    # Kimi-K2-Thinking puts an empty block of reasoning before earlier answers.
    for old, new in (
        (MOONLIGHT_SYSTEM, "Another text"),
        ("{{ message['content'] }}", "<think></think>{{ message['content'] }}"),
    ):
        text = (KIMI % MOONLIGHT_SYSTEM).replace(old, new)
        (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="none that r1 knows"):
            Tokenizer.load(tmp_path).chat_prompt(CONVERSATIONS["one turn"])
