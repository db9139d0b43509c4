"""The metric: windows, the one score loop against a brute-force float64 scorer, and broken scorers it must expose."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
import train_gpt as tg

CPU = torch.device("cpu")


def stream_of(n, vocab=32, seed=0, whole=True):
    """n targets with a few bytes each, drawn at random."""
    rng = np.random.default_rng(seed)
    return tg.ValStream(ref.tokens(vocab, n + 1, seed=seed).int(),
                        torch.from_numpy(rng.integers(0, 9, n).astype(np.int16)), whole)


def scored(predictor, stream, length, stride=0, batch=3, rt=None, **options):
    """(Score, reasons why it is not valid)."""
    rt, validity = rt or ref.alone(), tg.Validity()
    result = tg.score(predictor, tg.chunks(stream, length, stride, batch, rt), stream, rt, validity, **options)
    return result, validity.reasons


def small_model(**changes):
    s = ref.small(num_layers=2, ve_layers=(1,), model_dim=8, num_heads=2, num_kv_heads=1, eval_seq_len=8,
                  train_seq_len=8, **changes)
    return s, ref.randomise(tg.GPT(s), seed=1, spread=0.4)


def window_start(target, targets, length, stride):
    """Where the window begins that scores a target: the specification's rule (6.3, corrected) for a single target."""
    if target < length:
        return 0
    start = -(-(target - length + 1) // stride) * stride
    return min(start, targets - length)


# --- windows ---------------------------------------------------------------------------------------------------------


@ref.tries(500)
@given(st.integers(1, 60), st.integers(0, 400), st.data())
def test_windows_score_every_target_once_with_context(length, more, data):
    targets, stride = length + more, data.draw(st.integers(0, length))
    seen = [[] for _ in range(targets)]
    for starts, keep in tg.windows(targets, length, stride):
        assert 1 <= keep <= length
        for start in starts.tolist():
            assert 0 <= start <= targets - length
            for target in range(start + length - keep, start + length):
                seen[target].append(start)
    stride = stride or length
    assert all(len(starts) == 1 for starts in seen)
    for target, (start,) in enumerate(seen):
        assert start == window_start(target, targets, length, stride)
        assert target < length or target - start >= length - stride  # inputs before it: the context it was promised


def test_contiguous_windows_are_a_stride_of_the_length():
    for targets in (8, 9, 15, 16, 17, 100):
        a, b = tg.windows(targets, 8, 0), tg.windows(targets, 8, 8)
        assert [(x.tolist(), k) for x, k in a] == [(x.tolist(), k) for x, k in b]
    (starts, keep), (last, rest) = tg.windows(21, 8)
    assert starts.tolist() == [0, 8] and keep == 8 and last.tolist() == [13] and rest == 5


def test_fineweb_window_counts():
    """62,021,845 targets at 2048 and stride 64: the tail is scored, nothing twice."""
    groups = tg.windows(62_021_845, 2048, 64)
    assert sum(len(starts) * keep for starts, keep in groups) == 62_021_845
    assert max(int(starts.max()) for starts, _ in groups) + 2048 == 62_021_845


@ref.tries(60)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(1, 5), st.integers(1, 4), st.data())
def test_chunks_carry_the_streams_own_tokens_and_ranks_share_them(length, more, batch, world, data):
    stream, stride = stream_of(length + more, vocab=1000), data.draw(st.integers(0, length))
    alone, seen = [], []
    for chunk in tg.chunks(stream, length, stride, batch, ref.alone()):
        assert chunk.x.shape == chunk.y.shape and chunk.x.shape[1] == length and chunk.x.dtype == torch.int64
        assert len(chunk.at) == len(chunk.x) <= batch
        for x, y, at in zip(chunk.x, chunk.y, chunk.at.tolist()):
            start = at + chunk.keep - length
            assert torch.equal(x, stream.tokens[start : start + length].long())
            assert torch.equal(y, stream.tokens[start + 1 : start + length + 1].long())
            alone += [(start, target) for target in range(at, at + chunk.keep)]
    assert sorted(target for _, target in alone) == list(range(length + more))
    for member in ref.Ranks(world).members:
        for chunk in tg.chunks(stream, length, stride, batch, member):
            seen += [(at + chunk.keep - length, target) for at in chunk.at.tolist()
                     for target in range(at, at + chunk.keep)]
    assert sorted(seen) == sorted(alone)


