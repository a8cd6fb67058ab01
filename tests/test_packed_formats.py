"""Four-bit formats of others: the values they stand for, and every mode of AD through them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.families import family_batch, family_source
from costbp.config.catalog import FolderSource, ModelEntry
from costbp.errors import UserError
from costbp.estimators.forward_mode import directional_derivatives
from costbp.models.architecture import transformers_config
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.packed import GptqLinear, Nf4Linear, PackedLinear
from costbp.models.weights import load_base
from costbp.objective import Objective
from tests.entries import lora

GROUP = 16
SIZES = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 64}


def gptq_tensors(weight: torch.Tensor, group: int, order: torch.Tensor, less_one: bool):
    """A weight [out, in] as GPTQ stores it, packed value by value, and what it stands for."""
    outs, ins = weight.shape
    groups = ins // group
    index = order // group  # each input's group
    scales = torch.empty(groups, outs, dtype=torch.float16)
    zeros = torch.empty(groups, outs, dtype=torch.int64)
    levels = torch.empty(ins, outs, dtype=torch.int64)
    for g in range(groups):
        part = weight[:, index == g].T
        low, high = part.amin(0), part.amax(0)
        scales[g] = ((high - low) / 15).half()
        zeros[g] = (-low / scales[g].float()).round().clamp(1, 15).long()
        levels[index == g] = (part / scales[g].float() + zeros[g]).round().clamp(0, 15).long()
    stands_for = scales[index] * (levels - zeros[index]).half()
    stored = zeros - int(less_one)

    def word(values):
        total = sum(int(v) << (4 * place) for place, v in enumerate(values))
        return total - 2**32 if total >= 2**31 else total

    rows = [[word(levels[r : r + 8, c]) for c in range(outs)] for r in range(0, ins, 8)]
    marks = [[word(stored[g, c : c + 8]) for c in range(0, outs, 8)] for g in range(groups)]
    return {
        "qweight": torch.tensor(rows, dtype=torch.int32),
        "qzeros": torch.tensor(marks, dtype=torch.int32),
        "scales": scales,
        "g_idx": index.int(),
    }, stands_for.T.float()


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_gptq_layer_stands_for_its_checkpoint(less_one, shuffled):
    torch.manual_seed(0)
    plain = nn.Linear(32, 16)
    order = torch.randperm(32) if shuffled else torch.arange(32)  # act order
    tensors, weight = gptq_tensors(plain.weight.detach(), GROUP, order, less_one)
    layer = GptqLinear(plain, GROUP, less_one=less_one)
    layer.load_state_dict({**tensors, "bias": plain.bias})
    torch.testing.assert_close(layer.unpacked(torch.float32), weight, rtol=0, atol=0)
    assert float((weight - plain.weight).abs().max()) < 0.03
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, weight, plain.bias))
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(slope, weight.sum(0).expand(3, -1))


NF4 = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0
0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1.0"""


def test_nf4_rounds_to_the_nearest_of_the_published_levels():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(128, 24)
    layer = Nf4Linear(plain)
    levels = torch.tensor([float(v) for v in NF4.split()])  # Dettmers et al. 2023, appendix E
    blocks = plain.weight.detach().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / scales).unsqueeze(2).sub(levels).abs().argmin(2)] * scales
    torch.testing.assert_close(
        layer.unpacked(torch.float32), nearest.view(24, 128), rtol=1e-5, atol=1e-6
    )
    assert layer.qweight.nbytes == 128 * 24 // 2
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), F.linear(x, layer.unpacked(torch.float32), plain.bias))


# --- whole models ----------------------------------------------------------------------------------


def saved(family: str, folder, *, packed: bool, method: str = "gptq", bits: int = 4):
    """A small model as a transformers folder, its blocks' linear layers GPTQ's where ``packed``; and
    the state it stands for."""
    source = family_source(family, **SIZES)
    config = transformers_config(source.config)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if source.form == "causal" else AutoModelForImageTextToText
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    state, plain = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(state.items()):
        layer = name.removesuffix(".weight")
        linear = tensor.ndim == 2 and "layers" in name and "visual" not in name
        if packed and linear:
            tensors, plain[name] = gptq_tensors(tensor, GROUP, torch.arange(tensor.shape[1]), True)
            del state[name]
            state |= {f"{layer}.{key}": value for key, value in tensors.items()}
    if packed:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        file = folder / "config.json"
        settings = {"quant_method": method, "bits": bits, "group_size": GROUP, "desc_act": False}
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"quantization_config": settings})
        )
    return source, plain


