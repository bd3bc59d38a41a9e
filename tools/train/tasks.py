"""Print arithmetic problems with written-out reasoning: the data on which tiny-r1 is trained.

    python tools/train/tasks.py --kinds mul,expr -n 5

A problem is an expression. An example asks it in one of many phrasings, in symbols or in words, and
works it out digit by digit, as one does on paper. So a small model never needs a step that is
larger than a fact that it can know by heart.

A hash of the expression chooses the test problems. The phrasing does not change the hash, and
neither does the order or the grouping of terms and factors. No training text asks a test problem,
or works one out on the way to another result.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared

from r1 import InputError
from r1.switches import flags

TEST_SHARE = 10
"""One problem in TEST_SHARE is a test problem."""
KINDS = {"fact": 4, "add": 18, "sub": 18, "mul": 34, "expr": 26}
"""The kinds of problems, and how often each is drawn for training.

Facts have one digit on each side. No fact is held out."""
KNOWS = (
    "sums and differences of whole numbers of up to four digits, products of two digits by two, "
    "and chains of two or three operations"
)
"""What a model learns of all kinds, in words."""
TESTED = ("add", "sub", "mul", "expr")
SPLITS = ("train", "test")
LONGEST = 288
"""The most bytes of question, reasoning and answer. A phrasing that takes more is not used."""
NAMES = {"+": "plus", "-": "minus", "*": "times"}
RANK = {"+": 0, "-": 0, "*": 1}


# -------------------------------------------------------------------------------------- expressions
@dataclass(frozen=True)
class Operation:
    """Two expressions and the sign between them."""

    left: Expression
    sign: str
    right: Expression


Expression = int | Operation


def value(e: Expression) -> int:
    """The result of an expression."""
    if isinstance(e, int):
        return e
    a, b = value(e.left), value(e.right)
    return a + b if e.sign == "+" else a - b if e.sign == "-" else a * b


def text(e: Expression) -> str:
    """An expression as people write it, with only the parentheses that it needs."""
    if isinstance(e, int):
        return str(e)
    left, right = text(e.left), text(e.right)
    if isinstance(e.left, Operation) and RANK[e.left.sign] < RANK[e.sign]:
        left = f"({left})"
    if isinstance(e.right, Operation) and RANK[e.right.sign] <= RANK[e.sign]:
        right = f"({right})"
    return f"{left} {e.sign} {right}"


def canonical(e: Expression) -> str:
    """A text that is the same whatever the order and the grouping of terms and factors."""
    if isinstance(e, int):
        return str(e)
    if e.sign == "*":
        return "*".join(sorted(f"({canonical(factor)})" for factor in _factors(e)))
    return "".join(sorted(f"{sign}{canonical(term)}" for sign, term in _terms(e, "+")))


def _factors(e: Expression) -> list[Expression]:
    if isinstance(e, int) or e.sign != "*":
        return [e]
    return [*_factors(e.left), *_factors(e.right)]


def _terms(e: Expression, sign: str) -> list[tuple[str, Expression]]:
    """The terms of a sum, each with its sign."""
    if isinstance(e, int) or e.sign == "*":
        return [(sign, e)]
    other = {"+": "-", "-": "+"}[sign]
    return [*_terms(e.left, sign), *_terms(e.right, sign if e.sign == "+" else other)]


def is_fact(e: Expression) -> bool:
    """Whether the columns of a longer problem may contain it.

    Such an expression has at most one number of two digits, which is no factor.
    """
    large = [n for n in _numbers(e) if n > 9]
    return not large or (
        len(large) == 1 and large[0] < 100 and large[0] in (term for _, term in _terms(e, "+"))
    )


def _numbers(e: Expression) -> list[int]:
    return [e] if isinstance(e, int) else [*_numbers(e.left), *_numbers(e.right)]


def is_held_out(e: Expression) -> bool:
    """Whether it is a test problem, by the hash of its canonical form.

    Facts never are, because all other problems are made of them.
    """
    if is_fact(e):
        return False
    digest = hashlib.blake2b(canonical(e).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE == 0


@dataclass(frozen=True)
class Problem:
    """An expression to work out."""

    kind: str
    expression: Expression

    @cached_property
    def text(self) -> str:
        return text(self.expression)

    @cached_property
    def answer(self) -> int:
        return value(self.expression)

    @cached_property
    def split(self) -> str | None:
        """ "test" if it is held out; "train" if its reasoning needs no test problem; else None."""
        if is_held_out(self.expression):
            return "test"
        return None if any(map(is_held_out, worked_out(self.expression))) else "train"


# --------------------------------------------------------------------------------- drawing problems
def draw(rng: random.Random, split: str, kind: str) -> Problem:
    """A random problem of a split and kind. Raises InputError for test facts: there are none."""
    if kind == "fact" and split == "test":
        raise InputError(
            f"facts are all trained on, so there are none to test: choose {', '.join(TESTED)}"
        )
    while True:
        problem = Problem(kind, DRAWS[kind](rng))
        if problem.split == split:
            return problem


def exam(count: int, seed: int = 0, kinds: Sequence[str] = TESTED) -> list[Problem]:
    """`count` different test problems, equally many of each kind.

    Raises InputError if there are not so many.
    """
    rng = random.Random(f"test {seed}")
    found: dict[str, Problem] = {}
    for i in range(count):
        for _ in range(1000):
            problem = draw(rng, "test", kinds[i % len(kinds)])
            if problem.text not in found:
                found[problem.text] = problem
                break
        else:
            raise InputError(
                f"there are no {count} test problems of the kinds {', '.join(kinds)}: ask for fewer"
            )
    return list(found.values())


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _fact(rng: random.Random) -> Expression:
    sign = rng.choice("+-*")
    a, b = _number(rng, 1), _number(rng, 1)
    return Operation(max(a, b) if sign == "-" else a, sign, min(a, b) if sign == "-" else b)


def _sum(rng: random.Random, sign: str) -> Expression:
    """Up to four digits on each side, and two at least on one. Few differences are negative."""
    sizes = rng.choices((1, 2, 3, 4), (1, 3, 4, 3), k=2)
    a, b = (_number(rng, digits) for digits in ((2, sizes[1]) if max(sizes) == 1 else sizes))
    if sign == "-" and a < b and rng.random() < 0.8:
        a, b = b, a
    return Operation(a, sign, b)


def _product(rng: random.Random) -> Expression:
    left, right = rng.choices(((2, 2), (3, 1), (2, 1), (1, 2), (1, 3)), (12, 4, 2, 1, 1))[0]
    return Operation(_number(rng, left), "*", _number(rng, right))


def _chain(rng: random.Random) -> Expression:
    """Two or three operations, a few of them in parentheses.

    No step needs a long product, and only the last step may go below 0.
    """
    while True:
        signs = [rng.choice("++--**") for _ in range(rng.choice((2, 2, 3)))]
        beside = [c == "*" or d == "*" for c, d in zip(["", *signs], [*signs, ""], strict=True)]
        parts: list[Expression] = [
            rng.randint(2, 9) if near and rng.random() < 0.8 else rng.randint(1, 99)
            for near in beside
        ]
        sums = [i for i, sign in enumerate(signs) if sign != "*"]
        if sums and rng.random() < 0.4:
            i = rng.choice(sums)
            parts[i : i + 2] = [Operation(parts[i], signs.pop(i), parts[i + 1])]
        for rank in (1, 0):
            i = 0
            while i < len(signs):
                if RANK[signs[i]] == rank:
                    parts[i : i + 2] = [Operation(parts[i], signs.pop(i), parts[i + 1])]
                else:
                    i += 1
        if _easy(parts[0], last=True):
            return parts[0]


def _easy(e: Expression, last: bool = False) -> bool:
    if isinstance(e, int):
        return True
    if not (_easy(e.left) and _easy(e.right)):
        return False
    small = min(value(e.left), value(e.right))
    return (small < 10 and value(e) < 1000) if e.sign == "*" else last or value(e) >= 0


DRAWS = {
    "fact": _fact,
    "add": lambda rng: _sum(rng, "+"),
    "sub": lambda rng: _sum(rng, "-"),
    "mul": _product,
    "expr": _chain,
}


# ---------------------------------------------------------------------------------------- reasoning
@dataclass(frozen=True)
class Voice:
    """The wording of a step: in symbols, or in words."""

    plus: str
    minus: str
    times: str
    gives: str
    then: str
    carry: str
    total: str


SYMBOLS = Voice("+", "-", "*", "=", ", ", "", " -> ")
WORDS = Voice(" plus ", " minus ", " times ", " is ", "; ", ", carry 1", ". That makes ")


def reason(e: Expression, voice: Voice) -> str:
    """Work out an expression, with a line for each step. The last line ends in the result."""
    if isinstance(e, int) or (isinstance(e.left, int) and isinstance(e.right, int)):
        return _step(e, voice) if isinstance(e, Operation) else str(e)
    lines = [text(e)]
    while isinstance(e, Operation):
        step = _next(e)
        line = _step(step, voice)
        e = _replace(e, step)
        lines.append(line if isinstance(e, int) else f"{line}, leaves {text(e)}")
    return "\n".join(lines)


def worked_out(e: Expression) -> Iterator[Operation]:
    """Every expression whose value `reason` computes: the steps, their parts, and what is left."""
    while isinstance(e, Operation):
        step = _next(e)
        yield from (e, step)
        a, b = value(step.left), value(step.right)
        if step.sign == "-" and a < b:
            yield Operation(b, "-", a)
        if step.sign == "*" and a > 9 and b > 9:
            tens, ones = Operation(a, "*", b // 10 * 10), Operation(a, "*", b % 10)
            by_digit = Operation(a, "*", b // 10)
            yield from (tens, by_digit, Operation(by_digit, "*", 10))
            if b % 10:
                sums = Operation(tens, "+", ones), Operation(value(tens), "+", value(ones))
                yield from (ones, *sums)
        e = _replace(e, step)


def _next(e: Operation) -> Operation:
    """The operation to do first: a product or one in parentheses, else the leftmost one."""
    steps = [(side, e) for side in _leaves(e)]
    inner = [step for step, _ in steps if step.sign == "*" or f"({text(step)})" in text(e)]
    return inner[0] if inner else steps[0][0]


def _leaves(e: Expression) -> list[Operation]:
    """The operations whose both sides are numbers, from the left."""
    if isinstance(e, int):
        return []
    return [*_leaves(e.left), *_leaves(e.right)] or [e]


def _replace(e: Expression, step: Operation) -> Expression:
    """`e` with the value of `step` in the place of `step`."""
    if e is step:
        return value(step)
    if isinstance(e, int):
        return e
    return Operation(_replace(e.left, step), e.sign, _replace(e.right, step))


def _step(e: Operation, voice: Voice) -> str:
    assert isinstance(e.left, int) and isinstance(e.right, int)
    return {"+": add, "-": subtract, "*": multiply}[e.sign](e.left, e.right, voice)


def add(a: int, b: int, voice: Voice) -> str:
    """Add column by column from the right, with carries."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}"
    columns, carry = [], 0
    rows = str(a)[::-1], str(b)[::-1]
    width = max(map(len, rows))
    for i in range(width):
        terms = [row[i] for row in rows if i < len(row)] + ["1"] * carry
        total = sum(map(int, terms))
        carry = int(total > 9)
        carried = voice.carry * (carry and i < width - 1)
        columns.append(f"{voice.plus.join(terms)}{voice.gives}{total}{carried}")
    return f"{a} + {b}: {voice.then.join(columns)}{voice.total}{a + b}"


