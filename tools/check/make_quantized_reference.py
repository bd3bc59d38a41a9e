"""Make tests/reference/quantized-*: matrices packed by the libraries that define the formats.

    # write the cases of every library that is installed, or one case
    python tools/check/make_quantized_reference.py
    python tools/check/make_quantized_reference.py --only awq-g128
    # make them again and compare them with the stored ones; exit status 1 if one differs
    python tools/check/make_quantized_reference.py --check

The libraries do not all fit into one environment. What is not installed is left as it is, and said:

    compressed-tensors 0.20.0   autoawq 0.2.9 (its source; pip install --no-deps)
    gptqmodel 7.6.0             auto-round 0.16.1         nvidia-modelopt 0.47.0
    amd-quark 0.13              (needs transformers, and a C++ compiler for 20 s)

A file holds one matrix, a few KB. Its tensors are named as in a checkpoint, `m.weight_packed` and
so on. `reference` (out, in) is what the library itself dequantizes them to, in its own dtype. The
metadata has the library's version, and under "config" the quantization_config that a checkpoint in
this format has. The tests need only these files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the packers' CPU code is the reference

import shared
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

OUTPUT = shared.ROOT / "tests" / "reference"
PREFIX = "quantized-"
Made = tuple[dict[str, Tensor], Tensor, dict[str, Any]]
"""A case's tensors by ending, the reference, and the quantization_config."""


@dataclass(frozen=True)
class Case:
    """One matrix in one format."""

    library: str
    """The package's name on PyPI."""
    make: Callable[[], Made]


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix whose rows are of unlike sizes, fp32."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return w * (0.01 + 0.05 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)))


def ranges(w: Tensor, group: int, symmetric: bool, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups) by the largest and the smallest number of each group."""
    parts = w.unflatten(1, (-1, group))
    top, bottom = parts.amax(-1).clamp(min=0), parts.amin(-1).clamp(max=0)
    if symmetric:
        scale = torch.maximum(top, -bottom) / ((2**bits - 1) / 2)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = (top - bottom) / (2**bits - 1)
    return scale, (-bottom / scale).round().clamp(0, 2**bits - 1)


# ---------------------------- compressed-tensors
def compressed(
    name: str, shape: tuple[int, int], dtype: torch.dtype, actorder: bool = False, **arguments: Any
) -> Made:
    """A matrix by one of its compressors; `arguments` are those of its weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    w = weights(*shape, seed=len(name)).to(dtype)
    args = QuantizationArgs(**arguments)
    inputs = None
    if name in ("float-quantized", "int-quantized"):
        kind = "float" if name.startswith("float") else "int"
        inputs = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    state = {"weight": w, **compressed_scales(w, arguments)}
    compressor = BaseCompressor.get_value_from_registry(name)
    packed = compressor.compress(dict(state), scheme)
    reference = compressor.decompress(dict(packed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        },
    }  # fmt: skip
    return {key: value for key, value in packed.items() if value is not None}, reference, config