def test_compiled_chunks_all_have_one_shape():
    rt = ref.alone()
    rt.compiled = True
    stream = stream_of(30)
    parts = list(tg.chunks(stream, 8, 3, 4, rt))
    assert {tuple(chunk.x.shape) for chunk in parts} == {(4, 8)} and any(len(chunk.at) < 4 for chunk in parts)
    s, model = small_model()
    predictor = tg.ModelPredictor(model, rt)
    (padded, reasons), (plain, _) = scored(predictor, stream, 8, 3, 4, rt), scored(predictor, stream, 8, 3, 4)
    assert reasons == [] and padded[2:] == plain[2:]
    assert padded.loss == pytest.approx(plain.loss, rel=1e-7)  # a batch of another size is rounded in another order


# --- the score -------------------------------------------------------------------------------------------------------


@ref.tries(20)
@given(st.integers(0, 40), st.integers(0, 8), st.integers(0, 999))
def test_the_score_is_that_of_a_brute_force_scorer(more, stride, seed):
    """Every target on its own: the float64 model over its window, one forward each."""
    s, model = small_model()
    stream, parameters = stream_of(8 + more, seed=seed), ref.arrays(model)
    ids, nats = stream.tokens.tolist(), 0.0
    for target in range(8 + more):
        start = window_start(target, 8 + more, 8, stride or 8)
        nats += ref.nats(ref.forward(parameters, s, ids[start : start + 8])[1][target - start], ids[target + 1])
    result, reasons = scored(tg.ModelPredictor(model, ref.alone()), stream, 8, stride)
    assert reasons == []
    assert (result.tokens, result.bytes) == (8 + more, sum(stream.bytes.tolist()))
    assert result.loss == pytest.approx(nats / (8 + more), rel=1e-6)
    assert result.bpb == pytest.approx(nats / math.log(2) / max(sum(stream.bytes.tolist()), 1), rel=1e-6)


@ref.tries(15)
@given(st.integers(0, 60), st.integers(0, 8), st.integers(1, 7), st.integers(2, 4), st.integers(0, 99))
def test_the_score_does_not_depend_on_batch_or_ranks(more, stride, batch, world, seed):
    """Ranks that reduce among themselves, one thread each: the same score and the same clean record on every one."""
    s, model = small_model()
    stream = stream_of(8 + more, seed=seed)
    one, _ = scored(tg.ModelPredictor(model, ref.alone()), stream, 8, stride, batch=5)
    work = lambda rt: scored(tg.ModelPredictor(model, rt), stream, 8, stride, batch, rt)
    for result, reasons in [work(ref.alone()), *ref.Ranks(world).together(work)]:
        assert reasons == [] and result[2:] == one[2:]
        assert result.loss == pytest.approx(one.loss, rel=1e-6) and result.bpb == pytest.approx(one.bpb, rel=1e-6)


def test_contiguous_equals_a_stride_of_the_length():
    s, model = small_model()
    stream = stream_of(45)
    predictor = tg.ModelPredictor(model, ref.alone())
    assert scored(predictor, stream, 8, 0) == scored(predictor, stream, 8, 8)


