"""Texts -> unit vectors, by a sentence-transformers model or by a language model.

Texts are sorted by length and batched by tokens, so there is hardly any padding; on the CPU each thread works on batches of its
own. Batches do not depend on the number of threads, and neither do the vectors.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densityrm_core.arrays import Flags, Floats
from densityrm_core.choices import take
from densityrm_core.hardware import fast_bfloat16, located
from densityrm_core.settings import EmbeddingSettings
from densityrm_core.vectors.encoder_files import EmbeddingError, normalize, not_to_be_had, split_kind

Report = Callable[[int], None]

_GPU_TOKENS = 32  # times as many tokens a batch
_PROBE = "The quick brown fox jumps over the lazy dog."
_SOFT_CAPS = ("final_logit_softcapping", "logit_softcap", "softcap", "logits_soft_cap")


def load_encoder(settings: EmbeddingSettings, threads: int = 2, device: str = "cpu") -> Encoder:
    """The encoder that `settings.model` names: from the installed package that carries it, a folder, or the hub.

    Raises:
        EmbeddingError: it cannot be loaded, or it cannot give the vectors that are asked for.
    """
    kind, name = split_kind(settings.model)
    if kind == "parquet":
        raise EmbeddingError(f"embedding.model {settings.model!r} is a file of vectors, which cannot embed another text")
    dtype = getattr(torch, dtype_of(settings, device))
    build = {"st": SentenceEncoder, "lm": HiddenStateEncoder, "lm-logits": LogitEncoder}[kind]
    try:
        return build(located(name), _Work(settings.max_tokens, settings.tokens_per_batch, threads, device, dtype))
    except EmbeddingError:
        raise
    except Exception as error:  # the loaders raise many kinds; all mean that the model is not to be had
        raise not_to_be_had(settings.model, error) from error


def encoder_of_texts(settings: EmbeddingSettings, threads: int = 2, device: str = "cpu") -> Encoder | None:
    """`load_encoder`, or None where vectors come from a file, and no further text can be embedded."""
    return None if split_kind(settings.model)[0] == "parquet" else load_encoder(settings, threads, device)


def dtype_of(settings: EmbeddingSettings, device: str) -> str:
    """The precision of the encoder's weights: as set, or what the hardware is fast at."""
    if settings.dtype != "auto":
        return take("encoder", settings.dtype)
    return take("encoder", "bfloat16" if fast_bfloat16(device) else "float32")


@dataclass(frozen=True)
class _Work:
    max_tokens: int
    tokens_per_batch: int
    threads: int
    device: str
    dtype: torch.dtype

    @property
    def workers(self) -> int:
        """Batches that are computed at a time: one on a GPU, which is busy with one."""
        return self.threads if self.device == "cpu" else 1

    @property
    def tokens(self) -> int:
        """Of a batch, padding included."""
        return self.tokens_per_batch * (1 if self.device == "cpu" else _GPU_TOKENS)


