"""The training stream under every LOADER: which targets, in which order, on any ranks, from any position."""

import math
import re
import time
from functools import partial

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from toy import write_shard

import train_gpt as tg

LOADERS = ("sequential", "coprime", "shuffled", "packed")
BLOCKS = ("coprime", "shuffled")  # whole blocks in another order


def numbered(*sizes, first=2):
    """Shards in which every token names its place."""
    ends = first + np.cumsum([0, *sizes])
    return [range(a, b) for a, b in zip(ends, ends[1:])]


def write(folder, shards):
    for old in folder.glob("*.bin"):
        old.unlink()
    for i, shard in enumerate(shards):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", shard)
    return tg.find_shards(folder, "train")


def settings(loader, **changes):
    """Small settings of a loader; length and batch default to 4 and 16."""
    stages = changes.pop("stages", None)  # [(length, tokens)], evenly over the run
    if stages:
        ends = [(i + 1) / len(stages) for i in range(len(stages))]
        changes |= {name: tuple(f"{stage[i]}@{end}" for stage, end in zip(stages, ends))
                    for i, name in enumerate(("train_seq_schedule", "train_batch_schedule"))}
    shape = dict(train_seq_len=4, train_batch_tokens=16, eval_seq_len=2, eval_stride=1, micro_batch_tokens=10**6)
    masked = dict(doc_mask="attention") if loader == "packed" else {}
    return ref.small(vocab_size=65536, loader=loader, **{**shape, **masked, **changes})


def stream_of(paths, s, rank=0, world=1, documents=None):
    return tg.TokenStream(paths, s, ref.Ranks(world).members[rank], documents)


def flat(batch):
    """A batch as rows of inputs and rows of targets, whatever its micro-batches."""
    return [torch.cat([micro[side].flatten() for micro in batch]).tolist() for side in (0, 1)]


def windows_of(batch, length):
    """[(first input, last target)] of the training sequences in a batch of numbered tokens."""
    x, y = flat(batch)
    rows = [(x[i : i + length], y[i : i + length]) for i in range(0, len(x), length)]
    for a, b in rows:
        assert a == list(range(a[0], a[0] + length)) and b == list(range(a[0] + 1, a[0] + 1 + length))
    return [(a[0], b[-1]) for a, b in rows]


def epoch_of(stream, length, tokens, blocks):
    """The training sequences of the epoch that begins at the stream's position; batches must divide it."""
    rows = []
    while len(rows) < blocks:
        rows += windows_of(stream.next(length, tokens), length)
    assert len(rows) == blocks
    return rows


@st.composite
def cases(draw, loaders=LOADERS):
    """(loader, shard sizes, world, stages, further settings) of a stream that holds enough."""
    loader, world = draw(st.sampled_from(loaders)), draw(st.integers(1, 3))
    unit = draw(st.integers(2, 4))
    lengths = [unit * draw(st.sampled_from([1, 2, 4])) for _ in range(draw(st.integers(1, 3)))]
    sizes = draw(st.lists(st.integers(1, 70), min_size=1, max_size=6))
    if max(sizes) <= max(lengths):
        sizes[draw(st.integers(0, len(sizes) - 1))] = max(lengths) + draw(st.integers(1, 20))
    stages = [(length, length * world * draw(st.integers(1, 4))) for length in lengths]
    more = dict(seed=draw(st.integers(0, 3)), micro_batch_tokens=draw(st.integers(max(lengths), 8 * max(lengths))))
    return loader, sizes, world, stages, more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


# --- every loader ----------------------------------------------------------------------------------------------------


