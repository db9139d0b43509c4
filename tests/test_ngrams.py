"""Predictors that count the scored text, against dictionaries and the formulas in float64: what they count and when,
what they make of it, and that every one of them is a distribution.
"""

import math
from collections import Counter, defaultdict
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring import Thorough

import train_gpt as tg

CPU = torch.device("cpu")


def settings(**changes):
    return ref.small(**{"eval_seq_len": 8, "train_seq_len": 8, "eval_stride": 3, "eval_batch_seqs": 4,
                        "ttt_chunk_tokens": 10, "ttt_chunk_size": 4, "mixer_min_tokens": 0,
                        "ngram_order": 4, "token_order": 3, **changes})


def stream_of(ids):
    return tg.ValStream(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids) - 1, dtype=torch.int16), True)


@st.composite
def texts(draw, most=60, tokens=8):
    """A text in which n-grams come again, with some documents, of few tokens or many."""
    seed, kinds = draw(st.integers(0, 999)), draw(st.sampled_from([2, 3, tokens]))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, kinds, draw(st.integers(9, most)))
    ids = np.where(rng.random(len(ids)) < draw(st.sampled_from([0, 0.1, 0.4])), ref.BOS, ids)
    return np.concatenate((ids, ids[rng.integers(0, 5) :], ids))[: draw(st.integers(9, 2 * most))].tolist()


# --- the table -------------------------------------------------------------------------------------------------------


def colliding(most):
    """Keys that all want the same slot of a table of this size: found by adding each alone."""
    wanted = defaultdict(list)
    table = tg.HashTable(most, CPU)
    for key in range(1500):
        table.reset()
        wanted[int(table.probe(torch.tensor([key]), add=True))].append(key)
    return max(wanted.values(), key=len)


COLLIDING = colliding(100)


@ref.tries(80)
@given(st.data())
def test_the_table_is_a_dictionary(data):
    """Batches of keys to add or only to look for, with duplicates, most of which collide."""
    keys = st.one_of(st.sampled_from(COLLIDING), st.integers(0, 60), st.integers(0, 2**62 + 2**40))
    table, slots = tg.HashTable(100, CPU), {}
    for batch, add in data.draw(st.lists(st.tuples(st.lists(keys, max_size=30), st.booleans()), max_size=8)):
        if add and len({*slots, *batch}) > 100:
            break
        found = table.probe(torch.tensor(batch, dtype=torch.int64), add).tolist()
        for key, slot in zip(batch, found):
            assert slot == (slots.setdefault(key, slot) if add else slots.get(key, -1)) and slot < len(table)
    assert len(set(slots.values())) == len(slots) and -1 not in slots.values()
    assert int((table.contents != 0).sum()) == len(slots)


@pytest.mark.parametrize("most", [1, 170, 171, 1000])
def test_a_full_table_still_finds_its_keys_and_says_of_others_that_they_are_not_there(most):
    table, keys = tg.HashTable(most, CPU), torch.randperm(10**6)[:most]
    slots = table.probe(keys, add=True)
    assert len(set(slots.tolist())) == most and torch.equal(table.probe(keys), slots)
    assert (table.probe(10**6 + torch.arange(2000)) == -1).all()


# --- counts ----------------------------------------------------------------------------------------------------------


def counted(ids, ends, order, begins=lambda end: 0):
    """{context: Counter of the tokens after it}: n-grams that end at these places of a text."""
    table = defaultdict(Counter)
    for end in ends:
        for n in range(order):
            if end - n >= begins(end):
                table[tuple(ids[end - n : end])][ids[end]] += 1
    return table


def nodes_of(counts, grams):
    """{n-gram: its node}, -1 for one that is not there."""
    found = {gram[:1]: gram[0] for gram in grams}
    for n in range(2, max(map(len, grams), default=0) + 1):
        some = sorted({gram[:n] for gram in grams if len(gram) >= n})
        parents = torch.tensor([found[gram[:-1]] for gram in some])
        found |= zip(some, counts.find(parents, torch.tensor([gram[-1] for gram in some])).tolist())
    return found


