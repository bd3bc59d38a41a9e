"""The checkpoint that is quantized: its layers, read one at a time.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from r1 import Backend, InputError, build
from r1.device import DTYPES, torch_device
from r1.files.config_json import load_config
from r1.files.folder import check_folder
from r1.files.layouts import tensors_of
from r1.files.load import read, survey
from r1.files.names import key_of, slots
from r1.files.quantized import methods
from r1.files.shards import DTYPES as FILE_DTYPES
from r1.files.shards import one
from r1.model.config import GroupedShape
from r1.model.mtp import MTPLayer
from r1.model.rope import frequencies
from r1.model.step import Step
from r1.model.transformer import Block
from r1.reading import read_json
from r1.switches.resolve import resolve


class Source:
    """A model without memory for its weights, and the files from which a layer can be read."""

    def __init__(self, directory: Path, device: str = "cpu", dtype: str = "fp32") -> None:
        """`dtype` is that of the layer in memory. Raises InputError for unusable files."""
        self.directory, self.config = directory, load_config(directory)
        check_folder(directory)
        if isinstance(self.config.attention, GroupedShape):
            raise InputError(
                f"{directory} has grouped-query attention, and this tool takes only models with "
                "latent attention: use llm-compressor, whose files r1 reads, or quantize while "
                "loading (--quant)"
            )
        if self.config.files.kind == "int4":
            raise InputError(
                f"{directory} is quantized to 4 bits already: start from the model's own "
                "repository, in bf16 or FP8 blocks"
            )
        if self.config.files.left_out:
            raise InputError(
                f"{directory} holds parts that r1 does not read, and a copy would lack them: "
                "start from a model of text without an indexer"
            )
        declared = methods.declared_in(directory)
        entries = tensors_of(directory, unlisted=declared is not None and declared.unlisted)
        self.versions = {e.path.name: e.version for e in entries.values()}
        last = f"model.layers.{self.config.num_hidden_layers}."
        mtp = self.config.num_nextn_predict_layers > 0 and any(k.startswith(last) for k in entries)
        if mtp and self.config.num_nextn_predict_layers > 1:
            raise InputError(
                f"{directory} has {self.config.num_nextn_predict_layers} layers for multi-token "
                "prediction, and this tool knows models with one: set num_nextn_predict_layers = 0"
            )
        experts = "loop" if self.config.experts.n_routed_experts else "auto"
        asked = Backend(device=device, dtype=dtype, join="off", quant="none", prefill_moe=experts)
        self.backend = resolve(asked, self.config)
        self.device = torch_device(self.backend.device)
        model = build.sketch(self.config, self.backend, mtp=mtp)
        self.model = build.finish(model, self.backend)
        frequency = frequencies(self.config.attention).to(self.device)
        self.model.register_buffer("frequency", frequency, persistent=False)
        self.survey = survey(self.model, directory)
        self.entries = entries
        raw = read_json(directory / "config.json")
        name = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        self.kept = known.get(str(name), torch.bfloat16)

    @property
    def layers(self) -> int:
        """The decoder's layers and those for multi-token prediction."""
        return self.config.num_hidden_layers + len(self.model.mtp)

    def path(self, layer: int) -> str:
        """The module of a layer's block."""
        extra = layer - self.config.num_hidden_layers
        return f"layers.{layer}" if extra < 0 else f"mtp.{extra}.block"

    def stem(self, layer: int) -> str:
        """What the checkpoint's names of a layer begin with."""
        return key_of(self.path(layer), self.model)

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[list[nn.Module]]:
        """Modules of the model with their weights, which are forgotten at the end."""
        modules = [self.model.get_submodule(path) for path in paths]
        for module in modules:
            module.to_empty(device=self.device)
        try:
            inside = {k: s for k, s in slots(self.model).items() if not s.weight.is_meta}
            with torch.device("cpu"):  # safetensors maps files to the caller's default device
                read(self.survey, inside, quiet=True)
            yield modules
        finally:
            for module in modules:
                module.to_empty(device="meta")

    @contextmanager
    def block(self, layer: int) -> Iterator[Block]:
        """One layer's block."""
        with self.loaded(self.path(layer)) as (block,):
            yield cast(Block, block)

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype in which a weight that is not quantized is written.

        As it was; or, where the files have it quantized, the one that config.json names.
        """
        plain = self.survey.files.plain.get(key)
        return self.kept if plain is None else FILE_DTYPES[plain.dtype]

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no layer's block, one by one, as they are written.

        The multi-token-prediction layer's own parts are among them, and the copies of the embedding
        and the output head that its files have.
        """
        files = self.survey.files
        found = files.found
        packed = {e.key for each in found.values() for e in each.tensors.values()}
        packed |= {*files.unused, *(entry.key for entry in files.biases)}
        stems = [self.stem(layer) for layer in range(self.layers)]

        def outside(key: str) -> bool:
            return all(not key.startswith(f"{s}.") or _beside(key, s) for s in stems)

        for key, entry in self.entries.items():
            if key not in packed and (outside(key) or key not in self.survey.readings):
                yield key, one(entry)
        for key, each in found.items():
            if outside(key):
                values = {ending: one(entry) for ending, entry in each.tensors.items()}
                rows, columns = self.survey.readings[key].shape
                dense = each.format.dense(values, each.spec, (rows, columns), each.declared)
                yield key, dense.to(self.kept)

    def step(self, tokens: Tensor) -> Step:
        """A call that reads whole rows, (B, S), on the source's device."""
        positions = torch.arange(tokens.shape[1], device=self.device).expand(*tokens.shape)
        return self.model.step("prefill", positions, 0)

    @torch.inference_mode()
    def embedded(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token ids (B, S) each -> what the first layer reads, (B, S, D) on the CPU."""
        with self.loaded("embed_tokens") as (embedding,):
            return [embedding(tokens.to(self.device)).cpu() for tokens in batches]

    @torch.inference_mode()
    def drafting(self, tokens: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the block of the multi-token-prediction layer reads, (B, S, D) each on the CPU.

        `hidden` is the last decoder layer's output. A row's last token has none after it: its entry
        means nothing.
        """
        parts = [f"mtp.0.{name}" for name in ("enorm", "hnorm", "eh_proj")]
        with self.loaded("embed_tokens", "norm", *parts):
            layer, out = cast(MTPLayer, self.model.mtp[0]), []
            for ids, x in zip(tokens, hidden, strict=True):
                following = ids.roll(-1, dims=1).to(self.device)
                both = (
                    layer.enorm(self.model.embed_tokens(following)),
                    layer.hnorm(self.model.norm(x.to(self.device))),
                )
                out.append(layer.eh_proj(torch.cat(both, dim=-1)).cpu())
            return out


def _beside(key: str, stem: str) -> bool:
    """Whether a layer's tensor is none of its block's."""
    parts = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")
    return key.removeprefix(f"{stem}.").split(".")[0] in parts