class Encoder(ABC):
    """A model that gives texts vectors of one width, `dimensions`."""

    dimensions: int

    def __init__(self, tokenizer: Any, work: _Work) -> None:
        self._tokenizer, self._work = tokenizer, work

    def encode(self, texts: Sequence[str], report: Report = lambda _: None) -> tuple[Floats, Flags]:
        """Unit vectors (n, d) rounded to half precision, in the order of `texts`; and whether a text was longer than is read.

        `report` is called with the number of texts done so far.

        Raises:
            EmbeddingError: a text has no tokens, or its vector is not finite; `row` says which.
        """
        ids, truncated = self._tokenize(texts)
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        lock, done = threading.Lock(), 0

        def work(rows: npt.NDArray[np.int64]) -> None:
            nonlocal done
            with torch.inference_mode():
                vectors[rows] = self._embed(*self._padded([ids[row] for row in rows])).float().cpu().numpy()
            with lock:
                done += len(rows)
                report(done)

        before = torch.get_num_threads()
        with ThreadPoolExecutor(self._work.workers, initializer=lambda: torch.set_num_threads(1)) as pool:
            list(pool.map(work, _batches([len(x) for x in ids], self._work.tokens)))
        torch.set_num_threads(before)
        return normalize(vectors), truncated

    @abstractmethod
    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors (b, d) of token ids (b, t), padded on the right where `mask` (b, t) is 0."""

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], Flags]:
        if not texts:
            return [], np.zeros(0, np.bool_)
        limit = self._work.max_tokens
        made = self._tokenizer(list(texts), truncation=True, max_length=limit, padding=False)
        ids = cast(list[list[int]], made["input_ids"])
        empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
        if empty is not None:
            raise EmbeddingError("it has no tokens", row=empty)
        truncated = np.zeros(len(ids), np.bool_)
        full = [row for row, tokens in enumerate(ids) if len(tokens) >= limit]
        if full:  # exactly full, or cut
            whole = cast(list[list[int]], self._tokenizer([texts[row] for row in full], verbose=False)["input_ids"])
            truncated[full] = [len(tokens) > limit for tokens in whole]
        return ids, truncated

    def _padded(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, ids))
        pad = self._tokenizer.pad_token_id or 0
        padded = torch.tensor([x + [pad] * (longest - len(x)) for x in ids], device=self._work.device)
        lengths = torch.tensor([len(x) for x in ids], device=self._work.device)
        return padded, (torch.arange(longest, device=self._work.device) < lengths[:, None]).long()


class SentenceEncoder(Encoder):
    """A sentence-transformers model: its transformer in the precision asked for, pooling and what follows in float32."""

    def __init__(self, source: str, work: _Work) -> None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(source, device=work.device).eval()
        if model.default_prompt_name:
            raise EmbeddingError(f"{source} puts a prompt before every text ({model.default_prompt_name}); use lm:<model>")
        limit = min(work.max_tokens, model.max_seq_length or work.max_tokens)
        super().__init__(model.tokenizer, _Work(limit, work.tokens_per_batch, work.threads, work.device, work.dtype))
        self._transformer, *self._rest = model
        for parameter in self._transformer.parameters():  # buffers stay: rotary frequencies need all their digits
            parameter.data = parameter.data.to(work.dtype)
        self.dimensions = cast(int, model.get_embedding_dimension())

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        features: dict[str, Any] = self._transformer({"input_ids": ids, "attention_mask": mask})
        features = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in features.items()}
        for module in self._rest:
            features = module(features)
        return features["sentence_embedding"]


class HiddenStateEncoder(Encoder):
    """The mean of a language model's last hidden states, after its final norm, over the tokens of the text."""

    def __init__(self, source: str, work: _Work) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(AutoTokenizer.from_pretrained(source), work)
        self._model = AutoModel.from_pretrained(source, dtype=work.dtype).eval().to(work.device)
        self.dimensions = int(self._model.config.hidden_size)

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self._model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        weight = mask[:, :, None].float()
        return (hidden * weight).sum(1) / weight.sum(1)


class LogitEncoder(HiddenStateEncoder):
    """The mean logits of a language model over the tokens of the text, in as many dimensions as it has hidden ones.

    Logits z = W h are linear, so their mean is W times the mean h, and with L L^T = W^T W the vector L^T h has the inner products
    of z: |L^T h - L^T g|^2 = |W h - W g|^2. The neighbours are those in the vocabulary's tens of thousands of columns. A head
    with a bias is linear in (h, 1).
    """

    def __init__(self, source: str, work: _Work) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(source, work)
        whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        whole.to(work.device)
        head: Any = whole.get_output_embeddings()
        _require_linear(whole, head, self._tokenizer, source)
        columns = [head.weight] if head.bias is None else [head.weight, head.bias[:, None]]
        matrix = torch.cat([column.detach().double() for column in columns], dim=1)
        values, basis = torch.linalg.eigh(matrix.T @ matrix)  # as Cholesky, and W need not have full rank
        self._root = (basis * values.clamp(min=0).sqrt()).float()
        self._biased, self.dimensions = head.bias is not None, matrix.shape[1]

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        mean = super()._embed(ids, mask)
        if self._biased:
            mean = torch.cat([mean, torch.ones_like(mean[:, :1])], dim=1)
        return mean @ self._root


def _batches(lengths: Sequence[int], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Rows in batches of at most `tokens` tokens, padding included, shortest first; a longer text is alone."""
    order = np.argsort(lengths, kind="stable")
    batches: list[npt.NDArray[np.int64]] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > tokens:
            batches.append(order[start:end])
            start = end
    return batches


def _require_linear(model: Any, head: Any, tokenizer: Any, source: str) -> None:
    """Refuse a model whose logits are not its head's product with the last hidden states, up to one factor."""
    config = model.config
    capped = next((name for name in _SOFT_CAPS if getattr(config, name, None)), None)
    why = f"it soft-caps them (config.{capped} = {getattr(config, capped)})" if capped else ""
    if not why:
        ids = torch.tensor([tokenizer(_PROBE)["input_ids"]], device=head.weight.device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.flatten()
            plain = head(model.base_model(input_ids=ids).last_hidden_state).flatten()
        alike = torch.nn.functional.cosine_similarity(logits, plain, dim=0).item()
        why = "" if alike > 1 - 1e-5 else f"they are not what its head makes of its hidden states (cosine {alike:.4f})"
    if why:
        raise EmbeddingError(f"{source}: mean logits are not linear in the mean hidden state, {why}; use lm:{source}")
