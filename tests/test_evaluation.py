"""Room 9, the metric: how a text is read, and the one score loop against brute force in float64; scorers that cannot add up
must be found out. What breaks the contest's conditions is in test_validity.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import reference as ref
import scoring
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring import BASE, coded, model_of, settings, stream_of

import train_gpt as tg


def random_text(targets, vocab=32, seed=0, bos=0.15):
    return stream_of(ref.tokens(vocab, targets + 1, seed=seed, bos=bos), seed=seed)


def scored(predictor, stream, length, stride=0, batch=3, rt=None, unit=0, docs=False, **options):
    """(Score, reasons why it is not valid) of a predictor that reads windows."""
    rt, validity = rt or ref.alone(), tg.Validity()
    s = replace(BASE, eval_seq_len=length, eval_stride=stride, eval_batch_seqs=batch, eval_docs=docs)
    result = tg.score(predictor, tg.Reader(stream, s, rt, unit, predictor.history), stream, rt, validity, **options)
    return result, validity.reasons


def window_start(target, length, stride):
    """Where the window begins that scores a target: the first of 0, stride, ... that reaches it, wherever the text ends."""
    return next(start for start in itertools.count(0, stride) if target < start + length)


# --- windows and documents -------------------------------------------------------------------------------------------


@st.composite
def rows(draw):
    """(n, 2) neighbouring ranges of targets."""
    edges = np.cumsum([draw(st.integers(0, 5)), *draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))])
    return np.stack((edges[:-1], edges[1:]), 1)


@ref.tries(500)
@given(rows(), st.integers(1, 30), st.data())
def test_sliding_windows_score_every_target_of_every_row_once_with_its_context(table, length, data):
    stride = data.draw(st.integers(0, length))
    starts, lengths, keeps = tg.sliding_windows(table, length, stride)
    stride, at = stride or length, 0
    for a, b in table.tolist():
        target = a
        while target < b:  # one window after the other, each beginning where the rule for its first target says
            start, n, keep = starts[at], lengths[at], keeps[at]
            assert start == a + window_start(target - a, length, stride)
            assert n == min(length, b - start) and start + n - keep == target and 1 <= keep <= (n if target == a else stride)
            assert {a + window_start(one - a, length, stride) for one in range(target, target + keep)} == {start}
            at, target = at + 1, target + keep
        assert target == b
    assert at == len(starts) == len(lengths) == len(keeps)


def test_contiguous_windows_are_sliding_windows_with_a_stride_of_the_length():
    for targets in (3, 8, 9, 15, 16, 17, 100):
        table = np.array([[0, targets], [targets, 2 * targets + 1]])
        assert [x.tolist() for x in tg.sliding_windows(table, 8, 0)] == [x.tolist() for x in tg.sliding_windows(table, 8, 8)]
    starts, lengths, keeps = tg.sliding_windows(np.array([[0, 21]]), 8)
    assert (starts.tolist(), lengths.tolist(), keeps.tolist()) == ([0, 8, 16], [8, 8, 5], [8, 8, 5])


def test_sliding_window_counts_of_fineweb():
    """62,021,845 targets at 2048 and stride 64: the tail is scored, nothing twice; and so it is by document."""
    starts, lengths, keeps = tg.sliding_windows(np.array([[0, 62_021_845]]), 2048, 64)
    assert keeps.sum() == 62_021_845 == starts[-1] + lengths[-1] and (lengths[:-1] == 2048).all() and lengths[-1] == 2048 - 64 + 21
    edges = np.unique(np.append(np.random.default_rng(0).integers(1, 62_021_845, 49_999), (0, 62_021_845)))
    starts, lengths, keeps = tg.sliding_windows(np.stack((edges[:-1], edges[1:]), 1), 2048, 64)
    assert keeps.sum() == 62_021_845 and (np.sort(starts + lengths - keeps) == np.cumsum(keeps) - keeps).all()


@ref.tries(200)
@given(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=2, max_size=30))
def test_a_document_is_what_follows_its_bos_up_to_and_with_the_next(ids):
    found, at = [], 0
    for target in range(1, len(ids) - 1):  # the target that is predicted after token `target`
        if ids[target] == ref.BOS:
            found.append([at, target])
            at = target
    assert tg.document_ranges(stream_of(ids)).tolist() == [*found, [at, len(ids) - 1]]


# --- the reader ------------------------------------------------------------------------------------------------------


MODES = {"windows": {}, "documents": dict(eval_docs=True), "cache": dict(eval_context="cache"), "documents by cache": dict(eval_docs=True, eval_context="cache"),
         "lora_docs": dict(ttt="lora_docs"), "lora_docs by cache": dict(ttt="lora_docs", eval_context="cache")}


def reading(mode, seed):
    """Random settings of a way to read, and how many targets a part has, if anything learns."""
    rng = np.random.default_rng(seed)
    upto = lambda most, least=1: int(rng.integers(least, most + 1))
    length, unit = upto(12, 2), int(rng.choice([0, 1, 7, 16, 40, 1000]))
    s = replace(BASE, eval_seq_len=length, eval_stride=upto(length, 0), eval_batch_seqs=upto(20), ttt_batch_size=upto(20), **MODES[mode])
    if s.ttt == "lora_docs":
        short = tuple((upto(length), upto(6) + 6 * i) for i in range(upto(2, 0)))
        prefix = upto(6, 0) if unit else 0
        s = replace(s, ttt_chunk_size=upto(length), ttt_short_chunks=short[:: rng.choice([1, -1])], ttt_group_docs=upto(4),
                    phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=upto(max(prefix, 1)))
    return s, unit


def by_document(s):
    return s.eval_docs or s.ttt == "lora_docs"


def expected_parts(s, rows, unit):
    """[ranges of targets] of the parts, in the words of the settings."""
    n = rows[-1][1]
    if s.ttt == "lora_docs":
        order = sorted(rows, key=lambda row: row[0] - row[1])  # longest first, else as they stand
        groups = range(0, len(order), s.ttt_group_docs) if unit else [0]
        k = s.phased_ttt_num_phases
        phases = [round(s.phased_ttt_prefix_docs * i / k) for i in range(1, k + 1)] if s.phased_ttt_prefix_docs else []
        edges = sorted({edge for edge in (*groups, *phases, len(order)) if edge <= len(order)})
        return [order[a:b] for a, b in zip(edges, edges[1:])]
    if not unit:
        return [[[0, n]]]
    if s.eval_context == "cache" and not by_document(s):
        return [[[a, min(a + unit, n)]] for a in range(0, n, unit)]
    if s.eval_context == "cache":  # whole documents, by where they end
        blocks = [((b - 1) // unit, a, b) for a, b in rows]
    else:  # whole windows, by where their first target is
        starts, lengths, keeps = tg.sliding_windows(np.array(rows), s.eval_seq_len, s.eval_stride)
        blocks = [((b - keep) // unit, b - keep, b) for b, keep in zip((starts + lengths).tolist(), keeps.tolist())]
    groups = [list(group) for _, group in itertools.groupby(blocks, key=lambda block: block[0])]
    return [[[group[0][1], group[-1][2]]] for group in groups]


def expected_begin(s, rows, parts, unit):
    """{target: the first token that the row which scores it is shown}."""
    found, length = {}, s.eval_seq_len
    if s.eval_context == "cache" and not by_document(s):
        for (a, b), in parts:
            segment = min(tg.CACHE_SEGMENT * length, max((unit or rows[-1][1]) // 16, length))
            found |= {target: max(target - (target - a) % segment - length, 0) for target in range(a, b)}
        return found
    for a, b in rows:
        at, end = a, a
        for target in range(a, b):
            if s.ttt == "lora_docs" and target == end:
                at, fitting = target, [(until, size) for size, until in s.ttt_short_chunks if target - a < until]
                end = at + (min(fitting)[1] if fitting else s.ttt_chunk_size)
            found[target] = (a if s.eval_context == "cache" else max(end - length, a) if s.ttt == "lora_docs" else
                             a + window_start(target - a, length, s.eval_stride or length))
    return found


def shown(chunks, kept):
    """(chunk, row, column, target, the tokens which its row has been shown by then); rows keep their text where `kept`."""
    rows, more, before = [], 0, 0
    for chunk in chunks:
        x, take, _, step = chunk.inputs
        if not step:
            assert more == 0, "rows were to go on"
            rows = [[] for _ in x]
        else:
            assert len(x) >= more > 0 and step == before + 1
        rows, before, more = [(row if kept else []) + new for row, new in zip(rows, x.tolist())], step, chunk.continuing
        for row, column in (chunk.index >= 0).nonzero().tolist():
            yield chunk, row, column, chunk.index[row, column].item(), rows[row][: len(rows[row]) - x.size(1) + take[row, column] + 1]
    assert more == 0, "rows were to go on"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", MODES)
@ref.tries(50)
@given(st.integers(0, 9999), st.integers(1, 90), st.integers(0, 5), st.integers(1, 4), st.sampled_from([(256, 32), (3, 2)]))
def test_the_reader_brings_every_target_once_with_the_text_that_the_settings_promise(mode, compiled, seed, targets, history, world, steps):
    s, unit = reading(mode, seed)
    stream = random_text(targets if by_document(s) else max(targets, s.eval_seq_len), seed=seed)  # no shorter stream is accepted
    ids, n = stream.tokens.tolist(), len(stream.bytes)
    rows = tg.document_ranges(stream).tolist() if by_document(s) else [[0, n]]
    origin = {target: a for a, b in rows for target in range(a, b)}
    with mock.patch.multiple(tg, CACHE_STEP=steps[0], CACHE_SEGMENT=steps[1]):
        parts = expected_parts(s, rows, unit)
        begin, members = expected_begin(s, rows, parts, unit), ref.Ranks(world).members
        readers = [tg.Reader(stream, s, member, unit, history, total_parts=3) for member in members]
        for member in members:
            member.compiled = compiled
        shapes = [reader.shapes() for reader in readers]
        read = [[part._replace(chunks=list(part.chunks)) for part in reader] for reader in readers]
    for member in read:
        assert [part.ranges.tolist() for part in member] == parts
        assert [(part.number, part.total) for part in member] == [(i, max(len(parts), 3)) for i in range(len(parts))]
    for of_ranks in zip(*read):
        scored = []
        for part in of_ranks:
            for chunk, row, column, target, text in shown(part.chunks, s.eval_context == "cache"):
                scored.append(target)
                assert text == ids[begin[target] : target + 1] and chunk.targets[row, column] == ids[target + 1]
                assert s.eval_context == "window" or len(text) >= min(s.eval_seq_len, target + 1 - origin[target])
                assert chunk.inputs.recent[row, column : column + history + 1].tolist() == [
                    ids[i] if i >= origin[target] else -1 for i in range(target - history, target + 1)]
        assert sorted(scored) == sorted(target for a, b in of_ranks[0].ranges.tolist() for target in range(a, b))
    batch = s.ttt_batch_size if s.ttt == "lora_docs" else s.eval_batch_seqs
    for reader, member, promised in zip(readers, read, shapes):
        chunks = [chunk for part in member for chunk in part.chunks]
        if compiled:  # a graph for every chunk, and none in vain
            turn_of = lambda chunk: None if chunk.inputs.turn is None else min(chunk.inputs.turn, 1)
            found = {(*chunk.inputs.ids.shape, chunk.targets.size(1), turn_of(chunk)) for chunk in chunks}
            assert len(promised) == len(found) and set(promised) == found
        for chunk in chunks:
            x, take, run, step = chunk.inputs
            assert x.dtype == chunk.targets.dtype == run.dtype == torch.int64 and len(x) <= batch and chunk.continuing <= len(x)
            assert take.shape == chunk.targets.shape == chunk.index.shape and run.shape[1] == history + take.shape[1]
            for row, live in enumerate((chunk.index >= 0).sum(1).tolist()):
                if live:  # nothing tells the end of a row: it begins anew, and shows nothing that comes later
                    text = x[row, : take[row, live - 1] + 1].tolist()
                    assert x[row].tolist() == list(itertools.islice(itertools.cycle(text), x.size(1)))
                    again = run[row, history + live :].tolist()
                    assert again == list(itertools.islice(itertools.cycle(text), len(again)))
        assert reader.forwarded == sum(chunk.inputs.ids.numel() for chunk in chunks)


def test_a_reader_can_be_read_again():
    """As by a self-test behind the score, with the same chunks in the same order."""
    for kind in scoring.HONEST:
        reader = tg.Reader(scoring.text(), settings(kind), ref.alone(), 24, 2)
        first, second = [[chunk for part in reader for chunk in part.chunks] for _ in range(2)]
        assert all(torch.equal(a.index, b.index) and torch.equal(a.inputs.ids, b.inputs.ids) for a, b in zip(first, second, strict=True))


def test_windows_of_documents_are_scored_with_those_of_about_their_length():
    """A text of which the model has to forward hardly more than there is."""
    stream = stream_of([token for length in range(3, 65) for token in [1, *[5] * length]])
    reader = tg.Reader(stream, replace(BASE, eval_seq_len=64, eval_docs=True, eval_batch_seqs=4), ref.alone())
    widths = {chunk.inputs.ids.size(1) for part in reader for chunk in part.chunks}
    assert widths == {16, 32, 48, 64} and reader.forwarded < 1.3 * len(stream.bytes)


# --- the score -------------------------------------------------------------------------------------------------------


@ref.tries(20)
@given(st.integers(0, 40), st.integers(0, 8), st.booleans(), st.integers(0, 999))
def test_the_score_is_that_of_a_brute_force_scorer(more, stride, docs, seed):
    """Every target on its own: the float64 model over its window, one forward each."""
    s = replace(BASE, eval_stride=stride, eval_docs=docs)
    stream = random_text(8 + more, seed=seed)
    parameters, ids, nats = ref.arrays(model_of(s)), stream.tokens.tolist(), []
    for a, b in tg.document_ranges(stream).tolist() if docs else [[0, 8 + more]]:
        for target in range(a, b):
            start = a + window_start(target - a, 8, stride or 8)
            logits = ref.forward(parameters, s, ids[start : min(start + 8, b)])[1]
            nats.append(ref.nats(logits[target - start], ids[target + 1]))
    found, result, reasons = coded(s, stream)
    assert reasons == [] and np.allclose(found, nats, rtol=1e-5, atol=1e-5)
    assert (result.tokens, result.bytes) == (8 + more, sum(stream.bytes.tolist()))
    assert result.loss == pytest.approx(np.mean(nats), rel=1e-6)
    assert result.bpb == pytest.approx(sum(nats) / math.log(2) / max(sum(stream.bytes.tolist()), 1), rel=1e-6)


@ref.tries(40)
@given(ref.models(eval_context="cache", eval_seq_len=5, eval_stride=0), st.integers(5, 40), st.booleans(), st.sampled_from([0, 0, 11, 16]),
       st.sampled_from([(256, 32), (2, 2)]), st.integers(0, 999))
def test_with_kept_keys_every_token_sees_the_window_up_to_itself_in_every_layer(s, targets, docs, unit, steps, seed):
    """The float64 model over each document, or over each segment of the stream and the window before it, with attention
    confined to a band.
    """
    s, stream = replace(s, eval_docs=docs), random_text(targets, s.vocab_size, seed)
    model, ids, found = ref.double(s, seed), stream.tokens.tolist(), torch.zeros(targets, dtype=torch.float64)
    rows = tg.document_ranges(stream).tolist() if docs else [[0, targets]]
    with mock.patch.multiple(tg, CACHE_STEP=steps[0], CACHE_SEGMENT=steps[1]):
        predictor, validity = tg.ModelPredictor(model, ref.alone(), kept_tokens=5), tg.Validity()
        tg.score(predictor, tg.Reader(stream, s, ref.alone(), unit), stream, ref.alone(), validity, nats=found)
        begin = expected_begin(s, rows, expected_parts(s, rows, unit), unit)
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = {}
    for first in sorted(set(begin.values()) | {0}):
        some = [target for target in begin if begin[target] == first]
        text = ids[first : max(some, default=first) + 1]
        logits = ref.forward(parameters, s, text, band=5)[1] if some else []
        expected |= {target: ref.nats(logits[target - first], ids[target + 1]) for target in some}
    assert validity.reasons == [] and np.allclose(found, [expected[target] for target in range(targets)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", scoring.HONEST)
def test_the_score_does_not_depend_on_batch_or_ranks(kind):
    """Ranks that reduce among themselves, one thread each: the same nats and the same clean record on every one."""
    stream, plain = scoring.text(), coded(settings(), scoring.text())[0]
    nats, one, reasons = coded(settings(kind), stream)
    assert reasons == [] and (kind == "windows" or (nats - plain).abs().max() > 0.5)
    for batch, documents, world in ((1, 5, 1), (7, 1, 2), (2, 3, 3)):
        s = settings(kind, eval_batch_seqs=batch, ttt_batch_size=documents, micro_batch_tokens=8)
        for others, result, reasons in ref.Ranks(world).together(lambda rt: coded(s, stream, rt)):
            assert reasons == [] and result[2:] == one[2:] and (others - nats).abs().max() < 1e-3, (batch, documents, world)
            assert result.loss == pytest.approx(one.loss, rel=1e-5) and result.bpb == pytest.approx(one.bpb, rel=1e-5)


def test_contiguous_equals_a_stride_of_the_length():
    stream = random_text(45)
    predictor = tg.ModelPredictor(model_of(BASE), ref.alone())
    assert scored(predictor, stream, 8, 0) == scored(predictor, stream, 8, 8)


@pytest.mark.parametrize("kind", scoring.HONEST)
def test_a_contiguous_report_reads_windows_side_by_side_whatever_the_score_does(kind):
    """However a run scores, it reports on windows that do not overlap and forwards every token once."""
    stream, s = random_text(45), settings(kind, eval_batch_seqs=3)
    reader = tg.contiguous_reader(stream, s, ref.alone())
    chunks = [chunk for part in reader for chunk in part.chunks]
    firsts = sorted(row[0] for chunk in chunks for row in chunk.index.tolist())
    assert firsts == [0, 8, 16, 24, 32, 40] and reader.forwarded == 48
    assert all(chunk.inputs.places.tolist() == len(chunk.index) * [[*range(8)]] for chunk in chunks)
    predictor = tg.ModelPredictor(model_of(BASE), ref.alone())
    reported = tg.score(predictor, reader, stream, ref.alone(), tg.Validity())
    assert reported == scored(predictor, stream, 8, 0)[0]


def test_more_context_lowers_the_loss_of_a_model_that_uses_it():
    """Windows that overlap by four or two positions or not at all; a text of period five, a model that copies."""

    class Copy(tg.Predictor):
        """Knows what comes after four inputs, and nothing before."""

        def predict(self, inputs, count=None):
            logits = torch.zeros(*inputs.ids.shape, 32)
            logits[:, 4:].scatter_(-1, inputs.ids[:, : inputs.ids.size(1) - 4, None], 5.0)
            return logits.log_softmax(-1).take_along_dim(inputs.places[..., None], 1)[:, :count]

    stream = stream_of([3, 1, 4, 15, 9] * 12)
    losses = [scored(Copy(), stream, 8, stride)[0].loss for stride in (4, 6, 0)]
    assert losses[0] < losses[1] < losses[2]


def test_the_score_of_windows_that_are_padded_to_one_shape_is_the_same():
    for kind in ("windows", "sliding", "documents", "cache", "documents by cache", "lora_docs by cache", "warm start", "all"):
        rt, stream = ref.alone(), scoring.text(targets=90)
        rt.compiled = True
        (padded, result, reasons), (plain, *_) = coded(settings(kind, eval_batch_seqs=4), stream, rt), coded(settings(kind, eval_batch_seqs=4), stream)
        assert reasons == [] and result.tokens == 90 and (padded - plain).abs().max() < 1e-3, kind  # other batches are rounded in another order


@pytest.mark.parametrize("kind, changes", [
    ("documents", {}), ("cache", dict(doc_mask="attention")), ("lora_docs by cache", dict(ttt_short_chunks=((3, 4),), ttt_chunk_size=5)),
    ("lora_docs", dict(ttt_chunk_size=5)), ("all", {})], ids=lambda value: value if isinstance(value, str) else "")
def test_every_graph_of_a_scoring_is_compiled_before_it(kind, changes):
    """And learning among it; a graph more would end the run here, and costs seconds of the evaluation elsewhere."""
    torch._dynamo.reset()
    rt, stream, s = ref.alone(), scoring.text(), settings(kind, num_layers=1, ve_layers=(0,), **changes)
    rt.compiled, rt.compile = True, lambda function: torch.compile(function, backend="eager", dynamic=False, fullgraph=True)
    predictor, nats = tg.make_predictor(model_of(s), s, rt, 100), torch.zeros(100, dtype=torch.float64)
    reader = tg.reader_for(predictor, stream, s, rt)
    run = SimpleNamespace(s=replace(s, vocab_size=5000), rt=rt, log=mock.Mock())  # the artifact's is what counts
    with torch._dynamo.config.patch(recompile_limit=64):
        tg.warm_up_scoring(run, predictor, reader)
        with torch._dynamo.config.patch(error_on_recompile=True):
            tg.score(predictor, reader, stream, rt, tg.Validity(), nats=nats)
    assert (nats - coded(s, stream)[0]).abs().max() < 1e-3


class Flat(tg.Predictor):
    """Every token of `vocab` is as likely; overrides only predict()."""

    def __init__(self, vocab=32):
        self.vocab = vocab

    def predict(self, inputs, count=None):
        return torch.full((*inputs.places[:, :count].shape, self.vocab), -math.log(self.vocab))


def test_sums_are_float64():
    """Ten thousand float32 values of which adding to a float32 sum would lose the last digits."""

    class Constant(Flat):
        def nll(self, inputs, targets):
            return torch.full(targets.shape, math.log(8))

    stream = tg.ValStream(torch.zeros(100_001, dtype=torch.int32), torch.ones(100_000, dtype=torch.int16), True)
    result, reasons = scored(Constant(8), stream, 10, batch=100)
    assert reasons == [] and result.loss == pytest.approx(float(np.float32(math.log(8))), rel=1e-12)
    assert result.bpb == pytest.approx(result.loss / math.log(2), rel=1e-12)


def test_bytes_do_not_overflow_their_small_type():
    stream = tg.ValStream(torch.zeros(10_001, dtype=torch.int32), torch.full((10_000,), 1000, dtype=torch.int16), True)
    assert scored(Flat(), stream, 100, batch=100)[0].bytes == 10_000_000


def test_what_each_target_cost_and_the_distribution_at_some_of_them_can_be_had():
    """On every rank, whichever scored them."""
    s, stream, n = settings("documents"), scoring.text(), 100

    def work(rt):
        nats, distributions = torch.zeros(n, dtype=torch.float64), {target: torch.zeros(32, dtype=torch.float64) for target in (0, 29, 77)}
        predictor = tg.make_predictor(model_of(s), s, rt, n)
        result = tg.score(predictor, tg.Reader(stream, s, rt), stream, rt, tg.Validity(), nats=nats, distributions=distributions)
        return result.loss, nats, distributions

    for loss, nats, distributions in [work(ref.alone()), *ref.Ranks(3).together(work)]:
        assert loss == pytest.approx(nats.mean().item(), rel=1e-9)
        for target, p in distributions.items():
            assert p.sum().item() == pytest.approx(1, abs=1e-5) and len(p.unique()) > 20
            assert -p[stream.tokens[target + 1]].log().item() == pytest.approx(nats[target].item(), rel=1e-4)


# --- predictors ------------------------------------------------------------------------------------------------------


def test_a_predictor_needs_only_predict():
    result, reasons = scored(Flat(), random_text(50), 8, 3)
    assert reasons == [] and result.loss == pytest.approx(math.log(32), rel=1e-6)
    with pytest.raises(NotImplementedError):
        scored(tg.Predictor(), random_text(50), 8)


class Watched(tg.WrappingPredictor):
    """Looks at every chunk whether the short way says what the distributions say, and whether they are such."""

    def __init__(self, base, s, rt):
        super().__init__(base, s, rt)
        self.learns, self.history, self.worst = base.learns, base.history, 0.0

    def predict(self, inputs, count=None):
        return self.base.predict(inputs, count)

    def nll(self, inputs, targets):
        said, first = self.base.predict(inputs), self.base.predict(inputs, 2)
        nll = self.base.nll(inputs, targets)
        same = targets[:, :-1] == inputs.recent[:, self.history + 1 :]  # up to the end of the row
        live = torch.cat((torch.ones(len(same), 1, dtype=torch.bool), same.cumprod(1).bool()), 1)
        errors = [(said.gather(-1, targets[..., None]).squeeze(-1) + nll)[live], said.double().logsumexp(-1)[live], (said[:, :2] - first)[live[:, :2]]]
        self.worst = max([self.worst, *(error.abs().max().item() for error in errors if len(error))])
        assert said.shape == (*targets.shape, 32) and not said.requires_grad and not nll.requires_grad
        return nll


@pytest.mark.parametrize("kind", scoring.HONEST)
def test_the_fused_nll_is_what_predict_says(kind):
    watched = []

    def make(stream, rt):
        s = settings(kind)
        watched.append(Watched(tg.make_predictor(model_of(s), s, rt, len(stream.bytes), s.eval_temperature), s, rt))
        return watched[0]

    nats, _, reasons = coded(settings(kind), scoring.text(), make=make)
    assert reasons == [] and watched[0].worst < 1e-4
    assert (nats - coded(settings(kind), scoring.text(), check_every=0)[0]).abs().max() < 1e-6, "looking changed the score"


@pytest.mark.parametrize("kind", [*scoring.HONEST, *scoring.INVALID])
def test_a_predictor_that_is_reset_has_forgotten_everything(kind):
    """Half a text, then all of it, and all of it again: the bits of one that is new."""
    s, stream, rt = settings(kind), scoring.text(), ref.alone()
    predictor, first = tg.make_predictor(model_of(s), s, rt, 100, s.eval_temperature), coded(s, stream)[0]
    for text in (stream_of(stream.tokens[:50]), stream, stream):
        nats = torch.zeros(len(text.bytes), dtype=torch.float64)
        tg.score(predictor, tg.reader_for(predictor, text, s, rt), text, rt, tg.Validity(), nats=nats)
        predictor.reset()
    assert torch.equal(nats, first)


def test_an_invalid_mixture_says_that_what_it_sums_to_is_not_1():
    for kind in scoring.INVALID:
        s = settings(kind)
        assert coded(s, scoring.text())[2] and tg.make_predictor(model_of(s), s, ref.alone(), 100).invalid_reason.startswith("C2 normalisation")


@pytest.mark.parametrize("changes", [dict(), dict(tie_embeddings=False), dict(embed_dim=6)], ids=str)
def test_the_head_of_a_score_is_float32_whatever_the_activations_are(changes):
    """Logits of bfloat16 would be off by hundredths. So is the head of what test-time training lowers."""
    s = replace(BASE, **changes)
    model = ref.randomise(tg.GPT(s, dtype=torch.bfloat16), seed=1, spread=0.4)
    ids = ref.tokens(32, 2, 9)
    x, y = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        hidden = model.hidden(x)
        assert hidden.dtype == torch.bfloat16
        narrow = hidden.double()
        if model.head_proj is not None:
            narrow = narrow @ model.head_proj.weight.double().T
        head = (model.embed if model.head is None else model.head).weight.double()
        want = (30 * torch.tanh(narrow @ head.T / 30)).log_softmax(-1)
    take = torch.arange(8).expand(2, 8)
    said = tg.ModelPredictor(model, ref.alone()).predict(tg.Inputs(x, take, x))
    torch.testing.assert_close(said.double(), want, rtol=1e-5, atol=1e-5)
    adaptation = tg.adaptation_of_weights(model, settings("full"), ref.alone())
    loss = adaptation._weighted_loss(x, y, torch.full(y.shape, 1 / 16), None)
    assert loss.item() == pytest.approx(-want.gather(-1, y[..., None]).mean().item(), rel=1e-5)


def test_the_temperature_divides_the_logits():
    s, stream = BASE, random_text(8)
    logits = ref.forward(ref.arrays(model_of(s)), s, stream.tokens[:-1].tolist())[1]
    for kind, temperature in (("windows", 1.0), ("temperature", 1.7)):
        nats = coded(settings(kind), stream)[0]
        assert np.allclose(nats, [ref.nats(row / temperature, token) for row, token in zip(logits, stream.tokens[1:].tolist())], rtol=1e-5)


def test_learning_comes_after_scoring_and_is_legal():
    """An adaptive unigram that learns each part when it is scored, as the definition says."""

    class Counts(tg.Predictor):
        learns = True

        def __init__(self):
            self.counts, self.calls = torch.ones(32), []

        def predict(self, inputs, count=None):
            self.calls.append("predict")
            return (self.counts / self.counts.sum()).log().expand(*inputs.places[:, :count].shape, 32)

        def observe(self, chunk):
            self.calls.append("observe")

        def learn(self, part, stream):
            self.calls.append("learn")
            for a, b in part.ranges.tolist():
                self.counts = self.counts + torch.bincount(stream.tokens[a + 1 : b + 1].long(), minlength=32)

    stream, predictor = random_text(70), Counts()
    result, reasons = scored(predictor, stream, 8, batch=2, unit=24, check_every=0)
    assert reasons == [] and predictor.calls == 2 * (2 * ["predict", "observe"] + ["learn"]) + 2 * ["predict", "observe"] + ["learn"]
    counts, nats, ids = np.ones(32), 0.0, stream.tokens.tolist()
    for a, b in ((0, 24), (24, 48), (48, 70)):
        nats -= sum(math.log(counts[i] / counts.sum()) for i in ids[a + 1 : b + 1])
        counts += np.bincount(ids[a + 1 : b + 1], minlength=32)
    assert result.loss == pytest.approx(nats / 70, rel=1e-6)


def test_nothing_learns_from_a_part_that_is_not_whole_yet():
    """Whatever the ranks' shares are, each learns a part once all of it is scored, and all learn the same."""
    events = []

    class Listener(Flat):
        learns = True

        def __init__(self, rt):
            super().__init__()
            self.rt = rt

        def observe(self, chunk):
            events.append((chunk.index[chunk.index >= 0].tolist(), None))

        def learn(self, part, stream):
            events.append((None, part.ranges.tolist()))
            self.rt.sum(torch.zeros(1))  # nobody goes on before all are here

    stream = random_text(60)
    work = lambda rt: scored(Listener(rt), stream, 8, 3, 2, rt, unit=16)
    assert all(reasons == [] for _, reasons in ref.Ranks(3).together(work))
    seen, learnt = set(), []
    for targets, ranges in events:
        if targets is not None:
            assert not seen & set(targets)
            seen |= set(targets)
        else:
            assert all(target in seen for a, b in ranges for target in range(a, b))
            learnt += ranges
    assert len(seen) == 60 and len(learnt) == 3 * len({tuple(one) for one in learnt})


