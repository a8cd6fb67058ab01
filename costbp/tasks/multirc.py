"""MultiRC: is this an answer to the question on the paragraph? (Khashabi et al. 2018, NAACL).

Several answers to one question may be right. Beside accuracy over answers the benchmark reports F1
of the right ones, over all answers, and the share of questions whose answers are all judged rightly.
"""

from collections.abc import Sequence

from costbp.tasks.base import Example, Metrics, Row, Task, accuracy, named, one_of

NAMES = ("no", "yes")


def example(row: Row) -> Example:
    paragraph, question = str(row["paragraph"]), str(row["question"])
    return Example(
        f"{question}\nProposed answer: {row['answer']}",
        named(row["label"], NAMES),
        paragraph,
        group=f"{paragraph}\n{question}",
    )


def score(examples: Sequence[Example], given: Sequence[str]) -> Metrics:
    """Accuracy, F1 of "yes" over all answers (F1a), exact match by question (EM)."""
    pairs = list(zip(examples, given, strict=True))
    both = sum(e.answer == answer == "yes" for e, answer in pairs)
    claimed = sum(answer == "yes" for _, answer in pairs)
    true = sum(e.answer == "yes" for e in examples)
    whole: dict[str, bool] = {}
    for e, answer in pairs:
        whole[e.group] = whole.get(e.group, True) and answer == e.answer
    return accuracy(examples, given) | {
        "f1": 2 * both / (claimed + true) if claimed + true else 0.0,
        "exact_match": sum(whole.values()) / len(whole),
    }


TASK = Task(
    example=example,
    columns=("paragraph", "question", "answer", "label"),
    names=NAMES,
    instruction="Is the proposed answer right? Answer yes or no:",
    parse=one_of(NAMES),
    score=score,
)
