"""Each kind of task with each method, and scores of language models against one example at a time."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch

from costbp.config import Cell, load_plan
from costbp.config.load import overlaid
from costbp.config.study import Plan
from costbp.cost.step import Count
from costbp.data.encode import Prompter, encode
from costbp.data.pairs import Pair
from costbp.data.prepare import Prepared, load_prepared, prepare
from costbp.errors import UserError
from costbp.models.build import build_model
from costbp.models.tokenizer import Bytes
from costbp.objective import Key
from costbp.tasks import easy_vqa, gsm8k, multirc
from costbp.tasks.base import Example, load_task
from costbp.train.loop import Run
from tests.conftest import ROOT, working_copy

CPU = torch.device("cpu")
KINDS = {
    "features": ("tiny_head", "docstrings"),
    "pairs": ("tiny_lora", "name_fits"),
    "pairs_as_text": ("tiny_decoder", "name_fits"),
    "choices": ("tiny_decoder", "word_choices"),
    "numbers": ("tiny_decoder", "word_problems"),
    "packed": ("tiny_packed", "word_problems"),
    "images": ("tiny_seer", "easy_vqa"),
}
BY_EXAMPLE = ("zo_per_example", "fmad_per_example", "zo_nodes")  # patches of images are no rows


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A working copy whose easy-VQA is a folder of twelve drawn squares."""
    folder = working_copy(tmp_path_factory.mktemp("standins"))
    draw_easy_vqa(folder / "cache/assets/easy_vqa")
    with contextlib.chdir(folder):
        plan = load_plan()
        packed = {"source.bits": 4, "source.group": 16}
        entry = overlaid(plan.catalog.models["tiny_decoder"], packed, "test")
        plan.catalog.models["tiny_packed"] = entry
        yield plan


