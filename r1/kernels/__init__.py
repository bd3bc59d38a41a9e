"""Triton kernels for decode and for a prompt's experts, each beside its torch twin: what
`attention`, `moe`, `prefill_moe` and `kernels` run where they are `triton`.

A decode step is bound by reading weights, so the plan is a matter of bytes. One sparse layer, bf16,
one token:

| kernel | file | reads, Moonlight-16B | R1 | programs on 132 processors |
|---|---|---:|---:|---|
| norm + qkv_a projection | linear.py | 14.9 MB | 30.3 MB | 1824, 1056 (2 rows of the matrix each) |
| norm + q_b projection (R1 only) | linear.py | | 75.5 MB | 12288 (2 rows) |
| latent norm, rope, cache write, W_UK | latent.py | 2.1 MB | 16.8 MB | 64, 512 (a head's 128 columns), and 1 for the token |
| attention, split over the context | attention.py | cache: 4.7 MB at 4k | 4.7 MB | (tiles of heads) x tokens x splits |
| splits' sum + W_UV | attention.py | 2.1 MB | 16.8 MB | 32 or 64, 256 (64 or 32 rows of a head) |
| o_proj + residual | linear.py | 8.4 MB | 234.9 MB | 1024, 3584 (2 rows) |
| norm + router + choice of experts | router.py | 0.5 MB | 7.3 MB | 64, 256 (an expert's logit each) |
| gate, up, SwiGLU of the experts hit | experts.py | 92.3 MB | 528.5 MB | 5632, 9216 (2 rows of an expert) |
| down, weighted sum, residual | experts.py | 46.1 MB | 264.2 MB | 512, 1792 (4 rows, of all experts hit) |
| weights in all | | 166.5 MB, 55 us | 1.17 GB, 389 us | 8 kernels, 9 |

Once a step: step.py makes positions and rotations in one program, and linear.py's kernel is the
output head (81920 programs for Moonlight); in a dense layer it is gate and up (11264), and down
with the SwiGLU in front (1024).

Microseconds are at 3.02 TB/s, an H100's copy rate. A launch costs 1.2 us in a graph, or hides
behind the kernel before it (chip.py). Several tokens need three kernels more (R1: four): one sorts
their choices by expert, so that an expert that several tokens hit is read once; one adds up the
experts' outputs; and a norm in front of a product has its own (R1: two of them), since it would
have to stand in the product's loop. No sum is made by atomics: results don't change from run to
run.

Every kernel takes its launch parameters as a frozen dataclass, with defaults by shape and chip;
tune.py searches better ones."""

from r1.kernels.attention import attend
from r1.kernels.block import DecodeBlock, head
from r1.kernels.chip import Chip
from r1.kernels.experts import dispatch
from r1.kernels.step import begin_step

__all__ = ["Chip", "DecodeBlock", "attend", "begin_step", "dispatch", "head"]
