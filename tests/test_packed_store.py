"""Weights that are packed once: equal to packing the whole model, in little memory, made anew when
they must be."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from benchmarks.families import family_source
from costbp.config import load_plan
from costbp.config.catalog import FolderSource, LocalData, ModelEntry, TaskEntry
from costbp.config.trainables import HeadTraining
from costbp.data.pairs import Pair
from costbp.data.prepare import prepare
from costbp.errors import UserError
from costbp.models import packed
from costbp.models.architecture import transformers_config
from costbp.models.build import build_model
from costbp.models.packed import Nf4Linear, PackedLinear, QuantisedLinear, replace_packed
from costbp.models.trainable import HEADS
from costbp.models.weights import CLASSES, load_base
from tests.entries import lora
from tests.test_sources import tokenizer

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 64}
GROUP = 16


def checkpoint(family: str, folder: Path, *, binary: bool = False, seed: int = 0, **sizes) -> Path:
    """A language model with random weights in float16, in shards."""
    source = family_source(family, **SIZES | sizes)
    config = transformers_config(source.config)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[source.form]).from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="20KB")
    if binary:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        state = {
            k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys
        }
        shards = split_torch_state_dict_into_shards(
            state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size="20KB"
        )
        for file, names in shards.filename_to_tensors.items():
            torch.save({name: state[name] for name in names}, folder / file)
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) > 2
    return folder


def entry(folder: Path, form: str, train=None, **held) -> ModelEntry:
    held = {"dtype": "bfloat16", "bits": 4, "group": GROUP} | held
    source = FolderSource(kind="folder", path=str(folder), form=form, **held)
    return ModelEntry(label="m", source=source, train=train or lora("llama"))


def state(module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def caches(assets: Path) -> list[Path]:
    return sorted(path.parent for path in assets.glob("packed/*/*/packed.json"))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packing", ["rtn", "nf4"])
@pytest.mark.parametrize(
    ("family", "form"), [("llama", "causal"), ("opt", "classifier"), ("qwen2_vl", "image_text")]
)
def test_packed_once_is_the_whole_model_packed(family, form, packing, binary, tmp_path):
    if packing == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = checkpoint(family, tmp_path / "m", binary=binary)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    model = entry(folder, form, packing=packing)
    whole = load_base(entry(folder, form, bits=None), tmp_path, 3)
    replace_packed(whole, Nf4Linear if packing == "nf4" else partial(QuantisedLinear, group=GROUP))
    for classes in (3, 5):
        base = load_base(model, tmp_path, classes)
        found, wanted = state(base), state(whole)
        assert found.keys() == wanted.keys()
        assert sum(isinstance(layer, PackedLinear) for layer in base.modules()) >= 12
        drawn = {k for k in wanted if form == "classifier" and {*HEADS} & {*k.split(".")}}
        assert len(drawn) == (form == "classifier")
        for name in wanted.keys() - drawn:
            assert found[name].dtype == wanted[name].dtype, name
            assert torch.equal(found[name], wanted[name]), name
    (kept,) = caches(tmp_path)
    assert kept.name == f"packed-{form}-{packing}-{GROUP}-bfloat16"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_language_model_writes_as_its_folder_says(tmp_path):
    folder = checkpoint("llama", tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 2}))
    assert load_base(entry(folder, "causal"), tmp_path).generation_config.repetition_penalty == 2


def qweights(model: ModelEntry, assets: Path) -> torch.Tensor:
    layers = load_base(model, assets).modules()
    return torch.cat([layer.qweight.flatten() for layer in layers if hasattr(layer, "qweight")])


def test_packed_weights_are_made_anew_when_damaged_or_of_other_weights(tmp_path, capsys):
    model = entry(checkpoint("llama", tmp_path / "m"), "causal")
    first = qweights(model, tmp_path)
    assert "packing the weights into four bits, once" in capsys.readouterr().err
    (kept,) = caches(tmp_path)
    assert torch.equal(qweights(model, tmp_path), first)
    assert capsys.readouterr().err == ""  # read, not made

    (file,) = kept.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    assert torch.equal(qweights(model, tmp_path), first)
    (kept / "packed.json").unlink()
    scratch = kept.with_name(f".{kept.name}")  # as a killed process leaves it
    scratch.mkdir()
    (scratch / "model.safetensors").write_bytes(b"half")
    assert torch.equal(qweights(model, tmp_path), first)
    assert capsys.readouterr().err.count("packing") == 2

    checkpoint("llama", tmp_path / "m", seed=1)
    second = qweights(model, tmp_path)
    shutil.rmtree(tmp_path / "packed")
    assert torch.equal(qweights(model, tmp_path), second)
    assert not torch.equal(first, second)


def test_a_layer_that_the_weights_lack_is_packed_as_drawn(tmp_path):
    folder = checkpoint("llama", tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    lost = "model.layers.0.mlp.up_proj.weight"
    file = folder / found["weight_map"].pop(lost)
    index.write_text(json.dumps(found))
    state = {name: tensor for name, tensor in load_file(file).items() if name != lost}
    save_file(state, file, metadata={"format": "pt"})
    first, again = (load_base(entry(folder, "causal"), tmp_path) for _ in range(2))
    one, other = (base.model.layers[0].mlp.up_proj for base in (first, again))
    assert 0.01 < float(one.unpacked(torch.float32).std()) < 0.03  # as the family draws it
    assert torch.equal(one.qweight, other.qweight) and torch.equal(one.scales, other.scales)


def test_without_room_nothing_is_left(tmp_path, monkeypatch):
    def full(*args, **options):
        save_torch_state_dict(*args, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    model = entry(checkpoint("llama", tmp_path / "m"), "causal")
    with pytest.raises(UserError, match=r"can't be made \(.*No space left on device") as caught:
        load_base(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in tmp_path.glob("packed/*/*")] == [".lock"]


def test_packing_holds_a_few_weights_in_full_at_a_time(tmp_path, monkeypatch):
    folder = checkpoint("llama", tmp_path / "m", hidden=128, layers=12)
    peaks: list[int] = []
    calls: list[str] = []

    def live() -> int:
        """Bytes of all tensors there are."""
        found = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        there = {t.untyped_storage() for t in found if t.device.type == "cpu"}
        return sum({s.data_ptr(): s.nbytes() for s in there}.values())

    def watched(weight, group):
        calls.append(weight.device.type)
        if calls[-1] == "cpu" and len(calls) % 9 == 0:  # looking takes 0.1 s
            peaks.append(live() - before)
        return quantise(weight, group)

    quantise = packed.quantise
    before = live()
    monkeypatch.setattr(packed, "quantise", watched)
    base = load_base(entry(folder, "causal", dtype="float32"), tmp_path)
    parts = state(base).values()
    linear = 4 * sum(
        p.in_features * p.out_features for p in base.modules() if isinstance(p, PackedLinear)
    )
    held = sum(part.nbytes for part in parts)
    assert calls.count("cpu") == 12 * 7 and len(peaks) > 8
    assert linear > 4 * held
    assert max(peaks) < held + linear / 10


# --- where it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [{}, {"packing": "nf4"}, {"bits": None}])
def test_weights_are_read_onto_the_device(held, tmp_path):
    if held.get("packing") == "nf4":
        pytest.importorskip("bitsandbytes")
    model = entry(checkpoint("llama", tmp_path / "m"), "causal", **held)
    load_base(model, tmp_path)
    devices = {
        part.device.type for part in state(load_base(model, tmp_path, device="meta")).values()
    }
    assert devices == {"meta"}


@pytest.mark.parametrize("train", [None, HeadTraining(kind="head")])
@pytest.mark.parametrize("form", ["causal", "classifier", "encoder"])
def test_all_is_drawn_on_the_cpu_and_ends_on_the_device(form, train, tmp_path):
    model = entry(checkpoint("opt", tmp_path / "m"), form, train, bits=None)
    drawn = []
    for device in ("cpu", "meta"):
        module = build_model(model, 3, tmp_path, 0, 0, device)
        assert {part.device.type for part in state(module).values()} == {device}
        assert module.training
        drawn.append(torch.get_rng_state())
    assert torch.equal(*drawn)


def test_preparing_packs_the_weights(workdir, capsys):
    rows = [{"text": f"a {i}", "label": i % 4} for i in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = load_plan()
    tokenizer(checkpoint("opt", Path("m")), eos_token="[END]")
    plan.catalog.models["m"] = entry(Path("m"), "classifier")
    plan.catalog.tasks["news"] = TaskEntry(
        label="x", loader="agnews", data=LocalData(path="rows.jsonl"), batch_size=4,
        max_length=16, validation=8, test=8,
    )  # fmt: skip
    prepare(Pair.of(plan, "m", "news"))
    assert "m: packing the weights into four bits, once" in capsys.readouterr().err
    assets = plan.study.paths.cache / "assets"
    assert len(caches(assets)) == 1
    key = plan.prepared("m", "news")
    build_model(plan.catalog.models["m"], 4, assets, 0, 0)
    assert capsys.readouterr().err == "" and plan.prepared("m", "news") == key
    shutil.rmtree(assets / "packed")
    prepare(Pair.of(plan, "m", "news"))  # though the splits are there
    assert len(caches(assets)) == 1


def test_random_weights_are_packed_without_a_store(tmp_path):
    from costbp.config.catalog import RandomSource

    config = family_source("llama", **SIZES).config
    source = RandomSource(kind="random", model_type="llama", form="causal", bits=4, group=GROUP,
        config={k: v for k, v in config.items() if k != "model_type"})  # fmt: skip
    base = load_base(ModelEntry(label="r", source=source, train=lora("llama")), tmp_path)
    assert sum(isinstance(layer, packed.QuantisedLinear) for layer in base.modules()) == 14
    assert not list(tmp_path.iterdir())
    wrong = source.model_copy(update={"packing": "gptq"})
    with pytest.raises(UserError, match="reads a checkpoint that GPTQ made"):
        load_base(ModelEntry(label="r", source=wrong, train=lora("llama")), tmp_path)