# --- scorers that do not add up must be found out ---------------------------------------------------------------------


class Broken(Flat):
    """`shift` is added to every log-probability; a `bonus` is what only the fused way gives."""

    def __init__(self, shift=0.0, bonus=0.0, nan_in=None):
        super().__init__()
        self.shift, self.bonus, self.nan_in = shift, bonus, nan_in

    def predict(self, inputs, count=None):
        out = super().predict(inputs, count) + self.shift
        if self.nan_in == "predict":
            out[0, -1, 3] = math.nan
        return out

    def nll(self, inputs, targets):
        if self.nan_in == "predict":
            return torch.full(targets.shape, math.log(32))
        out = super().nll(inputs, targets) - self.bonus
        if self.nan_in == "nll":
            out[0, 0] = math.nan
        return out


def test_distributions_that_do_not_sum_to_one_are_c2():
    for shift in (1e-4, -1e-4, 3.0):
        _, reasons = scored(Broken(shift=shift), random_text(50), 8)
        assert len(reasons) == 1 and reasons[0].startswith("C2 normalisation")
    assert scored(Broken(shift=1e-5), random_text(50), 8)[1] == []


def test_a_fused_path_that_knows_better_than_its_distribution_is_c2():
    _, reasons = scored(Broken(bonus=0.5), random_text(50), 8)
    assert len(reasons) == 1 and reasons[0].startswith("C2 normalisation")


