"""A quantization from start to end: layer by layer, to be continued where it was killed.

While it runs, all it has made is in a folder OUT.quantizing beside OUT (work_folder.py). That
folder has no config.json, so no program takes it for a checkpoint. OUT appears when everything is
complete.

| file in it | what it holds |
|---|---|
| plan.json | the settings, and the version of each file that is read |
| rows.safetensors | the calibration's tokens |
| hidden-N.safetensors | what layer N reads, of all rows |
| layer-N.safetensors | layer N as it will be in OUT |
| layer-N.json | what is reported of layer N. It is written last, and tells that N is done |
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from quantizing.formats import FORMATS
from quantizing.layer import Batch, Calibrated, Done, batches, experts_of, paths, quantize
from quantizing.rounding import Grid, expert_of
from quantizing.sites import matrix
from quantizing.source import Source
from quantizing.work_folder import (
    read_list,
    read_rows,
    work_folder,
    write_json,
    write_list,
    write_rows,
    write_tensors,
)
from r1 import InputError
from r1.files.folder import files_in
from r1.files.names import slots
from r1.files.quantized.methods import MODELOPT
from r1.files.shards import INDEX, some
from r1.model.mla import MLA
from r1.model.transformer import Block
from r1.reading import read_json
from r1.switches.precision import KEPT
from r1.writing import new_folder

COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""The endings of small files that go with a checkpoint: its tokenizer, its generation settings."""
NOT_COPIED = ("config.json", INDEX, MODELOPT, "training.json")
SHARD_BYTES = 5 * 10**9
Say = Callable[[str], object]
Report = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be made."""

    method: str
    grid: Grid
    format: str = "compressed-tensors"
    experts_only: bool = False
    text: str = ""
    """What the calibration reads, in words. Another text is another plan."""


@dataclass
class Choice:
    """Which matrices are quantized."""

    quantized: dict[int, list[str]] = field(default_factory=dict)
    """Of each layer, their paths in the block."""
    kept: list[str] = field(default_factory=list)
    """The checkpoint's names of all other modules that multiply."""
    widths: dict[int, list[str]] = field(default_factory=dict)
    """The checkpoint's names of the quantized ones, by the columns of a group (0: a whole row)."""
    unfit: dict[str, list[str]] = field(default_factory=dict)
    """Those that the format can't hold, by the reason."""

    def cautions(self) -> list[str]:
        """What the user should know, a line each."""
        lines = [
            f"not quantized, because {why}: {some(names)}" for why, names in self.unfit.items()
        ]
        sizes = [w for w, names in self.widths.items() if any(".experts." in n for n in names)]
        if len(sizes) > 1:
            told = " and ".join(f"{size} columns" if size else "a whole row" for size in sizes)
            same = math.gcd(*sizes) if all(sizes) else 0
            lines.append(
                f"experts have groups of {told}: r1 reads that, but transformers wants one size "
                f"(--group {same})"
            )
        return lines


def choose(source: Source, plan: Plan) -> Choice:
    """Look at every matrix of the model. Raises InputError if none can be quantized."""
    if plan.experts_only and not source.config.experts.n_routed_experts:
        raise InputError(f"--experts-only: {source.directory} has no experts: leave it out")
    out, form = Choice(kept=["lm_head"]), FORMATS[plan.format]
    for layer in range(source.layers):
        block = cast(Block, source.model.get_submodule(source.path(layer)))
        stem = source.stem(layer)
        out.quantized[layer] = []
        if isinstance(block.self_attn, MLA):
            out.kept.append(f"{stem}.self_attn.kv_b_proj")
        if block.sparse:
            out.kept.append(f"{stem}.mlp.gate")
        for path in paths(block):
            rows, columns = matrix(block, path).shape[-2:]
            why = form.why_not(rows, columns, plan.grid)
            wanted = path.rpartition(".")[2] not in KEPT
            wanted = wanted and (experts_of(path) or not plan.experts_only)
            names = [f"{stem}.{name}" for name in modules(block, path)]
            if wanted and why is None:
                out.quantized[layer].append(path)
                width = plan.grid.spec(columns).columns
                out.widths.setdefault(width, []).extend(names)
            else:
                out.kept += names
                if wanted and why:
                    out.unfit.setdefault(why, []).append(f"{stem}.{path}")
    for depth in range(len(source.model.mtp)):
        stem = source.stem(source.config.num_hidden_layers + depth)
        out.kept += [f"{stem}.eh_proj", f"{stem}.shared_head.head"]
    if not out.widths:
        why = next(iter(out.unfit), "it has none that are quantized")
        raise InputError(
            f"{source.directory}: no matrix can be written as {plan.format} ({why}): give another "
            "--group or --format"
        )
    return out


