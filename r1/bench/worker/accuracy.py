"""The command that asks the arm the checkpoint's problems."""

from __future__ import annotations

from r1.bench import exam
from r1.bench.exam import Question
from r1.bench.process import Answer
from r1.bench.worker.subject import Subject


def accuracy(subject: Subject, questions: list[Question]) -> Answer:
    """The share of right answers.

    A compiled or tuned arm gets batches of the workload's size, the shape that it is made for.
    """
    backend = subject.engine.backend
    batch = subject.workload.batch if backend.compile or backend.tune else len(questions)
    share = exam.accuracy(subject.engine, questions, subject.workload.tokens, batch)
    return {"share": share, "problems": len(questions)}
