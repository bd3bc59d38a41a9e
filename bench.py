"""Measure what each optimization buys on this machine: `python bench.py --compile --amp bf16`.

Prints the machine, then one row per arm: the baseline (all switches off), each given switch alone,
and all given switches together. `--ablate` measures every switch that this machine can run.

Every arm runs in a process of its own, and all are warmed up alike. Its repetitions are taken in
turn with the baseline's, so that a change of the clock affects both. Its logits are compared with
an fp32 eager reference on the same tokens. If a checkpoint has problems (exam.json), each arm is
asked some of them. The parts are in r1/bench.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # The imports below take a second. Until `main` handles signals, there is nothing to finish.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, lambda *_: os._exit(130))

from r1 import streams
from r1.__main__ import EMBEDDED
from r1.bench.commands import run
from r1.bench.flags import parser
from r1.bench.process import ignore_signals, signals
from r1.bench.progress import say
from r1.errors import InputError, flags_spelling, hung_up
from r1.placement import ranks
from r1.switches import own_files


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status.

    0 if all is well, 1 if an arm fails parity or breaks down, 2 for bad input, 130 after Ctrl-C,
    SIGTERM (of a time limit) or SIGHUP (of a terminal that is closed).
    """
    streams.prepare()
    argv = sys.argv[1:] if argv is None else argv
    crew = ranks.Crew()
    try:
        with signals(interrupt), flags_spelling():
            own_files.run_given(argv)
            arguments = parser(EMBEDDED).parse_args(argv)
            crew = ranks.crew()
            if crew.count > 1:  # or torch tells of a rank that is gone, while the others' end
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            if not crew.leads:
                crew.ends_together("bench")
            return ranks.together(lambda: run(arguments, argv, crew), "bench")
    except BrokenPipeError:
        return hung_up()
    except InputError as error:
        say("")
        crew.complain("bench", error)
        return 2
    except KeyboardInterrupt:  # before or after the measurement, which handles its own
        return 130


def interrupt(_number: int, _frame: object) -> None:
    """A handler for `signals`: the result's note tells it, and no other rank does."""
    ignore_signals()
    ranks.first_to_speak()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