def same_counts(counts, table):
    """Every n-gram as often as in the dictionary, no other at all; of each context how many tokens and kinds follow."""
    grams = {(*context, token): number for context, after in table.items() for token, number in after.items()}
    nodes, count = nodes_of(counts, grams), counts.count.tolist()
    assert -1 not in nodes.values() and all(count[nodes[gram]] == number for gram, number in grams.items())
    assert int((counts.count > 0).sum()) == len(grams)
    for context, after in table.items():
        node = nodes[context] if context else counts.root
        assert (int(counts.tokens_after[node]), int(counts.types_after[node])) == (after.total(), len(after)), context
    assert int((counts.tokens_after > 0).sum()) == int((counts.types_after > 0).sum()) == len(table)


def cut(ids, where):
    """Parts of the stream, one range each, cut at these targets."""
    edges = sorted({0, len(ids) - 1, *(at for at in where if 0 < at < len(ids) - 1)})
    return [np.array([[a, b]]) for a, b in zip(edges, edges[1:])]


def part_of(ranges):
    return tg.Part(0, 1, np.asarray(ranges), [])


@ref.tries(100)
@given(texts(), st.integers(1, 9), st.lists(st.integers(1, 100)), st.sampled_from([8, 50_000]))
def test_counts_are_those_of_a_dictionary_wherever_the_text_is_cut(ids, order, cuts, vocab):
    s, counts = settings(), tg.NgramCounts(vocab, order, (len(ids) - 1) * (order - 1), CPU)
    s, shift = tg.replace(s, vocab_size=vocab), vocab - 8
    ids = [token if token == ref.BOS else token + shift for token in ids]
    for ranges in cut(ids, cuts):
        counts.add(*tg.scored_text(part_of(ranges), stream_of(ids), order - 1, s))
        same_counts(counts, counted(ids, range(1, ranges[0, 1] + 1), order))
    counts.reset()
    same_counts(counts, {})