def test_more_context_lowers_the_loss_of_a_model_that_uses_it():
    """Windows that overlap by four or two positions or not at all; a text of period five, a model that copies."""

    class Copy(tg.Predictor):
        """Knows what comes after four inputs, and nothing before."""

        def predict(self, x, docs=None, keep=None):
            logits = torch.zeros(*x.shape, 32)
            logits[:, 4:].scatter_(-1, x[:, : x.size(1) - 4, None], 5.0)
            return logits.log_softmax(-1)[:, -(keep or x.size(1)) :]

    ids = torch.tensor([3, 1, 4, 15, 9] * 12, dtype=torch.int32)
    stream = tg.ValStream(ids, torch.ones(59, dtype=torch.int16), True)
    losses = [scored(Copy(), stream, 8, stride)[0].loss for stride in (4, 6, 0)]
    assert losses[0] < losses[1] < losses[2]


def test_sums_are_float64():
    """Ten thousand float32 values of which adding to a float32 sum would lose the last digits."""

    class Constant(tg.Predictor):
        def predict(self, x, docs=None, keep=None):
            return torch.full((len(x), keep or x.size(1), 8), -math.log(8))

        def nll(self, x, y, keep, docs=None):
            return torch.full((len(x), keep), math.log(8))

    stream = tg.ValStream(torch.zeros(100_001, dtype=torch.int32), torch.ones(100_000, dtype=torch.int16), True)
    result, reasons = scored(Constant(), stream, 10, batch=100)
    assert reasons == [] and result.loss == pytest.approx(float(np.float32(math.log(8))), rel=1e-12)
    assert result.bpb == pytest.approx(result.loss / math.log(2), rel=1e-12)


def test_bytes_do_not_overflow_their_small_type():
    stream = tg.ValStream(torch.zeros(10_001, dtype=torch.int32), torch.full((10_000,), 1000, dtype=torch.int16), True)
    assert scored(Uniform(), stream, 100, batch=100)[0].bytes == 10_000_000


# --- predictors ------------------------------------------------------------------------------------------------------


class Uniform(tg.Predictor):
    """Overrides only predict()."""

    def predict(self, x, docs=None, keep=None):
        return torch.full((len(x), keep or x.size(1), 32), -math.log(32))


def test_a_predictor_needs_only_predict():
    result, reasons = scored(Uniform(), stream_of(50), 8, 3)
    assert reasons == [] and result.loss == pytest.approx(math.log(32), rel=1e-6)
    with pytest.raises(NotImplementedError):
        scored(tg.Predictor(), stream_of(50), 8)


@pytest.mark.parametrize("keep", [1, 3, 8])
@pytest.mark.parametrize("softcap", [0, 30])
def test_the_fused_nll_is_what_predict_says(keep, softcap):
    s, model = small_model(logit_softcap=softcap)
    predictor, x, y = tg.ModelPredictor(model, ref.alone()), ref.tokens(32, 3, 8), ref.tokens(32, 3, 8, seed=1)
    said = predictor.predict(x, keep=keep)
    assert said.shape == (3, keep, 32) and not said.requires_grad
    torch.testing.assert_close(predictor.nll(x, y, keep), tg.Predictor.nll(predictor, x, y, keep), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(3, keep), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictor.predict(x)[:, -keep:], said, rtol=1e-5, atol=1e-6)
    docs = tg.Docs(torch.zeros_like(x, dtype=torch.bool))
    assert not torch.equal(predictor.predict(x, docs), predictor.predict(x))
    assert not predictor.nll(x, y, keep, docs).requires_grad


def test_observe_comes_after_scoring_and_learning_is_legal():
    """An adaptive unigram scores a chunk by the counts of earlier ones: valid, and as the definition says."""

    class Counts(tg.Predictor):
        def __init__(self):
            self.counts, self.calls = torch.ones(32), []

        def predict(self, x, docs=None, keep=None):
            self.calls.append("predict")
            return (self.counts / self.counts.sum()).log().expand(len(x), keep or x.size(1), 32)

        def observe(self, chunk):
            self.calls.append("observe")
            self.counts += torch.bincount(chunk.y[:, -chunk.keep :].flatten(), minlength=32)

    stream, predictor = stream_of(70), Counts()
    result, reasons = scored(predictor, stream, 8, 0, batch=2)
    assert reasons == [] and predictor.calls[0] == "predict" and predictor.calls.count("observe") == 5
    counts, nats, ids = np.ones(32), 0.0, stream.tokens.tolist()
    for first in (*range(0, 64, 16), 64):
        block = ids[first + 1 : min(first + 16, 70 if first == 64 else 64) + 1]
        nats -= sum(math.log(counts[i] / counts.sum()) for i in block)
        counts += np.bincount(block, minlength=32)
    assert result.loss == pytest.approx(nats / 70, rel=1e-6)


