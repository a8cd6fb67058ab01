"""From catalog entries to modules: what is loaded, what is drawn from the seed, what is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.families import family_source
from costbp.cli import app
from costbp.config import load_plan
from costbp.config.catalog import (
    AssetSource,
    ConfigSource,
    FolderSource,
    ModelEntry,
    RandomSource,
    Repository,
)
from costbp.config.trainables import FullTraining, HeadTraining
from costbp.errors import UserError
from costbp.estimators.forward_mode import directional_derivatives
from costbp.models.architecture import longest, sample_batch, transformers_config
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.modules import Classifier
from costbp.models.trainable import trainable
from costbp.models.weights import configuration, load_base, weights_folder
from costbp.objective import Objective
from tests.conftest import ROOT
from tests.entries import lora
from tests.fetched_models import fusion

FUSION = fusion()
SIZES = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 64}
BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def folder_of(family: str, folder: Path, *, classes: int = 3) -> ConfigSource:
    """A small model with random weights as a transformers folder, without its classifier's head."""
    import transformers

    source = family_source(family, **SIZES)
    config = transformers_config(source.config, classes)
    kinds = {"classifier": "AutoModel", "causal": "AutoModelForCausalLM", "image_text": "AutoModelForImageTextToText"}  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, kinds[source.form]).from_config(config).save_pretrained(folder)
    return source


def local(folder: Path, form: str, train, **options) -> ModelEntry:
    held = {key: options.pop(key) for key in ("dtype", "bits") if key in options}
    source = FolderSource(kind="folder", path=str(folder), form=form, **held)
    return ModelEntry(label="small", source=source, train=train, **options)


