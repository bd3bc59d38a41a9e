"""What the hardware allows: bytes that must move and FLOPs that must be done in one step, and the
rates measured here.

Counted from the config, each input read once: weights of what is active (of the routed experts only
those really hit), the cache that attention reads, one row written. Activations stay out: at the
sizes where a step is bound by memory they are nothing beside the weights. So the time that comes
out is a floor.

Shapes: B rows of a step, S tokens of a row in it, T tokens in the cache, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from r1.device import DTYPES, synchronize
from r1.model.cache import bytes_per_token
from r1.model.config import Config
from r1.switches.backend import Backend


@dataclass(frozen=True)
class Work:
    """One step's bytes and floating-point operations (a multiply-add is two)."""

    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.flops + other.flops,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes - other.weight_bytes,
            self.cache_bytes - other.cache_bytes,
            self.flops - other.flops,
        )


def attention_weights(config: Config) -> int:
    """Elements of one layer's attention projections."""
    c = config
    q = c.attention.num_attention_heads * c.attention.qk_head_dim
    query = (
        c.hidden_size * q
        if c.attention.q_lora_rank is None
        else (c.hidden_size + q) * c.attention.q_lora_rank
    )
    key_value = (
        c.hidden_size * c.attention.latent_dim
        + c.attention.kv_lora_rank
        * c.attention.num_attention_heads
        * (c.attention.qk_nope_head_dim + c.attention.v_head_dim)
    )
    return (
        query + key_value + c.attention.num_attention_heads * c.attention.v_head_dim * c.hidden_size
    )


def expert_weights(config: Config) -> int:
    """Elements of one routed expert."""
    return 3 * config.hidden_size * config.experts.moe_intermediate_size


def step_work(
    config: Config,
    backend: Backend,
    rows: int,
    tokens: int,
    context: float,
    experts_hit: float,
    *,
    verify: bool = False,
) -> Work:
    """The work of one step: `rows` rows of `tokens` tokens each, behind `context` cached ones; only
    the last gets logits.

    `experts_hit` is how many different experts a MoE layer uses in the step, on average. `backend`
    is resolved. `verify`: a decode step over drafts (speculate.py), in which every token gets
    logits."""
    c, storage = config, DTYPES[backend.dtype]
    dense = sum(not c.is_moe(layer) for layer in range(c.num_hidden_layers))
    sparse = c.num_hidden_layers - dense
    n = rows * tokens
    attention = c.num_hidden_layers * attention_weights(c)
    feed_forward = dense * 3 * c.hidden_size * c.intermediate_size
    shared = sparse * c.experts.n_shared_experts * expert_weights(c)
    gate = sparse * c.experts.n_routed_experts * c.hidden_size  # fp32, whatever the rest is
    head = c.vocab_size * c.hidden_size
    every_token = attention + feed_forward + shared
    weight_bytes = (
        every_token + head + sparse * experts_hit * expert_weights(c)
    ) * storage.itemsize + gate * 4
    weight_bytes += n * c.hidden_size * storage.itemsize  # rows of the embedding
    per_token = bytes_per_token(c, storage, full=backend.attention == "naive")
    flops = (
        2.0 * n * (every_token + gate + sparse * c.experts.num_experts_per_tok * expert_weights(c))
    )
    flops += 2.0 * rows * (tokens if verify else 1) * head
    flops += (
        n
        * (context + (tokens + 1) / 2)
        * c.num_hidden_layers
        * attention_flops(
            c, absorbed=(tokens == 1 or verify) and backend.attention in ("absorbed", "triton")
        )
    )
    return Work(weight_bytes, (rows * context + n) * per_token, flops)


def attention_flops(config: Config, *, absorbed: bool) -> float:
    """Operations of one query against one key in one layer, all heads: scores and weighted sum."""
    c = config
    per_head = (
        c.attention.latent_dim + c.attention.kv_lora_rank
        if absorbed
        else c.attention.qk_head_dim + c.attention.v_head_dim
    )
    return 2.0 * c.attention.num_attention_heads * per_head


def expected_experts(config: Config, rows: int) -> float:
    """How many experts `rows` tokens hit if each chooses uniformly: E (1 - (1 - K/E)^B)."""
    experts = config.experts.n_routed_experts
    return (
        experts * (1 - (1 - config.experts.num_experts_per_tok / experts) ** rows)
        if experts
        else 0.0
    )