def entry(source, folder, family, **held) -> ModelEntry:
    held = {"dtype": "float32", "form": source.form} | held
    local = FolderSource(kind="folder", path=str(folder), **held)
    return ModelEntry(label="small", source=local, train=lora(family))


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_a_gptq_checkpoint_loads_and_every_mode_agrees(family, tmp_path):
    source, plain = saved(family, tmp_path / "packed", packed=True)
    model = entry(source, tmp_path / "packed", family, bits=4, packing="gptq")
    base = load_base(model, tmp_path)
    layers = [m for m in base.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == len(plain) == 14
    found = sorted(float(m.unpacked(torch.float32).sum()) for m in layers)
    assert found == pytest.approx(sorted(float(w.sum()) for w in plain.values()), abs=1e-5)
    objective = Objective(build_model(model, 0, tmp_path, 0, 0), cross_entropy)
    with torch.no_grad():
        objective.theta.copy_(torch.randn(objective.d) / 10)
    data = family_batch(family, 2, 12, SIZES["vocabulary"])
    z = torch.randn(2, objective.d)
    _, gradient = objective.gradient(data)
    _, slopes = directional_derivatives(objective, data, z)
    assert float(gradient.norm()) > 0
    torch.testing.assert_close(slopes, z @ gradient, rtol=1e-3, atol=1e-5)


def test_scales_keep_their_precision_in_a_bfloat16_model(tmp_path):
    source, plain = saved("llama", tmp_path / "packed", packed=True)
    held = {"bits": 4, "packing": "gptq", "dtype": "bfloat16"}
    base = load_base(entry(source, tmp_path / "packed", "llama", **held), tmp_path)
    weights = dict(plain)
    for name, module in base.named_modules():
        if isinstance(module, PackedLinear):
            weight = module.unpacked(torch.float32)
            assert torch.equal(weight, weights.pop(f"{name}.weight"))
    assert not weights


def test_nf4_base_has_the_same_slopes_in_every_mode(tmp_path):
    pytest.importorskip("bitsandbytes")
    source, _ = saved("llama", tmp_path / "plain", packed=False)
    model = entry(source, tmp_path / "plain", "llama", bits=4, packing="nf4")
    objective = Objective(build_model(model, 0, tmp_path, 0, 0), cross_entropy)
    assert sum(isinstance(m, Nf4Linear) for m in objective.module.modules()) == 14
    with torch.no_grad():
        objective.theta.copy_(torch.randn(objective.d) / 10)
    data = family_batch("llama", 2, 12, SIZES["vocabulary"])
    z = torch.randn(3, objective.d)
    for training in (True, False):  # some releases repack their own layer in evaluation
        objective.module.train(training)
        _, gradient = objective.gradient(data)
        for count in (1, 3):
            _, slopes = directional_derivatives(objective, data, z[:count])
            torch.testing.assert_close(slopes, z[:count] @ gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "held", "words"),
    [
        ({"packed": True}, {}, r"are packed \(gptq\); set source.bits = 4 and packing gptq"),
        (
            {"packed": True, "bits": 8},
            {"bits": 4, "packing": "gptq"},
            "bits = 8; packing gptq reads",
        ),
        ({"packed": False}, {"bits": 4, "packing": "gptq"}, "reads a checkpoint that GPTQ made"),
        ({"packed": False}, {"bits": 4, "group": 12}, "does not divide the 32 inputs"),
    ],
)
def test_packings_that_do_not_fit_are_one_line(stored, held, words, tmp_path):
    source, _ = saved("llama", tmp_path / "m", **stored)
    with pytest.raises(UserError, match=words) as caught:
        load_base(entry(source, tmp_path / "m", "llama", **held), tmp_path)
    assert "\n" not in str(caught.value)