def test_a_bonus_for_the_right_token_in_a_later_chunk_or_row_is_c2():
    class Sometimes(Broken):
        def __init__(self, chunk, row):
            super().__init__()
            self.chunk, self.row, self.count = chunk, row, -1

        def nll(self, inputs, targets):
            self.count += 1
            out = super().nll(inputs, targets)
            if self.count == self.chunk:
                out[self.row] += 3.0
            return out

    assert scored(Sometimes(0, 0), random_text(200), 8, batch=4, check_every=1)[1] != []
    assert scored(Sometimes(5, 0), random_text(200), 8, batch=4, check_every=1)[1] != []
    assert scored(Sometimes(192, 3), random_text(9000), 8, batch=4, check_every=1)[1] != []


def test_nobody_knows_which_chunks_and_places_will_be_looked_at():
    """About 2 ln n + n / 64 of n chunks, others in each run, the first among them; and in them every place at times."""

    class Asked(Flat):
        def __init__(self):
            super().__init__()
            self.chunk, self.chunks, self.places = 0, set(), set()

        def predict(self, inputs, count=None):
            if count is not None:  # else for the nats
                self.chunks.add(self.chunk)
                self.places |= set(inputs.places[:, :count].flatten().tolist())
            return super().predict(inputs, count)

        def observe(self, chunk):
            self.chunk += 1

    runs = []
    for _ in range(3):
        runs.append(Asked())
        assert scored(runs[-1], random_text(8 * 1000), 8, batch=4)[1] == []
        assert runs[-1].chunk == 250 and 0 in runs[-1].chunks and 4 < len(runs[-1].chunks) < 40
        assert runs[-1].places == set(range(8))
    assert len({frozenset(run.chunks) for run in runs}) == 3


