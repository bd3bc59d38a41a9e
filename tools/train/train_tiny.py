"""Train tiny-r1, the embedded checkpoint, from scratch, with r1's own model.

    # one large GPU, four minutes
    python tools/train/train_tiny.py /tmp/tiny-r1 --steps 3000 --fp8-from 0.8 --compile
    # a CPU
    python tools/train/train_tiny.py /tmp/facts --kinds fact --layers 2 --steps 300 \\
        --rows 4 --length 320 --examine 0

Three parts of the recipe come from V3's paper (arXiv 2412.19437):

- the gate's bias balances the experts, instead of an auxiliary loss (section 2.1.2)
- the MTP layer adds a second loss (section 2.2)
- the weights are stored as FP8 blocks (section 3.3)

Muon trains the matrices, and AdamW all other parameters. The learning rate rises, stays constant,
and falls linearly. The result is a folder in R1's own format, with a model card.

Shapes: B rows, S tokens of a row, N = B S, K experts per token, E experts, D hidden_size,
W vocab_size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from card import card
from eval import examine, report
from make_exam import make_exam
from make_tokenizer import make_tokenizer
from muon import Muon
from packing import IGNORE, Batches, layout, shift
from rounding import Rounding
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tasks import KINDS, add_kinds
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import r1
from r1 import Backend, InputError, build
from r1.device import torch_device
from r1.files.save import save
from r1.model.config import Config
from r1.model.dispatch import Dispatch
from r1.model.moe import Experts, MoE, Run
from r1.model.shapes import shape
from r1.model.transformer import Transformer
from r1.switches import flags
from r1.switches.backend import choices
from r1.switches.resolve import resolve
from r1.text.control_tokens import PAD
from r1.text.tokenizer import Tokenizer
from r1.writing import new_file

WARM_UP, DECAY = 50, 0.5
"""The learning rate rises for WARM_UP steps. It falls to 0 from the share DECAY of the run on."""
MTP_WEIGHTS = 0.3, 0.1
"""The weight of the MTP loss before and during the decay, as in V3 (section 4.2)."""
SHARD_BYTES = 10**6
SAVE_SECONDS, LOG_SECONDS = 60, 5


@dataclass(frozen=True)
class Settings:
    """The settings of a run. A state that was saved under other settings can't be continued."""

    seed: int = 0
    steps: int = 0
    """The length of the run; 0: `minutes` is its length."""
    minutes: float = 0.0
    rows: int = 128
    length: int = 512
    """Tokens of a row."""
    kinds: tuple[str, ...] = tuple(KINDS)
    layers: int | None = None
    """Only the first layers of the shape; None: all."""
    direct: float = 0.1
    """The share of examples that are answered without thinking. So the model learns that too."""
    lr: float = 5e-3
    weight_decay: float = 0.1
    bias_speed: float = 5e-3
    """The step size of the gate's bias. It follows the learning rate's schedule."""
    fp8_from: float = 1.0
    """From this share of the run on, the weights are rounded as FP8 storage does; 1: never."""
    amp: str = "off"
    compile: bool = False


def schedule(step: int, progress: float) -> float:
    """The learning rate relative to its peak, after `step` steps, at `progress` (0 to 1)."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - progress) / (1 - DECAY)))


class Counted(Dispatch):
    """A strategy for MoE's slot: it runs another one, and counts the tokens of each expert."""

    def __init__(self, dispatch: Run, experts: int, real: Tensor) -> None:
        """`real`, bool (N,): which tokens of the step are no padding."""
        self.dispatch, self.real = dispatch, real
        self.load = torch.zeros(experts, device=real.device)

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        numbers = torch.arange(self.load.shape[0], device=x.device)
        chosen = indices[..., None] == numbers  # (N, K, E)
        self.load.add_((chosen & self.real[:, None, None]).sum(dim=(0, 1)))
        return self.dispatch(experts, x, indices, weights)


