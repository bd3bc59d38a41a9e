"""Write the tokenizer of the embedded checkpoint: the 256 bytes and R1's control tokens.

    python tools/train/make_tokenizer.py weights/tiny-r1

There are no merges, so each byte is one token, and each digit too. The control tokens have R1's
names. Ids 0 to 2 are R1's. Byte b has id 3 + b.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared

from r1.text.byte_alphabet import BYTE_TO_SYMBOL
from r1.text.control_tokens import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER

FIRST = [BOS, EOS, PAD]
LAST = [USER, ASSISTANT, THINK, END_THINK, "<|EOT|>"]
LAST += [
    f"<｜tool▁{part}▁{end}｜>"
    for part in ("calls", "call", "outputs", "output")
    for end in ("begin", "end")
]
LAST += ["<｜tool▁sep｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
SPECIAL = {*FIRST, "<|EOT|>"}
"""The tokens that R1's file marks as special. It does not mark <think>, nor the other ones."""


def make_tokenizer(directory: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json to a folder; returns the vocabulary's size."""
    directory.mkdir(parents=True, exist_ok=True)
    symbols = [BYTE_TO_SYMBOL[byte] for byte in range(256)]
    # As in R1's file, the BPE's vocabulary holds the first three too. The library ignores the
    # file's ids for added tokens outside that vocabulary, and numbers them after it.
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


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = shared.parser(__doc__)
    parser.add_argument("directory", type=Path, help="the folder to write the two files to")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    print(f"{arguments.directory}: {make_tokenizer(arguments.directory)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