@pytest.mark.parametrize("place", [0, 8, 20, 63])
def test_a_nll_that_is_wrong_at_a_late_place_of_a_row_is_c2(place):
    """Not only in the first ones; half as likely as it is said to be, too."""

    class Late(Flat):
        wrong = 0.0

        def nll(self, inputs, targets):
            return super().nll(inputs, targets) - self.wrong * (torch.arange(targets.size(1)) >= place)

    for wrong in (1.0, -math.log(2)):
        late = Late()
        late.wrong = wrong
        reasons = scored(late, random_text(64 * 200), 64, batch=8, check_every=1)[1]
        assert [reason.partition(":")[0] for reason in reasons] == ["C2 normalisation"]


def test_nats_below_zero_are_c2_wherever_one_is():
    """At one place of one chunk that nothing else looks at."""

    class Once(Flat):
        def nll(self, inputs, targets):
            out = super().nll(inputs, targets)
            self.count = getattr(self, "count", -1) + 1
            out[1, 5] -= (self.count == 7) * (math.log(32) + 0.01)
            return out

    reasons = scored(Once(), random_text(400), 8, batch=4, check_every=0)[1]
    assert len(reasons) == 1 and reasons[0].startswith("C2 normalisation: nats of -1.0e-02")


def test_a_prediction_that_later_tokens_of_its_row_change_is_c1():
    """Only in long rows, or only at the end of a document, where the row is not full; the nats agree with it."""

    class Long(Flat):
        def predict(self, inputs, count=None):
            said = super().predict(inputs, count)
            odd = inputs.ids[:, -1:, None] % 2 * (torch.arange(32) < 16)
            return said if inputs.ids.size(1) <= 128 else (said + 1e-3 * odd).log_softmax(-1)

    class End(Flat):
        """Says BOS where the text begins anew behind the place: what the tail of a row holds."""

        def predict(self, inputs, count=None):
            x = torch.cat((inputs.ids, inputs.ids[:, :1]), 1)
            ends = x.gather(1, inputs.places[:, :count] + 1) == x[:, :1]
            return (super().predict(inputs, count) + 3.0 * ends[..., None] * (torch.arange(32) == 1)).log_softmax(-1)

    for predictor, length, docs, text in ((Long(), 129, False, random_text(129 * 48)), (End(), 64, True, random_text(3000, bos=0.05))):
        reasons = scored(predictor, text, length, batch=4, check_every=1, docs=docs)[1]
        assert [reason.partition(":")[0] for reason in reasons] == ["C1 causality"], type(predictor)
    assert scored(Long(), random_text(128 * 8), 128, batch=4, check_every=1)[1] == []