# --- scorers that break a condition must be found out ----------------------------------------------------------------


class Broken(tg.Predictor):
    """Uniform, with `shift` added to every log-probability, or a bonus that only the fused path gives."""

    def __init__(self, shift=0.0, bonus=0.0, nan_in=None):
        self.shift, self.bonus, self.nan_in = shift, bonus, nan_in

    def predict(self, x, docs=None, keep=None):
        out = torch.full((len(x), keep or x.size(1), 32), -math.log(32) + self.shift)
        if self.nan_in == "predict":
            out[0, -1, 3] = math.nan
        return out

    def nll(self, x, y, keep, docs=None):
        if self.nan_in == "predict":
            return torch.full((len(x), keep), math.log(32))
        out = super().nll(x, y, keep) - self.bonus
        if self.nan_in == "nll":
            out[0, 0] = math.nan
        return out


def test_distributions_that_do_not_sum_to_one_are_c2():
    for shift in (0.01, -0.01, 3.0):
        _, reasons = scored(Broken(shift=shift), stream_of(50), 8)
        assert len(reasons) == 1 and "C2" in reasons[0]
    assert scored(Broken(shift=1e-5), stream_of(50), 8)[1] == []


def test_a_fused_path_that_knows_better_than_its_distribution_is_c2():
    _, reasons = scored(Broken(bonus=0.5), stream_of(50), 8)
    assert len(reasons) == 1 and "C2" in reasons[0]


def test_a_bonus_for_the_right_token_in_a_later_chunk_or_row_is_c2():
    """Chunks that are sampled: the first and every `check_every`-th."""

    class Sometimes(Broken):
        def __init__(self, chunk, row):
            super().__init__()
            self.chunk, self.row, self.count = chunk, row, -1

        def nll(self, x, y, keep, docs=None):
            self.count += 1
            out = super().nll(x, y, keep)
            if self.count == self.chunk:
                out[self.row] -= 3.0
            return out

    assert scored(Sometimes(0, 0), stream_of(200), 8, batch=4, check_every=1)[1] != []
    assert scored(Sometimes(4, 0), stream_of(200), 8, batch=4, check_every=1)[1] != []
    assert scored(Sometimes(64, 0), stream_of(3000), 8, batch=4)[1] != []
    assert scored(Sometimes(64, 3), stream_of(3000), 8, batch=4)[1] != []


@pytest.mark.parametrize("where", ["nll", "predict"])
def test_nan_is_not_valid_wherever_it_comes_from(where):
    assert scored(Broken(nan_in=where), stream_of(50), 8)[1] != []


def test_infinite_nats_are_not_valid():
    class Certain(tg.Predictor):
        def predict(self, x, docs=None, keep=None):
            out = torch.full((len(x), keep or x.size(1), 32), -math.inf)
            out[..., 0] = 0.0
            return out

    result, reasons = scored(Certain(), stream_of(50), 8)
    assert reasons != [] and not math.isfinite(result.loss)


