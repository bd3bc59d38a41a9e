"""The names of the control tokens that the published chat templates use."""

from __future__ import annotations

# DeepSeek. R1's vocabulary has all of these.
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
PAD = "<｜▁pad▁｜>"
"""Coder-V2's vocabulary shares BOS, EOS, USER and ASSISTANT, but lacks PAD. PAD marks V3."""
TOOL_SEP = "<｜tool▁sep｜>"
"""V2.5 has it, Coder-V2 does not."""
SEARCH_BEGIN = "<｜search▁begin｜>"
"""V3.1 has it. R1 and V3 have a place holder with the same id."""
DSML = "｜DSML｜"
"""V3.2 has it."""

# GLM-4.7. It has THINK and END_THINK too.
GMASK, SOP = "[gMASK]", "<sop>"
GLM_SYSTEM, GLM_USER, GLM_ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

# Moonlight and Kimi.
IM_SYSTEM, IM_USER, IM_ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"