def test_targets_that_are_not_those_of_the_text_are_c4():
    """Easy ones in their place, or another text before them."""
    stream = random_text(50)
    chunks = list(next(iter(tg.Reader(stream, BASE, ref.alone()))).chunks)
    for change in (lambda chunk: chunk._replace(targets=torch.full_like(chunk.targets, 3)),
                   lambda chunk: chunk._replace(inputs=chunk.inputs._replace(ids=chunk.inputs.ids + 1))):
        validity = tg.Validity()
        part = tg.Part(0, 1, np.array([[0, 50]]), [*chunks[:1], change(chunks[1]), *chunks[2:]])
        tg.score(Flat(), [part], stream, ref.alone(), validity)
        assert [reason.partition(":")[0] for reason in validity.reasons] == ["C4 coverage"]


def test_what_learns_can_neither_change_what_is_scored_nor_see_what_comes():
    class Forger(Flat):
        learns, told = True, []

        def learn(self, part, stream):
            self.told.append((stream.tokens.clone(), stream.bytes.clone()))
            stream.tokens.fill_(3), stream.bytes.fill_(100)

    stream, validity = random_text(50), tg.Validity()
    before = stream.tokens.clone(), stream.bytes.clone()
    result = tg.score(Forger(), tg.Reader(stream, BASE, ref.alone(), 16), stream, ref.alone(), validity)
    assert validity.reasons == [] and result.bytes == before[1].sum()
    assert torch.equal(stream.tokens, before[0]) and torch.equal(stream.bytes, before[1])
    (tokens, counted), *_ = Forger.told
    assert torch.equal(tokens[:17], before[0][:17]) and not tokens[17:].any()
    assert torch.equal(counted[:16], before[1][:16]) and not counted[16:].any()


