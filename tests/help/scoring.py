"""Predictors of every kind on a text of a hundred tokens: what the tests of evaluation and validity share.

    nats, result, reasons = coded(settings("hedge"), text())      nats by target, Score, why it is not valid
"""

from dataclasses import replace

import numpy as np
import reference as ref
import torch
from training import walk

import train_gpt as tg

VOCAB = ref.SMALL["vocab_size"]
BASE = ref.small(num_layers=2, ve_layers=(1,), model_dim=8, num_heads=2, num_kv_heads=1, train_seq_len=8, eval_seq_len=8, eval_stride=0,
                 eval_batch_seqs=3, ttt_chunk_tokens=24, ttt_epochs=2, ttt_batch_seqs=2, ttt_lr=0.05, ttt_lora_rank=2, ttt_lora_lr=0.1,
                 ttt_lora_targets=("q", "k", "v", "o", "mlp", "head"), ttt_chunk_size=3, ttt_batch_size=2, ttt_group_docs=2,
                 ngram_order=4, mixer_min_tokens=20, mixer_eta=2.0, token_order=3, token_threshold=0.5, ngram_buckets=64, min_count=1)
DOCS = dict(eval_docs=True, eval_stride=3)
CACHE = dict(eval_context="cache")
HONEST = {  # every kind of predictor, and every way in which it may read
    "windows": {}, "sliding": dict(eval_stride=3), "documents": DOCS, "cache": CACHE, "documents by cache": DOCS | CACHE,
    "temperature": dict(eval_temperature=1.7),
    "full": dict(ttt="full"), "full, documents by cache": dict(ttt="full", **DOCS | CACHE),
    "full, all switches": dict(ttt="full", eval_stride=3, ttt_optimizer="adamw", ttt_lr=0.02, ttt_min_lr=0.1, adaptive_lr_max=2.0,
                               polyak_decay=0.5, byte_weighted_ttt=True, ttt_freeze_blocks=1, ttt_train_scales=True, ttt_lr_mult_fc=2.0),
    "lora": dict(ttt="lora"), "lora, cache": dict(ttt="lora", polyak_decay=0.5, **CACHE),
    "lora_docs": dict(ttt="lora_docs"), "lora_docs by cache": dict(ttt="lora_docs", ttt_short_chunks=((2, 4), (1, 6)), **CACHE),
    "warm start": dict(ttt="lora_docs", ttt_warm_start_a=True), "warm start, cache": dict(ttt="lora_docs", ttt_warm_start_a=True, **CACHE),
    "own start": dict(ttt="lora_docs", ttt_lora_a="own"), "own warm start": dict(
        ttt="lora_docs", ttt_lora_a="own", ttt_warm_start_a=True, ttt_lora_scaled=True, phased_ttt_prefix_docs=3,
        ttt_lora_targets=("k", "attn", "mlp", "head")),
    "phases": dict(ttt="lora_docs", phased_ttt_prefix_docs=3, phased_ttt_num_phases=2),
    "backoff": dict(mixer="backoff"), "backoff, documents": dict(mixer="backoff", **DOCS),
    "hedge": dict(mixer="hedge", mixer_experts=("unigram", "bigram", "trigram", "backoff")),
    "tilt": dict(token_boost=2.0), "tilt, cache": dict(token_boost=2.0, **CACHE),
    "tilt, lora_docs": dict(ttt="lora_docs", token_boost=2.0),
    "all": dict(ttt="full", mixer="hedge", token_boost=1.0, **DOCS | CACHE),
    "all, lora_docs": dict(ttt="lora_docs", mixer="backoff", token_boost=1.0, ttt_warm_start_a=True, phased_ttt_prefix_docs=2, **CACHE)}
INVALID = {"hashed": dict(mixer="hashed", allow_invalid=True),
           "entropy": dict(mixer="hedge", mixer_experts=("bigram", "entropy"), allow_invalid=True)}


class Thorough(tg.Examiner):
    """Looks at every chunk, at the last places that each row scores."""

    class Chance:
        def random(self, shape=()):
            return np.full(shape, 0.9)

        def integers(self, high, size):
            return np.random.default_rng(0).integers(high, size=size)

    def __init__(self, predictor, every):
        super().__init__(predictor, every)
        self.random = self.Chance()


def settings(kind="windows", **changes):
    return replace(BASE, **{**HONEST, **INVALID}[kind] | changes)


def stream_of(ids, whole=True, seed=0):
    """The text of these ids, whose targets have a few bytes each."""
    counted = np.random.default_rng(seed).integers(0, 9, len(ids) - 1).astype(np.int16)
    return tg.ValStream(torch.as_tensor(ids).int(), torch.from_numpy(counted), whole)


def text(targets=100, seed=5, bos=0.06):
    """Targets that can be learned, in documents of very different lengths."""
    return stream_of(walk(targets + 1, seed, bos))


def model_of(s):
    """With random weights, the same for the same settings of the model."""
    return ref.randomise(tg.GPT(s), seed=1, spread=0.4)


def coded(s, stream, rt=None, of=0, make=None, reader=None, check_every=1):
    """(nats by target, Score, reasons) of what the settings say, or of make(stream, rt), read as they say or by reader(...)."""
    rt, validity, n = rt or ref.alone(), tg.Validity(), len(stream.bytes)
    predictor = make(stream, rt) if make else tg.make_predictor(model_of(s), s, rt, n, s.eval_temperature)
    parts = (reader or tg.Reader)(stream, s, rt, s.ttt_chunk_tokens if predictor.learns else 0, predictor.history, of)
    nats = torch.zeros(n, dtype=torch.float64)
    result = tg.score(predictor, parts, stream, rt, validity, check_every=check_every, nats=nats)
    return nats, result, validity.reasons
