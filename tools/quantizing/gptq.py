"""GPTQ: round a matrix column by column, and let the columns that follow make up for the error.

(Frantar, Ashkboos, Hoefler, Alistarh, arXiv 2210.17323.) Rounding W to Q changes a layer's output
by (W - Q) x. Summed over the calibration's inputs, the squared change of one row w is

    (w - q) H (w - q)^T,  H = sum of x x^T

When a column has been rounded, the columns that are not yet rounded can be moved so that this error
is least. The move is given by the inverse of H, restricted to those columns. All these inverses are
rows of one triangular matrix (section 3.3, step 3), so the loop below needs nothing else.

Shapes: out and in are a matrix's rows and columns. A leading E, the experts, may stand before both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizing.rounding import Fitted, Grid, by_column, fit, groups_of, parts
from r1.storage.codes import Codes

DAMPING = 0.01
"""The part of H's mean diagonal that is added to it. Without it, inputs that are nearly the same
would let one column's error be moved to another in huge steps."""
BLOCK = 128
"""Columns after which the move is applied to the rest of the matrix: one product in place of many
(section 3.3, step 2). It changes no result but for rounding."""
TRIALS = ((1.0,), parts(0.8, 1.2))
"""The parts of a group's range that are tried, see `fit`: the whole range, and a search for the
scale of the least squared error. The search does not know how far columns will be moved. On tiny-r1
it was worse than the whole range at 2 bits, and better at 4 bits in most layers."""


def gptq(
    w: Tensor, h: Tensor, grid: Grid, *, damping: float = DAMPING, ordered: bool = True
) -> Codes:
    """Quantize (..., out, in) for inputs with the second moments h, (..., in, in) or (in, in).

    `ordered` rounds the columns with the largest inputs first ("activation order"), while most
    others can still make up for them. The groups' scales are chosen before, and groups are of
    neighbouring columns, so nothing in the file tells the order. Each row is rounded once for each
    of TRIALS, and keeps what changes its output least.
    """
    lead = w.shape[:-2]
    if h.dim() == 2 and lead:  # rows do not depend on each other: one tall matrix
        codes = gptq(w.flatten(0, -2), h, grid, damping=damping, ordered=ordered)
        rows, zero = w.shape[:-1], codes.zero
        return Codes(
            codes.q.unflatten(0, rows),
            codes.scale.unflatten(0, rows),
            None if zero is None else zero.unflatten(0, rows),
        )
    w, spread = w.float(), damped(h, damping)
    size = spread.diagonal(dim1=-2, dim2=-1)  # (..., in)
    order = torch.arange(w.shape[-1], device=w.device).expand(size.shape)
    if ordered:
        order = size.argsort(dim=-1, descending=True, stable=True)  # (..., in)
    at = order[..., None, :].expand(w.shape)  # (..., out, in)
    spread = spread.gather(-1, order[..., None, :].expand(spread.shape))
    spread = spread.gather(-2, order[..., :, None].expand(spread.shape))
    u = inverse_factor(spread).float()
    # What is left of a column's input when the later columns have made up for what they can.
    alone = u.diagonal(dim1=-2, dim2=-1).pow(-2.0)  # (..., in)
    alone = torch.empty_like(alone).scatter(-1, order, alone)
    groups = groups_of(w.shape[-1], grid, w.device)[order]  # (..., in)
    best: tuple[Tensor, Fitted, Tensor] | None = None
    for trials in TRIALS:
        fitted = fit(w, grid, trials, by_column(alone) if len(trials) > 1 else None)
        q, value = _round(w.gather(-1, at), u, fitted, groups)
        q, change = (torch.empty_like(q).scatter(-1, at, each) for each in (q, value))
        change -= w
        error = ((change @ h.float()) * change).sum(-1, keepdim=True)  # (..., out, 1)
        best = (q, fitted, error) if best is None else _better(best, (q, fitted, error))
    assert best is not None
    return best[1].codes(best[0])


def _better(
    a: tuple[Tensor, Fitted, Tensor], b: tuple[Tensor, Fitted, Tensor]
) -> tuple[Tensor, Fitted, Tensor]:
    """Of each row the one with the smaller error."""
    (qa, fa, ea), (qb, fb, eb) = a, b
    which = eb < ea
    scale, zero = torch.where(which, fb.scale, fa.scale), torch.where(which, fb.zero, fa.zero)
    fitted = Fitted(fa.grid, scale, zero)
    return torch.where(which, qb, qa), fitted, torch.where(which, eb, ea)


def _round(w: Tensor, u: Tensor, fitted: Fitted, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over columns; returns the numbers and what they stand for.

    All are fp32 (..., out, in), in the order of rounding. w is changed.
    """
    q, values, columns = torch.empty_like(w), torch.empty_like(w), w.shape[-1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(w[..., start:stop])
        for j in range(start, stop):
            column, group = w[..., j : j + 1], groups[..., j : j + 1]
            q[..., j : j + 1] = rounded = fitted.q(column, group)
            values[..., j : j + 1] = value = fitted.value(rounded, group)
            error = (column - value) / u[..., j : j + 1, j : j + 1]
            w[..., j + 1 : stop] -= error * u[..., j : j + 1, j + 1 : stop]
            errors[..., j - start] = error[..., 0]
        w[..., stop:] -= errors @ u[..., start:stop, stop:]
    return q, values


def damped(h: Tensor, damping: float) -> Tensor:
    """H with something added to its diagonal, fp64. An H of zeros becomes the identity."""
    h = h.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)  # (...)
    more = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return h + more[..., None, None] * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, (..., in, in).

    Cholesky gives a lower L with L L^T of H with its rows and columns in reverse. Reversed again, L
    is an upper R with R R^T = H, and U is the inverse of R.
    """
    r = torch.linalg.cholesky(h.flip(-1, -2)).flip(-1, -2)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand(h.shape)
    return torch.linalg.solve_triangular(r, eye, upper=True)