def draw_easy_vqa(folder: Path) -> None:
    import json

    from PIL import Image

    for split, count in (("train", 400), ("test", 60)):
        (folder / split / "images").mkdir(parents=True)
        questions = []
        for index in range(count):
            colour = easy_vqa.COLOURS[index % 8]
            picture = Image.new("RGB", (64, 64), colour)
            picture.putpixel((index % 64, index // 64), (1, 2, 3))  # no two alike
            picture.save(folder / split / "images" / f"{index}.png")
            questions.append(["what color is the shape?", colour, index])
        (folder / split / "questions.json").write_text(json.dumps(questions))


def load(plan: Plan, kind: str) -> tuple[Prepared, Cell]:
    model, task = KINDS[kind]
    entry = plan.catalog.tasks[task].model_copy(
        update={
            "batch_size": 2,
            "validation": 12,
            "test": 20,
            "train": 64,
            "max_length": 60 if model in ("tiny_lora", "tiny_head") else 176,
        }
    )
    smaller = plan.model_copy(
        update={
            "catalog": plan.catalog.model_copy(update={"tasks": plan.catalog.tasks | {task: entry}})
        }
    )
    return load_prepared(prepare(Pair.of(smaller, model, task))), Cell(
        model, task, "bp_vanilla", "units_96"
    )


def run_of(plan: Plan, kind: str, method: str) -> Run:
    data, cell = load(plan, kind)
    spec = plan.spec(cell._replace(method=method), 0)
    spec = spec.model_copy(update={"task": spec.task.model_copy(update={"batch_size": 2})})
    module = build_model(spec.model, len(data.names), Path("cache/assets"), 0, data.width)
    return Run(spec, module, data, CPU)


def methods() -> list[str]:
    with contextlib.chdir(ROOT):
        return list(load_plan().catalog.methods)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_takes_three_steps(plan, kind):
    for method in methods():
        run = run_of(plan, kind, method)
        start = run.objective.theta.clone()
        if kind == "images" and method in BY_EXAMPLE:
            with pytest.raises(UserError, match="can't be told apart into examples"):
                run.step(run.batches(), Key(0, 0), Count(0, 1.0, 0))
            continue
        for _ in range(3):
            key = Key(0, run.state.step)
            loss, *_ = run.step(run.batches(), key, Count(0, 1.0, 0))
            assert math.isfinite(loss), (kind, method)
        assert run.objective.finite(), (kind, method)
        assert not torch.equal(run.objective.theta, start), (kind, method)


# --- scores ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pairs_as_text", "choices", "images"])
def scored(plan, request):
    """A run whose adapters and head have been moved, so that answers differ."""
    run = run_of(plan, request.param, "bp_vanilla")
    torch.manual_seed(1)
    with torch.no_grad():
        run.objective.theta.copy_(2 * torch.randn(run.objective.d))
    run.module.eval()
    return run


def alone(run: Run, index: int, ids: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods [length, vocabulary] of one unpadded row."""
    split = run.data.splits["validation"]
    batch = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, len(ids)).long()}
    batch |= split.seen(torch.tensor([index]), batch)
    with torch.no_grad():
        return run.module(batch)[0].log_softmax(-1)


def test_likelihoods_of_answers_are_those_of_each_example_alone(scored):
    run, split = scored, scored.data.splits["validation"]
    indices, right = torch.arange(len(split)), 0
    prompts = [split.prompt(i) for i in indices.tolist()]
    model = run.module.model
    with torch.no_grad():
        found = torch.stack(
            [run.scorer._sums(model, split, indices, prompts, c) for c in run.data.choices], 1
        )
    for index, prompt in enumerate(prompts):
        for place, choice in enumerate(run.data.choices):
            table = alone(run, index, torch.cat([prompt, torch.tensor(choice)]))
            rows = table[len(prompt) - 1 : -1].gather(1, torch.tensor(choice).unsqueeze(1))
            assert float(found[index, place]) == pytest.approx(float(rows.sum()), rel=1e-3)
        best = run.data.names[int(found[index].argmax())]
        right += best == split.examples[index].answer
    assert run.scorer(run.module, "validation").accuracy == right / len(split)
    assert float(found.std(0).min()) > 1e-3  # prompts matter


def test_choices_of_one_token_are_compared_in_one_pass(scored):
    run, split = scored, scored.data.splits["validation"]
    ids = list(range(70, 70 + len(run.data.names)))
    run.data.facts["choices"], before = [[token] for token in ids], run.data.choices
    try:
        answers = run.scorer._likeliest(run.module.model, split)
    finally:
        run.data.facts["choices"] = before
    for index, answer in enumerate(answers):
        last = alone(run, index, split.prompt(index))[-1, ids]
        assert answer == run.data.names[int(last.argmax())]


def test_the_loss_is_the_mean_over_answers_tokens(scored):
    run, split = scored, scored.data.splits["validation"]
    total, count = 0.0, 0
    for index in range(len(split)):
        row, start = split.row(index), len(split.prompt(index))
        table = alone(run, index, row)[start - 1 : -1]
        total -= float(table.gather(1, row[start:].unsqueeze(1)).sum())
        count += len(row) - start
    assert run.scorer(run.module, "validation").loss == pytest.approx(total / count, rel=1e-4)
    one = run.scorer.batch_size  # and the training loss of a batch is the same mean
    assert one >= len(split)
    batch = split.batch(torch.arange(len(split)))
    with torch.no_grad():
        assert float(run.objective.value(batch)) == pytest.approx(total / count, rel=1e-4)


def test_what_is_written_is_the_greedy_continuation(scored):
    run, split = scored, scored.data.splits["validation"]
    words = Bytes(260)
    with torch.no_grad():
        found = run.scorer._written(run.module.model, split)
    texts = set()
    for index in range(4):
        ids = split.prompt(index)
        for _ in range(run.scorer.task.new_tokens):
            token = alone(run, index, ids)[-1].argmax()
            if int(token) == words.end:
                break
            ids = torch.cat([ids, token.view(1)])
        text = words.text(ids[len(split.prompt(index)) :].tolist())
        texts.add(text)
        assert found[index] == run.scorer.task.parse(text)
    assert any(texts)


def test_a_summary_holds_both_ways_of_choosing(plan):
    run = run_of(plan, "choices", "bp_vanilla")
    metrics = run.summary(test=True).test_metrics
    assert metrics.keys() == {"accuracy", "accuracy_by_generation"}
    free = run_of(plan, "numbers", "bp_vanilla").summary(test=True)
    assert free.test_metrics.keys() == {"accuracy"} and free.test_accuracy is not None


def test_a_classifier_reports_its_benchmarks_metrics(plan):
    run = run_of(plan, "pairs", "bp_vanilla")
    object.__setattr__(run.scorer, "task", load_task("multirc"))
    found = run.summary(test=True).test_metrics
    assert found.keys() == {"accuracy", "f1", "exact_match"}


# --- encoding ----------------------------------------------------------------------------------


def entry(name: str = "tiny_decoder"):
    with contextlib.chdir(ROOT):
        return load_plan().catalog.models[name]


@pytest.mark.parametrize("limit", [12, 40, 60, 200])
def test_prompts_are_cut_in_the_context_first_and_end_as_they_should(limit):
    words, task = Bytes(260), multirc.TASK
    example = Example("Why?", "yes", "once upon a time " * 6)
    encoded = encode([example], entry(), task, limit, words)
    (row,), (start,) = encoded.rows, encoded.starts
    assert len(row) <= limit
    assert words.text(row[start:]) == " yes" and row[-1] == words.end
    whole = len(Prompter(entry(), task, words).all([example])[0]) + len(" yes") + 1
    assert encoded.truncated == int(whole > limit)
    if limit == 200:
        prompt = words.text(row[:start])
        assert prompt.startswith("once upon") and prompt.endswith(task.instruction)
    if limit >= 60:  # what asks for the answer stays
        assert words.text(row[:start]).endswith(task.instruction)


@pytest.mark.parametrize("limit", [44, 100, 130])
def test_a_prompt_is_cut_alike_whatever_its_answer(limit):
    words, task = Bytes(260), gsm8k.TASK
    question = "How many apples are there in all? " * 2
    answers = ["#### 1", "first this, then that, " * 9 + "#### 12"]
    encoded = encode([Example(question, answer) for answer in answers], entry(), task, limit, words)
    one, other = (row[:start] for row, start in zip(encoded.rows, encoded.starts, strict=True))
    assert one == other
    assert words.text(one).endswith(task.instruction) == (limit > 44)
    assert max(map(len, encoded.rows)) == limit and encoded.truncated == 2
    assert words.text(encoded.rows[1][len(other) :]).startswith(" first this")


def test_a_classifiers_pair_is_cut_in_its_context_first():
    words = Bytes(260)
    example = Example("Why so?", "yes", "once upon a time")
    encoded = encode([example], entry("tiny_lora"), multirc.TASK, 14, words)
    (row,) = encoded.rows
    assert encoded.truncated == 1 and len(row) == 14
    assert words.text(row) == "Why so?once"
    assert row[-1] == words.end


def test_an_image_takes_its_tokens_and_only_those(plan):
    data, _ = load(plan, "images")
    split = data.splits["train"]
    batch = split.batch(torch.arange(3))
    config = plan.catalog.models["tiny_seer"].source.config
    grids = batch["image_grid_thw"]
    tokens = (batch["input_ids"] == config["image_token_id"]).sum(1)
    assert tokens.tolist() == (grids.prod(1) // 4).tolist()  # four patches a token
    assert len(batch["pixel_values"]) == int(grids.prod(1).sum())
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == 263).long())
    assert not (batch["labels"] == 263).any()
