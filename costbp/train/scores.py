"""How well a module answers the examples of a split: by classes, by likelihood, by what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from costbp.data.encoded import Split, padded
from costbp.data.prepare import Prepared
from costbp.device import to_device
from costbp.models.loss import cross_entropy
from costbp.models.tokenizer import Tokenizer
from costbp.objective import Loss
from costbp.tasks.base import Task

Scoring = Literal["likelihood", "generation"]


@dataclass(frozen=True)
class Scores:
    """Of one split.

    Attributes:
        loss: mean loss an example for classes, an answer's token for text.
        metrics: the task's, of which ``accuracy`` is the main one.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]


@dataclass(frozen=True)
class Scorer:
    """Scores a module on the splits of a prepared pair.

    Attributes:
        words: gives the model's tokenizer, which only written answers need.
        objective: the loss of classes that is reported; that of text is always cross-entropy.
    """

    data: Prepared
    task: Task
    batch_size: int
    device: torch.device
    words: Callable[[], Tokenizer]
    objective: Loss = cross_entropy

    @torch.no_grad()
    def __call__(self, module: nn.Module, split: str, scoring: Scoring = "likelihood") -> Scores:
        """Metrics and loss in evaluation mode; free text is always generated."""
        part = self.data.splits[split]
        was_training = module.training
        module.eval()
        try:
            if part.starts is None:
                answers, loss = self._classes(module, part)
            else:
                model: Any = module.model
                loss = self._loss(model, part)
                choose = (
                    self._likeliest
                    if scoring == "likelihood" and self.task.names
                    else self._written
                )
                answers = choose(model, part)
        finally:
            module.train(was_training)
        return Scores(loss, self.task.score(part.examples, answers))

    def _parts(self, split: Split) -> Iterator[Tensor]:
        """Indices by batches of similar lengths."""
        yield from split.order().split(self.batch_size)

    # --- classes ---------------------------------------------------------------------------------

    def _classes(self, module: nn.Module, split: Split) -> tuple[list[str], float]:
        answers, loss = [""] * len(split), 0.0
        for indices in self._parts(split):
            batch = to_device(split.batch(indices), self.device)
            logits = module(batch)
            loss += float(self.objective(logits, batch)) * len(indices)
            for index, best in zip(indices.tolist(), logits.argmax(-1).tolist(), strict=True):
                answers[index] = self.task.names[best]
        return answers, loss / len(split)

    # --- text ------------------------------------------------------------------------------------

    def _loss(self, model: Any, split: Split) -> float:
        total, count = 0.0, 0
        for indices in self._parts(split):
            rows = [split.row(i) for i in indices.tolist()]
            lengths = [len(split.row(i)) - len(split.prompt(i)) for i in indices.tolist()]
            for found in self._logarithms(model, split, indices, rows, lengths):
                total -= float(found.sum())
                count += len(found)
        return total / count

    def _likeliest(self, model: Any, split: Split) -> list[str]:
        """Of the task's names the one whose tokens are likeliest, their logarithms summed."""
        answers, choices = [""] * len(split), self.data.choices
        single = all(len(choice) == 1 for choice in choices)
        for indices in self._parts(split):
            prompts = [split.prompt(i) for i in indices.tolist()]
            if single:
                inputs = self._inputs(split, indices, prompts)
                last = model(**inputs, logits_to_keep=1).logits[:, -1]
                scores = last[:, [choice[0] for choice in choices]]
            else:
                scores = torch.stack(
                    [self._sums(model, split, indices, prompts, choice) for choice in choices], 1
                )
            for index, best in zip(indices.tolist(), scores.argmax(1).tolist(), strict=True):
                answers[index] = self.task.names[best]
        return answers

    def _sums(
        self, model: Any, split: Split, indices: Tensor, prompts: list[Tensor], choice: list[int]
    ) -> Tensor:
        rows = [torch.cat([prompt, torch.tensor(choice)]) for prompt in prompts]
        lengths = [len(choice)] * len(rows)
        return torch.stack(
            [found.sum() for found in self._logarithms(model, split, indices, rows, lengths)]
        )

    def _logarithms(
        self,
        model: Any,
        split: Split,
        indices: Tensor,
        rows: list[Tensor],
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """Log-likelihoods of the last ``lengths`` tokens of each row, given those before."""
        kept = max(lengths) + 1
        inputs = self._inputs(split, indices, rows)
        logits = model(**inputs, logits_to_keep=kept).logits[:, :-1].float().log_softmax(-1)
        ids = inputs["input_ids"][:, -(kept - 1) :].unsqueeze(2)
        found = logits.gather(2, ids).squeeze(2)
        return [row[-length:] for row, length in zip(found, lengths, strict=True)]

    def _inputs(self, split: Split, indices: Tensor, rows: list[Tensor]) -> dict[str, Tensor]:
        """Padded on the left, so that the last places are everybody's."""
        batch = padded(rows, max(len(row) for row in rows), split.pad, left=True)
        return dict(to_device({**batch, **split.seen(indices, batch)}, self.device))

    def _written(self, model: Any, split: Split) -> list[str]:
        """What the model writes after each prompt, greedily, as the task reads it."""
        from transformers import GenerationConfig

        words, answers = self.words(), [""] * len(split)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        settings = GenerationConfig(
            max_new_tokens=self.task.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=words.pad,
            eos_token_id=words.end,
        )
        for indices in self._parts(split):
            inputs = self._inputs(split, indices, [split.prompt(i) for i in indices.tolist()])
            found = whole.generate(**inputs, generation_config=settings)
            new = found[:, inputs["input_ids"].shape[1] :].tolist()
            for index, ids in zip(indices.tolist(), new, strict=True):
                answers[index] = self.task.parse(words.text(_until(ids, words.end)))
        return answers


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