@pytest.mark.parametrize("change", [
    lambda parts: parts[:-1], lambda parts: parts[1:], lambda parts: parts + parts[:1],
    lambda parts: parts + parts[-1:] * 2, lambda parts: [],
    lambda parts: parts[:1] + [parts[1]._replace(at=parts[1].at + 1)] + parts[2:],
    lambda parts: parts + [parts[0]] * 255,
    lambda parts: parts + [parts[0]] * 256, lambda parts: [part for part in parts for _ in range(257)],
    lambda parts: [part._replace(keep=1, at=part.at + part.keep - 1) for part in parts],
    lambda parts: parts[:1] * 257 + parts[1:],
], ids=["last missing", "first missing", "one twice", "last three times", "nothing", "shifted", "256 times",
        "257 times", "all 257 times", "only the last",
        "first 257 times"])
def test_targets_scored_twice_or_never_are_c4(change):
    stream, validity = stream_of(50), tg.Validity()
    parts = change(list(tg.chunks(stream, 8, 0, 3, ref.alone())))
    tg.score(Uniform(), parts, stream, ref.alone(), validity)
    assert any("C4" in reason for reason in validity.reasons)


def test_one_rank_that_repeats_another_is_c4_on_every_rank():
    stream = stream_of(50)

    def work(rt):
        validity, same = tg.Validity(), ref.alone()
        tg.score(Uniform(), list(tg.chunks(stream, 8, 0, 3, same)), stream, rt, validity)
        return validity.reasons

    assert all(any("C4" in reason for reason in reasons) for reasons in ref.Ranks(2).together(work))


def test_a_cheat_on_one_rank_is_known_on_all():
    stream = stream_of(50)
    results = ref.Ranks(3).together(lambda rt: scored(Broken(shift=0.1 * (rt.rank == 2)), stream, 8, 0, 2, rt))
    assert all(any("C2" in reason for reason in reasons) for _, reasons in results)


# Scorers of the rules' table (5.6) against the black-box sum, which needs nothing but the score of chosen streams.


def black_box_sum(make, ids, t):
    """Sum over the vocabulary of exp(-nats) of a token at position t after the prefix before it."""
    total = 0.0
    for token in range(32):
        changed = ids[: t + 1].clone()
        changed[t] = token
        stream = tg.ValStream(changed.int(), torch.ones(t, dtype=torch.int16), True)
        taken = []
        predictor = make()
        nll = predictor.nll
        predictor.nll = lambda x, y, keep, docs=None, nll=nll: (taken.append(nll(x, y, keep)), taken[-1])[1]
        tg.score(predictor, tg.chunks(stream, 8, 0, 1, ref.alone()), stream, ref.alone(), tg.Validity())
        total += math.exp(-taken[-1][-1, -1].item())
    return total


class Adaptive(tg.Predictor):
    """A unigram of what was observed; `early` learns from the chunk before it scores it: C3."""

    def __init__(self, early=False):
        self.counts, self.early = torch.ones(32), early

    def predict(self, x, docs=None, keep=None):
        return (self.counts / self.counts.sum()).log().expand(len(x), keep or x.size(1), 32)

    def nll(self, x, y, keep, docs=None):
        if self.early:
            self.counts += torch.bincount(y[:, -keep:].flatten(), minlength=32)
        return super().nll(x, y, keep)

    def observe(self, chunk):
        if not self.early:
            self.counts += torch.bincount(chunk.y[:, -chunk.keep :].flatten(), minlength=32)


def test_the_black_box_sum_tells_legal_predictors_from_the_rest():
    ids = ref.tokens(32, 30, seed=4)
    _, model = small_model()
    for make in (Uniform, Adaptive, lambda: tg.ModelPredictor(model, ref.alone())):
        for t in (8, 12, 20):
            assert black_box_sum(make, ids, t) == pytest.approx(1, abs=1e-4)
    assert abs(black_box_sum(lambda: Adaptive(early=True), ids, 20) - 1) > 1e-2
    assert abs(black_box_sum(lambda: Broken(bonus=0.2), ids, 20) - 1) > 0.1


# --- the ledger of what was opened when ------------------------------------------------------------------------------


