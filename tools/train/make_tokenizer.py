"""Write the tokenizer of the embedded checkpoint: the 256 bytes, and R1's control tokens under R1's
own names.

There are no merges, so a token is a byte and digits stand apart. Ids 0 to 2 are R1's; the bytes
follow at 3 + byte.

    python tools/train/make_tokenizer.py weights/tiny-r1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1

from r1.text.chat import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER
from r1.text.vocabulary import BYTE_TO_SYMBOL

FIRST = [BOS, EOS, PAD]
LAST = [USER, ASSISTANT, THINK, END_THINK, "<|EOT|>"]
LAST += [
    f"<｜tool▁{part}▁{end}｜>"
    for part in ("calls", "call", "outputs", "output")
    for end in ("begin", "end")
]
LAST += ["<｜tool▁sep｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
SPECIAL = {
    *FIRST,
    "<|EOT|>",
}  # flagged so in R1's file; its other control tokens, <think> among them, are not


def make_tokenizer(directory: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json to `directory`; returns the size of the
    vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    symbols = [BYTE_TO_SYMBOL[byte] for byte in range(256)]
    # As in R1's file, the first three are in the BPE's vocabulary too: the library gives added
    # tokens that are not there the ids after it, whatever the file says.
    vocab = {token: i for i, token in enumerate(FIRST + symbols)}
    ids = {token: vocab.get(token, i) for i, token in enumerate(FIRST + symbols + LAST)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": token not in FIRST,
            "special": token in SPECIAL,
        }
        for token in FIRST + LAST
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded checkpoint's tokenizer.")
    parser.add_argument(
        "directory", type=Path, help="where tokenizer.json and tokenizer_config.json go"
    )
    print(make_tokenizer(parser.parse_args().directory), "tokens")


if __name__ == "__main__":
    main()