@ref.tries(60)
@given(texts(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_documents_are_counted_on_their_own_in_any_order(ids, order, random):
    """Longest first, or any other way: no n-gram of two documents, and room for all of them."""
    s, counts = settings(ttt="lora_docs"), tg.NgramCounts(32, order, (len(ids) - 1) * (order - 1), CPU)
    stream = stream_of(ids)
    rows = tg.document_ranges(stream)[random.sample(range(len(tg.document_ranges(stream))), len(tg.document_ranges(stream)))]
    start, ends = {}, []
    for group in np.array_split(rows, random.randint(1, len(rows))):
        counts.add(*tg.scored_text(part_of(group), stream, order - 1, s))
        for a, b in group.tolist():
            start |= {end: a for end in range(a + 1, b + 1)}
            ends += range(a + 1, b + 1)
        same_counts(counts, counted(ids, ends, order, start.get))


@pytest.mark.parametrize("ttt, unit", [("off", 1), ("off", 7), ("lora_docs", 1), ("lora_docs", 50)])
def test_there_is_room_for_a_text_that_never_repeats_itself(ttt, unit):
    """A token a part, documents of three tokens: the longest n-grams of all, each of them new."""
    ids = [ref.BOS if i % 3 == 0 else 4 + i for i in range(304)]
    s, stream, targets, apart = settings(ttt=ttt, vocab_size=400), stream_of(ids), len(ids) - 1, ttt == "lora_docs"
    counts = tg.NgramCounts(400, 10, 9 * targets, CPU)
    rows = tg.document_ranges(stream) if apart else np.stack((np.arange(targets), np.arange(1, targets + 1)), 1)
    for at in range(0, len(rows), unit):
        group = rows[at : at + unit]
        counts.add(*tg.scored_text(part_of(group if apart else [[group[0, 0], group[-1, 1]]]), stream, 9, s))
        assert int((counts.table.contents != 0).sum()) <= 9 * targets
    same_counts(counts, counted(ids, range(1, 304), 10, lambda end: end - 1 - (end - 1) % 3 if apart else 0))


def test_more_than_there_is_space_for_is_refused_before_a_search_that_would_not_end():
    counts, part = tg.NgramCounts(32, 4, 3 * 20, CPU), part_of([[0, 20]])
    stream = stream_of(range(31))
    counts.add(*tg.scored_text(part, stream, 3, settings()))
    with pytest.raises(ValueError, match="n-grams, but there is space for 60"):
        counts.add(*tg.scored_text(part_of([[20, 30]]), stream, 3, settings()))
    counts.reset()
    counts.add(*tg.scored_text(part, stream, 3, settings()))


# --- probabilities ---------------------------------------------------------------------------------------------------


def discounted(table, context, order, vocab):
    """[distribution (V,) of orders 1 to `order`]: interpolated absolute discounting of 0.9, from its formula."""
    p, found = np.full(vocab, 1 / vocab), []
    for n in range(order):
        after = table.get(tuple(context[len(context) - n :]), Counter()) if n <= len(context) else Counter()
        if after:
            share = np.array([max(after[token] - 0.9, 0) for token in range(vocab)]) / after.total()
            p = share + 0.9 * len(after) / after.total() * p
        found.append(p)
    return found


@ref.tries(60)
@given(texts(), st.integers(1, 6), st.lists(st.integers(1, 100)), st.sampled_from([9, 21]))
def test_ngram_backoff_probabilities_are_those_of_the_formula(ids, order, cuts, vocab):
    """Of every token, behind every context of the text and some that it does not have."""
    counts, table = tg.NgramCounts(vocab, order, (len(ids) - 1) * (order - 1), CPU), {}
    for ranges in cut(ids, cuts):
        counts.add(*tg.scored_text(part_of(ranges), stream_of(ids), order - 1, settings(vocab_size=vocab)))
    table = counted(ids, range(1, len(ids)), order)
    for context in [ids[max(at - 6, 0) : at] for at in range(0, len(ids), 5)] + [[0, 1, 2, 3], [7, 7, 7]]:
        run = torch.tensor([[-1] * (order + 6 - len(context)) + context])
        nodes = [node[:, -1:] for node in counts.walk(run)][: order - 1]
        contexts = [node.expand(1, vocab) for node in (torch.full((1, 1), counts.root), *nodes)]
        grams = [torch.arange(vocab)[None], *(counts.find(node, torch.arange(vocab)[None]) for node in contexts[1:])]
        found, wanted = counts.backoff_probabilities(contexts, grams), discounted(table, context, order, vocab)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got[0].numpy(), want, rtol=1e-12)
            assert abs(want.sum() - 1) < 1e-12


class Bigram(tg.Predictor):
    """A base whose distribution is that of a random table, sharp or not."""

    def __init__(self, vocab, sharpness, seed=0):
        rng = np.random.default_rng(seed)
        self.table = torch.from_numpy(rng.standard_normal((vocab, vocab)) * sharpness).log_softmax(-1)

    def predict(self, inputs, count=None):
        return self.table[inputs.ids.gather(1, inputs.places)][:, :count]


class Watched(tg.Predictor):
    """A predictor of which the whole distribution at each target is kept, and the counts behind each part compared with
    the scored text.
    """

    learns = True

    def __init__(self, inner, ids, vocab):
        self.inner, self.history, self.ids = inner, inner.history, ids
        self.said = torch.full((len(ids) - 1, vocab), math.nan, dtype=torch.float64)

    def predict(self, inputs, count=None):
        return self.inner.predict(inputs, count)

    def nll(self, inputs, targets):
        self.now = self.inner.predict(inputs).double()
        torch.testing.assert_close(self.inner.predict(inputs, 3).double(), self.now[:, :3])
        return self.inner.nll(inputs, targets)

    def observe(self, chunk):
        live = chunk.index >= 0
        self.said[chunk.index[live]] = self.now[live]
        self.inner.observe(chunk)

    def learn(self, part, stream):
        self.inner.learn(part, stream)
        if isinstance(self.inner, tg.NgramMixture) and self.inner.s.ttt == "off":
            same_counts(self.inner.counts, counted(self.ids, range(1, part.ranges[-1, 1] + 1), self.inner.counts.order))


def predictor_of(s, base, targets, rt=None):
    """As make_predictor() builds it, over another base."""
    return tg.wrap_predictor(base, s, rt or ref.alone(), targets)


def scored(predictor, s, ids, rt=None, **words):
    """(nats of every target, reasons why they are not valid)."""
    rt, validity, nats = rt or ref.alone(), tg.Validity(), torch.zeros(len(ids) - 1, dtype=torch.float64)
    reader = tg.reader_for(predictor, stream_of(ids), s, rt)
    tg.score(predictor, reader, stream_of(ids), rt, validity, check_every=1, nats=nats, **words)
    return nats, validity.reasons


# --- the same by brute force -----------------------------------------------------------------------------------------


def parts_of(s, ids):
    """[[(target, where the text that is known begins)] of each part], in the order in which they are counted."""
    n = len(ids) - 1
    starts = [0] + [i for i in range(1, n) if ids[i] == ref.BOS]
    rows = list(zip(starts, [*starts[1:], n]))
    if s.ttt == "lora_docs":
        rows.sort(key=lambda row: row[0] - row[1])
        groups = [rows[i : i + s.ttt_group_docs] for i in range(0, len(rows), s.ttt_group_docs)]
        return [[(at, a) for a, b in group for at in range(a, b)] for group in groups]
    found = {}
    for a, b in rows if s.eval_docs else [(0, n)]:
        first = a
        while first < b:  # windows belong to the part of their first target
            end = min(first + (s.eval_seq_len if first == a else s.eval_stride or s.eval_seq_len), b)
            found.setdefault(first // s.ttt_chunk_tokens, []).extend((at, a) for at in range(first, end))
            first = end
    return list(found.values())


def tilted(s, p, table, context):
    """p with more for the hint, normalised; the hint: what followed most often, of several the highest token."""
    after = len(context) >= s.token_order - 1 and table.get(tuple(context[1 - s.token_order :]))
    if not after:
        return p
    most, hint = max((number, token) for token, number in after.items())
    if Fraction(most, after.total()) < Fraction(str(s.token_threshold)):
        return p
    out = p.copy()
    out[hint] *= math.exp(s.token_boost)
    return out / (1 + p[hint] * (math.exp(s.token_boost) - 1))


def merged(hints, s, ids, begin, at):
    """hints, and what followed in the targets begin..at of a document, on contexts that it holds."""
    found, back = defaultdict(Counter, {context: after.copy() for context, after in hints.items()}), s.token_order - 1
    for i in range(begin, at):
        if i - begin + 1 >= back:
            found[tuple(ids[i + 1 - back : i + 1])][ids[i + 1]] += 1
    return found


class Original:
    """MIXER=hashed: BackoffNgramMixer of #1033, one number at a time (spec 6.9)."""

    PRIMES = 36313, 27191, 51647, 81929, 131071, 174763, 233017

    def __init__(self, s):
        self.s, self.single, self.seen = s, Counter(), 0
        self.context, self.full = ([Counter() for _ in range(s.ngram_order + 1)] for _ in range(2))

    def keys(self, context, token):
        n, value = len(context) + 1, 0
        for k, one in enumerate(context):
            value ^= one * self.PRIMES[k % 7]
        return value % self.s.ngram_buckets, (value ^ token * self.PRIMES[(n - 1) % 7]) % self.s.ngram_buckets

    def add(self, context, token):
        self.single[token] += 1
        self.seen += 1
        for n in range(2, min(self.s.ngram_order, len(context) + 1) + 1):
            before, full = self.keys(context[len(context) - n + 1 :], token)
            self.context[n][before] += 1
            self.full[n][full] += 1

    def share(self, context, token):
        for n in range(min(self.s.ngram_order, len(context) + 1), 1, -1):
            before, full = self.keys(context[len(context) - n + 1 :], token)
            if self.context[n][before] >= self.s.min_count:
                return min(self.full[n][full], self.context[n][before]) / max(self.context[n][before], 1)
        return (self.single[token] + 0.5) / (self.seen + 0.5 * self.s.vocab_size)


def brute_force(s, base, ids):
    """(log of what is said of every token at every target (N, V), log weights of the experts at the end)."""
    vocab, said = s.vocab_size, np.full((len(ids) - 1, s.vocab_size), math.nan)
    names = ("backoff",) if s.mixer == "backoff" else s.mixer_experts
    orders = {"unigram": 1, "bigram": 2, "trigram": 3, "backoff": s.ngram_order}
    table, hints, original, seen = defaultdict(Counter), defaultdict(Counter), Original(s), 0
    weights = np.array([2.0] + [0.0] * len(names))
    for part in parts_of(s, ids):
        nats, known = [], hints
        for at, begin in part:
            context, p = ids[begin : at + 1], base.table[ids[at]].exp().numpy()
            if s.ttt == "lora_docs":  # the chunks of the document that are scored are known, too
                if (at - begin) % s.ttt_chunk_size == 0:
                    known = merged(hints, s, ids, begin, at)
                p = tilted(s, p, known, context) if s.token_boost else p
            else:
                p = tilted(s, p, hints, context) if s.token_boost else p
            entropy = -(p * np.log(p)).sum()
            alpha = s.alpha_base + s.alpha_range / (1 + math.exp(-2 * (entropy - s.alpha_center)))
            if s.mixer == "off" or seen < s.mixer_min_tokens:
                mixed = p
            elif s.mixer == "hashed":
                share = np.array([original.share(context, token) for token in range(vocab)])
                mixed = np.maximum((1 - alpha) * p + alpha * share, 1e-12)
            else:
                shares = discounted(table, context, max(s.ngram_order, 3), vocab)
                same = np.full(vocab, math.exp(-entropy))
                experts = [p, *(same if name == "entropy" else shares[orders[name] - 1] for name in names)]
                nats.append([-math.log(expert[ids[at + 1]]) for expert in experts])
                share = np.exp(weights) / np.exp(weights).sum() if s.mixer == "hedge" else (1 - alpha, alpha)
                mixed = sum(w * expert for w, expert in zip(share, experts))
            said[at] = np.log(mixed)
        if nats and s.mixer == "hedge":
            weights = weights - s.mixer_eta * np.mean(nats, 0)
        for at, begin in part:
            text = ids[begin if s.ttt == "lora_docs" else 0 : at + 1]
            original.add(text, ids[at + 1])
            for n in range(min(max(s.ngram_order, 3) - 1, len(text)) + 1):
                table[tuple(text[len(text) - n :])][ids[at + 1]] += 1
            if len(text) >= s.token_order - 1:
                hints[tuple(text[len(text) - s.token_order + 1 :])][ids[at + 1]] += 1
        seen += len(part)
    return said, weights


@st.composite
def readings(draw):
    """A way to read a text, and to mix what is said of it."""
    pick = lambda *values: draw(st.sampled_from(values))
    experts = st.lists(st.sampled_from(["unigram", "bigram", "trigram", "backoff"]), min_size=1, unique=True)
    return settings(
        vocab_size=pick(8, 17), eval_seq_len=pick(5, 8), eval_stride=pick(0, 2, 5), eval_docs=pick(False, True),
        eval_context=pick("window", "cache"), ttt_chunk_tokens=pick(3, 10, 25), ttt_chunk_size=3,
        ttt_group_docs=pick(1, 2, 5), mixer=pick("off", "backoff", "hedge"), mixer_experts=tuple(draw(experts)),
        ngram_order=pick(2, 3, 7), mixer_eta=pick(0.1, 2.0), mixer_min_tokens=pick(0, 0, 30),
        alpha_base=pick(0.0, 0.2, 0.45, 1.0), alpha_range=0,
        token_boost=pick(0.0, 0.5, 2.6, 20.0), token_order=pick(2, 3, 6), token_threshold=pick(0.0, 0.4, 0.8, 1.0))


@ref.tries(100)
@given(readings(), texts(), st.sampled_from([0.1, 1.0, 4.0]), st.data())
def test_ngram_backoff_hedge_and_hints_are_the_formulas_and_sum_to_one(s, ids, sharpness, data):
    """At every target and of every token: counts, mixtures, weights and hints, all from the text scored before."""
    s = tg.replace(s, alpha_range=round(data.draw(st.floats(0, 1 - s.alpha_base)), 3),
                   alpha_center=data.draw(st.floats(0, 4)), ttt=data.draw(st.sampled_from(["off", "off", "lora_docs"])))
    s = tg.replace(s, eval_context="window") if s.ttt == "off" else s
    base = Bigram(s.vocab_size, sharpness)
    watched = Watched(predictor_of(s, base, len(ids) - 1), ids, s.vocab_size)
    nats, reasons = scored(watched, s, ids)
    want, weights = brute_force(s, base, ids)
    np.testing.assert_allclose(watched.said.numpy(), want, rtol=0, atol=2e-6)  # TOKEN_BOOST is float32
    assert (watched.said.logsumexp(-1).abs() < 1e-6).all() and reasons == []
    np.testing.assert_allclose(nats.numpy(), -want[np.arange(len(ids) - 1), ids[1:]], rtol=0, atol=2e-6)
    if s.mixer == "hedge":
        np.testing.assert_allclose(watched.inner.log_weights.numpy(), weights, rtol=1e-6)


def hint_of(tilt, *context):
    inputs = tg.Inputs(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([context]))
    return int(tilt._hints(inputs))


@pytest.mark.parametrize("threshold", ["0.55", "0.6", "0.7", "0.8", "0.9", "0.95", "1"])
def test_a_hint_needs_its_share_exactly(threshold):
    """So many of so many, for every count at which the share is met exactly, or missed by one."""
    s = settings(vocab_size=256, token_boost=1, token_order=2, token_threshold=float(threshold))
    for total in range(2, 130):
        need = Fraction(threshold) * total
        for most in {math.ceil(need), math.ceil(need) - 1} if need.denominator == 1 else ():
            ids = [4, 5] * most + [token for other in range(total - most) for token in (4, 6 + other)]
            tilt = predictor_of(s, Bigram(8, 1), len(ids))
            tilt.learn(part_of([[0, len(ids) - 1]]), stream_of(ids))
            assert hint_of(tilt, 4) == (5 if most >= need else -1), (most, total)


# --- mixtures and the tilt in a run ----------------------------------------------------------------------------------


def repeated(seed=0):
    """200 tokens of which most are as they were before."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, 12, 5).tolist() for _ in range(4)]
    return [ref.BOS, *(token for i in rng.integers(0, 4, 40) for token in words[i])]


def test_a_document_is_history_of_its_own_for_the_tilt():
    """Words that return within a document are hinted there at once; in the next one of the group, which says the same, too
    late; and the table of a row grows as far as its document.
    """
    s = settings(token_boost=4, token_order=3, token_threshold=0.5, ttt="lora_docs", ttt_chunk_size=3, ttt_group_docs=9)
    words = np.random.default_rng(0).integers(4, 32, 150).tolist()
    ids = [ref.BOS, *words, *words, ref.BOS, *words, ref.BOS]
    tilt = predictor_of(s, Bigram(32, 1), len(ids))
    nats, plain = scored(tilt, s, ids)[0], scored(Bigram(32, 1), s, ids)[0]
    gain = plain - nats
    assert gain[:150].abs().mean() < 0.1 and gain[150:300].mean() > 1 and gain[302:450].abs().mean() < 0.1
    assert len(tilt.row_followers.table) > 256


@pytest.mark.parametrize("segment", [32, 3])
def test_a_row_with_kept_keys_knows_what_it_has_scored(segment, monkeypatch):
    """And nothing of what other rows score at the same time, the text that it reads first for its keys included."""
    monkeypatch.setattr(tg, "CACHE_SEGMENT", segment)
    s, ids = settings(token_boost=2, token_order=3, token_threshold=0.5, eval_context="cache", eval_seq_len=4,
                      ttt_chunk_tokens=480), repeated()
    ids = [*ids, *ids, *ids]
    base, n = Bigram(32, 1), len(ids) - 1
    watched = Watched(predictor_of(s, base, n), ids, 32)
    assert scored(watched, s, ids)[1] == []
    for at in range(n):
        part, row = s.ttt_chunk_tokens * (at // s.ttt_chunk_tokens), min(segment * 4, max(s.ttt_chunk_tokens // 16, 4))
        first = part + row * ((at - part) // row)
        begin = max(first - 4, 0)
        chunk = max(begin + 4 * ((at - begin) // 4), first)
        if at == part:
            hints = merged({}, s, ids, 0, part)
        found = defaultdict(Counter, {context: after.copy() for context, after in hints.items()})
        for i in range(first, chunk):
            if i >= 1:
                found[tuple(ids[i - 1 : i + 1])][ids[i + 1]] += 1
        want = tilted(s, base.table[ids[at]].exp().numpy(), found, ids[: at + 1])
        np.testing.assert_allclose(watched.said[at].exp().numpy(), want, atol=2e-6)


KINDS = {"backoff": dict(mixer="backoff"),
         "hedge": dict(mixer="hedge", mixer_eta=1, mixer_experts="unigram,trigram,backoff"),
         "tilt": dict(token_boost=2), "all": dict(mixer="hedge", mixer_experts="backoff", token_boost=2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_learn_the_same_from_each_others_targets(kind, world):
    """Counts, hints and weights of experts are equal on all ranks, and those of one; also where rows are padded."""
    s, ids = settings(**KINDS[kind], eval_batch_seqs=2), repeated()

    def work(rt):
        predictor = predictor_of(s, Bigram(32, 1), len(ids), rt)
        nats, reasons = scored(predictor, s, ids, rt)
        assert reasons == []
        return nats, getattr(predictor, "weights", torch.zeros(0))

    one, weights = work(ref.alone())
    ranks = ref.Ranks(world)
    for member in ranks.members:
        member.compiled = True
    for nats, learned in ranks.together(work):
        torch.testing.assert_close(nats, one, rtol=0, atol=1e-6)
        torch.testing.assert_close(learned, weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets_every_bit(kind):
    s, ids = settings(**KINDS[kind]), repeated()
    predictor = predictor_of(s, Bigram(32, 1), len(ids))
    first, again = scored(predictor, s, ids)[0], scored(predictor, s, ids)[0]
    predictor.reset()
    assert torch.equal(scored(predictor, s, ids)[0], first) and not torch.equal(again, first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_repeats_itself_costs_less(kind):
    s, ids = settings(**KINDS[kind]), repeated()
    plain = scored(Bigram(32, 1), s, ids)[0]
    assert scored(predictor_of(s, Bigram(32, 1), len(ids)), s, ids)[0].mean() < plain.mean() - 0.2


def test_experts_are_weighed_by_their_record():
    """The bigrams tell a text of period five, the single tokens do not; the table of a model knows neither."""
    s, ids = settings(mixer="hedge", mixer_experts="unigram,bigram", mixer_eta=1), [3, 1, 4, 15, 9] * 30
    predictor = predictor_of(s, Bigram(32, 1), len(ids))
    scored(predictor, s, ids)
    model, unigram, bigram = predictor.log_weights.tolist()
    assert bigram > unigram > model and bigram - unigram > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ttt", ["off", "full", "lora", "lora_docs"])
@pytest.mark.parametrize("kind", ["all", "backoff"])
def test_whatever_the_model_and_its_training_a_mixture_is_a_distribution(ttt, kind, dtype):
    """The composition that a run builds, with logits in float32: within 1e-6 of 1, and nll says the same."""
    s = settings(**KINDS[kind], ttt=ttt, ttt_lr=0.05, ttt_warm_start_a=True, ttt_group_docs=3, ttt_epochs=1)
    ids = [ref.BOS if i % 37 == 0 else token for i, token in enumerate(repeated())]
    predictor = tg.make_predictor(ref.randomise(tg.GPT(s, dtype), 1), s, ref.alone(), len(ids) - 1)
    watched = Watched(predictor, ids, 32)
    nats, reasons = scored(watched, s, ids)
    assert reasons == [] and (watched.said.exp().sum(-1) - 1).abs().max() < 1e-6
    said = watched.said.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(nats, -said, rtol=1e-6, atol=1e-6)


@ref.tries(100)
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_weight_that_could_exceed_one_is_refused(base, more):
    for mixer in ("backoff", "hashed"):
        words = ["ALLOW_INVALID=1", f"MIXER={mixer}", f"ALPHA_BASE={base:.3f}", f"ALPHA_RANGE={more:.3f}"]
        if Fraction(f"{base:.3f}") + Fraction(f"{more:.3f}") <= 1:
            tg.Settings.parse(words)
        else:
            with pytest.raises(tg.BadInput, match=r"ALPHA_BASE=.*ALPHA_RANGE="):
                tg.Settings.parse(words)
    tg.Settings.parse(words[2:])  # where there is no mixture, any will do


# --- what is no distribution -----------------------------------------------------------------------------------------


class Said:
    """A log that keeps what score() says of normalisation."""

    def __call__(self, event, **values):
        self.normalisation = values

    def progress(self, *_):
        pass


@ref.tries(25)
@given(texts(), st.sampled_from([2, 3, 5, 9, 10]), st.sampled_from([3, 16, 1000, 2**22]), st.sampled_from([1, 2, 3]),
       st.sampled_from([0, 30]))
def test_the_hashed_mixer_is_the_published_one(ids, order, buckets, min_count, min_tokens):
    """#1033's numbers for every token; their sum is what score() reports, and why it calls itself invalid."""
    s = settings(vocab_size=11, mixer="hashed", allow_invalid=True, ngram_order=order, ngram_buckets=buckets,
                 min_count=min_count, mixer_min_tokens=min_tokens, alpha_base=0.2, alpha_range=0.55, alpha_center=1.5)
    base, log = Bigram(11, 1), Said()
    watched = Watched(predictor_of(s, base, len(ids) - 1), ids, 11)
    with mock.patch.object(tg, "Examiner", Thorough):
        nats, reasons = scored(watched, s, ids, log=log)
    want, _ = brute_force(s, base, ids)
    np.testing.assert_allclose(watched.said.numpy(), want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(nats.numpy(), -want[np.arange(len(ids) - 1), ids[1:]], rtol=0, atol=1e-6)
    sums = np.exp(want).sum(1)
    assert log.normalisation["largest_sum"] == pytest.approx(sums.max(), rel=1e-6)
    assert "C2" in watched.inner.invalid_reason
    assert any("C2" in reason for reason in reasons) == bool(abs(np.log(sums)).max() > 2e-5)


def test_full_buckets_promise_every_token_at_once():
    """Sixteen buckets for everything: the "probabilities" of all tokens come to many times 1."""
    rng, s = np.random.default_rng(0), settings(mixer="hashed", allow_invalid=True, ngram_buckets=16, ngram_order=5,
                                                alpha_base=0.9, alpha_range=0)
    ids = [1, *rng.integers(2, 32, 400).tolist()]
    log = Said()
    nats, reasons = scored(predictor_of(s, Bigram(32, 0.1), len(ids)), s, ids, log=log)
    assert log.normalisation["largest_sum"] > 10 and reasons != [] and nats[200:].mean() < math.log(30) - 1


def test_the_entropy_expert_gives_every_token_the_same_and_too_much():
    s = settings(vocab_size=11, mixer="hedge", mixer_experts="unigram,entropy", allow_invalid=True)
    ids = [1, 2, 3, 4, 5] * 12
    base = Bigram(11, 3)
    watched = Watched(predictor_of(s, base, len(ids) - 1), ids, 11)
    _, reasons = scored(watched, s, ids)
    np.testing.assert_allclose(watched.said.numpy(), brute_force(s, base, ids)[0], rtol=0, atol=1e-9)
    assert "C2" in watched.inner.invalid_reason and "entropy" in watched.inner.invalid_reason
    assert any("C2" in reason for reason in reasons)