def test_validation_before_the_freeze_is_c3_except_for_reports():
    validity = tg.Validity()
    with validity.report():
        validity.opened("val")
        assert not torch.is_grad_enabled()
    validity.opened("train")
    assert torch.is_grad_enabled() and validity.reasons == []
    validity.opened("val")
    assert len(validity.reasons) == 1 and "C3" in validity.reasons[0]


def test_training_data_after_the_freeze_is_a_reason():
    validity = tg.Validity()
    validity.opened("train")
    validity.freeze()
    validity.opened("val")
    assert validity.reasons == []
    validity.opened("train")
    assert len(validity.reasons) == 1 and "train" in validity.reasons[0]


def test_a_report_that_fails_ends_the_permission():
    validity = tg.Validity()
    with pytest.raises(ZeroDivisionError), validity.report():
        1 / 0
    validity.opened("val")
    assert validity.reasons != [] and torch.is_grad_enabled()


def test_reasons_are_kept_once_and_never_withdrawn():
    validity = tg.Validity()
    for ok in (False, True, False):
        validity.need(ok, "a reason")
    validity.need_for_record(False, "hardware")
    assert validity.reasons == ["a reason"] and validity.eligible_reasons == ["hardware"]


# --- the denominator -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proven(toy):
    s = tg.Settings.parse(toy)
    sp, *_ = tg.load_tokenizer(s)
    return sp, tg.load_validation(s, ref.alone(), sp)


def test_bytes_of_the_toy_validation_text_are_those_of_its_documents(proven):
    sp, val = proven
    ids = val.tokens.tolist()
    starts = [i for i, token in enumerate(ids) if token == ref.BOS] + [len(ids)]
    texts = [sp.decode(ids[a + 1 : b]) for a, b in zip(starts, starts[1:])]
    assert sum(len(text.encode()) for text in texts) == val.bytes.sum().item() and len(texts) == 20
    assert tg.prove_bytes(sp, val) == (20, 0)


def test_tampering_with_any_entry_of_the_byte_table_is_seen(proven):
    """One more byte for every occurrence of a token: an ordinary one, a byte piece, and the beginning of a document."""
    sp, val = proven
    used = sorted(set(val.tokens[1:].tolist()))
    chosen = [ref.BOS, *[t for t in used if sp.is_byte(t)][:2], *[t for t in used if not sp.is_byte(t) and t > 3][:5]]
    assert len(chosen) == 8
    for token in chosen:
        for change in (1, -1):
            counted = val.bytes + change * (val.tokens[1:] == token).to(torch.int16)
            _, wrong = tg.prove_bytes(sp, val._replace(bytes=counted))
            assert wrong > 0, (token, sp.id_to_piece(token), change)


def test_a_single_wrong_target_is_seen_and_the_tail_counts_when_it_is_whole(proven):
    sp, val = proven
    last = val.bytes.clone()
    last[-1] += 1
    assert tg.prove_bytes(sp, val._replace(bytes=last)) == (20, 1)
    middle = val.bytes.clone()
    middle[1000] += 1
    assert tg.prove_bytes(sp, val._replace(bytes=middle)) == (20, 1)
    cut = tg.ValStream(val.tokens[:-3], val.bytes[:-3], False)  # a document cut by VAL_TOKENS cannot be decoded whole
    assert tg.prove_bytes(sp, cut) == (19, 0)
    assert tg.prove_bytes(sp, val, most=2000)[1] == 0 and 0 < tg.prove_bytes(sp, val, most=2000)[0] < 20


def test_empty_documents_and_a_single_document_are_proven(proven):
    sp, _ = proven
    for ids in ([1, 1, 1, *sp.encode("ta ko"), 1], [1, *sp.encode("ta ko, mi")], [1, 1]):
        counted = torch.from_numpy(tg.target_bytes(ids, tg.byte_tables(sp, 512)))
        documents, wrong = tg.prove_bytes(sp, tg.ValStream(torch.tensor(ids, dtype=torch.int32), counted, True))
        assert (documents, wrong) == (ids.count(1), 0)