def subtract(a: int, b: int, voice: Voice) -> str:
    """Subtract column by column from the right.

    A column that borrows has ten more, and the next column has one less.
    """
    if a < b:
        return f"{b} is more than {a}. {subtract(b, a, voice)}, so {a} - {b} = {a - b}"
    if a < 10:
        return f"{a} - {b} = {a - b}"
    columns, digits, borrow = [], "", 0
    top, bottom = str(a)[::-1], str(b)[::-1]
    for i, upper in enumerate(map(int, top)):
        taken = ([bottom[i]] if i < len(bottom) else []) + ["1"] * borrow
        borrow = int(upper < sum(map(int, taken)))
        left = upper + 10 * borrow - sum(map(int, taken))
        columns.append(f"{voice.minus.join([str(upper + 10 * borrow), *taken])}{voice.gives}{left}")
        digits = f"{left}{digits}"
    zeros = f" = {a - b}" if digits != str(a - b) else ""
    return f"{a} - {b}: {voice.then.join(columns)}{voice.total}{digits}{zeros}"


def multiply(a: int, b: int, voice: Voice) -> str:
    """Multiply by each digit of the second factor, then add the partial products."""
    if a < 10:
        if b < 10:
            return f"{a} * {b} = {a * b}"
        return f"{a} * {b} = {b} * {a}\n{multiply(b, a, voice)}"
    if b < 10:
        return _times_digit(a, b, voice) if b else f"{a} * 0 = 0"
    tens, ones = b // 10, b % 10
    if ones == 0:
        return f"{a} * {b} = {a} * {tens} * 10\n{_times_digit(a, tens, voice)}, then 0: {a * b}"
    first = f"{a} * {b} = {a} * {tens * 10} + {a} * {ones}"
    parts = [
        f"{_times_digit(a, tens, voice)}, then 0: {a * tens * 10}",
        _times_digit(a, ones, voice),
    ]
    return "\n".join([first, *parts, add(a * tens * 10, a * ones, voice)])


