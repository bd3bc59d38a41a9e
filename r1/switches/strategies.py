"""The strategies that a switch can name: one table for each slot.

A new strategy is one class and one entry here. Its name is then a value of the switch.
"""

from __future__ import annotations

from r1.kernels.strategies import TritonAttend, TritonDispatch
from r1.model import attend, dispatch
from r1.model.attend import Attend
from r1.model.dispatch import Dispatch

ATTENTION: dict[str, Attend] = {s.name: s for s in (*attend.STRATEGIES, TritonAttend())}
"""For `attention` and `prefill_attention`."""
EXPERTS: dict[str, Dispatch] = {s.name: s for s in (*dispatch.STRATEGIES, TritonDispatch())}
"""For `moe` and `prefill_moe`."""
