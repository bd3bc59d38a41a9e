"""The fields of a row, and their units.

A row is flat. If an arm can't run, its row says why in `refused`, and has only the fields that
identify it. If parity fails there is no speed-up: a wrong answer has no speed.
"""

from __future__ import annotations

SCHEMA = 1
"""The version of the result files. A file of another version is refused."""
FIELDS: dict[str, str] = {
    "arm": "the switches that are on",
    "kind": "baseline, alone, together, ladder (with all rungs before it), all-but-one",
    "model": "the name of the checkpoint's folder, or the shape of random weights",
    "batch": "rows decoded together",
    "prompt": "tokens of each row's prompt",
    "new": "new tokens of each row",
    "depth": "tokens in the cache before the prompt",
    "refused": "why this arm can't run here; null if it can, and then the other fields are there",
    "crashed": "true if the arm should have run and broke down: a defect",
    "ttft_ms": "time to the first token, median",
    "tpot_ms": "(end to end - TTFT) / (new - 1), median over repetitions",
    "tpot_p90_ms": (
        "90th percentile of the single steps of all repetitions; a step of speculation gives "
        "several tokens"
    ),
    "tpot_p99_ms": "99th percentile of the same",
    "tpot_low_ms": (
        "lower end of the 95% interval of a step's mean time, by a bootstrap of repetitions and of "
        "their steps (interval.py); null with one repetition, and with speculation"
    ),
    "tpot_high_ms": "its upper end",
    "interactive": (
        "true if the medians keep the limits that MLPerf Inference sets for DeepSeek-R1's "
        "interactive scenario: TTFT 1.5 s, TPOT 15 ms (there of the 99th percentile of requests)"
    ),
    "decode_tok_s": "batch / TPOT",
    "prefill_tok_s": "batch x prompt / TTFT",
    "speedup": (
        "the baseline's tpot_ms / this arm's, as both stand in the table; null if one of the two "
        "fails parity"
    ),
    "speedup_low": (
        "smallest of that and of the repetitions' own ratios, each to the baseline's repetition "
        "beside it; null with one repetition"
    ),
    "speedup_high": "largest of these",
    "within_noise": (
        "true if 1 lies between the two; null with one repetition, which has no spread"
    ),
    "beside_ms": (
        "the baseline's TPOT in the repetitions that ran in turn with this arm's, median; where "
        "it differs from the baseline's tpot_ms, the machine's speed changed during the run"
    ),
    "acceptance": "share of drafts that were accepted, all repetitions; null without speculation",
    "acceptance_by_place": (
        "of each draft of a step, how often it was accepted if those before it were; null without "
        "speculation and in older results"
    ),
    "assumed": (
        "the probability with which drafts were accepted at random, not by the model: the "
        "row's text means nothing"
    ),
    "tokens_per_step": (
        "new tokens per step and row, of rows that were not done; 1 without speculation"
    ),
    "predicted_speedup": (
        "the speed-up of this many tokens per step over steps of one token, from the bytes "
        "moved alone"
    ),
    "pays_from": (
        "the acceptance from which that is more than 1; null if even accepting all drafts "
        "would not pay"
    ),
    "floor_ms": (
        "the least TPOT that the measured copy bandwidth and matmul rate allow for this "
        "step's bytes and FLOPs, and those of the link and the drive for its experts"
    ),
    "mbu": (
        "bytes that a step must move / time of a step (TPOT, without speculation) / measured "
        "copy bandwidth"
    ),
    "mfu_prefill": "FLOPs of the prompt / TTFT / measured matmul rate",
    "bottleneck": (
        "what limits a step: memory, compute, launches (kernels x gap), link (copies from host "
        "memory), disk (reads of files), host (reads of its memory, to multiply) or, on a CPU, "
        "framework"
    ),
    "step_gb": (
        "bytes that a step must move; with speculation those of a verification and its "
        "drafts, for uniform routing"
    ),
    "moe_layer_us": (
        "one MoE layer of a decode step, with its attention, run as this arm runs its steps, in a "
        "row of at least 16 where its weights are cold; null without one"
    ),
    "moe_layer_floor_us": "the least time that the measured rates allow for it",
    "experts_hit": (
        "different experts that a MoE layer uses in a step of one token per row, on average, "
        "as the reference routed"
    ),
    "expert_hits": (
        "with experts in host memory: share of the experts visited by decode steps that lay in a "
        "slot of the device, or were on their way; null without"
    ),
    "expert_hits_even": "the same, if choices were even and independent: slots / experts",
    "expert_hits_recorded": (
        "the same, if slots held what --routing FILE tells as chosen most; null without a file"
    ),
    "expert_slots": "experts of each layer that the device holds",
    "guesses_right": "share of the experts fetched early that were chosen; null without guesses",
    "link_mb": "MB that a decode step copies from host memory",
    "link_share": "these / time of a step / measured rate of copies from pinned host memory",
    "prompt_link_share": "the same of the prompt: its copies / TTFT / the measured rate",
    "host_computed": (
        "with --experts cpu: share of the experts visited by decode steps that the host multiplied"
    ),
    "host_mb": "MB of host memory that a decode step reads for them",
    "host_share": "these / time of a step / measured rate of reading host memory",
    "disk_mb": "MB that a decode step reads from the checkpoint's files, with experts on a disk",
    "disk_share": (
        "these / time of a step / rate of the same reads without a model, measured right after "
        "each repetition; of all repetitions together"
    ),
    "prompt_disk_share": (
        "the same of the prompt, by the rate of the steps' reads; where steps read nothing, by the "
        "rate from files of the heading, measured once at the start"
    ),
    "kernels": "kernels of one decode step; null on a CPU",
    "kernel_times": (
        "the microseconds that each of them adds to the step (timeline.py), as profiled; null "
        "on a CPU"
    ),
    "exchange_ms": (
        "time of the kernels that exchange numbers among devices, in one decode step, as profiled, "
        "waiting for the others included; null on a CPU and without several devices"
    ),
    "exchange_exposed": "share of the step that they add to it: no other kernel ran meanwhile",
    "exchange_mb": "MB that a device hands to them in a decode step: its parts of sums and logits",
    "allocated_gb": "peak of the GPU's allocator; null on a CPU",
    "reserved_gb": "peak of what it took from the GPU; null on a CPU",
    "host_gb": "peak of the process's resident memory, from its start to the last repetition",
    "start_cold_s": (
        "first call - second, with nothing cached (except the test of the CPU): compilation "
        "and capture; null without either"
    ),
    "start_warm_s": (
        "the same in a new process that finds the code the first one compiled; null without "
        "--warm-start"
    ),
    "break_even_tokens": (
        "decode steps after which the cold start has paid for itself; null if it never does, or "
        "if the speed-up is noise"
    ),
    "parity": (
        "true if median_kl, mean_kl, excess and outliers are all within their bounds, and there "
        "are no wrong_tokens (../parity.py)"
    ),
    "kl_bound": (
        "the largest median_kl that passes: the KL that rounding to this arm's dtype "
        "explains, measured on this model and text"
    ),
    "mean_kl_bound": "the largest mean_kl that passes; null in older results",
    "median_kl": (
        "nats, of the median position; null in older results, whose kl_bound is for mean_kl"
    ),
    "mean_kl": "nats, next-token distributions against the fp32 eager reference on the same tokens",
    "excess": (
        "KL in units of what rounding makes at the same position, median of all or of the late "
        "positions, whichever is worse; 1 is the most that passes; null in older results"
    ),
    "outliers": (
        "positions with a KL far above the largest that rounding makes there; null in older results"
    ),
    "outliers_bound": "the most outliers that pass; null in older results",
    "max_logit_diff": "largest difference of one logit",
    "top1": "share of positions where both give the same token the highest logit",
    "positions": "how many positions were compared",
    "quant_kl": (
        "what quantizing cost: mean_kl against the original weights, where parity and the fields "
        "before it compare a quantized arm with its own weights, dequantized; null if it has none"
    ),
    "quant_top1": "top1 against the original weights",
    "same_text": (
        "share of the reference's greedy text that this arm wrote before its first other "
        "token; null if acceptance is assumed"
    ),
    "wrong_tokens": (
        "of the greedy text that this arm writes with drafts, accepted by the model in any case: "
        "tokens that its own steps, which read this text, would not choose; null without "
        "speculation and in older results"
    ),
    "accuracy": (
        "share of held-out problems (the checkpoint's exam.json) with a right answer, greedy; "
        "null if none was asked"
    ),
    "problems": "how many were asked, the same in all arms; null if none was",
    "load_s": "seconds to load or make the model",
    "sm_mhz": "GPU clock after the last repetition, if it can be read",
    "power_w": "GPU power at the same time",
    "mean_power_w": (
        "the GPU's mean power over decode steps of two seconds, by its own counter of energy; null "
        "without one, with speculation, and where devices share the model"
    ),
    "joules_per_token": "energy of these steps / tokens of all rows",
    "predicted": "true: r1.guide predicted this row, and nothing was measured",
    "backend": "every switch as it was resolved",
    "repetitions": "raw: TTFT and total seconds of each repetition",
}
NESTED = ("acceptance_by_place", "kernel_times", "backend", "repetitions")
"""Fields that are lists or objects, which csv leaves out."""
ALWAYS = (
    "ttft_ms",
    "tpot_ms",
    "floor_ms",
    "bottleneck",
    "experts_hit",
    "host_gb",
    "mean_kl",
    "kl_bound",
    "max_logit_diff",
    "top1",
)
"""Fields that are never null in a row that is not refused."""