def compressed_scales(w: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a calibration would have found."""
    strategy, bits = arguments["strategy"], arguments["num_bits"]
    rows, columns = w.shape
    if strategy == "tensor_group":  # NVFP4
        factor = 448 * 6 / w.float().abs().max()
        amax = w.float().abs().unflatten(1, (-1, 16)).amax(-1)
        return {
            "weight_scale": (amax / 6 * factor).to(torch.float8_e4m3fn).to(w.dtype),
            "weight_global_scale": factor.reshape(1),
        }
    if arguments.get("scale_dtype") is not None:  # MXFP4
        amax = w.float().abs().unflatten(1, (-1, 32)).amax(-1)
        return {"weight_scale": torch.exp2(torch.floor(torch.log2(amax)) - 2).to(w.dtype)}
    group: int = arguments["group_size"] if strategy == "group" else columns
    if strategy == "block":
        high, wide = arguments["block_structure"]
        padded = nn.functional.pad(w.float().abs(), (0, -columns % wide, 0, -rows % high))
        amax = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax((1, 3))
        return {"weight_scale": (amax / 448).to(w.dtype)}
    if strategy == "tensor":
        return {"weight_scale": (w.float().abs().max().reshape(1) / 448).to(w.dtype)}
    if arguments["type"] == "float":
        return {"weight_scale": (w.float().abs().amax(1, keepdim=True) / 448).to(w.dtype)}
    symmetric = arguments["symmetric"]
    scale, zero = ranges(w.float(), group, symmetric, bits)
    out = {"weight_scale": scale.to(w.dtype)}
    if not symmetric:
        out["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
    return out


# ---------------------------- AutoAWQ
def awq(rows: int, columns: int, group: int) -> Made:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    w = weights(rows, columns, seed=1)
    scale, zero = ranges(w, group, symmetric=False)
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = ((w.unflatten(1, (-1, group)) / scale[..., None]).round().clamp(
        -zero[..., None], 15 - zero[..., None]
    ) * scale[..., None]).flatten(1)  # fmt: skip
    s, z = scale.T.contiguous().half(), zero.T.contiguous()
    q = WQLinear_GEMM.from_linear(linear.half(), 4, group, scales=s, zeros=z)
    reference = dequantize_gemm(q.qweight, q.qzeros, q.scales, 4, group).T.contiguous()
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
        "zero_point": True, "modules_to_not_convert": None,
    }  # fmt: skip
    return {"qweight": q.qweight, "qzeros": q.qzeros, "scales": q.scales}, reference, config


# ---------------------------- GPTQ
def gptq(
    rows: int,
    columns: int,
    group: int,
    symmetric: bool,
    act_order: bool,
    version: int,
    bits: int = 4,
) -> Made:
    import gptqmodel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    w = weights(rows, columns, seed=2)
    w[3:20:4] = w[3:20:4].abs()  # zero points of 0, from which v1 borrows when it subtracts one
    order = torch.arange(columns)
    if act_order:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
    index = torch.empty(columns, dtype=torch.int32)
    index[order] = (torch.arange(columns) // group).int()
    scale, zero = ranges(w[:, order], group, symmetric, bits)
    scale = scale.half().float()
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=columns,
        out_features=rows, register_buffers=True, enable_wf_unsqueeze=True,
    )  # fmt: skip
    linear = nn.Linear(columns, rows, bias=False)
    wide, zeros = scale[:, index.long()], zero[:, index.long()]
    q = (w / wide + zeros).round().clamp(0, 2**bits - 1)
    linear.weight.data = (q - zeros) * wide
    module.pack_original(linear, scale, zero, index)
    module.post_init()
    reference = module.dequantize_weight().T.contiguous()
    if version == 1:
        settings = gptqmodel.QuantizeConfig(bits=bits, group_size=group, sym=symmetric)
        convert_gptq_v2_to_v1_format_module(module=module, quantize_config=settings)
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: module.state_dict()[name].clone() for name in names}
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": act_order, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip
    return tensors, reference, config


# ---------------------------- auto-round
def auto_round(rows: int, columns: int, group: int, packing: str) -> Made:
    if packing == "auto_round:auto_gptq":
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear

    w = weights(rows, columns, seed=4)
    scale, _ = ranges(w, group, symmetric=True)
    scale = scale.half().float()
    q = (w.unflatten(1, (-1, group)) / scale[..., None]).round().clamp(-8, 7)
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = (q * scale[..., None]).flatten(1)
    module = QuantLinear(4, group, columns, rows, bias=False)
    module.pack(linear, scale, 8, None)
    tensors = {n: t.clone() for n, t in module.state_dict().items() if n in (
        "qweight", "qzeros", "scales",
    )}  # fmt: skip
    module.post_init()
    with torch.no_grad():  # times the identity, which rounds nothing
        reference = module(torch.eye(columns).half()).T.half().contiguous()
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": group, "sym": True,
        "packing_format": packing,
    }  # fmt: skip
    return tensors, reference, config


# ---------------------------- NVFP4 and MXFP4 by their makers
def modelopt(rows: int, columns: int) -> Made:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = weights(rows, columns, seed=5)
    q, scale, factor = NVFP4QTensor.quantize(w, 16)
    reference = q.dequantize(
        dtype=torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16}
    )
    tensors = {
        "weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": factor.reshape(()),
        "input_scale": torch.tensor(0.5),
    }  # fmt: skip
    return tensors, reference, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def quark(rows: int, columns: int) -> Made:
    from quark.torch.utils.numerics import to_e8m0_uint8
    from quark.torch.utils.pack import Pack_fp4

    w = weights(rows, columns, seed=6)
    amax = w.abs().unflatten(1, (-1, 32)).amax(-1)
    scales = torch.exp2(torch.floor(torch.log2(amax)) - 2)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = w / scales.repeat_interleave(32, 1)
    nearest = grid[(scaled.abs()[..., None] - grid).abs().argmin(-1)] * scaled.sign()
    packer = Pack_fp4(None, "fp4")
    packed = packer.pack(nearest, False)
    reference = packer.unpack(packed, False).float() * scales.repeat_interleave(32, 1)
    tensors = {"weight": packed.view(torch.uint8), "weight_scale": to_e8m0_uint8(scales)}
    config = {
        "quant_method": "quark", "layer_quant_config": {}, "exclude": ["lm_head"],
        "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
    }  # fmt: skip
    return tensors, reference, config


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CT, GPTQ, ROUND = "compressed-tensors", "gptqmodel", "auto-round"


def _words(shape: tuple[int, int], dtype: torch.dtype, **arguments: Any) -> Case:
    return Case(CT, lambda: compressed("pack-quantized", shape, dtype, type="int", **arguments))


def _whole(name: str, shape: tuple[int, int], dtype: torch.dtype, **arguments: Any) -> Case:
    return Case(CT, lambda: compressed(name, shape, dtype, **arguments))


def _group(size: int, symmetric: bool, bits: int = 4) -> dict[str, Any]:
    return dict(num_bits=bits, symmetric=symmetric, strategy="group", group_size=size)


_CHANNEL = dict(num_bits=4, symmetric=True, strategy="channel")
_E4M3: dict[str, Any] = dict(num_bits=8, type="float", symmetric=True)
CASES: dict[str, Case] = {
    "ct-w4-g128": _words((16, 256), BF16, **_group(128, True)),
    "ct-w4-g32-odd-rows": _words((13, 96), BF16, **_group(32, True)),
    "ct-w4-g32-zeros": _words((13, 96), F16, **_group(32, False)),
    "ct-w4-channel": _words((11, 40), BF16, **_CHANNEL),
    "ct-w4-channel-padded": _words((11, 36), F32, **_CHANNEL),
    "ct-w4-channel-zeros": _words((11, 40), BF16, **{**_CHANNEL, "symmetric": False}),
    "ct-w8-g32": _words((13, 96), BF16, **_group(32, True, bits=8)),
    "ct-w8-g32-zeros": _words((13, 96), BF16, **_group(32, False, bits=8)),
    "ct-fp8-channel": _whole("float-quantized", (13, 48), BF16, strategy="channel", **_E4M3),
    "ct-fp8-tensor": _whole("naive-quantized", (13, 48), BF16, strategy="tensor", **_E4M3),
    "ct-fp8-block": _whole(
        "float-quantized", (40, 48), BF16, strategy="block", block_structure=[32, 32], **_E4M3
    ),
    "ct-int8-channel": _whole(
        "int-quantized", (13, 48), BF16, num_bits=8, type="int", symmetric=True, strategy="channel"
    ),
    "ct-nvfp4": _whole(
        "nvfp4-pack-quantized", (13, 64), BF16, num_bits=4, type="float", symmetric=True,
        strategy="tensor_group", group_size=16, scale_dtype=None,
    ),
    "ct-mxfp4": _whole(
        "mxfp4-pack-quantized", (13, 64), BF16, num_bits=4, type="float", symmetric=True,
        strategy="group", group_size=32, scale_dtype=torch.uint8,
    ),
    "awq-g128": Case("autoawq", lambda: awq(32, 256, 128)),
    "awq-g32": Case("autoawq", lambda: awq(64, 96, 32)),
    "gptq-v1": Case(GPTQ, lambda: gptq(32, 256, 128, True, False, 1)),
    "gptq-v2": Case(GPTQ, lambda: gptq(32, 64, 32, True, False, 2)),
    "gptq-v1-zeros": Case(GPTQ, lambda: gptq(32, 64, 32, False, False, 1)),
    "gptq-v2-zeros": Case(GPTQ, lambda: gptq(32, 64, 32, False, False, 2)),
    "gptq-v1-order": Case(GPTQ, lambda: gptq(32, 96, 32, True, True, 1)),
    "gptq-v2-order-zeros": Case(GPTQ, lambda: gptq(32, 96, 32, False, True, 2)),
    "gptq-8-bit": Case(GPTQ, lambda: gptq(32, 64, 32, False, False, 1, bits=8)),
    "auto-round": Case(ROUND, lambda: auto_round(32, 64, 32, "auto_round")),
    "auto-round-gptq": Case(ROUND, lambda: auto_round(32, 64, 32, "auto_round:auto_gptq")),
    "nvfp4-modelopt": Case("nvidia-modelopt", lambda: modelopt(13, 64)),
    "mxfp4-quark": Case("amd-quark", lambda: quark(12, 64)),
}  # fmt: skip


def main() -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--only", choices=CASES, help="this case alone")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    wrong = 0
    for name, case in CASES.items():
        if arguments.only in (None, name):
            try:
                version = importlib.metadata.version(case.library)
            except importlib.metadata.PackageNotFoundError:
                print(f"{name}: left as it is, {case.library} is not installed")
                continue
            tensors, reference, config = case.make()
            stored = {f"m.{key}": value.contiguous() for key, value in tensors.items()}
            stored["reference"] = reference.contiguous()
            path = OUTPUT / f"{PREFIX}{name}.safetensors"
            if arguments.check:
                same = compare(path, stored)
                wrong += not same
                print(f"{name}: {'the same' if same else 'differs'}")
            else:
                said = {"library": f"{case.library} {version}", "config": json.dumps(config)}
                save_file(stored, path, metadata=said)
                print(f"{name}: {path.stat().st_size} bytes, {sorted(tensors)}")
    return int(wrong > 0)


def compare(path: Path, made: dict[str, Tensor]) -> bool:
    """Whether a stored file has these tensors, bit by bit."""
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return stored.keys() == made.keys() and all(
        torch.equal(stored[key].flatten().view(torch.uint8), made[key].flatten().view(torch.uint8))
        for key in stored
    )


if __name__ == "__main__":
    sys.exit(main())