@dataclass(frozen=True)
class Speculation:
    """What a turn of speculate.py moves and computes, beside a step that gives each row one
    token."""

    plain: Work
    verify: Work
    draft: Work
    drafts: int

    @property
    def turn(self) -> Work:
        return self.verify + self.draft

    def speedup(self, tokens: float) -> float:
        """What a turn that gives `tokens` tokens a row is worth by its bytes alone."""
        return tokens * self.plain.nbytes / self.turn.nbytes

    def pays_from(self) -> float | None:
        """The acceptance from which turns are worth more than steps, by bytes alone; None where
        even 1 is not enough."""
        if self.speedup(self.drafts + 1) <= 1:
            return None
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (low, middle)
                if self.speedup(expected_tokens(middle, self.drafts)) > 1
                else (middle, high)
            )
        return high


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens a turn gives if each draft is accepted with this probability when those before it
    were: 1 + a + ... + a^k."""
    return sum(acceptance**number for number in range(drafts + 1))


def speculation(config: Config, backend: Backend, rows: int, context: float) -> Speculation:
    """The byte model of a resolved backend that speculates, with `context` tokens cached in each
    row.

    Tokens are taken to choose experts uniformly and each for itself. In truth neighbours share
    some, and the verification reads less."""
    drafts = backend.draft_tokens
    tokens = drafts + 1
    return Speculation(
        step_work(config, backend, rows, 1, context, expected_experts(config, rows)),
        step_work(
            config,
            backend,
            rows,
            tokens,
            context,
            expected_experts(config, rows * tokens),
            verify=True,
        ),
        draft_work(config, backend, rows, context),
        drafts,
    )


def draft_work(config: Config, backend: Backend, rows: int, context: float) -> Work:
    """A turn's drafts: one pass of the MTP layer over the k + 1 tokens that were judged, k - 1 over
    a single one more, and each with the output head."""
    c, storage = config, DTYPES[backend.dtype]
    sparse = c.is_moe(c.num_hidden_layers)
    dense_ffn = (
        c.experts.n_shared_experts * expert_weights(c)
        if sparse
        else 3 * c.hidden_size * c.intermediate_size
    )
    every_token = 2 * c.hidden_size**2 + attention_weights(c) + dense_ffn
    gate = c.experts.n_routed_experts * c.hidden_size if sparse else 0
    chosen = c.experts.num_experts_per_tok * expert_weights(c) if sparse else 0
    head = c.vocab_size * c.hidden_size
    per_token = bytes_per_token(c, storage, full=backend.attention == "naive", layers=1)
    attention = attention_flops(c, absorbed=backend.attention == "absorbed")
    weight_bytes = cache_bytes = flops = 0.0
    for tokens in [backend.draft_tokens + 1] + [1] * (backend.draft_tokens - 1):
        n = rows * tokens
        hit = expected_experts(c, n) * expert_weights(c) if sparse else 0
        weight_bytes += (every_token + hit + head + n * c.hidden_size) * storage.itemsize + gate * 4
        cache_bytes += (rows * context + n) * per_token
        flops += (
            2.0 * n * (every_token + gate + chosen)
            + 2.0 * rows * head
            + n * (context + (tokens + 1) / 2) * attention
        )
    return Work(weight_bytes, cache_bytes, flops)


@dataclass(frozen=True)
class Rates:
    """What this machine does, measured: bytes/s of a large copy (read + written), FLOP/s of a large
    matrix product."""

    copy: float
    matmul: float
    launch: float
    """Seconds that one more tiny kernel costs in eager mode; 0 on a CPU, where nothing is
    launched."""
    replay: float
    """The same inside a CUDA graph."""

    def seconds(self, work: Work) -> float:
        """The floor for one step: bytes or operations, whichever takes longer."""
        return max(work.nbytes / self.copy, work.flops / self.matmul)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (a CPU: 128 MiB)."""
    source = torch.zeros(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def measure_rates(device: torch.device, dtypes: Iterable[str]) -> dict[str, Rates]:
    """Measure the device, matrix products in each of `dtypes` ("bf16", ...); some seconds."""
    gpu, copy = device.type == "cuda", copy_rate(device)
    size = 8192 if gpu else 1024
    matmul = {}
    for dtype in dtypes:
        square = torch.randn(size, size, device=device).to(DTYPES[dtype])
        matmul[dtype] = 2 * size**3 / _best(partial(torch.mm, square, square), device)
    launch, replay = _launches(device) if gpu else (0.0, 0.0)
    return {dtype: Rates(copy, rate, launch, replay) for dtype, rate in matmul.items()}


def _launches(device: torch.device) -> tuple[float, float]:
    """Seconds of one more tiny kernel, eager and inside a graph."""
    tiny = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1)

    graph = torch.cuda.CUDAGraph()
    many()
    with torch.cuda.graph(graph):
        many()
    return _best(many, device) / 1000, _best(graph.replay, device) / 1000


def bottleneck(
    work: Work, rates: Rates, kernels: int | None, captured: bool, seconds: float
) -> str:
    """What a step of `seconds` waits for: the largest of the times for memory, compute and launches
    (kernels x gap).

    On a CPU launches are not counted, and what the other two leave unexplained is the framework's.
    """
    parts = {"memory": work.nbytes / rates.copy, "compute": work.flops / rates.matmul}
    if kernels is not None:
        parts["launches"] = kernels * (rates.replay if captured else rates.launch)
    elif max(parts.values()) < seconds / 2:
        return "framework"
    return max(parts, key=lambda name: parts[name])


def _best(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls: a ceiling is what the machine can do, not what it did
    on average."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