def _times_digit(a: int, digit: int, voice: Voice) -> str:
    """Multiply digit by digit from the right. Each product takes the tens of the one before."""
    columns, carry = [], 0
    for d in map(int, reversed(str(a))):
        product = f"{d}{voice.times}{digit}"
        if carry:
            product += f"{voice.plus}{carry}{voice.gives}{d * digit}{voice.plus}{carry}"
        columns.append(f"{product}{voice.gives}{d * digit + carry}")
        carry = (d * digit + carry) // 10
    return f"{a} * {digit}: {voice.then.join(columns)}{voice.total}{a * digit}"


# ---------------------------------------------------------------------------------------- phrasings
FRAMES = (
    "What is {}?", "What is {}?", "What is {}?", "What's {}?", "How much is {}?", "Compute {}.",
    "Calculate {}.", "Evaluate {}.", "Work out {}.", "Solve {}.", "What does {} equal?",
    "What do you get for {}?", "Please compute {}.", "Please calculate {}.", "Can you work out {}?",
    "Could you compute {} for me?", "Tell me what {} is.", "Find the value of {}.",
    "I need to know {}.", "Hi! What is {}?", "Hello, can you tell me what {} is?",
    "Quick question: {}?", "Help me with my homework: {}.",
)  # fmt: skip
BARE = ("{}", "{} = ?", "{}=?", "{}?")
ASKED = {
    "+": ("Add {a} and {b}.", "Add {b} to {a}.", "What is the sum of {a} and {b}?",
          "Find the sum of {a} and {b}.", "Please add {a} and {b}.",
          "What do {a} and {b} make together?",
          "I have {a} apples and buy {b} more. How many do I have?",
          "There are {a} cars and {b} bikes. How many vehicles is that?",
          "Anna read {a} pages, then {b} more. How many pages did she read?"),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.",
          "What is the difference of {a} and {b}?",
          "What is left of {a} if you take away {b}?", "Reduce {a} by {b}.",
          "Please subtract {b} from {a}."),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?",
          "Find the product of {a} and {b}.", "Please multiply {a} and {b}.",
          "There are {a} boxes with {b} pens each. How many pens is that?",
          "A ticket costs {a} dollars. What do {b} tickets cost?",
          "How many seats are in {a} rows of {b}?"),
}  # fmt: skip
STEPS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = (
    "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
OPENINGS = {
    SYMBOLS: ("", "", "", "Step by step.\n", "From the right.\n"),
    WORDS: ("", "", "", "Let me work it out.\n", "Okay, step by step.\n"),
}


@dataclass(frozen=True)
class Example:
    """A problem as a conversation: question, reasoning and answer."""

    question: str
    reasoning: str
    answer: str

    @property
    def size(self) -> int:
        """The bytes of all three."""
        return len(f"{self.question}{self.reasoning}{self.answer}".encode())


def phrase(problem: Problem, rng: random.Random) -> Example:
    """Ask a problem in one of its phrasings, and work it out."""
    while (example := _phrase(problem, rng)).size > LONGEST:
        pass
    return example


def phrased(problems: Sequence[Problem], seed: int = 0) -> list[Example]:
    """Each problem in one phrasing, which depends on the seed and the problem alone."""
    return [phrase(problem, random.Random(f"{seed} {problem.text}")) for problem in problems]


def _phrase(problem: Problem, rng: random.Random) -> Example:
    """Choose a phrasing. The reasoning uses words if the question does and the steps are short."""
    e = problem.expression
    in_words = rng.random() < 0.4 and "(" not in problem.text
    voice = WORDS if in_words and _short(e) else SYMBOLS
    reasoning = rng.choice(OPENINGS[voice]) + reason(e, voice)
    if not in_words:
        return Example(
            _in_symbols(problem.text, rng), reasoning, f"{problem.text} = {problem.answer}."
        )
    return Example(_in_words(e, rng), reasoning, f"The answer is {problem.answer}.")


def _short(e: Expression) -> bool:
    """Whether its steps fit on one line."""
    if not (isinstance(e, Operation) and isinstance(e.left, int) and isinstance(e.right, int)):
        return False
    return e.sign != "*" or min(e.left, e.right) < 10


def _in_symbols(expression: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        expression = expression.replace(" ", "")
    if rng.random() < 0.1:
        expression = expression.replace("*", rng.choice("x×"))
    asked = rng.choice(BARE if rng.random() < 0.15 else FRAMES).format(expression)
    return _loosely(asked, rng)


def _in_words(e: Expression, rng: random.Random) -> str:
    assert isinstance(e, Operation)
    spell = rng.random() < 0.15
    if isinstance(e.left, int) and isinstance(e.right, int) and rng.random() < 0.6:
        asked = rng.choice(ASKED[e.sign]).format(a=_say(e.left, spell), b=_say(e.right, spell))
        return _loosely(asked, rng)
    parts = [NAMES.get(part) or _say(int(part), spell) for part in text(e).split()]
    signs = text(e).split()[1::2]
    if len(signs) > 1 and "*" not in signs and rng.random() < 0.5:  # "Start with 3, add 4, ..."
        start, *rest = text(e).split()[::2]
        told = [
            STEPS[sign].format(_say(int(operand), spell))
            for sign, operand in zip(signs, rest, strict=True)
        ]
        return _loosely(f"Start with {_say(int(start), spell)}, {', then '.join(told)}.", rng)
    return _loosely(rng.choice(FRAMES).format(" ".join(parts)), rng)


def _say(number: int, spell: bool) -> str:
    """A number in digits, or spelled out if `spell` and below a hundred."""
    if not spell or number > 99:
        return str(number)
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def _loosely(asked: str, rng: random.Random) -> str:
    """Sometimes write as people type: no capitals, no full stop."""
    return asked.lower().rstrip(".?") if rng.random() < 0.1 else asked


# -------------------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    add_kinds(parser, list(KINDS))
    parser.add_argument("--split", choices=SPLITS, default="train", help="default train")
    parser.add_argument("-n", type=int, default=10, metavar="N", help="problems (default 10)")
    parser.add_argument("--seed", type=flags.seed, default=0, help="default 0")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    rng = random.Random(arguments.seed)
    for _ in range(arguments.n):
        example = phrase(draw(rng, arguments.split, rng.choice(arguments.kinds)), rng)
        print(f"{example.question}\n<think>\n{example.reasoning}\n</think>\n\n{example.answer}\n")
    return 0


def add_kinds(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The flag that chooses kinds of problems."""
    text = f"kinds of problems (default {','.join(default)})"
    parser.add_argument("--kinds", type=kinds, default=default, metavar="KIND,..", help=text)


def kinds(names: str) -> list[str]:
    """A comma list of kinds, for argparse."""
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in KINDS]:
        raise argparse.ArgumentTypeError(
            f"no kind {', '.join(unknown)}: choose from {', '.join(KINDS)}"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
