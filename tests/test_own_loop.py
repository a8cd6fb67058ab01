"""Methods in training loops of one's own: a plain one, and transformers' Trainer."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import costbp
from costbp.errors import UserError
from costbp.objective import Key
from tests.conftest import ROOT

SGD = functools.partial(torch.optim.SGD, lr=0.05)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def loader(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, 5, generator=generator)
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def test_backpropagation_is_torch_s_own_loop():
    wanted, found = network(), network()
    optimizer = SGD(wanted.parameters())
    steps = costbp.method("bp_vanilla", optimizer=SGD).on(found, loss)
    for batch in loader(5):
        optimizer.zero_grad()
        expected = loss(wanted, batch)
        expected.backward()
        optimizer.step()
        assert torch.equal(steps(batch), expected.detach())
    for one, other in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["fmad_vanilla", "zo_vanilla"])
def test_an_estimate_is_the_gradient_s_share_along_its_direction(name):
    """(g . z) z, with g by torch in float64 and z drawn again from its key."""
    module, (batch,) = network(), loader(1)
    steps = costbp.method(name, optimizer=SGD).on(module, loss)
    estimate = steps.estimate(batch).gradient.double()
    parameters = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    value = F.cross_entropy(functional_call(module, parameters, batch[0].double()), batch[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, [*parameters.values()])])
    z = steps.estimator.source.draw(steps.objective, Key(0, 0), 1).row(0).double()
    torch.testing.assert_close(estimate, (gradient @ z) * z, rtol=5e-3, atol=1e-4)
    held = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert torch.equal(held, steps.objective.buffer)


def test_methods_of_several_batches_take_them_from_a_loader():
    settings = {"svrg.period": 3, "svrg.snapshot_batches": 2}
    steps = costbp.method("zo_svrg", optimizer=SGD, settings=settings).on(network(), loss)
    assert steps.batches == 2
    assert len(list(steps.over(loader(9)))) == 6  # 2 + 1 + 1, twice; one left over
    steps = costbp.method("bp_accumulate", optimizer=SGD).on(network(), loss)
    with pytest.raises(ValueError, match="looks at 4 batches, not 1"):
        steps(loader(1)[0])


@pytest.mark.parametrize("name", ["fmad_multiple", "zo_svrg", "zo_sparse", "hizoo"])
def test_a_loop_that_continues_is_bit_equal(name):
    def begun():
        return costbp.method(name, settings={"optimizer.lr": 1e-3}).on(network(), loss, seed=3)

    whole = begun()
    list(whole.over(loader(24)))
    first = begun()
    list(first.over(loader(24)[:13]))
    second = begun()
    second.objective.module.load_state_dict(first.objective.module.state_dict())
    second.load_state_dict(first.state_dict())
    list(second.over(loader(24)[13:]))
    assert second.step == whole.step
    assert torch.equal(second.objective.theta, whole.objective.theta)


@pytest.mark.parametrize("name", ["fmad_multiple", "zo_multiple"])
def test_batches_may_be_mappings_with_other_things_in_them(name):
    def by_name(module, batch):
        assert batch["name"] == "a batch"
        return F.cross_entropy(module(batch["x"]), batch["y"])

    module = network()
    x, y = loader(1)[0]
    steps = costbp.method(name, optimizer=SGD).on(module, by_name)
    batch = {"name": "a batch", "x": x, "y": y}  # the first leaf is no tensor
    values = [float(steps(batch)) for _ in range(60)]
    assert values[-1] < 0.9 * values[0]


def test_each_batch_of_a_step_keeps_what_is_no_tensor():
    seen = []

    def weighted(module, batch):
        x, factor = batch
        seen.append(factor)
        return factor * module(x).square().mean()

    steps = costbp.method("bp_accumulate", optimizer=SGD).on(network(), weighted)
    steps(*((x, 10**i) for i, (x, _) in enumerate(loader(4))))
    assert seen == [1, 10, 100, 1000]


def test_differences_are_settled_before_the_first_step_unless_their_eps_is_set():
    for settings, eps in (({}, 1e-3), ({"estimator.oracle.eps": 0.02}, 0.02)):
        steps = costbp.method("zo_vanilla", settings=settings).on(network(), loss)
        asked = steps.estimator.difference
        assert asked.eps == settings.get("estimator.oracle.eps")
        steps(loader(1)[0])
        assert asked.eps == eps
    # of a loss of ten thousand float32's last digit is 0.001: the usual step drowns in it
    steps = costbp.method("zo_vanilla").on(network(), lambda m, batch: m(batch[0]).mean() + 1e4)
    steps.estimate(loader(1)[0])
    assert steps.estimator.difference.eps > 1e-3


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match=r"no method 'fmad_multipel'.*did you mean 'fmad_multiple'"):
        costbp.method("fmad_multipel")
    with pytest.raises(UserError, match=r"settings: .*directions.count = 0"):
        costbp.method("fmad_multiple", settings={"estimator.directions.count": 0})


def test_importing_the_package_imports_no_torch():
    code = "import sys, costbp; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- transformers' Trainer -----------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        seed=5,
    )


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, intermediate_size=32, max_position_embeddings=16, **sizes)
    )


def rows():
    ids = torch.randint(0, 40, (24, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def test_the_trainer_with_backpropagation_is_transformers_own(arguments):
    from transformers import Trainer as Plain

    from costbp.hf_trainer import Trainer

    one, other = classifier().eval(), classifier().eval()
    for model in (one, other):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # masks are drawn otherwise
    wanted = Plain(one, arguments, train_dataset=rows()).train().training_loss
    method = costbp.method("bp_vanilla")
    found = Trainer(other, arguments, train_dataset=rows(), method=method).train().training_loss
    assert found == pytest.approx(wanted, rel=1e-5)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_the_trainer_refuses_what_takes_several_batches(arguments):
    from costbp.hf_trainer import Trainer

    for name in ("bp_accumulate", "zo_svrg"):
        with pytest.raises(UserError, match="one batch a step"):
            Trainer(classifier(), arguments, train_dataset=rows(), method=costbp.method(name))


# --- what README and docs show -------------------------------------------------------------------------


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def test_the_readme_s_lines_run(arguments):
    plain, trainer = snippets("README.md")
    assert len([line for line in plain.splitlines() if line]) == 5
    names = {"torch": torch, "F": F, "model": network(), "loader": loader(3)}
    before = [p.clone() for p in names["model"].parameters()]
    exec(plain, names)
    after = names["model"].parameters()
    assert not any(map(torch.equal, before, after)) and names["loss"].ndim == 0
    exec(trainer, names | {"model": classifier(), "arguments": arguments, "rows": rows()})


def test_the_page_s_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for text in snippets("docs/own-loop.md"):
        exec(text, names)
    assert sum(names["losses"][-8:]) < 0.9 * sum(names["losses"][:8])
    assert names["trainer"].state.global_step == 4