def state(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "roberta", "opt"])
def test_a_classifiers_head_and_adapters_are_drawn_from_the_seed_and_its_base_is_read(
    family, tmp_path
):
    source = folder_of(family, tmp_path / "m")
    if family == "opt":
        source = source.model_copy(update={"form": "classifier"})
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "m" / "config.json").read_text()) | {"pad_token_id": 0})
    )
    entry = local(tmp_path / "m", "classifier", lora(family))
    one, same, other = (build_model(entry, 3, tmp_path, seed, 0) for seed in (0, 0, 1))
    first, again, second = map(state, (one, same, other))
    trained = [name for name, p in one.named_parameters() if p.requires_grad]
    assert any("classifier" in name or "score" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    for name in first:
        assert torch.equal(first[name], again[name]), name
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    drawn = {name for name in trained if "lora_B" not in name and not name.endswith("bias")}
    assert changed == drawn | {n for n in changed if "original_module" in n}
    data = sample_batch(transformers_config(source.config), "classifier", 3, 8, 3)
    assert one.eval()(data).shape == (3, 3)


def test_a_base_in_bfloat16_has_adapters_in_float32_and_right_slopes(tmp_path):
    source = folder_of("llama", tmp_path / "m")
    entry = local(tmp_path / "m", "causal", lora("llama"), dtype="bfloat16")
    module = build_model(entry, 0, tmp_path, 0, 0)
    dtypes = {p.requires_grad: p.dtype for p in module.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    objective = Objective(module, cross_entropy)
    with torch.no_grad():
        objective.theta.copy_(torch.randn(objective.d))
    data = sample_batch(transformers_config(source.config), "causal", 2, 8)
    z = torch.randn(1, objective.d)
    _, gradient = objective.gradient(data)
    _, slopes = directional_derivatives(objective, data, z)
    torch.testing.assert_close(slopes, z @ gradient, rtol=0.05, atol=0.02)


def test_what_each_kind_of_training_trains(tmp_path):
    folder_of("bert", tmp_path / "m")

    def trained(form, train):
        module = build_model(local(tmp_path / "m", form, train), 3, tmp_path, 0, 0)
        return {name for name, p in module.named_parameters() if p.requires_grad}

    head = trained("classifier", HeadTraining(kind="head"))
    assert head == {"model.classifier.weight", "model.classifier.bias"}
    full = trained("encoder", FullTraining(kind="full"))
    assert not any("pooler" in name for name in full)
    assert {"head.classifier.weight", "encoder.model.embeddings.word_embeddings.weight"} < full
    assert build_model(
        local(tmp_path / "m", "encoder", HeadTraining(kind="head")), 3, tmp_path, 0, 7
    )({"features": torch.randn(2, 7)}).shape == (2, 3)


def test_of_a_fusion_only_head_and_projection_may_be_trained(vision, tmp_path):
    source = RandomSource(kind="random", model_type="bert", config=BERT)
    base = load_base(ModelEntry(label="x", source=source, train=lora("bert")), tmp_path)
    model = trainable(base, "encoder", HeadTraining(kind="head"))
    module = Classifier(FUSION.Fusion(model, vision), 3)
    trained = {name.split(".")[-2] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"projection", "classifier"}


def test_a_format_of_four_bits_needs_four_bits():
    with pytest.raises(ValueError, match="packing nf4 needs bits: 4"):
        FolderSource(kind="folder", path="x", packing="nf4")


def test_a_broken_gguf_file_is_one_line_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF and no more")
    source = AssetSource(kind="asset", asset="a", gguf="model.gguf", form="causal")
    entry = ModelEntry(label="x", source=source, train=lora("llama"))
    with pytest.raises(UserError, match=r"model\.gguf: can't be unpacked") as caught:
        weights_folder(entry, tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == [".unpacked.lock", "model.gguf"]


def test_dropout_is_the_entrys_or_the_models_own(tmp_path):
    source = RandomSource(kind="random", model_type="bert", config=BERT)
    for given, expected in ((0.0, 0.0), (0.3, 0.3), (None, 0.1)):
        entry = ModelEntry(label="x", source=source, train=lora("bert"), dropout=given)
        assert load_base(entry, tmp_path).embeddings.dropout.p == expected


# --- refusals ----------------------------------------------------------------------------------


def test_fetched_weights_are_of_the_architecture_that_is_traced(tmp_path):
    weights = Repository(repo="a/b")
    source = folder_of("llama", tmp_path / weights.folder)
    entry = ModelEntry(
        label="small", source=source.model_copy(update={"weights": weights}), train=lora("llama")
    )
    assert weights_folder(entry, tmp_path) == tmp_path / weights.folder
    assert load_base(entry, tmp_path) is not None
    other = source.model_copy(
        update={"weights": weights, "config": source.config | {"hidden_size": 64}}
    )
    with pytest.raises(UserError, match=r"hidden_size = 32, and the catalog's models.yaml says 64"):
        load_base(entry.model_copy(update={"source": other}), tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["EVIL"])),)


def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    folder_of("llama", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save({"weight": Evil()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load_base(local(tmp_path / "m", "causal", lora("llama")), tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: None, "holds no config.json; check source.path"),
        (lambda m: (m.mkdir(), (m / "config.json").write_text("{")), "config.json"),
        (lambda m: (m.mkdir(), (m / "config.json").write_text('{"model_type": "nothing"}')), "config.json"),
        (lambda m: (folder_of("llama", m), (m / "model.safetensors").unlink()), "can't be loaded"),
        (lambda m: (folder_of("llama", m), (m / "model.safetensors").write_bytes(b"x" * 100)), "can't be loaded"),
    ],
)  # fmt: skip
def test_folders_that_hold_no_model_are_one_line(make, words, tmp_path):
    make(tmp_path / "m")
    with pytest.raises(UserError, match=words) as caught:
        load_base(local(tmp_path / "m", "causal", lora("llama")), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_packed_base_is_not_trained_in_full(tmp_path):
    with pytest.raises(ValueError, match="can't be trained in full"):
        local(tmp_path, "causal", FullTraining(kind="full"), bits=4)


# --- image and text ----------------------------------------------------------------------------


@pytest.fixture
def vision(tmp_path):
    """With random weights under the published names, some of which it doesn't read."""
    torch.manual_seed(0)
    encoder = FUSION.VisionEncoder()
    with pytest.raises(UserError, match="no weights of EfficientNet-lite0"):
        encoder.read(tmp_path / "none.pth")
    state = {**encoder.state_dict(), "_fc.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "v.pth")
    return FUSION.VisionEncoder().read(tmp_path / "v.pth")


def test_the_vision_encoder_is_frozen_and_gives_a_vector_a_cell(vision):
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    found = vision.train()(pixels)
    assert found.shape == (2, 2 * 3, 320)
    assert not vision._bn0.training
    assert not any(p.requires_grad for p in vision.parameters())
    torch.testing.assert_close(vision(pixels[1:]), found[1:], rtol=1e-4, atol=1e-5)  # no batch norm


def test_forward_mode_through_image_and_text_equals_reverse_mode(vision, tmp_path):
    source = RandomSource(kind="random", model_type="bert", config=BERT)
    base = load_base(ModelEntry(label="x", source=source, train=lora("bert")), tmp_path)
    module = Classifier(FUSION.Fusion(trainable(base, "encoder", lora("bert")), vision), 3)
    objective = Objective(module.train(), cross_entropy)
    with torch.no_grad():
        objective.theta.add_(torch.randn(objective.d) / 5)
    data = {
        "input_ids": torch.randint(0, 64, (2, 8)),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "pixel_values": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "labels": torch.tensor([0, 2]),
    }
    _, gradient = objective.gradient(data)
    z = torch.randn(2, objective.d)
    _, slopes = directional_derivatives(objective, data, z)
    torch.testing.assert_close(slopes, z @ gradient, rtol=1e-3, atol=1e-4)
    names = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    changed = {n: torch.ones_like(p) for n, p in names.items()}
    with sdpa_kernel(SDPBackend.MATH):
        _, stock = jvp(lambda p: objective.loss(functional_call(module, p, (data,)), data), (names,), (changed,))  # fmt: skip
    assert float(stock) == pytest.approx(float(gradient.sum()), rel=1e-3)
    assert any("projection" in name for name in objective.slices)
    other = data | {"pixel_values": 255 - data["pixel_values"]}
    module.double()  # what random weights make of an image is small
    with torch.no_grad():
        one, two = (float(cross_entropy(module(batch), batch)) for batch in (data, other))
    assert one != two


def test_cells_and_question_fit_the_positions(workdir):
    models = load_plan().catalog.models
    source = models["fusion_lora"].source
    assert source.image_positions == (source.image_side // 32) ** 2
    assert longest(configuration(models["roberta_base"], Path())) == 512
    assert longest(configuration(models["tiny_seer"], Path())) == 512


def test_doctor_lists_what_is_missing(workdir, capsys, monkeypatch):
    app(["doctor", "-c", "config/studies/offline.yaml"], standalone_mode=False)
    assert "study 'offline' can run here" in capsys.readouterr().out
    monkeypatch.setattr("costbp.cli.doctor.find_spec", lambda name: None)
    with pytest.raises(UserError, match="its needs are not met here") as caught:
        app(["doctor", "-c", "config/studies/standins.yaml"], standalone_mode=False)
    out = capsys.readouterr().out
    assert caught.value.code == 1
    assert "package gguf" in out and "pip install gguf sentencepiece" in out
    assert "smollm2" in out and "89 MiB" in out and "to download" in out


def test_a_head_on_cached_features_needs_no_large_library():
    program = """
import sys
import costbp.train.experiment
from pathlib import Path
from costbp.config import load_plan
from costbp.models.build import build_model
build_model(load_plan().catalog.models["tiny_head"], 4, Path(), 0, 64)
print({"transformers", "peft", "datasets", "tokenizers", "PIL", "pandas"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
