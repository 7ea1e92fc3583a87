"""A nanochat checkpoint becomes a Hugging Face model of the same logits; what does not fit or could run code is refused."""

import json
import pickle
from pathlib import Path

import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.conversion import as_hugging_face
from densityrm_core.models.folders import (
    ModelError,
    fit_to_tokenizer,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    save_model,
)
from densityrm_core.models.packing import pack, rewards, why_padded
from densityrm_core.models.tokens import Codec
from densityrm_core.settings import BaseModelSettings
from densityrm_core.training.loop import Watch

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = torch.tensor([[5, 9, 33, 2, 71, 5, 5, 120, 44, 8, 19]])
SIZES = {"sequence_len": 64, "vocab_size": 265, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
NANOCHAT_TOKENS = [
    "<|bos|>",
    *(f"<|{who}_{end}|>" for who in ("user", "assistant", "python", "output") for end in ("start", "end")),
]


def nanochat_state(sizes: dict[str, int] = SIZES, seed: int = 0, rows: int | None = None) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    wide, small = sizes["n_embd"], sizes["n_embd"] // sizes["n_head"] * sizes["n_kv_head"]
    shapes = {"attn.c_q": (wide, wide), "attn.c_k": (small, wide), "attn.c_v": (small, wide), "attn.c_proj": (wide, wide)}
    shapes |= {"mlp.c_fc": (4 * wide, wide), "mlp.c_proj": (wide, 4 * wide)}
    rows = rows or sizes["vocab_size"]
    every = {"transformer.wte.weight": (rows, wide), "lm_head.weight": (rows, wide)}
    for layer in range(sizes["n_layer"]):
        every |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    state = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in every.items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    return state


def nanochat_logits(state: dict[str, torch.Tensor], ids: torch.Tensor, sizes: dict[str, int] = SIZES) -> torch.Tensor:
    """nanochat's GPT, written down from its equations: (1, T) -> (T, vocabulary)."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],))

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (heads, T, d), clockwise
        half = x.shape[-1] // 2
        angle = torch.outer(torch.arange(x.shape[1]).float(), 10_000 ** (-torch.arange(half) / half))
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)

    x = norm(state["transformer.wte.weight"].float()[ids[0]])
    for layer in range(sizes["n_layer"]):
        weight = {n.split(".", 3)[3]: w for n, w in state.items() if n.startswith(f"transformer.h.{layer}.")}
        q, k, v = (
            (norm(x) @ weight[f"attn.c_{name}.weight"].T).unflatten(-1, (-1, sizes["n_embd"] // sizes["n_head"])).transpose(0, 1)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(sizes["n_head"] // sizes["n_kv_head"], 0) for t in (k, v))
        mixed = scaled_dot_product_attention(norm(rotate(q)), norm(rotate(k)), v, is_causal=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ weight["attn.c_proj.weight"].T
        x = x + (norm(x) @ weight["mlp.c_fc.weight"].T).relu().square() @ weight["mlp.c_proj.weight"].T
    logits = norm(x) @ state["lm_head.weight"][: sizes["vocab_size"]].T
    return 15 * torch.tanh(logits / 15)


def write_nanochat_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(NANOCHAT_TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_nanochat(folder: Path, state: dict | None = None, step: int = 100, **meta: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state or nanochat_state(), folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": {**SIZES, **meta}}))
    if not (folder / "tokenizer.json").exists():
        write_nanochat_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "state",
    [
        nanochat_state(),
        {f"_orig_mod.{name}": tensor for name, tensor in nanochat_state().items()},
        nanochat_state(rows=320),
    ],
    ids=["plain", "compiled", "padded vocabulary"],
)
def test_a_nanochat_checkpoint_gives_the_logits_of_nanochats_equations(tmp_path: Path, state: dict):
    folder = as_hugging_face(str(write_nanochat(tmp_path / "d2", state)), tmp_path / "cache")
    ours = load_causal_lm(folder).eval()(IDS).logits[0]
    theirs = nanochat_logits({name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}, IDS)
    assert ours.detach().numpy() == pytest.approx(theirs.numpy(), abs=1e-5)


def test_the_checkpoint_of_the_highest_step_is_taken(tmp_path: Path):
    folder = write_nanochat(tmp_path / "d2", nanochat_state(seed=1), step=99)
    write_nanochat(folder, nanochat_state(seed=2), step=1_000_000)
    (folder / "model_2000000_backup.pt").write_bytes(b"")
    ours = load_causal_lm(as_hugging_face(str(folder), tmp_path / "cache")).eval()(IDS).logits[0]
    assert ours.detach().numpy() == pytest.approx(nanochat_logits(nanochat_state(seed=2), IDS).numpy(), abs=1e-5)


def test_a_conversation_is_rendered_as_nanochat_does(tmp_path: Path):
    tokenizer = load_tokenizer(as_hugging_face(str(write_nanochat(tmp_path / "d2")), tmp_path / "cache"))
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1 + 1?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello<|assistant_end|>"
        "<|user_start|>1 + 1?<|user_end|><|assistant_start|>"
    )
    codec = Codec(tokenizer, 64, 16)
    assert codec.prompt(messages)[:2] == [256, 257]
    assert codec.reply("So")[-1] == NANOCHAT_TOKENS.index("<|assistant_end|>") + 256


@pytest.mark.parametrize("place", ["base_checkpoints/d2/tokenizer", "base_checkpoints/tokenizer", "tokenizer"])
def test_the_tokenizer_may_lie_where_nanochat_keeps_it(tmp_path: Path, place: str):
    folder = write_nanochat(tmp_path / "base_checkpoints" / "d2")
    (folder / "tokenizer.json").unlink()
    write_nanochat_tokenizer(tmp_path / place)
    assert len(load_tokenizer(as_hugging_face(str(folder), tmp_path / "cache"))) == SIZES["vocab_size"] + 1


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_a_pickled_tokenizer_is_never_loaded_and_its_export_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = write_nanochat(tmp_path / "d2")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ModelError, match=r"tokenizer\.pkl: is a pickle.*convert_tiktoken_to_fast"):
        as_hugging_face(str(folder), tmp_path / "cache")
    assert not Path("executed").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"model_000100\.pt: cannot be read as a state dict"):
        as_hugging_face(str(write_nanochat(tmp_path / "d2", {"lm_head.weight": Malicious()})), tmp_path / "cache")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("meta", "extra", "named"),
    [
        ({"window_pattern": "SSSL"}, {}, "model_config has window_pattern"),
        ({}, {"resid_lambdas": torch.ones(2), "x0_lambdas": torch.zeros(2)}, "state dict has resid_lambdas, x0_lambdas"),
        ({}, {f"value_embeds.{i}.weight": torch.ones(2) for i in (1, 3)}, r"state dict has value_embeds\.\*\.weight, which"),
    ],
)
def test_parts_of_later_nanochat_versions_are_refused_by_name(tmp_path: Path, meta: dict, extra: dict, named: str):
    folder = write_nanochat(tmp_path / "d2", {**nanochat_state(), **extra}, **meta)
    with pytest.raises(ModelError, match=f"{named}.*came to nanochat after its first format"):
        as_hugging_face(str(folder), tmp_path / "cache")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"n_layer": 3}, r"model_000100\.pt: lacks 6 weights"),
        ({"n_embd": 64}, r"model_000100\.pt: its .* is of shape"),
        ({"vocab_size": 300}, r"tokenizer\.json: has 265 tokens, the model 300"),
        ({"n_head": "4"}, r"meta_000100\.json: its model_config must have"),
    ],
)
def test_parts_of_different_nanochat_models_are_refused(tmp_path: Path, meta: dict, message: str):
    with pytest.raises(ModelError, match=message):
        as_hugging_face(str(write_nanochat(tmp_path / "d2", **meta)), tmp_path / "cache")


def test_a_checkpoint_without_its_meta_file_is_refused(tmp_path: Path):
    folder = write_nanochat(tmp_path / "d2")
    (folder / "meta_000100.json").unlink()
    with pytest.raises(ModelError, match=r"meta_000100\.json: is missing"):
        as_hugging_face(str(folder), tmp_path / "cache")


def test_a_nanochat_checkpoint_is_tuned_on_the_chosen_replies(tmp_path: Path):
    pairs = pl.DataFrame({"context": [[{"role": "user", "content": "How?"}]], "chosen": ["So."]})
    source, watch = write_nanochat(tmp_path / "d2"), Watch()
    settings = BaseModelSettings(model=str(source), steps=20, batch_size=4, learning_rate=1e-2)
    train_base_model(pairs, settings, watch, cache=tmp_path / "cache")
    losses = [metrics["train/loss"] for _, metrics in watch.points if "train/loss" in metrics]
    assert losses[-1] < losses[0]


def test_a_nanochat_base_model_becomes_a_reward_model_with_packed_rewards_as_padded(tmp_path: Path):
    codec = Codec(load_tokenizer(source := as_hugging_face(str(write_nanochat(tmp_path / "d2")), tmp_path / "cache")), 64, 16)
    base = load_causal_lm(source)
    fit_to_tokenizer(base, codec.tokenizer)
    save_model(base, codec, tmp_path / "base", {})
    model = new_reward_model(tmp_path / "base", seed=0).eval()
    assert why_padded(model) == ""
    prompt, replies = codec.prompt([{"role": "user", "content": "How?"}]), [codec.reply("So."), codec.reply("No, never.")]
    packed = rewards(model, pack([(prompt, replies)]))
    rows = [torch.tensor(prompt + reply) for reply in replies]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=codec.pad)
    padded = model(input_ids=ids, attention_mask=(ids != codec.pad).long()).logits.squeeze(-1)
    assert packed.detach().numpy() == pytest.approx(padded.detach().numpy(), abs=1e-5)
    save_model(model, codec, tmp_path / "rm", {})
    again = rewards(load_reward_model(tmp_path / "rm"), pack([(prompt, replies)]))
    assert torch.equal(again, packed)
