"""The names of the control tokens that the published chat templates use."""

from __future__ import annotations

# DeepSeek. R1's vocabulary has all of these.
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
PAD = "<｜▁pad▁｜>"
"""V2's vocabulary shares BOS, EOS, USER and ASSISTANT, but lacks PAD. So PAD marks V3 and R1."""

# Moonlight and Kimi.
IM_SYSTEM, IM_USER, IM_ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"
