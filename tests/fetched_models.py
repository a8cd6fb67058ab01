"""Tiny models in the layouts of the real repositories and packages: the same names of files and
tensors, the same dtypes, the same keys of ``config.json``; random weights, bytes as words."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.implementations import BertWordPieceTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from costbp.config.catalog import ModelEntry
from costbp.models.architecture import transformers_config
from tests.conftest import ROOT
from tests.test_packed_formats import gptq_tensors

State = dict[str, torch.Tensor]


def fusion() -> Any:
    """The catalog's file of that name as a module."""
    path = ROOT / "config/parts/fusion.py"
    found = importlib.util.spec_from_file_location("fusion", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


GROUP = 16  # of packed weights
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"()[]<>=+-*/_$%&#`"
WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
ROBERTA_WORDS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
OPT_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
LLAMA_WORDS = ("<|begin_of_text|>", "<|end_of_text|>")
CHAT_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEEING_WORDS = (*CHAT_WORDS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# --- sizes -----------------------------------------------------------------------------------------

BLOCKS = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
BERT = {**BLOCKS, "intermediate_size": 64, "vocab_size": len(WORD_PIECES)}
ROBERTA = {**BERT, "vocab_size": 256 + len(ROBERTA_WORDS)}
OPT = {**BLOCKS, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 256 + len(OPT_WORDS)}
LLAMA = {**BERT, "num_key_value_heads": 1, "vocab_size": 256 + len(LLAMA_WORDS)}
SMOLLM2 = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 256 + len(CHAT_WORDS)}
QWEN2_VL = {
    "image_token_id": 256 + SEEING_WORDS.index("<|image_pad|>"),
    "vision_start_token_id": 256 + SEEING_WORDS.index("<|vision_start|>"),
    "vision_end_token_id": 256 + SEEING_WORDS.index("<|vision_end|>"),
    "text_config": {
        **LLAMA,
        "vocab_size": 256 + len(SEEING_WORDS),
        "rope_parameters": {"mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
}
CONFIGS = {  # one block, and two in what packages hold and in SmolLM2: blocks are what takes time
    "bert_base": BERT,
    "bert_large": BERT,
    "roberta_base": ROBERTA,
    "roberta_large": ROBERTA,
    "opt_1_3b": OPT,
    "opt_6_7b": OPT,
    "opt_13b": OPT,
    "llama_3_1_8b": LLAMA,
    "smollm2_hub": SMOLLM2,
    "qwen2_vl_7b": QWEN2_VL,
}
SIZES = {  # laid over the catalog's models
    name: {"source": {"config": config, "group": GROUP}} for name, config in CONFIGS.items()
} | {"fusion_lora": {"source": {"image_side": 64}}}


# --- tokenizers ------------------------------------------------------------------------------------


def alphabet(special: tuple[str, ...], *, first: bool) -> dict[str, int]:
    """Special tokens, before or after one for each byte."""
    letters = list(bytes_to_unicode().values())
    names = [*special, *letters] if first else [*letters, *special]
    return {name: index for index, name in enumerate(names)}


def byte_tokenizer(
    folder: Path, special: tuple[str, ...], settings: dict[str, Any], *, first: bool, opening: str
) -> None:
    """``tokenizer.json`` and what stands beside it, of bytes; ``opening`` begins every text."""
    vocabulary = alphabet(special, first=first)
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(list(special))
    if special is ROBERTA_WORDS:
        words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    elif opening:
        words.post_processor = processors.TemplateProcessing(
            f"{opening} $A",
            f"{opening} $A {opening} $B:1",
            [(opening, vocabulary[opening])],
        )
    words.save(str(folder / "tokenizer.json"))
    plain_files(folder, vocabulary, settings)


def plain_files(folder: Path, vocabulary: dict[str, int], settings: dict[str, Any]) -> None:
    """The slow tokenizer's files, and its settings."""
    write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write(folder / "tokenizer_config.json", settings)


def word_pieces(folder: Path) -> None:
    """BERT's tokenizer, of letters."""
    words = BertWordPieceTokenizer({name: index for index, name in enumerate(WORD_PIECES)})
    words.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(WORD_PIECES) + "\n")
    write(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2))


# --- repositories of the hub -----------------------------------------------------------------------


def drawn(head: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model of a head's class, random weights."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, head).from_config(transformers_config(values, 2), dtype=dtype)


def said(folder: Path, values: dict[str, Any], architecture: str, dtype: str, **more: Any) -> None:
    """``config.json`` as repositories of that time have it."""
    write(
        folder / "config.json",
        {"architectures": [architecture], "torch_dtype": dtype, **values, **more},
    )


def in_shards(folder: Path, state: State, name: str, save: Callable[[State, Path], None]) -> None:
    """The tensors in two files with their index."""
    stem, _, kind = name.rpartition(".")
    half, names = len(state) // 2, list(state)
    files = {f"{stem}-0000{i}-of-00002.{kind}": part for i, part in ((1, names[:half]), (2, names[half:]))}  # fmt: skip
    for file, part in files.items():
        save({key: state[key] for key in part}, folder / file)
    size = sum(tensor.nbytes for tensor in state.values())
    places = {key: file for file, part in files.items() for key in part}
    write(folder / f"{name}.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def safe(state: State, path: Path) -> None:
    """The tensors as safetensors, those that share memory each on its own."""
    save_file(
        {k: v.contiguous().clone() for k, v in state.items()}, path, metadata={"format": "pt"}
    )


def bert(folder: Path, values: dict[str, Any]) -> None:
    """Normalisations are called gamma and beta, and the head of pretraining is there."""
    state = drawn("AutoModelForPreTraining", values).state_dict()
    named = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in state.items()}  # fmt: skip
    safe(named, folder / "model.safetensors")
    said(folder, values, "BertForMaskedLM", "float32", pad_token_id=0)
    word_pieces(folder)


def roberta(folder: Path, values: dict[str, Any]) -> None:
    """With the head of pretraining."""
    safe(drawn("AutoModelForMaskedLM", values).state_dict(), folder / "model.safetensors")
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    said(folder, values, "RobertaForMaskedLM", "float32", **ids)
    byte_tokenizer(folder, ROBERTA_WORDS, {"model_max_length": 512}, first=True, opening="")


def opt(folder: Path, values: dict[str, Any], *, sharded: bool) -> None:
    """State dicts of torch in half precision, the larger ones in parts and without the prefix that
    the classes of today have; no ``tokenizer.json``."""
    model = drawn("AutoModelForCausalLM", values, torch.float16)
    if sharded:
        state = {k.removeprefix("model."): v for k, v in model.model.state_dict().items()}
        in_shards(folder, state, "pytorch_model.bin", torch.save)
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
    said(folder, values, "OPTForCausalLM", "float16", prefix="</s>", **ids)
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    kind = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False}
    plain_files(folder, alphabet(OPT_WORDS, first=True), {**kind, **names})
    write(folder / "special_tokens_map.json", names)


def llama(folder: Path, values: dict[str, Any]) -> None:
    """In shards and half precision; its tokenizer begins texts, and has nothing to pad with."""
    model = drawn("AutoModelForCausalLM", values, torch.bfloat16)
    begin, end = LLAMA_WORDS
    last = ends_soon(model, LLAMA_WORDS.index(end))
    in_shards(folder, model.state_dict(), "model.safetensors", safe)
    rest, theta, scaling = older(values)
    rope = {"rope_theta": theta, "rope_scaling": scaling}
    said(folder, rest, "LlamaForCausalLM", "bfloat16", **rope, eos_token_id=last)
    settings = {"bos_token": begin, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    byte_tokenizer(folder, LLAMA_WORDS, settings, first=False, opening=begin)


def smollm2(folder: Path, values: dict[str, Any]) -> None:
    """The output is the embedding, and isn't stored."""
    model = drawn("AutoModelForCausalLM", values, torch.bfloat16)
    last = ends_soon(model, CHAT_WORDS.index("<|im_end|>"))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    safe(state, folder / "model.safetensors")
    rest, theta, _ = older(values)
    rope = {"rope_theta": theta, "rope_scaling": None}
    said(folder, rest, "LlamaForCausalLM", "bfloat16", **rope, eos_token_id=last, pad_token_id=last)
    settings = chatting("<|im_start|>", "<|im_end|>")
    byte_tokenizer(folder, CHAT_WORDS, settings, first=False, opening="")


def older(values: dict[str, Any]) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """A text model's configuration, the base of its rotary embedding, and how that is scaled."""
    rest = dict(values)
    rope = dict(rest.pop("rope_parameters"))
    return rest, rope.pop("rope_theta"), rope


def chatting(begin: str | None, pad: str) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model that chats."""
    return {
        "bos_token": begin,
        "eos_token": "<|im_end|>",
        "pad_token": pad,
        "tokenizer_class": "GPT2Tokenizer" if begin else "Qwen2Tokenizer",
        "chat_template": TEMPLATE,
    }


def qwen2_vl(folder: Path, values: dict[str, Any]) -> None:
    """As GPTQ left it, under the names of its first release: a flat ``config.json``, the text's
    tensors below ``model.`` and those of its tower below ``visual.``."""
    model = drawn("AutoModelForImageTextToText", values, torch.float16)
    ends_soon(model, SEEING_WORDS.index("<|im_end|>"))
    state = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if key.startswith("model.layers.") and tensor.ndim == 2:
            order = torch.arange(tensor.shape[1])
            tensors, _ = gptq_tensors(tensor.float(), GROUP, order, less_one=True)
            state |= {f"{key.removesuffix('.weight')}.{k}": v for k, v in tensors.items()}
        else:
            state[key] = tensor
    in_shards(folder, state, "model.safetensors", safe)
    text, theta, rope = older(values["text_config"])
    parts = {"text_config", "vision_config"}
    flat = {key: value for key, value in values.items() if key not in parts} | text
    gptq = {"bits": 4, "damp_percent": 0.1, "desc_act": False, "group_size": GROUP, "sym": True, "quant_method": "gptq"}  # fmt: skip
    said(
        folder,
        {**flat, "vision_config": {**values["vision_config"], "in_chans": 3}},
        "Qwen2VLForConditionalGeneration",
        "float16",
        rope_theta=theta,
        rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]},
        quantization_config=gptq,
    )
    pictures = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    kind = {"image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2}
    write(folder / "preprocessor_config.json", {**pictures, **kind})
    byte_tokenizer(folder, SEEING_WORDS, chatting(None, "<|endoftext|>"), first=False, opening="")


@torch.no_grad()
def ends_soon(model: Any, place: int) -> int:
    """Make the token that ends a text likely, so that no run writes 256 tokens; returns its id."""
    end = 256 + place
    model.get_input_embeddings().weight[:, 0] = 0.1
    model.get_output_embeddings().weight[end, 0] += 0.2
    return end


def repository(folder: Path, model: ModelEntry) -> None:
    """What the hub has of a model whose entry holds its configuration."""
    assert model.repository is not None
    values, repo = model.source.config, model.repository.repo
    kind = values["model_type"]
    if kind == "opt":
        opt(folder, values, sharded=not repo.endswith("1.3b"))
    elif "SmolLM2" in repo:
        smollm2(folder, values)
    else:
        makers = {"bert": bert, "roberta": roberta, "llama": llama, "qwen2_vl": qwen2_vl}
        makers[kind](folder, values)


# --- packages --------------------------------------------------------------------------------------


def minilm(folder: Path) -> None:
    """A BERT encoder without any head."""
    values = {"model_type": "bert", **BERT, "num_hidden_layers": 2}
    safe(drawn("AutoModel", values).state_dict(), folder / "model.safetensors")
    said(folder, values, "BertModel", "float32", pad_token_id=0, max_position_embeddings=512)
    word_pieces(folder)
    names = {"cls": "[CLS]", "mask": "[MASK]", "pad": "[PAD]", "sep": "[SEP]", "unk": "[UNK]"}
    write(folder / "special_tokens_map.json", {f"{k}_token": v for k, v in names.items()})


def efficientnet(folder: Path) -> None:
    """At its real size, for it has no other; and the classifier's tensors, which are not read."""
    torch.manual_seed(0)
    state = fusion().VisionEncoder().state_dict() | {"_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}  # fmt: skip
    torch.save(state, folder / "efficientnet-lite0.pth")


def smollm2_gguf(folder: Path) -> None:
    """Blocks in Q4_1, the embedding in Q8_0, which serves as the output, too."""
    import gguf

    hidden, inner, width = 64, 128, 32  # as wide as the groups that are packed again
    merges = ["\u0120 t", "h e"]
    words = [*alphabet(CHAT_WORDS, first=True), *(pair.replace(" ", "") for pair in merges)]
    file = gguf.GGUFWriter(folder / "model.gguf", "llama")
    file.add_context_length(8192)
    file.add_block_count(2)
    file.add_embedding_length(hidden)
    file.add_feed_forward_length(inner)
    file.add_head_count(hidden // width)
    file.add_head_count_kv(1)
    file.add_rope_freq_base(100000.0)
    file.add_rope_dimension_count(width)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(words))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(words)
    file.add_token_types([3 if word in CHAT_WORDS else 1 for word in words])
    file.add_token_merges(merges)
    file.add_add_bos_token(False)
    file.add_unk_token_id(0)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, outs: int, ins: int, kind: Any) -> None:
        values = (torch.randn(outs, ins, generator=generator) / 10).numpy()
        file.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def one(name: str) -> None:
        file.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())

    kinds = gguf.GGMLQuantizationType
    add("token_embd", len(words), hidden, kinds.Q8_0)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (width, hidden), "attn_v": (width, hidden), "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}  # fmt: skip
    for block in range(2):
        one(f"blk.{block}.attn_norm")
        one(f"blk.{block}.ffn_norm")
        for name, shape in shapes.items():
            add(f"blk.{block}.{name}", *shape, kinds.Q4_1)
    one("output_norm")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