class Balance:
    """Balancing without an auxiliary loss: a step raises the bias of experts with too few tokens.

    It lowers the bias of those with too many. The bias changes only the choice of experts, so it
    has no gradient (V3 paper, section 2.1.2). Padding tokens do not count.
    """

    def __init__(self, model: Transformer, real: Tensor) -> None:
        """`real`, bool (N,): which tokens of the step are no padding."""
        self.real = real
        experts = model.config.experts.n_routed_experts
        self.layers: list[tuple[MoE, Counted]] = []
        for module in model.modules():
            if isinstance(module, MoE):
                counted = Counted(module.dispatch["prefill"], experts, real)
                module.dispatch["prefill"] = counted
                self.layers.append((module, counted))
        self.total = torch.zeros(len(self.layers), experts, device=real.device)
        """The loads since the last `read`, (layers, E)."""

    @torch.no_grad()
    def step(self, speed: float) -> None:
        for row, (moe, counted) in enumerate(self.layers):
            load = counted.load
            moe.gate.e_score_correction_bias.add_((load.mean() - load).sign(), alpha=speed)
            self.total[row] += load
            load.zero_()

    def read(self) -> Tensor:
        """Each expert's load relative to its layer's mean, (layers, E), since the last `read`."""
        relative = self.total / self.total.mean(dim=1, keepdim=True).clamp(min=1)
        self.total = torch.zeros_like(self.total)
        return relative.cpu()


