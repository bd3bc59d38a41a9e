"""The four commands of bench.py: measure, --show, --compare and --explain."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from r1 import streams
from r1.bench import measure, merge, output, team
from r1.bench.load_result import load
from r1.bench.progress import say
from r1.bench.report.table import legend
from r1.bench.team import Lead
from r1.errors import InputError
from r1.placement.ranks import Crew, Line
from r1.switches.backend import Backend
from r1.switches.flags import given as given_switches
from r1.switches.machine import Machine, explain


def run(arguments: argparse.Namespace, argv: Sequence[str], crew: Crew) -> int:
    """Run the command that `arguments`, parsed from `argv`, ask for. Returns the exit status.

    Of several processes, rank 0 does, and the others have children for shared arms. Raises
    InputError for bad input.
    """
    _check_flags(arguments)
    if not (arguments.explain or arguments.compare or arguments.show):
        given = Backend(**given_switches(arguments))
        crew.check(given.tp, given.ep, given.pp)
    if crew.count == 1:
        return _run(arguments, argv, Lead())
    team.check_host(crew)
    line = Line(crew)
    line.check_words(list(argv))
    if not crew.leads:
        team.follow(crew, line)
        return 0
    try:
        return _run(arguments, argv, Lead(crew, line))
    finally:
        line.end()


def _run(arguments: argparse.Namespace, argv: Sequence[str], lead: Lead) -> int:
    """The command itself, on rank 0."""
    if arguments.explain == "columns":
        streams.write(legend())
        return 0
    machine = Machine.here()
    if arguments.explain:
        streams.write(explain(machine))
        return 0
    if arguments.compare:
        streams.write(merge.compare(arguments.compare, arguments.price, arguments.wide))
        return 0
    output.check(arguments)
    if arguments.show:
        output.present(load(arguments.show, complete=True), arguments)
        return 0
    result, interrupted = measure.run(arguments, argv, machine, lead)
    say("")
    try:
        output.present(result, arguments, measured=True)
    except InputError as error:
        if not interrupted:
            raise
        streams.complain(f"bench: {error}")
    failed = any(
        row.get("parity") is False or row.get("crashed") for row in result["rows"] + result["pairs"]
    )
    return 130 if interrupted else int(failed)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise InputError for a flag that the command would ignore."""
    results = {"-o": "output", "--output-file": "output_file", "--plot": "plot"}
    if arguments.explain or arguments.compare:
        for flag, name in results.items():
            if getattr(arguments, name):
                raise InputError(f"{flag} goes with a measurement, or with --show")
    if arguments.profile and (arguments.explain or arguments.compare or arguments.show):
        raise InputError("--profile goes with a measurement")
    if arguments.price and not arguments.compare:
        raise InputError("--price goes with --compare")