@pytest.mark.parametrize("where", ["nll", "predict"])
def test_nan_is_not_valid_wherever_it_comes_from(where):
    with mock.patch.object(tg, "Examiner", scoring.Thorough):
        assert scored(Broken(nan_in=where), random_text(50), 8)[1] != []


@pytest.mark.parametrize("bonus", [math.nan, math.inf, -math.inf])
def test_nats_that_are_no_numbers_are_not_valid_where_nobody_looked(bonus):
    """Only some distributions are looked at. The sum is of all nats."""
    result, reasons = scored(Broken(bonus=bonus), random_text(50), 8, check_every=0)
    below = ["C2 normalisation: nats of -inf, which are below 0"] * (bonus == math.inf)
    assert reasons == [*below, "the score is not finite"] and not math.isfinite(result.bpb)


def test_infinite_nats_are_not_valid():
    class Certain(Flat):
        def predict(self, inputs, count=None):
            out = torch.full((*inputs.places[:, :count].shape, 32), -math.inf)
            out[..., 0] = 0.0
            return out

    result, reasons = scored(Certain(), random_text(50), 8)
    assert reasons != [] and not math.isfinite(result.loss)


@pytest.mark.parametrize("change", [
    lambda parts: parts[:-1], lambda parts: parts[1:], lambda parts: parts + parts[:1],
    lambda parts: parts + parts[-1:] * 2, lambda parts: [],
    lambda parts: parts[:1] + [parts[1]._replace(index=parts[1].index + 1)] + parts[2:],
    lambda parts: parts + [parts[0]] * 255,
    lambda parts: parts + [parts[0]] * 256, lambda parts: [part for part in parts for _ in range(257)],
    lambda parts: [part._replace(index=part.index.where(part.index % 8 == 7, -1)) for part in parts],
    lambda parts: parts[:1] * 257 + parts[1:],
], ids=["last missing", "first missing", "one twice", "last three times", "nothing", "shifted", "256 times",
        "257 times", "all 257 times", "only the last",
        "first 257 times"])