class Trainer:
    """A model, its optimizers, and their progress."""

    def __init__(
        self, config: Config, settings: Settings, tokenizer: Tokenizer, device: str
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        backend = resolve(
            Backend(device=device, dtype="fp32", amp=settings.amp, prefill_moe="grouped"), config
        )
        self.device = torch_device(backend.device)
        self.model = build.allocate(config, backend, mtp=True)
        initialize(self.model, settings.seed)
        build.finish(self.model, backend)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
        self.muon, self.adam = optimizers(self.model, settings)
        real = torch.zeros(settings.rows * settings.length, dtype=torch.bool, device=self.device)
        self.balance = Balance(self.model, real)
        self.rounding = Rounding(self.model)
        self.blocks: list[Callable[..., Tensor]] = list(self.model.layers)
        self.heads: list[Callable[..., Tensor]] = list(self.model.mtp)
        if settings.compile:
            self.blocks, self.heads = (
                [torch.compile(module, fullgraph=True, dynamic=False) for module in modules]
                for modules in (self.model.layers, self.model.mtp)
            )
        self.step, self.seconds = 0, 0.0
        """Steps done, and the time they took."""
        self.history: list[dict[str, float]] = []

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1: by steps if they are given, else by time."""
        s = self.settings
        return self.step / s.steps if s.steps else self.seconds / (60 * s.minutes)

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (B, S) each -> the mean losses (nats a token) of the model and of its MTP layer."""
        model = self.model
        self.balance.real.copy_((tokens != self.tokenizer.control[PAD]).flatten())
        positions, mask = layout(tokens, self.tokenizer.bos_id or 0)
        step = replace(model.step("prefill", positions, 0), starts_rows=False, mask=mask)
        hidden = model(tokens, step, None, self.blocks)
        main = self.cross_entropy(hidden, shift(targets, 1, IGNORE))
        # Each MTP layer also reads the next token. A target in the next example belongs to a
        # question, so it is IGNORE.
        further = []
        for depth, head in enumerate(self.heads, 1):
            hidden = head(model.embed_tokens(shift(tokens, depth, 0)), hidden, step)
            further.append(self.cross_entropy(hidden, shift(targets, depth + 1, IGNORE)))
        return main, torch.stack(further).mean()

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            self.model.lm_head(hidden).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE
        )

    def amp(self) -> AbstractContextManager[Any]:
        if self.settings.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One step. Returns the two losses, on the device."""
        rate = schedule(self.step, self.progress)
        tokens, targets = (part.to(self.device, non_blocking=True).long() for part in batch)
        weight = MTP_WEIGHTS[self.progress >= DECAY]
        with self.rounding.applied() if self.progress >= self.settings.fp8_from else nullcontext():
            with self.amp():
                main, mtp = self.losses(tokens, targets)
            (main + weight * mtp).backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.grad is not None], 1.0
        )
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr * rate
        self.adam.step()
        self.muon.step(self.settings.lr * rate)
        self.balance.step(self.settings.bias_speed * rate)
        self.model.zero_grad()
        self.step += 1
        return main.detach(), mtp.detach()

    def run(self, workers: int, state: Path | None = None) -> None:
        """Train to the end. Print progress from time to time, and save the state to `state`."""
        s = self.settings
        data = Batches(
            self.tokenizer, s.rows, s.length, seed=s.seed, direct=s.direct, kinds=s.kinds
        )
        numbers = range(self.step, s.steps or 10**9)
        batches: Iterator[Any] = iter(
            DataLoader(data, batch_size=None, sampler=numbers, num_workers=workers)
        )
        begun, before = time.monotonic(), self.seconds
        logged, saved, first = begun, begun, self.step
        while self.progress < 1:
            main, mtp = self.train_step(next(batches))
            now = time.monotonic()
            self.seconds = before + now - begun
            if now - logged >= LOG_SECONDS or self.progress >= 1:
                tokens = (self.step - first) * s.rows * s.length
                self.log(float(main), float(mtp), tokens / (now - logged))
                logged, first = now, self.step
            if state and (now - saved >= SAVE_SECONDS or self.progress >= 1):
                self.save_state(state)
                saved = now

    def log(self, main: float, mtp: float, rate: float) -> None:
        """Print a line and add an entry to the history.

        `rate` is in tokens a second, padding included. Raises InputError for an infinite loss or
        NaN.
        """
        if not math.isfinite(main + mtp):
            raise InputError(
                f"the loss is {main} after step {self.step}: "
                f"take a lower --lr than {self.settings.lr}"
            )
        load = self.balance.read()
        entry = {
            "step": self.step,
            "seconds": self.seconds,
            "loss": main,
            "mtp_loss": mtp,
            "tokens_per_s": rate,
        }
        entry |= {"max_load": float(load.max()), "min_load": float(load.min())}
        self.history.append(entry)
        left = self.seconds / max(self.progress, 1e-9) * (1 - min(self.progress, 1.0))
        print(
            f"step {self.step:6d} {self.progress:6.1%}  loss {main:.4f}  mtp {mtp:.4f}  "
            f"{rate / 1e3:7.1f}k tokens/s  "
            f"load {load.min():.2f} to {load.max():.2f}  {left:5.0f} s left",
            flush=True,
        )

    # ------------------------------------------------------------------------------- to resume from
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs: weights, and both optimizers' averages."""
        found = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        found |= {f"muon.{shape}": average for shape, average in self.muon.averages.items()}
        for number, state in self.adam.state_dict()["state"].items():
            found |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
        return found

    def save_state(self, path: Path) -> None:
        """Write the state to `path`, whole or not at all."""
        told = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        tensors = {name: t.contiguous().cpu() for name, t in self.tensors().items()}
        with new_file(path) as partial:
            save_file(tensors, partial, metadata={"told": json.dumps(told)})

    def load_state(self, path: Path) -> None:
        """Go on from `path`. Raises InputError for other files, and for a run of other settings."""
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["told"])
                names = file.keys()  # a safe_open is no dict
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no state of a run ({type(error).__name__}): remove it to start anew"
            ) from None
        ours = json.loads(json.dumps(asdict(self.settings)))
        if other := [name for name in ours if told["settings"].get(name) != ours[name]]:
            raise InputError(
                f"{path} is of a run with another {', '.join(other)}: "
                "use its settings, or remove it"
            )
        numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("adam.")}
        state = {
            n: {k: tensors[f"adam.{n}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            for n in numbers
        }
        self.adam.load_state_dict(
            {"state": state, "param_groups": self.adam.state_dict()["param_groups"]}
        )
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.step, self.seconds, self.history = told["step"], told["seconds"], told["history"]


def optimizers(model: Transformer, settings: Settings) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the projections, AdamW for all other parameters."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            matrices.append(parameter)
        elif parameter.requires_grad:
            rest.append(parameter)
    adam = torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return Muon(matrices, weight_decay=settings.weight_decay), adam


def initialize(model: Transformer, seed: int) -> None:
    """Draw matrices from N(0, 1 / fan-in), so that activations keep their size.

    The rows of the embedding are as long as a hidden state.
    """
    build.randomize(model, seed)  # N(0, 0.02^2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter.shape[-1] ** -0.5 / 0.02)


def finish(trainer: Trainer, directory: Path, examined: int) -> dict[str, Any]:
    """Write the checkpoint, load and examine it as a user would, and write its model card.

    `examined` is the number of problems. Returns the content of training.json.
    """
    save(trainer.model, directory, shard_bytes=SHARD_BYTES, dtype=torch.bfloat16)
    make_tokenizer(directory)
    make_exam(directory)
    machine = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "a CPU"
    record: dict[str, Any] = {
        "settings": asdict(trainer.settings), "steps": trainer.step, "seconds": trainer.seconds,
        "history": trainer.history, "torch": torch.__version__, "machine": machine,
        "parameters": build.parameters(trainer.model),
    }  # fmt: skip
    if examined:
        backend = Backend(device="cpu" if machine == "a CPU" else "auto", dtype="fp32")
        engine = r1.load(directory, backend, batch=examined, mtp=True)
        record["figures"] = examine(engine, examined)
        print(report(record["figures"]))
    (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card(record), encoding="utf-8")
    return record


def parser() -> argparse.ArgumentParser:
    d = Settings()
    p = shared.parser(__doc__)
    p.add_argument("directory", type=Path, help="the checkpoint, a new folder")
    p.add_argument("--steps", type=int, default=0, metavar="N", help="length of the run")
    p.add_argument(
        "--minutes", type=float, default=0.0, help="length of the run, instead of --steps"
    )
    p.add_argument("--seed", type=flags.seed, default=d.seed, help=f"default {d.seed}")
    p.add_argument(
        "--rows", type=int, default=d.rows, metavar="N", help=f"rows of a batch (default {d.rows})"
    )
    p.add_argument(
        "--length",
        type=int,
        default=d.length,
        metavar="N",
        help=f"tokens of a row (default {d.length})",
    )
    add_kinds(p, list(KINDS))
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers of tiny")
    p.add_argument("--lr", type=float, default=d.lr, help=f"peak learning rate (default {d.lr})")
    p.add_argument(
        "--fp8-from",
        type=float,
        default=d.fp8_from,
        metavar="SHARE",
        help="round the weights as FP8 from this share of the run on (default 1: never)",
    )
    p.add_argument("--device", choices=choices()["device"], default="auto", help="default auto")
    p.add_argument(
        "--amp",
        choices=("auto", "off", "bf16"),
        default="auto",
        help="autocast; auto, the default, is bf16 on a GPU",
    )
    p.add_argument("--compile", action="store_true", help="compile each block")
    add_files(p)
    return p


def add_files(p: argparse.ArgumentParser) -> None:
    """The flags that do not change the training itself."""
    workers = min(12, (os.cpu_count() or 1) - 1)
    p.add_argument(
        "--workers",
        type=int,
        default=workers,
        metavar="N",
        help=f"processes that make batches (default {workers})",
    )
    p.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="save the run's state there; if the file exists, continue from it",
    )
    p.add_argument(
        "--examine",
        type=int,
        default=1000,
        metavar="N",
        help="ask N held-out problems at the end (default 1000; 0: none)",
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    return shared.run(__file__, work, parser().parse_args(argv))


def work(a: argparse.Namespace) -> int:
    if bool(a.steps) == bool(a.minutes) or a.steps < 0 or a.minutes < 0:
        raise InputError("how long? give either --steps or --minutes, more than 0")
    if a.directory.exists():
        raise InputError(f"{a.directory} exists already: name a new folder")
    on_gpu = a.device in ("cuda", "rocm") or (a.device == "auto" and torch.cuda.is_available())
    settings = Settings(
        seed=a.seed, steps=a.steps, minutes=a.minutes, rows=a.rows, length=a.length,
        kinds=tuple(a.kinds), layers=a.layers, lr=a.lr, fp8_from=a.fp8_from,
        amp=("bf16" if on_gpu else "off") if a.amp == "auto" else a.amp, compile=a.compile,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch))
        tokenizer = Tokenizer.load(Path(scratch))
    trainer = Trainer(shape("tiny", a.layers), settings, tokenizer, a.device)
    if a.state and a.state.exists():
        trainer.load_state(a.state)
    trainer.run(a.workers, a.state)
    finish(trainer, a.directory, a.examine)
    print(f"written: {a.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
