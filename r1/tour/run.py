"""Runs one prompt through a model, and keeps what the pages show.

Shapes: B rows, S tokens of a row, k drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

import r1
from r1.files.config_json import load_config
from r1.files.folder import check_folder
from r1.files.layouts import tensors_of
from r1.model.cache import Cache
from r1.model.mtp import MTPLayer
from r1.model.transformer import Block
from r1.run.callers import Caller
from r1.run.graphs import Step
from r1.run.prompts import check_rows, room_for_answers
from r1.run.sampler import Sampler
from r1.tour.watch import Made, Watch


@dataclass(frozen=True)
class Prompt:
    """The tokens that a tour follows, and where they come from."""

    tokens: list[int]
    text: str | None = None  # None: token ids were given
    template: str | None = None  # the chat template around the text; None: there is none


@dataclass(frozen=True)
class Turn:
    """A decode step over the last token and its drafts."""

    read: list[int]  # the last token, then k drafts
    accepted: int  # how many drafts were accepted before the first rejected one
    new: list[int]  # the accepted drafts, then one token of the model's own


@dataclass(frozen=True)
class Tour:
    """A prompt, and what the model made of it. Tensors are those of the chosen layer."""

    prompt: Prompt
    layer: int
    read: list[Made]  # from the prompt, all tokens at once
    step: list[Made]  # from one token more
    drafted: list[Made]  # by the MTP layer, when it first reads a turn
    slots: int  # T of that one token
    cache_bytes: int  # of a cache of so many slots
    turns: list[Turn]
    new: list[int]  # all new tokens, up to a stop token


class Recorder:
    """A caller around another one. It keeps the tokens of each turn of speculation."""

    def __init__(self, inner: Caller, watch: Watch) -> None:
        self.inner, self.watch = inner, watch
        self.turns: list[Turn] = []
        self.drafted: list[Made] = []

    def __call__(
        self, key: tuple[Any, ...], step: Step, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]:
        if key[0] != "turn":
            return self.inner(key, step, inputs, cache)
        with self.watch():
            outputs = self.inner(key, step, inputs, cache)
        if made := [m for m in self.watch.take() if isinstance(m.owner, MTPLayer)]:
            self.drafted = self.drafted or [m for m in made if m.call == made[0].call]
        accepted = int(outputs[1][0])
        new = outputs[0][0, : accepted + 1].tolist()
        self.turns.append(Turn(inputs[0][0].tolist(), accepted, new))
        return outputs


def load(directory: Path, switches: dict[str, Any], drafts: int) -> r1.Engine:
    """The engine of a folder, with its MTP layer where its files have one. Raises InputError."""
    config = load_config(directory)
    check_folder(directory)
    mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and any(
        key.startswith(mtp) for key in tensors_of(directory)
    ):
        switches = {**switches, "speculate": "mtp", "draft_tokens": drafts}
    return r1.load(directory, r1.Backend(**switches))


def prompt_of(engine: r1.Engine, text: str) -> Prompt:
    """The text as the user's message of a chat, or as it is where no chat template fits."""
    if engine.tokenizer is None:
        raise r1.InputError("this checkpoint has no tokenizer: give token ids, as --tokens 0,5,7")
    template = engine.tokenizer.template
    if template is None:
        return Prompt(engine.encode(text), text)
    messages = [{"role": "user", "content": text}]
    return Prompt(engine.tokenizer.chat_prompt(messages), text, template.name)


def follow(engine: r1.Engine, prompt: Prompt, layer: int, new: int) -> Tour:
    """Read the prompt, decode one token, then decode anew with drafts until there are `new` tokens.

    The last turn may bring more. All of it is greedy.
    """
    rows = [prompt.tokens]
    check_rows(rows, engine.config)
    new = min(new, room_for_answers(rows, engine.config))
    watch = Watch(cast(Block, engine.model.layers[layer]))
    greedy, runner = Sampler(temperature=0.0), engine.runner

    cache = engine.cache(1, len(prompt.tokens) + new)
    with watch():
        logits = runner.prefill(rows, cache)  # (B, W)
    read = watch.take()
    token, _ = greedy(logits[:, None])  # (B, 1)
    with watch():
        runner.decode(token, cache)
    step = watch.take()

    recorder = Recorder(runner.callers["decode"], watch)
    runner.callers["decode"] = recorder
    tokens: list[int] = []
    cache.reset()
    for (arrived,) in engine.steps(rows, new, greedy, cache):
        tokens += arrived
        if not engine.stop_ids.isdisjoint(tokens) or len(tokens) >= new:
            break
    runner.callers["decode"] = recorder.inner
    ends = [place for place, each in enumerate(tokens, 1) if each in engine.stop_ids]
    tokens = tokens[: min(ends, default=len(tokens))]
    return Tour(
        prompt, layer, read, step, recorder.drafted, cache.capacity, cache.nbytes, recorder.turns,
        tokens,
    )  # fmt: skip