def test_targets_scored_twice_or_never_are_c4(change):
    stream, validity = random_text(50), tg.Validity()
    part, = tg.Reader(stream, BASE, ref.alone())
    chunks = change(list(part.chunks))
    tg.score(Flat(), [part._replace(chunks=chunks)], stream, ref.alone(), validity)
    assert any(reason.startswith("C4 coverage") for reason in validity.reasons)


def test_one_rank_that_repeats_another_is_c4_on_every_rank():
    stream = random_text(50)

    def work(rt):
        validity = tg.Validity()
        tg.score(Flat(), tg.Reader(stream, BASE, ref.alone()), stream, rt, validity)
        return validity.reasons

    assert all(any(reason.startswith("C4 coverage") for reason in reasons) for reasons in ref.Ranks(2).together(work))


def test_a_cheat_on_one_rank_is_known_on_all():
    stream = random_text(50)
    results = ref.Ranks(3).together(lambda rt: scored(Broken(shift=0.1 * (rt.rank == 2)), stream, 8, 0, 2, rt))
    assert all(any(reason.startswith("C2 normalisation") for reason in reasons) for _, reasons in results)


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
    assert tg.prove_bytes(sp, val, ref.alone())[:3] == (20, 0, 1.0)


def test_tampering_with_any_entry_of_the_byte_table_is_seen(proven):
    """One more byte for every occurrence of a token: an ordinary one, a byte piece, and the beginning of a document."""
    sp, val = proven
    used = sorted(set(val.tokens[1:].tolist()))
    chosen = [ref.BOS, *[t for t in used if sp.is_byte(t)][:2], *[t for t in used if not sp.is_byte(t) and t > 3][:5]]
    assert len(chosen) == 8
    for token in chosen:
        for change in (1, -1):
            counted = val.bytes + change * (val.tokens[1:] == token).to(torch.int16)
            _, wrong, *_ = tg.prove_bytes(sp, val._replace(bytes=counted), ref.alone())
            assert wrong > 0, (token, sp.id_to_piece(token), change)