def modules(block: Block, path: str) -> list[str]:
    """The checkpoint's modules of a path: a stack of experts is as many."""
    if not experts_of(path):
        return [path]
    stack, _, name = path.rpartition(".")
    ids = cast(Any, block.get_submodule(stack)).ids
    return [f"{stack}.{expert}.{name}" for expert in ids]


def run(
    source: Source, target: Path, plan: Plan, rows: Callable[[], list[list[int]]], say: Say = print
) -> list[Report]:
    """Write the checkpoint `target`; returns a report for each layer.

    `rows` gives the calibration's tokens; it is not called where none are needed, or where a killed
    run has them. Raises InputError.
    """
    chosen = choose(source, plan)
    for line in chosen.cautions():
        say(line)
    settings = {**asdict(plan), "files": source.versions, "device": source.backend.device}
    settings["dtype"] = source.backend.dtype
    with work_folder(target, settings) as folder:
        reports = _layers(source, plan, chosen, folder, rows, say)
        with new_folder(target) as partial:
            _assemble(source, plan, chosen, folder, partial)
    say(f"{target}: written")
    return reports


def _layers(
    source: Source, plan: Plan, chosen: Choice, folder: Path,
    rows: Callable[[], list[list[int]]], say: Say,
) -> list[Report]:  # fmt: skip
    """Quantize every layer that is not done yet."""
    reports = [read_json(p) for n in range(source.layers) if (p := _report(folder, n)).exists()]
    first = len(reports)
    if first:
        say(f"going on with layer {first} of {source.layers}")
    calibrated: list[tuple[Tensor, Tensor]] = []
    if plan.method != "rtn" and first < source.layers:
        calibrated = batches(_rows(folder, rows))
        if not _hidden(folder, 0).exists() and not first:
            write_list(_hidden(folder, 0), source.embedded([tokens for tokens, _ in calibrated]))
    start = time.monotonic()
    for layer in range(first, source.layers):
        report = _layer(source, plan, chosen.quantized[layer], layer, calibrated, folder)
        write_json(_report(folder, layer), report)
        _hidden(folder, layer).unlink(missing_ok=True)
        reports.append(report)
        left = (time.monotonic() - start) / (layer + 1 - first) * (source.layers - layer - 1)
        say(f"{told(report, source.layers)}, {left:.0f} s left")
    return reports


def _layer(
    source: Source, plan: Plan, quantized: list[str], layer: int,
    calibrated: list[tuple[Tensor, Tensor]], folder: Path,
) -> Report:  # fmt: skip
    """Quantize one layer, and write it and what the next one reads."""
    start = time.monotonic()
    with source.block(layer) as module, torch.inference_mode():
        _round_kept(source, quantized, layer)
        inputs = _inputs(source, layer, calibrated, folder) if calibrated else []
        block = Calibrated(module, inputs, source.step)
        before = block.output()
        done = quantize(block, plan.method, plan.grid, quantized)
        after = block.output()
        write_tensors(folder / f"layer-{layer}.safetensors", _tensors(source, plan, layer, done))
    if calibrated and layer < source.layers - 1:
        write_list(_hidden(folder, layer + 1), after)
    return {
        "layer": layer,
        "matrices": sum(len(modules(module, path)) for path in quantized),
        "tokens": sum(int(batch.real.sum()) for batch in inputs),
        "expert_tokens": None if done.loads is None else done.loads.tolist(),
        "folded": done.folded,
        "error": _error(inputs, before, after) if inputs else None,
        "seconds": round(time.monotonic() - start, 1),
    }


def told(report: Report, layers: int) -> str:
    """A layer's report as one line."""
    parts = [f"layer {report['layer']} of {layers}: {report['matrices']} matrices"]
    if report["tokens"]:
        parts.append(f"{report['tokens']:,} tokens")
    if loads := report["expert_tokens"]:
        fewest = loads.index(min(loads))
        parts.append(f"{min(loads):,} (expert {fewest}) to {max(loads):,} chosen for an expert")
    if report["folded"]:
        parts.append(f"{len(report['folded'])} inputs scaled")
    if report["error"] is not None:
        parts.append(f"output off by {report['error']:.2%}")
    return ", ".join([*parts, f"{report['seconds']:.1f} s"])