@ref.tries(100)
@given(cases(), st.data())
def test_ranks_together_see_the_batches_of_one(folder, case, data):
    loader, sizes, world, stages, more = case
    paths, s = write(folder, numbered(*sizes)), settings(loader, stages=stages, **more)
    try:
        ranks = [stream_of(paths, s, rank, world) for rank in range(world)]
    except tg.BadInput as error:  # a row of documents would have to be another one for this many ranks
        assert loader == "packed" and f"{world} ranks" in str(error)
        assume(len(stages) == 1)  # what fits one stage need not fit another
        s = settings(loader, stages=stages, **{**more, "micro_batch_tokens": stages[0][1] // world})
        ranks = [stream_of(paths, s, rank, world) for rank in range(world)]
    one = stream_of(paths, s)
    for stage in data.draw(st.lists(st.integers(0, len(stages) - 1), min_size=1, max_size=6)):
        length, tokens = stages[stage]
        parts, whole = [stream.next(length, tokens) for stream in ranks], flat(one.next(length, tokens))
        assert [sum((flat(part)[side] for part in parts), []) for side in (0, 1)] == whole
        assert len(whole[0]) == tokens and len({stream.position for stream in (one, *ranks)}) == 1
        for part in parts:
            shapes = {side.shape for x, y, _ in part for side in (x, y)}
            (shape,) = shapes  # one graph
            assert shape.numel() <= s.micro_batch_tokens and shape.numel() % length == 0
            assert shape[0] == 1 if loader == "packed" else shape[1] == length
            assert shape.numel() * len(part) * world == tokens
            shared = tokens // length // (1 if loader == "packed" else world)  # packed: the rows of any ranks
            more_rows = [n for n in range(shape.numel() // length + 1, shared + 1)
                         if shared % n == 0 and n * length <= s.micro_batch_tokens]
            assert not more_rows, "as large as the limit allows"


@ref.tries(100)
@given(cases(), st.data())
def test_the_position_is_the_whole_state(folder, case, data):
    """In the middle of an epoch and across its end, whether the thread has read ahead, is reading, or has not begun."""
    loader, sizes, _, stages, more = case
    paths, s = write(folder, numbered(*sizes)), settings(loader, stages=stages, **more)
    calls = data.draw(st.lists(st.integers(0, len(stages) - 1), min_size=2, max_size=12))
    cut = data.draw(st.integers(1, len(calls) - 1))
    whole, fresh, busy, ahead = (stream_of(paths, s) for _ in range(4))
    for stage in calls[:cut]:
        whole.next(*stages[stage])
    for stream in (busy, ahead):
        stream.next(*stages[calls[0]])
    time.sleep(1e-3)
    busy.next(*stages[calls[0]])
    for stream in (fresh, busy, ahead):
        stream.position = whole.position
    for stage in calls[cut:]:
        expected = flat(whole.next(*stages[stage]))
        assert all(flat(stream.next(*stages[stage])) == expected for stream in (fresh, busy, ahead))


def joined(shards, block):
    """The ranges of numbered tokens that blocks are dealt from: no range is too short for one."""
    parts = [shards[0]]
    for shard in shards[1:]:
        if len(parts[-1]) <= block:
            parts[-1] = range(parts[-1][0], shard[-1] + 1)
        else:
            parts.append(shard)
    if len(parts) > 1 and len(parts[-1]) <= block:
        last = parts.pop()
        parts[-1] = range(parts[-1][0], last[-1] + 1)
    return parts


@ref.tries(100)
@given(cases(BLOCKS), st.data())
def test_blocks_are_dealt_once_an_epoch_and_stay_in_their_shard(folder, case, data):
    """Of a shard only what does not fill a block is left out; a stage that begins inside a block skips its
    rest. Shards that are too short for a block count as a part of the next one.
    """
    loader, sizes, _, stages, more = case
    shards = numbered(*sizes)
    paths, s = write(folder, shards), settings(loader, stages=stages, **more)
    stream, block = stream_of(paths, s), max(length for length, _ in stages)
    shards = joined(shards, block)
    total = sum((len(shard) - 1) // block for shard in shards) * block
    for number in range(2):
        used, skipped = [], 0
        stream.position = number * total
        for stage in sorted(data.draw(st.lists(st.integers(0, len(stages) - 1), max_size=3))) + [len(stages) - 1] * 300:
            length, tokens = stages[stage]
            begin = -(-stream.position // length) * length
            if begin + tokens > (number + 1) * total:
                break
            skipped += begin - stream.position
            used += windows_of(stream.next(length, tokens), length)
            assert stream.position == begin + tokens
        targets = [token for a, b in used for token in range(a + 1, b + 1)]
        assert len(set(targets)) == len(targets), "a target twice"
        assert all(any(a in shard and b in shard for shard in shards) for a, b in used)
        if len(stages) == 1 and total % stages[0][1] == 0:
            for shard in shards:
                mine = sorted(a for a, _ in used if a in shard)
                assert len(mine) == (len(shard) - 1) // block
                assert all(b - a == block for a, b in zip(mine, mine[1:])), "one phase a shard"
                assert len(set(shard[1:]) - set(targets)) < block
        assert skipped < block * len(stages)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path, loader):
    paths = write(tmp_path, numbered(42, 81, 25))  # 10 + 20 + 6 blocks of 4; 148 tokens
    total = 36 * 4 if loader in BLOCKS else 148
    orders = {}
    for seed in (1, 2, 1):
        stream = stream_of(paths, settings(loader, seed=seed, train_batch_tokens=4))
        orders.setdefault(seed, []).append([flat(stream.next()) for _ in range(2 * total // 4)])
    assert orders[1][0] == orders[1][1], "equal for the same seed"
    assert (orders[1][0] != orders[2][0]) == (loader in BLOCKS)
    first, second = orders[1][0][: total // 4], orders[1][0][total // 4 :]
    assert (first != second) == (loader in BLOCKS)
    if loader not in BLOCKS:
        endless = [*range(2, 150), 2]
        assert first == [[endless[i : i + 4], endless[i + 1 : i + 5]] for i in range(0, 148, 4)]


@pytest.mark.parametrize("loader", BLOCKS)
@pytest.mark.parametrize("sizes", [[3, 40, 2, 2, 30], [7, 1, 1], [90, 6], [2] * 30])
def test_short_shards_are_read_too(tmp_path, loader, sizes):
    """Within a few epochs every token has been trained on, also those of shards shorter than a sequence."""
    paths = write(tmp_path, numbered(*sizes))
    stream = stream_of(paths, settings(loader, train_seq_len=8, train_batch_tokens=8))
    tokens = set()
    for _ in range(60 * stream.total // 8):
        for first, last in windows_of(stream.next(), 8):
            tokens.update(range(first, last + 1))
    assert tokens == set(range(2, 2 + sum(sizes)))


@pytest.mark.parametrize("loader", BLOCKS)
def test_the_phase_of_a_shard_changes_with_the_epoch(tmp_path, loader):
    """What an epoch leaves out, another one uses."""
    stream = stream_of(write(tmp_path, numbered(4 * 8 + 3)), settings(loader, train_seq_len=8, train_batch_tokens=32))
    begins = {min(a for a, _ in epoch_of(stream, 8, 32, 4)) for _ in range(40)}
    assert begins == {2, 3, 4}


def test_shuffled_puts_every_block_anywhere(tmp_path):
    """Chi-square of (block, place in the epoch) over 1,500 epochs: 12 blocks of 3 shards of unequal size."""
    counts, epochs = [2, 3, 7], 1500
    stream = stream_of(write(tmp_path, numbered(*(4 * n + 1 for n in counts))),
                       settings("shuffled", train_batch_tokens=48))
    table = np.zeros((12, 12))
    places = [a for shard in numbered(*(4 * n + 1 for n in counts)) for a in shard[:-1:4]]
    for _ in range(epochs):
        for place, (a, _) in enumerate(epoch_of(stream, 4, 48, 12)):
            table[places.index(a), place] += 1
    square = ((table - epochs / 12) ** 2 / (epochs / 12)).sum()
    assert abs(square - 121) < 5 * math.sqrt(2 * 121), square  # 11 * 11 degrees of freedom


def test_one_thread_at_a_time_reads(tmp_path, monkeypatch):
    """A change of stage or position while the thread reads ahead: two readers would pull the order from under each

    other's feet at the end of an epoch.
    """
    stream = stream_of(write(tmp_path, numbered(200)), settings("coprime", stages=[(2, 8), (4, 16)]))
    inside, most, read = [], [0], stream.read

    def slow(*args):
        inside.append(args)
        most[0] = max(most[0], len(inside))
        time.sleep(2e-3)
        inside.pop()
        return read(*args)

    monkeypatch.setattr(stream, "read", slow)
    for stage in ((2, 8), (2, 8), (4, 16), (2, 8), (4, 16)):
        stream.next(*stage)
    assert most == [1]


# --- coprime ---------------------------------------------------------------------------------------------------------


def walk(visited, slack):
    """Strides s coprime to n for which visit k of the n blocks is start + (k +- slack) s."""
    n = len(visited)
    assert sorted(visited) == list(range(n))
    found = []
    for stride in [s for s in range(1, n + 1) if math.gcd(s, n) == 1] if n > 1 else [0]:
        for start in range(n):
            place = {(start + k * stride) % n: k for k in range(n)}
            if all(abs(place[block] - k) <= slack for k, block in enumerate(visited)):
                found.append(stride)
    return found


@ref.tries(150)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any), st.integers(1, 20), st.integers(0, 99))
def test_coprime_deals_every_block_once(counts, batch, seed):
    order = tg.coprime_order(counts, np.random.default_rng(seed), batch)
    assert sorted(map(tuple, order)) == [(i, j) for i, n in enumerate(counts) for j in range(n)]
    for shard in range(len(counts)):
        visited = [j for i, j in order if i == shard]
        if len(visited) > 1:
            assert walk(visited, batch - 1), (visited, "no stride coprime to the number of blocks")


def test_coprime_walks_each_shard_by_a_constant_stride():
    """With one block a batch nothing blurs the walk. Strides and starts differ between shards and seeds."""
    strides, starts = set(), set()
    for seed in range(10):
        order = tg.coprime_order([30, 7, 1, 12], np.random.default_rng(seed), 1)
        for shard, n in enumerate([30, 7, 1, 12]):
            visited = [int(j) for i, j in order if i == shard]
            steps = {(b - a) % n for a, b in zip(visited, visited[1:])}
            assert len(steps) == (n > 1) and all(math.gcd(step, n) == 1 for step in steps)
            strides |= {(n, step) for step in steps}
            starts.add((n, visited[0]))
    assert len({step for n, step in strides if n == 30}) >= 4 and len({j for n, j in starts if n == 30}) >= 5


def test_coprime_mixes_8_shards_at_first_and_64_in_the_end():
    order = tg.coprime_order([1400] * 100, np.random.default_rng(0), 64)
    mixed = [len(set(order[c * 64 : c * 64 + 64, 0])) for c in range(1900)]
    assert mixed[0] == 8 and mixed[900] == 36 and mixed[1800:] == [64] * 100
    assert all(abs(n - (8 + 56 * min(c / 1800, 1))) <= 0.5 for c, n in enumerate(mixed))


def test_coprime_draws_shards_by_what_is_left_in_them():
    """In proportion to its power, 0.9 at first and 0.5 after 1,800 batches; other powers are excluded."""
    counts = np.array([300, 1500, 4200])
    order = tg.coprime_order(counts.tolist(), np.random.default_rng(3), 1)[:, 0]

    def off(first, last, power):
        """Standard deviations between how often the largest shard was drawn and what the power says."""
        expected = variance = 0.0
        for c in range(first, last):
            left = counts - np.bincount(order[:c], minlength=3)
            p = (left[2] ** power) / (left.astype(float) ** power).sum()
            expected, variance = expected + p, variance + p * (1 - p)
        return abs((order[first:last] == 2).sum() - expected) / math.sqrt(variance)

    assert off(0, 150, 0.9) < 3 < off(0, 150, 0.5)
    assert off(1800, 2800, 0.5) < 3 < off(1800, 2800, 0.9)


def test_a_batch_of_the_coprime_stream_mixes_shards(tmp_path):
    """16 blocks of 20 shards, 8 of them at first."""
    shards = numbered(*[101] * 20)
    stream = stream_of(write(tmp_path, shards), settings("coprime", train_batch_tokens=64))
    for _ in range(5):
        rows = windows_of(stream.next(), 4)
        assert len({i for a, _ in rows for i, shard in enumerate(shards) if a in shard}) == 8


# --- packed ----------------------------------------------------------------------------------------------------------


def segments(ids, longest):
    """The number of each token's document in one row: new at BOS, and after every `longest` tokens of a document."""
    out, number, since = [], -1, 0
    for t, token in enumerate(ids):
        if t == 0 or token == ref.BOS or since == longest:
            number, since = number + 1, 0
        out.append(number)
        since += 1
    return out


@ref.tries(60)
@given(st.lists(st.integers(0, 4), min_size=30, max_size=200), st.integers(2, 6), st.integers(1, 4), st.integers(1, 2),
       st.integers(1, 12))
def test_a_packed_micro_batch_is_one_row_of_documents(folder, ids, length, rows, world, micro):
    paths = write(folder, [ids])
    s = settings("packed", train_seq_len=length, train_batch_tokens=length * rows * world,
                 micro_batch_tokens=length * min(micro, rows))
    row = max(n for n in range(1, min(micro, rows) + 1) if rows * world % n == 0)
    if rows % row:  # two ranks would have other rows than one
        with pytest.raises(tg.BadInput, match=f"LOADER=packed makes rows of {row * length} tokens"):
            stream_of(paths, s, 0, world)
        return
    for varlen in (False, True):
        find = partial(tg.find_documents, mode="attention", varlen=varlen)
        for rank in range(world):
            stream = stream_of(paths, s, rank, world, lambda x, longest: find(x, longest=longest))
            for x, y, docs in stream.next() + stream.next():
                assert x.shape == y.shape == (1, x.numel()) and x.numel() <= min(s.longest_row, s.micro_batch_tokens)
                number = np.array(segments(x[0].tolist(), length))
                assert docs.first.tolist() == (x == ref.BOS).tolist()
                if varlen:
                    starts = [t for t in range(len(number)) if t == 0 or number[t] != number[t - 1]]
                    assert docs.cu_seqlens.tolist() == [*starts, len(number)] and docs.mask is None
                    assert docs.cu_seqlens.dtype == torch.int32
                else:
                    sees = (number[:, None] == number) & np.tril(np.ones((len(number),) * 2, bool))
                    assert docs.mask[0, 0].tolist() == sees.tolist() and docs.cu_seqlens is None


def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone(tmp_path):
    """Positions are relative and nothing but attention looks back here, so each piece can be forwarded by itself."""
    ids = [1, *range(5, 16), 1, 7, 8, 1, *range(3, 14), 9, 9, 1, 20, 21, 22]
    s = ref.small(loader="packed", doc_mask="attention", smear_gate="none", bigram_vocab_size=0, train_seq_len=8,
                  train_batch_tokens=24, micro_batch_tokens=24, eval_seq_len=8)
    model = ref.double(s, spread=0.3)
    ((x, y, docs),) = stream_of(write(tmp_path, [ids]), s, documents=model.find_documents).next()
    number = segments(x[0].tolist(), 8)
    assert len(set(number)) == 5, "a long document twice, cut"
    apart, open_ended = 0.0, model.loss(model.hidden(x, tg.Docs(x == 1)), y)
    for k in set(number):
        where = [t for t in range(24) if number[t] == k]
        apart += model(x[:, where], y[:, where], reduction="none").sum().item()
    assert model(x, y, docs).item() == pytest.approx(apart / 24, rel=1e-6)
    assert abs(open_ended.item() - apart / 24) > 1e-3, "the cuts matter"


def test_the_model_has_positions_for_the_longest_packed_row_of_any_stage(tmp_path):
    """Rows grow with TRAIN_BATCH_SCHEDULE up to MICRO_BATCH_TOKENS."""
    stages = [(8, 16), (8, 96), (8, 48)]
    for micro, longest in ((64, 48), (200, 96), (16, 16)):
        s = settings("packed", stages=stages, micro_batch_tokens=micro, rope_dims=2)
        stream = stream_of(write(tmp_path, numbered(400)), s)
        rows = {x.numel() for stage in stages for x, *_ in stream.next(*stage)}
        model = ref.randomise(tg.GPT(s))
        assert max(rows) == longest <= len(model.cos)
        ids = ref.tokens(s.vocab_size, 1, longest)
        assert torch.isfinite(model(ids, ids))


# --- copies of validation documents ----------------------------------------------------------------------------------


def a_text(rng, documents):
    """Documents of 70 to 200 tokens. The first token of each is its number, from 1000 on."""
    bodies = [rng.integers(2, 900, rng.integers(70, 200)) for _ in range(documents)]
    return [np.array([ref.BOS, 1000 + n, *body]) for n, body in enumerate(bodies)]


def begun(batch):
    """The documents whose first token is a target in this batch, predicted after their BOS."""
    x, y = map(np.array, flat(batch))
    return set((y[x == ref.BOS] - 1000).tolist())


def met(stream):
    stream._ahead.batch.result()  # what is read ahead and never trained on does not count
    return stream.copies.met


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_copy_of_a_validation_document_is_met_when_it_begins_in_a_batch(tmp_path, loader, world):
    """Sequences of 16 tokens and reads of 32 or 64, so every opening goes beyond its sequence, most beyond the read."""
    rng = np.random.default_rng(5)
    text = a_text(rng, 30)
    tokens = np.concatenate(text)
    s = settings(loader, train_seq_len=16, train_batch_tokens=64, micro_batch_tokens=32)
    paths = write(tmp_path, np.split(tokens, [700, 730, 2000]))  # documents across the ends of shards, too
    ranks = [stream_of(paths, s, rank, world) for rank in range(world)]
    plain = stream_of(paths, s)
    copied = tg.Contamination(np.concatenate(text))
    numbers = {tg.Contamination(document).keys.item(): n for n, document in enumerate(text)}
    for stream in ranks:
        stream.copies = tg.Contamination(np.concatenate(text))
    expected = set()
    for _ in range(len(tokens) // 64):
        for stream in ranks:
            stream.next()
        expected |= begun(plain.next())
        together = np.any([met(stream) for stream in ranks], 0)
        assert {numbers[key] for key in copied.keys[together].tolist()} == expected
    assert len(expected) >= 28, "all but those that the skipped tokens of an epoch begin"


@pytest.mark.parametrize("loader", LOADERS)
def test_text_that_only_resembles_a_validation_document_is_no_copy(tmp_path, loader):
    """Other documents, one whose 64th token differs, one without BOS, and one cut off by the end of the shards."""
    rng = np.random.default_rng(6)
    val = a_text(rng, 4)
    near = val[0].copy()
    near[tg.Contamination.PREFIX] += 1
    training = [*a_text(rng, 20), near, val[1][1:], val[2][:64]]
    s = settings(loader, train_seq_len=16, train_batch_tokens=64)
    stream = stream_of(write(tmp_path, [np.concatenate(training)]), s)
    stream.copies = tg.Contamination(np.concatenate(val))
    while stream.epoch < 1:
        stream.next()
    assert len(stream.copies.keys) == 4 and not met(stream).any()


def test_an_opening_counts_from_its_first_token_on(tmp_path):
    """Of a read that ends in the BOS nothing was trained on; one token later it is a copy."""
    (document,) = a_text(np.random.default_rng(7), 1)
    paths = write(tmp_path, [[*range(2, 40)], document])
    for count, found in ((39, False), (40, True), (41, True), (120, True)):
        stream = stream_of(paths, settings("sequential"))
        stream.copies = tg.Contamination(document)
        text = stream.read(0, count).tolist()
        assert text == [*range(2, 40), *document][:count] and stream._found == [0] * found


# --- synthetic batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_synthetic_batches_have_the_layout_of_real_ones_in_every_stage(tmp_path, loader):
    stages = [(4, 16), (8, 48)]
    s = settings(loader, stages=stages, micro_batch_tokens=16)
    find = partial(tg.find_documents, mode="attention") if loader == "packed" else None
    stream = stream_of(write(tmp_path, numbered(300)), s,
                       documents=find and (lambda x, longest: find(x, longest=longest)))
    for stage in stages:
        real, false = stream.next(*stage), stream.synthetic(torch.Generator().manual_seed(0), *stage)
        for one, two in zip(real, false, strict=True):
            assert (one[2] is None) == (two[2] is None) == (loader != "packed")
            for a, b in zip([*one[:2], *(one[2] or ())], [*two[:2], *(two[2] or ())], strict=True):
                assert a is b is None or (a.shape, a.stride(), a.dtype, a.storage_offset()) == (
                    b.shape, b.stride(), b.dtype, b.storage_offset())


# --- held out --------------------------------------------------------------------------------------------------------


@ref.tries(60)
@given(st.sampled_from(LOADERS), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(3, 120))
def test_the_end_of_the_stream_is_held_out_and_never_trained_on(folder, loader, sizes, count):
    shards = numbered(*sizes, 30)
    paths, text = write(folder, shards), [token for shard in shards for token in shard]
    s = settings(loader, average="best", holdout_tokens=count)
    try:
        stream = stream_of(paths, s)
    except tg.BadInput as error:
        kept = set(text[: max(len(text) - count, 0)])
        assert len(kept) < 2 or loader in BLOCKS and all(len(kept & set(shard)) < 5 for shard in shards)
        assert "\n" not in str(error) and (f"HOLDOUT_TOKENS={count}" in str(error)) == (not kept)
        return
    assert stream.held.tolist() == text[-count:]
    for _ in range(2 * len(text) // 16 + 2):
        x, y = flat(stream.next())
        assert not {*x, *y} & set(text[-count:])
    assert stream.epoch >= 1


def test_a_bad_token_in_the_held_out_text_is_named_before_training(tmp_path):
    paths = write(tmp_path, [range(2, 30), [*range(2, 18), 60, 5, 6], range(2, 8)])
    s = tg.replace(settings("sequential", average="best", holdout_tokens=12), vocab_size=45)
    with pytest.raises(tg.BadInput, match=rf"{re.escape(str(paths[1]))}: token 60 at offset {1024 + 2 * 16} .*=45"):
        stream_of(paths, s)


def test_nothing_is_held_out_otherwise(tmp_path):
    stream = stream_of(write(tmp_path, numbered(20, 30)), settings("sequential", average="ema", holdout_tokens=30))
    assert len(stream.held) == 0 and {*sum((flat(stream.next())[0] for _ in range(4)), [])} >= set(range(2, 52))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_a_bad_token_is_named_when_its_batch_is_due_and_not_before(tmp_path, loader):
    """The thread meets it one batch earlier; the position stays where the last good batch ended."""
    shards = [list(shard) for shard in numbered(30, 60)]
    shards[1][40] = 65000
    s = settings(loader, train_batch_tokens=8)
    paths = write(tmp_path, shards)
    s = tg.replace(s, vocab_size=1000)
    stream, done = stream_of(paths, s), []
    with pytest.raises(tg.BadInput) as error:
        while len(done) < 100:
            time.sleep(1e-3)
            done.append(flat(stream.next()))
    where = rf"{re.escape(str(paths[1]))}: token 65000 at offset {1024 + 80} is outside VOCAB_SIZE=1000"
    assert re.match(where, str(error.value)) and stream.position == 8 * len(done)
    assert 0 < len(done) < 100 and not any(65000 in side for batch in done for side in batch)
    with pytest.raises(tg.BadInput, match="token 65000"):
        stream.next()
    shards[1][40] = 999
    write(tmp_path, shards)
    mended = stream_of(paths, s)
    mended.position = stream.position
    assert 999 in sum(flat(mended.next()), []), "no batch was lost or passed over"


@pytest.mark.parametrize("loader, sizes, words", [
    ("sequential", [1], "fewer than 2 tokens"), ("packed", [1], "fewer than 2 tokens"),
    ("coprime", [2, 2], "hold fewer than the 5 tokens"), ("shuffled", [4], "hold fewer than the 5 tokens")])
def test_too_little_data_is_an_error_of_one_line(tmp_path, loader, sizes, words):
    paths = write(tmp_path, numbered(*sizes))
    with pytest.raises(tg.BadInput) as error:
        stream_of(paths, settings(loader))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