def test_a_single_wrong_target_is_seen_and_the_tail_counts_when_it_is_whole(proven):
    sp, val = proven
    last = val.bytes.clone()
    last[-1] += 1
    assert tg.prove_bytes(sp, val._replace(bytes=last), ref.alone())[:3] == (20, 1, 1.0)
    middle = val.bytes.clone()
    middle[1000] += 1
    assert tg.prove_bytes(sp, val._replace(bytes=middle), ref.alone())[:3] == (20, 1, 1.0)


def test_a_text_that_is_cut_anywhere_is_proven_to_its_last_byte(proven):
    """By VAL_TOKENS, in the middle of a character, too; or with a beginning that is no document's."""
    sp, val = proven
    pieces = [i for i, token in enumerate(val.tokens.tolist()) if sp.is_byte(token)]
    assert pieces
    for size in (3, 700, *(pieces[0] + i for i in range(-2, 5))):
        cut = tg.ValStream(val.tokens[: size + 1], val.bytes[:size], False)
        assert tg.prove_bytes(sp, cut, ref.alone())[1:3] == (0, 1.0), size
        more = cut.bytes.clone()
        more[-1] += 1
        assert tg.prove_bytes(sp, cut._replace(bytes=more), ref.alone())[1:3] == (1, 1.0), size
    for begin in (1, 2, 40):
        rest = tg.ValStream(val.tokens[begin:], val.bytes[begin:], True)
        assert tg.prove_bytes(sp, rest, ref.alone())[:3] == (20, 0, 1.0)


def test_all_of_a_long_text_is_proven_by_all_ranks(proven):
    """A wrong byte far behind, which a rank finds that is not the first: the same numbers on any number of ranks."""
    sp, val = proven
    tokens, counted = torch.cat([val.tokens[:1], *[val.tokens[1:]] * 30]), val.bytes.repeat(30)
    for wrong in ((), (len(counted) - 20,), (len(counted) // 2, 10)):
        changed = counted.clone()
        changed[list(wrong)] *= 3
        changed[list(wrong)] += 1
        expected = (20 + 29 * 19, len(wrong), 1.0)
        for world in (1, 3):
            stream = tg.ValStream(tokens, changed, True)
            assert ref.Ranks(world).together(lambda rt: tg.prove_bytes(sp, stream, rt)[:3]) == world * [expected]


def test_empty_documents_and_a_single_document_are_proven(proven):
    sp, _ = proven
    for ids in ([1, 1, 1, *sp.encode("ta ko"), 1], [1, *sp.encode("ta ko, mi")], [1, 1]):
        counted = torch.from_numpy(tg.target_bytes(ids, tg.byte_tables(sp, 512)))
        stream = tg.ValStream(torch.tensor(ids, dtype=torch.int32), counted, True)
        assert tg.prove_bytes(sp, stream, ref.alone())[:3] == (ids.count(1), 0, 1.0)
