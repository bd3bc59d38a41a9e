"""Split a completion into its reasoning and its answer."""

from __future__ import annotations

from collections.abc import Mapping

from r1.text.control_tokens import END_THINK, THINK
from r1.text.stream_decoder import StreamDecoder


class ReasoningSplitter:
    """Sorts a completion into reasoning and answer, one token at a time.

    The control tokens `<think>` and `</think>` start and end the reasoning. Their text does not: a
    model that quotes "</think>" in ordinary tokens continues to reason. The text counts only if the
    vocabulary has no such control token. Control tokens belong to neither part. If the completion
    stops before the reasoning ends, all of it is reasoning.
    """

    def __init__(self, stream: StreamDecoder, control: Mapping[str, int], thinking: bool) -> None:
        """Start inside the reasoning if `thinking` is true, else inside the answer.

        `stream` decodes the tokens and hides control tokens. `control` maps the text of each
        control token to its id.
        """
        self.thinking = thinking
        self._stream = stream
        self._open, self._close = control.get(THINK), control.get(END_THINK)
        self._held = ""  # text that may turn out to be the start of "</think>"

    def push(self, token: int) -> tuple[str, str]:
        """(reasoning, answer): the text that this token adds to each."""
        if token in (self._open, self._close):
            ended = self.flush()
            self.thinking = token == self._open
            return ended
        return self._sort(self._stream.push(token))

    def flush(self) -> tuple[str, str]:
        """(reasoning, answer): the text that is still held back when the completion ends."""
        reasoning, answer = self._sort(self._stream.flush())
        held, self._held = self._held, ""
        return reasoning + held, answer

    def _sort(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) of newly decoded text."""
        if not self.thinking:
            return "", text
        if self._close is not None:
            return text, ""
        reasoning, marker, answer = (self._held + text).partition(END_THINK)
        if marker:
            self.thinking, self._held = False, ""
            return reasoning, answer
        keep = next(
            (n for n in range(len(END_THINK) - 1, 0, -1) if reasoning.endswith(END_THINK[:n])), 0
        )
        cut = len(reasoning) - keep
        self._held = reasoning[cut:]
        return reasoning[:cut], ""
