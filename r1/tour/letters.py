"""Shape comments such as `# (B, S, H (P + R))`: which tensors they describe, and their numbers.

The comments stand in the model's own code: at the end of the statement that makes a tensor, or in
a line of their own above it. The letters are those of the legend in r1/README.md.
"""

from __future__ import annotations

import ast
import io
import linecache
import re
import tokenize
from dataclasses import dataclass
from functools import cache

from r1.model.config import Config, GroupedShape

Letters = tuple[str, ...]
"""A shape as a comment writes it, by dimensions: ("B", "S", "H (P + R)")."""
Sizes = dict[str, int]
"""The number of each letter."""


def sizes_of(config: Config, rows: int, new: int, slots: int) -> Sizes:
    """The letters' numbers in a call of `rows` B of `new` S tokens each, which see `slots` T.

    I is the dense feed-forward's; see `inner_sizes`. Letters that a config lacks, such as Q of a
    model without compressed queries, are left out.
    """
    e = config.experts
    sizes = {"B": rows, "S": new, "N": rows * new, "T": slots}
    sizes |= {"W": config.vocab_size, "D": config.hidden_size, "I": config.intermediate_size}
    sizes |= {"H": config.attention.num_attention_heads, "R": config.attention.qk_rope_head_dim}
    if isinstance(config.attention, GroupedShape):
        sizes |= {"U": config.grouped.num_key_value_heads, "A": config.grouped.head_dim}
    else:
        a = config.latent
        sizes |= {"P": a.qk_nope_head_dim, "V": a.v_head_dim, "C": a.kv_lora_rank}
        if a.q_lora_rank is not None:
            sizes["Q"] = a.q_lora_rank
    if e.n_routed_experts:
        sizes |= {"E": e.n_routed_experts, "K": e.num_experts_per_tok, "G": e.n_group}
        sizes["topk_group"] = e.topk_group
    return sizes


def inner_sizes(config: Config) -> dict[str, int]:
    """The three meanings of I: of a dense layer, of a routed expert, of all shared experts."""
    e = config.experts
    expert = e.moe_intermediate_size
    return {
        "dense": config.intermediate_size,
        "expert": expert,
        "shared": expert * e.n_shared_experts,
    }


def numbers(letters: Letters, sizes: Sizes) -> tuple[int, ...] | None:
    """The shape in numbers; None if a letter has none."""
    found = [number(each, sizes) for each in letters]
    return tuple(each for each in found if each is not None) if None not in found else None


def number(size: str, sizes: Sizes) -> int | None:
    """The number of a size such as "H (P + R)"; None if it has a letter without a number."""
    product = re.sub(r"(?<=[\w)]) +(?=[\w(])", " * ", size)
    try:
        return _evaluate(ast.parse(product, mode="eval").body, sizes)
    except (SyntaxError, KeyError):
        return None


def _evaluate(node: ast.AST, sizes: Sizes) -> int:
    match node:
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, sizes) + _evaluate(right, sizes)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluate(left, sizes) * _evaluate(right, sizes)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _evaluate(left, sizes) // _evaluate(right, sizes)
    raise SyntaxError("not a size")


@dataclass(frozen=True)
class Statement:
    """An assignment: its lines, the names that it assigns, and their shapes as its comment says."""

    first: int
    last: int
    names: tuple[str, ...]
    shapes: tuple[Letters | None, ...]  # one for each name


@cache
def assignments(path: str) -> list[Statement]:
    """The assignments of a file of Python, in order; none of code that is in no file."""
    text = "".join(linecache.getlines(path))
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    whole_lines = {n for n, line in enumerate(text.splitlines(), 1) if line.lstrip()[:1] == "#"}
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt) or not (names := _names(node)):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        above = comments[first - 1] if first - 1 in whole_lines else ""
        shapes = _shapes(comments.get(last, above), len(names))
        found.append(Statement(first, last, names, shapes))
    return sorted(found, key=lambda each: each.first)


def _names(node: ast.stmt) -> tuple[str, ...]:
    """The plain names that a statement assigns."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        (target,) = node.targets
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
    return tuple(each.id for each in targets if isinstance(each, ast.Name))


def _shapes(comment: str, names: int) -> tuple[Letters | None, ...]:
    """The shapes that a comment gives to `names` tensors; None for all if it tells of others.

    "(..) -> (..)" ends with the shape of a single tensor. "(..) each" is the shape of all.
    """
    shapes = [
        tuple(part.strip() for part in re.split(r",(?![^(]*\))", group) if part.strip())
        for group in _outermost(comment)
    ]
    if len(shapes) == names:
        return tuple(shapes)
    if shapes and names == 1 and "->" in comment:
        return (shapes[-1],)
    return tuple(shapes) * names if len(shapes) == 1 and "each" in comment else (None,) * names


def _outermost(text: str) -> list[str]:
    """The contents of the outermost pairs of parentheses."""
    groups, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            depth, start = depth + 1, start if depth else place + 1
        elif letter == ")" and depth:
            depth -= 1
            if not depth:
                groups.append(text[start:place])
    return groups
