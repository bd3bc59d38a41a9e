"""Tests the problems of tiny-r1: right reasoning, separate splits, wrong answers are found.

Holds to account: tools/train/tasks.py and the checker of r1/bench/exam.py.
"""

from __future__ import annotations

import ast
import random
import re
from itertools import pairwise

import pytest
import tasks
from tasks import (
    KINDS,
    LONGEST,
    TESTED,
    Expression,
    Operation,
    Problem,
    canonical,
    draw,
    exam,
    is_held_out,
    phrase,
    text,
    worked_out,
)  # fmt: skip

from r1 import InputError
from r1.bench.exam import correct

SUM = r"[\d(][\d+*() -]*\d\)?|\d+|-\d+"
DRAWN = 1500


def problems(kind: str, split: str = "train", count: int = DRAWN) -> list[Problem]:
    rng = random.Random(f"{kind} {split}")
    return [draw(rng, split, kind) for _ in range(count)]


def compute(expression: str) -> int:
    assert re.fullmatch(r"[\d+*() -]+", expression), expression
    return int(eval(re.sub(r"\b0+(?=\d)", "", expression)))


AS_SYMBOLS = {
    " plus ": "+",
    " minus ": "-",
    " times ": "*",
    ". That makes ": " -> ",
    ", carry 1": "",
    "; ": ", ",
}


def in_symbols(reasoning: str) -> str:
    for words, sign in AS_SYMBOLS.items():
        reasoning = reasoning.replace(words, sign)
    return re.sub(r"(?<=\d) is (?=\d)", "=", reasoning)


@pytest.mark.parametrize("kind", KINDS)
def test_every_statement_is_true(kind: str) -> None:
    """Each equality, each "leaves" and each comparison of the reasoning. It ends in the answer."""
    rng = random.Random(0)
    equalities = 0
    for problem in problems(kind):
        example = phrase(problem, rng)
        reasoning = in_symbols(example.reasoning)
        for chain in re.findall(rf"(?:(?:{SUM}) ?= ?)+(?:{SUM})", reasoning):
            for left, right in pairwise(re.split(r" ?= ?", chain)):
                assert compute(left) == compute(right), (problem.text, chain)
                equalities += 1
        for left in re.findall(r"leaves (.*)", reasoning):
            assert compute(left) == problem.answer, (problem.text, left)
        for more, less in re.findall(r"(\d+) is more than (\d+)", reasoning):
            assert int(more) > int(less)
        assert reasoning.endswith(str(problem.answer)), (problem.text, reasoning)
        assert correct(example.answer, problem.answer)
    assert equalities >= DRAWN


@pytest.mark.parametrize("kind", ["add", "sub", "mul", "expr"])
def test_columns_are_the_digits_and_make_the_result(kind: str) -> None:
    """The columns take the first operand's digits from the right.

    The results of the columns, read backwards, are the result of the line.
    """
    rng = random.Random(0)
    lines = 0
    for problem in problems(kind):
        reasoning = in_symbols(phrase(problem, rng).reasoning)
        for first, sign, _, columns, result in re.findall(
            r"(\d+) ([+*-]) (\d+): ([^>]*) -> (\d+)", reasoning
        ):
            results = [column.split("=")[-1] for column in columns.split(", ")]
            assert results[-1] + "".join(r[-1] for r in reversed(results[:-1])) == result, reasoning
            for place, column in enumerate(columns.split(", ")[: len(first)]):
                digit = re.split(r"[+*=-]", column)[0][-1]
                assert digit == first[-1 - place], (reasoning, sign)
            lines += 1
    assert lines > DRAWN / 2


