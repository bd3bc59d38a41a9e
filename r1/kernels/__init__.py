"""Triton kernels for decode, each beside its torch twin: what `attention=triton`, `moe=triton` and `kernels=triton` run.

A decode step is bound by reading weights, so the plan is a matter of bytes. One sparse layer, bf16, one token:

| kernel | file | reads, Moonlight-16B | R1 | programs on 132 processors |
|---|---|---:|---:|---|
| norm + qkv_a projection | linear.py | 14.9 MB | 30.3 MB | 1824, 1056 (2 rows of the matrix each) |
| norm + q_b projection (R1 only) | linear.py | | 75.5 MB | 12288 |
| latent norm, rope, cache write, W_UK | latent.py | 2.1 MB | 16.8 MB | 64, 512 (a head's 128 columns), 1 a token |
| attention, split over the context | attention.py | 4.7 MB at 4k | 4.7 MB at 4k | (tiles of heads) x tokens x splits |
| splits' sum + W_UV | attention.py | 2.1 MB | 16.8 MB | 64 (32 rows of a head), 256 (64) |
| o_proj + residual | linear.py | 8.4 MB | 234.9 MB | 1024, 3584 |
| norm + router's logits (fp32) | router.py | 0.5 MB | 7.3 MB | 32, 128 (2 experts each) |
| choice of experts | router.py | | | 1 a token |
| gate, up, SwiGLU of the experts hit | experts.py | 92.3 MB | 528.5 MB | 5632, 9216 (2 rows of an expert) |
| down, weighted sum, residual | experts.py | 46.1 MB | 264.2 MB | 512, 1792 |
| in all | | 166.5 MB, 55 us | 1.17 GB, 389 us | 9 kernels, 10 |

(Once a step, step.py makes positions and rotations, and linear.py's kernel is the output head.)

Microseconds are at 3.02 TB/s, an H100's copy rate, without the cache. A launch costs 1.2 us in a graph, or hides behind the
kernel before it (chip.py). Several tokens make three kernels more (R1: four): they are sorted by expert, because an expert that
several tokens hit should be read once; its outputs are added up in a kernel of their own; and so is a norm in front of a
product, which would have to stand in the loop. No kernel uses atomics: results don't change from run to run.

Every kernel takes its launch parameters as a frozen dataclass, with defaults by shape and chip; tune.py searches better ones.
"""

from r1.kernels.attention import attend
from r1.kernels.block import DecodeBlock, head
from r1.kernels.chip import Chip
from r1.kernels.experts import dispatch
from r1.kernels.step import begin_step

__all__ = ["Chip", "DecodeBlock", "attend", "begin_step", "dispatch", "head"]
