"""Triton kernels for decode steps and for a prompt's experts and packed weights, each beside its
torch twin.

They run where `attention`, `moe`, `prefill_moe` or `kernels` are `triton`. README.md beside this
file has the plan: what each kernel reads, how kernels overlap, and how long each takes.

Every kernel reads weights through tiles.py, however they are stored, and takes its launch
parameters as a frozen dataclass, with defaults by shape and chip; `--tune` searches better ones.
block.py puts the kernels together to a layer. strategies.py offers two of them alone. Several
tokens' experts are in experts_tiles.py, experts_narrow.py and sort.py. linear_few.py has dot
products of a few tokens, and linear_parts.py products of few rows. vectors.py loads the columns of
x that a thread has FP8 weights for. fixed.py multiplies 4 bits by whole numbers, narrow.py packed
weights by the matrix units, and rounded.py FP8 weights by inputs of FP8. prompt.py multiplies a
prompt by packed weights; in_graph.py and experts_dispatch.py hand torch.compile its products as a
whole. prompt_router.py chooses a prompt's experts. prompt_block.py puts a layer of FP8 prompts
together, with prompt_attention.py and prompt_norm.py. allreduce.py adds up over devices.

Tested in tests/test_kernels.py, test_prompt_kernels.py, test_prompt_router.py,
test_prompt_attention.py, test_prompt_norm.py, test_fixed.py, test_narrow.py, test_rounded.py,
test_vectors.py, test_tune.py, test_allreduce.py and test_gpus.py.
"""
