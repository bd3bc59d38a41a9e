"""Triton kernels for decode steps and for a prompt's experts, each beside its torch twin.

They run where `attention`, `moe`, `prefill_moe` or `kernels` are `triton`.

A decode step is bound by reading weights, so the plan is a matter of bytes. One sparse layer, bf16,
one token, in the order of launches; "2 rows" are rows of a matrix that one program reads:

| kernel | file | Moonlight reads | R1 reads | programs: Moonlight, R1 |
|---|---|---:|---:|---|
| norm + q and kv_a (R1: q_a and kv_a) | linear.py | 14.9 MB | 30.3 MB | 1824, 1056: 2 rows |
| norm + q_b (R1 only) | linear.py | | 75.5 MB | 12288: 2 rows |
| latent norm, rope, cache write, W_UK | latent.py | 2.1 MB | 16.8 MB | 64, 512; 1 for the token |
| attention, split over context | attention_kernels.py | 4.7 MB at 4k | 4.7 MB | tiles x splits |
| splits' sum + W_UV | attention_kernels.py | 2.1 MB | 16.8 MB | 32 or 64, 256: 64 or 32 rows |
| o_proj + residual | linear.py | 8.4 MB | 234.9 MB | 1024, 3584: 2 rows |
| norm + router + choice of experts | router.py | 0.5 MB | 7.3 MB | 64, 256: one expert |
| gate, up, SwiGLU of experts | experts_vector.py | 92.3 MB | 528.5 MB | 5632, 9216: 2 rows |
| down, weighted sum, residual | experts_vector.py | 46.1 MB | 264.2 MB | 512, 1792: 4 rows |
| all weights | | 166.5 MB, 55 us | 1.17 GB, 389 us | 8 kernels, 9 |

Programs are those on an H100's 132 processors. A program of latent.py makes 128 columns of a head,
one of the attention takes a tile of heads of one token through one split.
Once a step: step.py makes positions and rotations in one program, and linear.py's kernel is the
output head (81920 programs for Moonlight). In a dense layer it is gate and up (11264), and down
with SwiGLU before it (1024).

Microseconds are at 3.02 TB/s, an H100's copy rate. A launch costs 1.2 us in a graph, or is hidden
by the kernel before it (chip.py). Several tokens need three kernels more (R1: four). One sorts
their choices by expert, so that an expert that several tokens chose is read once. One adds up the
experts' outputs. And a norm before a product has a kernel of its own (R1: two of them), because it
would have to stand in the product's loop. No sum is made by atomics, so results don't change from
run to run.

Every kernel reads weights through tiles.py, however they are stored, and takes its launch
parameters as a frozen dataclass, with defaults by shape and chip; `--tune` searches better ones.
block.py puts the kernels together to a layer. strategies.py offers two of them alone. Several
tokens' experts are in experts_tiles.py and sort.py.

Tested in tests/test_kernels.py and tests/test_tune.py.

One legend of letters for all files: B rows, S new tokens of a row, N = B S tokens, T slots of the
cache, D hidden_size, I intermediate size (of the feed-forward, or of an expert), W vocab_size,
H heads, P qk_nope_head_dim, R rope dim, V value dim, C latent (kv_lora_rank), Q q_lora_rank,
E experts, K experts per token, G groups of experts, J slots of a token in the experts' kernels
(K choices + shared experts), Z splits of the context.
"""