def _error(inputs: list[Batch], before: list[Tensor], after: list[Tensor]) -> float:
    """The relative error of what the layer adds to its input: root mean squares of real tokens."""
    off = total = 0.0
    for batch, b, a in zip(inputs, before, after, strict=True):
        off += float((a - b)[batch.real].float().square().sum())
        total += float((b - batch.hidden)[batch.real].float().square().sum())
    return (off / max(total, 1e-30)) ** 0.5


def _rows(folder: Path, rows: Callable[[], list[list[int]]]) -> list[list[int]]:
    """The calibration's rows: a killed run's, or new ones."""
    path = folder / "rows.safetensors"
    if not path.exists():
        write_rows(path, rows())
    return read_rows(path)


def _inputs(
    source: Source, layer: int, calibrated: list[tuple[Tensor, Tensor]], folder: Path
) -> list[Batch]:
    """What a layer reads. The layer for multi-token prediction reads the next token, too."""
    hidden = read_list(_hidden(folder, layer))
    if layer == source.config.num_hidden_layers:
        hidden = source.drafting([tokens for tokens, _ in calibrated], hidden)
        # A row's last token has none after it.
        calibrated = [(t, real & real.roll(-1, 1).index_fill(1, torch.tensor(-1), False))
                      for t, real in calibrated]  # fmt: skip
    pairs = zip(calibrated, hidden, strict=True)
    return [Batch(tokens, real, x) for (tokens, real), x in pairs]


def _round_kept(source: Source, quantized: list[str], layer: int) -> None:
    """Round what is not quantized to the dtype it is written in: the calibration sees that."""
    stem = source.stem(layer)
    for key, slot in slots(source.model).items():
        if slot.weight.is_meta or _path(key, stem) in quantized:
            continue
        slot.weight.copy_(slot.weight.to(source.dtype_of(key)))


def _path(key: str, stem: str) -> str:
    """A weight's path in its block: that of the stack, for an expert's."""
    parts = key.removeprefix(f"{stem}.").removesuffix(".weight").split(".")
    return ".".join(part for part in parts if not part.isdecimal())


def _tensors(source: Source, plan: Plan, layer: int, done: Done) -> dict[str, Tensor]:
    """A layer's tensors as the checkpoint will hold them."""
    form, stem, out = FORMATS[plan.format], source.stem(layer), {}
    for key, slot in slots(source.model).items():
        if slot.weight.is_meta:
            continue
        module, path = key.removesuffix(".weight"), _path(key, stem)
        if path not in done.codes:
            out[key] = slot.weight.to(source.dtype_of(key)).cpu().contiguous()
            continue
        codes = done.codes[path]
        if experts_of(path):
            codes = expert_of(codes, int(module.split(".")[-2]))
        tensors = form.tensors(codes, plan.grid)
        out |= {f"{module}.{ending}": t.cpu().contiguous() for ending, t in tensors.items()}
    return out


def _assemble(source: Source, plan: Plan, chosen: Choice, folder: Path, out: Path) -> None:
    """Put the layers and all other tensors and files into `out`."""
    shards = [folder / f"layer-{layer}.safetensors" for layer in range(source.layers)]
    for number, tensors in enumerate(_rest(source)):
        shards.append(folder / f"rest-{number}.safetensors")
        write_tensors(shards[-1], tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _link(path, out / name)
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total += path.stat().st_size
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    raw = read_json(source.directory / "config.json")
    raw.pop("compression_config", None)
    form = FORMATS[plan.format]
    raw["quantization_config"] = form.config(plan.grid, chosen.widths, chosen.kept)
    write_json(out / "config.json", raw)
    for path in files_in(source.directory):
        if path.suffix in COPIED and path.name not in NOT_COPIED and path.is_file():
            shutil.copyfile(path, out / path.name)


def _rest(source: Source) -> Iterator[dict[str, Tensor]]:
    """All tensors outside the layers' blocks, some GB at a time."""
    shard: dict[str, Tensor] = {}
    for key, tensor in source.others():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[key] = tensor
    yield shard


def _link(path: Path, new: Path) -> None:
    """Give a file a second name; copy it where the file system has no such names."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def _hidden(folder: Path, layer: int) -> Path:
    return folder / f"hidden-{layer}.safetensors"


def _report(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.json"