def test_text_needs_its_parentheses() -> None:
    """The text of an expression has its value by Python's rules of precedence."""
    for problem in problems("expr"):
        assert compute(problem.text) == problem.answer
    assert text(Operation(12, "-", Operation(7, "-", 3))) == "12 - (7 - 3)"
    assert text(Operation(Operation(12, "+", 7), "*", 3)) == "(12 + 7) * 3"
    assert text(Operation(12, "+", Operation(7, "*", 3))) == "12 + 7 * 3"
    assert any("(" in problem.text for problem in problems("expr")), "parentheses are drawn"
    assert {problem.text.count(" ") // 2 for problem in problems("expr")} == {2, 3}, "operations"


def parsed(written: str) -> Expression:
    """The expression of a text."""

    def of(node: ast.expr) -> Expression:
        if isinstance(node, ast.BinOp):
            return Operation(
                of(node.left),
                {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(node.op)],
                of(node.right),
            )
        assert isinstance(node, ast.Constant) and type(node.value) is int, ast.dump(node)
        return node.value

    return of(ast.parse(re.sub(r"\b0+(?=\d)", "", written), mode="eval").body)


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_text_works_out_a_test_problem(kind: str) -> None:
    """No expression in lines or columns is a test problem, and `worked_out` lists only such."""
    rng = random.Random(0)
    for problem in problems(kind, "train", 3000):
        reasoning = in_symbols(phrase(problem, rng).reasoning)
        expressions = re.findall(r"[\d(][\d+*() -]*[\d)]", reasoning)
        for number, tens in re.findall(r"(\d+) \* (\d): [^\n]*, then 0", reasoning):
            expressions += [f"{number} * {tens}0", f"{number} * {tens} * 10"]
        written = [parsed(each) for each in expressions if re.search(r"\d\)* ?[+*-]", each)]
        assert written and not [text(e) for e in written if is_held_out(e)], reasoning
        assert {canonical(e) for e in worked_out(problem.expression)} <= {
            canonical(e) for e in written
        }, reasoning


def test_splits_never_meet() -> None:
    for kind in TESTED:
        train = {canonical(problem.expression) for problem in problems(kind, "train", 4000)}
        test = {canonical(problem.expression) for problem in problems(kind, "test", 400)}
        assert train and test and not train & test
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    split = {pair: Problem("mul", Operation(pair[0], "*", pair[1])).split for pair in pairs}
    assert all((split[a, b] == "test") == (split[b, a] == "test") for a, b in pairs), (
        "47 * 86 and 86 * 47 are one problem"
    )
    assert 0.08 < sum(s == "test" for s in split.values()) / len(split) < 0.12
    assert all(problem.split == "train" for problem in problems("fact"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1 - 2", "2 - 1", False),
        ("1 + 2 + 3", "3 + 1 + 2", True),
        ("1 + (2 + 3)", "1 + 2 + 3", True),
        ("9 - 2 - 3", "9 - 3 - 2", True),
        ("9 - (2 - 3)", "3 + 9 - 2", True),
        ("9 - 2 + 3", "9 - 3 + 2", False),
        ("2 * 3 * 4", "4 * (2 * 3)", True),
        ("5 + 2 * 3", "3 * 2 + 5", True),
        ("(5 + 2) * 3", "3 * (2 + 5)", True),
        ("(5 + 2) * 3", "5 + 2 * 3", False),
        ("1 + 23", "12 + 3", False),
    ],
)
def test_canonical(one: str, other: str, same: bool) -> None:
    assert (canonical(parsed(one)) == canonical(parsed(other))) == same


@pytest.mark.parametrize(
    ("expression", "fact"),
    [("7 + 8 + 1", True), ("13 - 7 - 1", True), ("7 * 6 + 42", True), ("42 + 4", True),
     ("42 + 14", False), ("42 * 4", False), ("100 + 4", False), ("9 * 9", True)],
)  # fmt: skip
def test_what_columns_are_made_of_is_no_test_problem(expression: str, fact: bool) -> None:
    assert tasks.is_fact(parsed(expression)) == fact


@pytest.mark.parametrize(
    "answer",
    [
        "4043.",
        "404.",
        "40420.",
        "-4042.",
        "4042",
        "4042. Or 4043.",
        "47 * 86 = 4042. But no",
        "",
        "four thousand.",
        "4,042 .5.",
    ],
)
def test_checker_rejects(answer: str) -> None:
    assert not correct(answer, 4042)


def test_checker_accepts() -> None:
    for answer in ("4042.", "47 * 86 = 4042.", "The answer is 4042.\n"):
        assert correct(answer, 4042)
    assert correct("12 - 45 = -33.", -33)
    assert not correct("12 - 45 = 33.", -33)


def test_exam() -> None:
    """An exam has different problems, all of the test split, equally many of each kind.

    Each call gives the same ones. More than there are is an InputError.
    """
    found = exam(200, seed=1)
    assert found == exam(200, seed=1) != exam(200, seed=2)
    assert len({problem.text for problem in found}) == 200
    assert {problem.split for problem in found} == {"test"}
    assert [sum(problem.kind == kind for problem in found) for kind in TESTED] == [50] * 4
    with pytest.raises(InputError, match="no 100000 test problems of the kinds mul: ask for fewer"):
        exam(100_000, kinds=["mul"])
    with pytest.raises(InputError, match="facts are all trained on"):
        exam(1, kinds=["fact"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_long_and_not_all_are_one_template(kind: str) -> None:
    rng = random.Random(0)
    examples = [phrase(problem, rng) for problem in problems(kind)]
    assert max(example.size for example in examples) <= LONGEST
    shapes = {re.sub(r"\d+", "#", example.question) for example in examples}
    assert len(shapes) > 50
    assert len({re.sub(r"\d+", "#", example.answer) for example in examples}) > 1


def test_few_differences_are_negative() -> None:
    """As most that people ask."""
    values = [tasks.value(tasks.DRAWS["sub"](random.Random(seed))) for seed in range(1000)]
    assert 0.03 < sum(each < 0 for each in values) / len(values) < 0.2


def test_words_say_the_numbers() -> None:
    said = {0: "zero", 13: "thirteen", 20: "twenty", 47: "forty-seven", 90: "ninety", 100: "100"}
    assert {number: tasks._say(number, True) for number in said} == said


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.main(["-n", "2", "--kinds", "mul"]) == 0
    assert capsys.readouterr().out.count("</think>") == 2
    assert tasks.main(["--kinds", "fact", "--split", "test"]) == 2
    assert capsys.readouterr().err.startswith("tasks: facts are all trained on")
    with pytest.raises(SystemExit) as caught:
        tasks.main(["--kinds", "div"])
    assert caught.value.code == 2
