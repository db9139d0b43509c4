"""Test-time training against tests/help/adaptation.py: the nats of every target, step by step; and what must not change."""

import contextlib
import functools
import re
import shutil
from pathlib import Path
from unittest import mock

import adaptation
import numpy as np
import pytest
import reference as ref
import scoring
import torch
import training
from hypothesis import given
from hypothesis import strategies as st
from runs import call, command, events, good, log_lines, refused, summary
from toy import write_shard

import train_gpt as tg

TINY = dict(num_layers=2, ve_layers=(1,), model_dim=8, num_heads=2, num_kv_heads=1, eval_seq_len=8, train_seq_len=8,
            ttt_chunk_tokens=24, ttt_batch_seqs=2, ttt_epochs=2, ttt_chunk_size=4, ttt_batch_size=3, ttt_group_docs=4)
CLOSE = 2e-5  # nats of one target: what float32 in the head and in the adapters costs after tens of steps


def tiny(**changes):
    return ref.small(**{**TINY, **changes})


@functools.cache
def stream_of(n=90, seed=0, vocab=32, bos=0.08):
    """n random targets of 0 to 4 bytes, in documents of a few to forty."""
    rng = np.random.default_rng(seed)
    return tg.ValStream(ref.tokens(vocab, n + 1, seed=seed, bos=bos).int(),
                        torch.from_numpy(rng.integers(0, 5, n).astype(np.int16)), True)


def periodic(periods=(5, 7, 4, 6), length=41, seed=0):
    """Documents each of which repeats a few random tokens."""
    rng, ids = np.random.default_rng(seed), []
    for period in periods:
        ids += [ref.BOS, *np.resize(rng.integers(4, 32, period), length).tolist()]
    return tg.ValStream(torch.tensor([*ids, ref.BOS], dtype=torch.int32), torch.ones(len(ids), dtype=torch.int16), True)


def predictor_of(s, model, stream, rt=None):
    return tg.make_predictor(model, s, rt or ref.alone(), len(stream.bytes), s.eval_temperature)


def scored(predictor, s, stream, rt=None):
    """Nats of every target; every distribution is looked at on the way, and no rule is broken."""
    rt, validity, nats = rt or ref.alone(), tg.Validity(), torch.zeros(len(stream.bytes), dtype=torch.float64)
    reader = tg.reader_for(predictor, stream, s, rt)
    tg.score(predictor, reader, stream, rt, validity, check_every=1, nats=nats)
    assert validity.reasons == []
    return nats


def starting(predictor, *draw):
    """{(visit, "q"): (A, B)} with which the adapters begin."""
    adapters = predictor.adapters.of(predictor.adapters.start(*draw))
    maps = {(visit, what): f for visit, slot in enumerate(adapters.slots) for what, f in slot._asdict().items() if callable(f)}
    maps |= {(None, "head"): adapters.head} if adapters.head else {}
    return {place: tuple(z[0] for z in f.args[:2]) for place, f in maps.items()}


def referred(s, seed, stream):
    """What tests/help/adaptation.py says."""
    start = None
    if s.ttt in ("lora", "lora_docs"):
        predictor = predictor_of(s, tg.GPT(s, torch.float64, init=False), stream)
        start = starting(predictor)
    if s.ttt == "lora_docs":
        draw = functools.partial(starting, predictor) if s.ttt_lora_a == "own" else None
        return adaptation.adapted_documents(s, seed, stream, start, draw)
    return adaptation.score_first(s, seed, stream, start)[0]


@functools.cache
def _referred(pairs):
    return referred(tiny(**dict(pairs)), 3, stream_of())


def wanted(changes):
    return _referred(tuple(sorted(changes.items())))


def far(a, b):
    return (a - b).abs().max().item()


# --- every setting, against the reference ----------------------------------------------------------------------------

FULL, ADAMW = dict(ttt="full", ttt_lr=0.03), dict(ttt="full", ttt_optimizer="adamw", ttt_lr=0.005)
LORA, DOCS = dict(ttt="lora"), dict(ttt="lora_docs")
CACHED = dict(eval_context="cache")
PHASES = dict(ttt="lora_docs", phased_ttt_prefix_docs=4, ttt_lr=0.03)
CASES = [  # (beside what, a change that must be seen)
    *(({}, change) for change in (FULL, ADAMW, LORA, DOCS, dict(eval_temperature=0.7))),
    *((FULL, change) for change in (
        dict(ttt_lr=0.01), dict(ttt_momentum=0.0), dict(ttt_epochs=1), dict(ttt_batch_seqs=1), dict(ttt_batch_seqs=9),
        dict(ttt_min_lr=0.7), dict(adaptive_lr_max=3), dict(ttt_lr_mult_proj=3), dict(ttt_lr_mult_fc=0.2),
        dict(ttt_grad_clip=0.1), dict(ttt_grad_clip=0, ttt_lr=0.005), dict(polyak_decay=0.8),
        dict(byte_weighted_ttt=True), dict(ttt_freeze_blocks=1), dict(ttt_freeze_blocks=2), dict(ttt_freeze_embed=True),
        dict(ttt_chunk_tokens=17), dict(ttt_chunk_tokens=1000), CACHED,
        dict(eval_docs=True), dict(eval_temperature=0.7), dict(eval_stride=0), dict(eval_seq_len=6))),
    *((FULL | dict(ttt_freeze_blocks=n), dict(ttt_train_scales=True)) for n in (1, 2)),
    *((ADAMW, change) for change in (dict(byte_weighted_ttt=True), dict(ttt_lr_mult_proj=3), dict(polyak_decay=0.5))),
    (FULL | CACHED, dict(eval_docs=True)), (FULL | CACHED, dict(ttt_chunk_tokens=17)),
    (FULL | dict(tie_embeddings=False), dict(ttt_freeze_embed=True)),
    (FULL | dict(eval_docs=True), dict(ttt_chunk_tokens=17)),
    *((LORA, change) for change in (
        dict(ttt_lora_rank=2), dict(ttt_lora_alpha=20), dict(ttt_lora_lr=0.003), dict(ttt_beta1=0.0),
        dict(ttt_beta2=0.999), dict(ttt_wd=0.5), dict(ttt_epochs=1), dict(ttt_batch_seqs=1),
        dict(ttt_min_lr=0.5), dict(ttt_grad_clip=0.001),
        dict(adaptive_lr_max=3), dict(polyak_decay=0.8), dict(byte_weighted_ttt=True), CACHED, dict(eval_docs=True),
        dict(num_loops=1, loop_start=0, loop_end=1), dict(seed=7),
        *(dict(ttt_lora_targets=what) for what in ("q", "k", "v", "o", "attn", "mlp", "head", "q,k,v,o,attn,mlp,head")))),
    *((kind | dict(ttt_lora_targets=what), dict(ttt_lora_scaled=True)) for kind in (LORA, DOCS, DOCS | CACHED)
      for what in ("o", "attn", "mlp")),
    *((docs | more, dict(ttt_lora_a="own")) for docs in (DOCS, DOCS | CACHED) for more in (
        {}, dict(ttt_warm_start_a=True), dict(ttt_warm_start_a=True, ttt_group_docs=2))),
    (PHASES, dict(ttt_lora_a="own")), (PHASES | dict(ttt_warm_start_a=True, phased_ttt_num_phases=2), dict(ttt_lora_a="own")),
    *((kind | dict(logit_softcap=3), dict(asym_logit_rescale=True)) for kind in (FULL, PHASES)),
    *((docs, change) for docs in (DOCS, DOCS | CACHED) for change in (
        dict(ttt_chunk_size=3), dict(ttt_lora_alpha=20), dict(ttt_beta1=0.0), dict(ttt_wd=0.5),
        dict(ttt_warm_start_a=True), dict(ttt_short_chunks="2@3,3@9"), dict(eval_seq_len=6),
        dict(eval_temperature=0.7), dict(num_loops=1, loop_start=0, loop_end=1),
        dict(ttt_lora_targets="q,k,v,o,attn,mlp,head"), dict(tie_embeddings=False), dict(doc_mask="none"))),
    (DOCS, CACHED), (DOCS, dict(ttt_lora_lr=0.03)), (DOCS, dict(ttt_beta2=0.999)), (DOCS, dict(ttt_lora_rank=2)),
    (DOCS | dict(ttt_short_chunks="2@3,3@9"), dict(ttt_short_chunks="3@9,2@3,3@100")),
    (DOCS | dict(ttt_warm_start_a=True), dict(ttt_group_docs=2)), (DOCS, PHASES), (DOCS | CACHED, PHASES | CACHED),
    *((PHASES, change) for change in (
        dict(phased_ttt_prefix_docs=2), dict(phased_ttt_num_phases=2), dict(phased_ttt_prefix_docs=99),
        dict(ttt_epochs=1), dict(ttt_lr=0.01), dict(ttt_optimizer="adamw", ttt_lr=0.01),
        dict(ttt_min_lr=0.7), dict(ttt_batch_seqs=1), dict(ttt_grad_clip=0.1),
        dict(byte_weighted_ttt=True), dict(ttt_freeze_blocks=1), dict(ttt_warm_start_a=True))),
]
UNSEEN = [  # changes that nothing may see, but for rounding
    *((kind, change) for kind in (FULL, LORA, DOCS, DOCS | CACHED) for change in (
        dict(micro_batch_tokens=16), dict(eval_batch_seqs=1), dict(ttt_batch_size=1), dict(ttt_batch_size=50))),
    *((PHASES | dict(ttt_lora_a="own", ttt_warm_start_a=warm), dict(ttt_batch_size=n)) for n in (1, 2) for warm in (False, True)),
    (DOCS, dict(ttt_group_docs=1)),
    (DOCS | dict(ttt_warm_start_a=True, ttt_group_docs=99), dict(ttt_warm_start_a=False)),
]


def named(case):
    return "+".join(f"{name}={value}" for part in case for name, value in part.items())


def has_phases(case):
    beside, change = case
    return "phased_ttt_prefix_docs" in beside | change


def has_document_adapters(case):
    beside, change = case
    return (beside | change).get("ttt") == "lora_docs" and not has_phases(case)


def has_neither(case):
    return not has_phases(case) and not has_document_adapters(case)


def check_every_step(case):
    """The nats of every target are those of the reference, and the change of the case is seen in them."""
    beside, change = case
    s = tiny(**{**beside, **change})
    got = scored(predictor_of(s, ref.double(s, 3), stream_of()), s, stream_of())
    want = wanted({**beside, **change})
    assert far(got, want) < CLOSE
    assert far(want, wanted(beside)) > 50 * CLOSE, "the change is too small to be seen here"


@pytest.mark.parametrize("case", list(filter(has_neither, CASES)), ids=named)
def test_every_step_is_that_of_the_reference(case):
    check_every_step(case)


@pytest.mark.parametrize("case", list(filter(has_document_adapters, CASES)), ids=named)
def test_every_step_of_document_adapters_is_that_of_the_reference(case):
    check_every_step(case)


@pytest.mark.parametrize("case", list(filter(has_phases, CASES)), ids=named)
def test_every_step_of_phases_is_that_of_the_reference(case):
    check_every_step(case)


@ref.tries(30)
@given(ref.models(eval_seq_len=8, train_seq_len=8, ttt_batch_seqs=3), st.data())
def test_every_model_adapts_as_the_reference(s, data):
    """Any model beside any way to adapt it; slowly, so that what is not smooth does not magnify the rounding."""
    pick = lambda *values: data.draw(st.sampled_from(values))
    s = tg.replace(
        s, ttt=pick("full", "lora", "lora_docs"), eval_context=pick("window", "cache"), eval_docs=pick(False, True),
        eval_stride=pick(0, 3, 8), ttt_lr=0.002, ttt_lora_lr=0.002, ttt_optimizer=pick("sgd", "adamw"),
        ttt_chunk_tokens=pick(9, 24), ttt_epochs=pick(1, 2), byte_weighted_ttt=pick(False, True),
        polyak_decay=pick(0.0, 0.5), ttt_warm_start_a=pick(False, True), ttt_group_docs=pick(1, 3),
        ttt_lora_a=pick("shared", "own"), ttt_lora_scaled=pick(False, True),
        ttt_lora_targets=tuple(data.draw(st.sets(st.sampled_from(["q", "k", "v", "o", "attn", "mlp", "head"]), min_size=1))),
        ttt_chunk_size=pick(2, 5, 8), phased_ttt_prefix_docs=pick(0, 2, 3))
    stream = stream_of(40, data.draw(st.integers(0, 9)), s.vocab_size)
    assert far(scored(predictor_of(s, ref.double(s, 5), stream), s, stream), referred(s, 5, stream)) < 1e-4


@pytest.mark.parametrize("case", UNSEEN, ids=named)
def test_what_is_only_about_speed_is_not_seen(case):
    beside, change = case
    scores = []
    for changes in (beside, {**beside, **change}):
        s = tiny(**changes)
        scores.append(scored(predictor_of(s, ref.double(s, 3), stream_of()), s, stream_of()))
    assert far(*scores) < CLOSE


KINDS = [FULL, FULL | dict(polyak_decay=0.8, eval_docs=True), ADAMW | CACHED, LORA,
         LORA | CACHED | dict(eval_docs=True), DOCS, DOCS | CACHED, PHASES | dict(ttt_warm_start_a=True),
         PHASES | dict(ttt_warm_start_a=True, ttt_lora_a="own", ttt_group_docs=7), DOCS | dict(ttt_lora_a="own", token_boost=2.0),
         PHASES | CACHED | dict(phased_ttt_num_phases=2)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: named([kind]))
def test_the_score_is_the_same_on_any_number_of_ranks(kind, world):
    s = tiny(**kind)
    one = scored(predictor_of(s, ref.double(s, 3), stream_of()), s, stream_of())
    some = ref.Ranks(world).together(
        lambda rt: scored(predictor_of(s, ref.double(s, 3), stream_of(), rt), s, stream_of(), rt))
    assert all(torch.equal(nats, some[0]) for nats in some) and far(some[0], one) < CLOSE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: named([kind]))
def test_reset_forgets_every_bit(kind):
    s = tiny(**kind)
    predictor = predictor_of(s, ref.randomise(tg.GPT(s), 3), stream_of())
    first, again = scored(predictor, s, stream_of()), scored(predictor, s, stream_of())
    predictor.reset()
    assert torch.equal(scored(predictor, s, stream_of()), first)
    if predictor.learns:
        assert not torch.equal(again, first), "what it learnt stays until then"


@pytest.mark.parametrize("kind", [FULL, FULL | CACHED, FULL | dict(polyak_decay=0.5), ADAMW, LORA, LORA | CACHED, DOCS,
                                  DOCS | CACHED, PHASES | dict(ttt_warm_start_a=True)], ids=lambda kind: named([kind]))
def test_a_text_that_repeats_itself_costs_less(kind):
    s, stream = tiny(**kind), periodic() if kind["ttt"] == "lora_docs" else periodic((6,), 240)
    loss = {ttt: scored(predictor_of(t, ref.randomise(tg.GPT(t), 3, 0.2), stream), t, stream).mean().item()
            for ttt, t in (("on", s), ("off", tg.replace(s, ttt="off", eval_docs=s.ttt == "lora_docs")))}
    assert loss["on"] < 0.95 * loss["off"]


# --- composition -----------------------------------------------------------------------------------------------------


def made(kind):
    """(settings, [predictors from the outside in]) of a kind of tests/scoring.py."""
    s = scoring.settings(kind)
    chain = [tg.make_predictor(scoring.model_of(s), s, ref.alone(), 100)]
    while isinstance(chain[-1], tg.WrappingPredictor):
        chain.append(chain[-1].base)
    return s, chain


def invalid_originals():
    """Names of all that stands in the room of the invalid originals."""
    source = Path(tg.__file__).read_text(encoding="utf-8")
    room = re.search(r"\n# \d+ Invalid originals.*?\n# \d+ Kernels", source, re.DOTALL)[0]
    return re.findall(r"^(?:def|class) (\w+)", room, re.MULTILINE)


def test_no_valid_score_needs_an_invalid_original():
    """With their room emptied every valid kind of predictor is still made, and no invalid one is."""
    names = invalid_originals()
    assert {"train_on_validation", "HashedMixture", "EntropyMixture"} <= set(names)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(tg, name, None))
        for kind in scoring.HONEST:
            made(kind)
        for kind in scoring.INVALID:
            with pytest.raises(TypeError):
                made(kind)


def test_every_predictor_has_a_kind_that_the_tests_of_validity_look_at():
    tested = {type(predictor) for kind in scoring.HONEST | scoring.INVALID for predictor in made(kind)[1]}
    classes = {value for value in vars(tg).values() if isinstance(value, type) and issubclass(value, tg.Predictor)}
    missing = classes - tested - {tg.Predictor, tg.WrappingPredictor, tg.NgramMixture}
    assert not missing, f"HONEST of tests/scoring.py makes none of {sorted(kind.__name__ for kind in missing)}"


@pytest.mark.parametrize("kind", scoring.HONEST)
def test_settings_know_which_predictors_learn(kind):
    """So that TTT_CHUNK_TOKENS or TTT_GROUP_DOCS is called idle only where the predictor reads the text as one part."""
    s, chain = made(kind)
    name = "TTT_GROUP_DOCS" if s.ttt == "lora_docs" else "TTT_CHUNK_TOKENS"
    assert getattr(s, name.lower()) != getattr(tg.Settings(), name.lower())
    learns = chain[0].learns if s.ttt != "lora_docs" else s.ttt_warm_start_a or len(chain) > 1
    waits = f"on= of {name.lower()} in Settings (LEARNS or GROUPS) does not name the setting that makes {type(chain[0]).__name__}"
    assert (name not in s.idle()) == learns, waits


def test_every_wrapper_is_in_the_name_of_the_score():
    for kind in scoring.HONEST | scoring.INVALID:
        s, chain = made(kind)
        words = [word for word, _ in tg.wrappers(s)]
        assert len(words) == len(chain) - 1 and tg.scoring_name(s).endswith("_".join(reversed(words))), kind


# --- which weights learn ---------------------------------------------------------------------------------------------

FREEZES = [dict(), dict(ttt_freeze_blocks=1), dict(ttt_freeze_blocks=3),
           dict(ttt_freeze_blocks=2, ttt_train_scales=True),
           dict(ttt_freeze_embed=True), dict(ttt_freeze_embed=True, ttt_freeze_blocks=2)]


@pytest.mark.parametrize("freeze", FREEZES, ids=lambda kind: named([kind]))
@pytest.mark.parametrize("kind", [FULL, PHASES], ids=lambda kind: kind["ttt"])
def test_frozen_weights_keep_every_bit_and_all_others_learn(freeze, kind):
    s = tiny(**{**kind, **freeze, "num_layers": 3, "attn_gate": "head", "gate_window": 4, "value_residual": "pair",
                "embed_dim": 4, "trigram_vocab_size": 9, "tie_embeddings": False})
    model = ref.randomise(tg.GPT(s), 3)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scored(predictor_of(s, model, stream_of()), s, stream_of())
    learned = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert learned == adaptation.rates(s, model).keys()


@pytest.mark.parametrize("kind", [FULL | dict(ttt_min_lr=0.5), ADAMW | dict(ttt_min_lr=0.5)],
                         ids=lambda kind: named([kind]))
def test_the_last_part_is_not_trained_on(kind):
    """The weights at the end are the reference's, which stops there; and no other last part would change them."""
    s, stream = tiny(**kind), stream_of()
    last = stream._replace(tokens=torch.cat((stream.tokens[:74], stream.tokens[74:].flip(0))))
    found = []
    for text in (stream, last):
        model = ref.double(s, 3)
        scored(predictor_of(s, model, text), s, text)
        found.append({name: weight.detach() for name, weight in model.named_parameters()})
    want = adaptation.score_first(s, 3, stream)[1]
    assert all(torch.equal(found[0][name], found[1][name]) and far(found[0][name], want[name]) < CLOSE for name in want)


@pytest.fixture(scope="module")
def artifact(toy, tmp_path_factory):
    """Of a run of the toy, and the model in it."""
    folder = tmp_path_factory.mktemp("trained")
    good(call(command(toy, folder, "PHASES=train", "ITERATIONS=20")))
    return folder / "model.pg", tg.load_artifact(folder / "model.pg")[1]


def evaluated(toy, artifact, out_dir, *changes):
    """The summary of a score of that artifact."""
    words = "PHASES=eval", f"ARTIFACT={artifact[0]}", "TTT_CHUNK_TOKENS=512"
    return summary(good(call(command(toy, out_dir, *words, *changes))))


@pytest.mark.parametrize("freeze", FREEZES, ids=lambda kind: named([kind]))
def test_the_log_counts_what_learns(toy, artifact, tmp_path, freeze):
    words = [f"{name.upper()}={int(value)}" for name, value in freeze.items()]
    evaluated(toy, artifact, tmp_path, "TTT=full", "VAL_TOKENS=600", *words)
    (said,) = events(tmp_path, "ttt_trainable")
    sizes = {name: weight.numel() for name, weight in artifact[1].named_parameters()}
    learns = adaptation.rates(tg.Settings.parse([*toy, "TTT=full", *words]), artifact[1])
    assert said["parameters"] == sum(sizes[name] for name in learns)
    assert said["frozen"] == sum(sizes.values()) - said["parameters"]
    blocks = [sum(sizes[name] for name in learns if name.startswith(f"blocks.{i}.")) for i in range(4)]
    assert said["by_block"] == blocks and said["outside_blocks"] == said["parameters"] - sum(blocks)


def test_a_weight_that_the_forward_does_not_touch_stays_on_any_number_of_ranks():
    s = tiny(**FULL)

    def work(rt):
        model, unused = ref.double(s, 3), torch.nn.Parameter(torch.ones(3))
        groups = [dict(params=[unused, model.embed.weight], lr=0.1)]
        tg.Adaptation(model, groups, torch.optim.SGD, s, rt).fit(stream_of(), np.arange(40), 1, lambda _: 1.0)
        assert torch.equal(unused, torch.ones(3)) and unused.grad is None
        return model.embed.weight.detach()

    alone, *some = [weight for world in (1, 2) for weight in ref.Ranks(world).together(work)]
    assert all(far(weight, alone) < CLOSE for weight in some) and far(alone, ref.double(s, 3).embed.weight) > 1e-4


def test_phases_are_logged_as_they_end_and_those_beyond_the_text_are_warned_of(toy, artifact, tmp_path):
    evaluated(toy, artifact, tmp_path, "TTT=lora_docs", "VAL_TOKENS=900", "PHASED_TTT_PREFIX_DOCS=20", "PHASED_TTT_NUM_PHASES=10",
              "TTT_EPOCHS=1", "SELFTEST=0")
    (said,) = events(tmp_path, "bytes")
    ends = [row["documents"] for row in events(tmp_path, "ttt_phase")]
    assert ends == list(range(2, said["documents_decoded"], 2)) and 0 < len(ends) < 10, "after the last document nothing is scored"
    assert sum(f"the {said['documents_decoded']} documents" in row["note"] for row in events(tmp_path, "warning")) == 1


# --- adapters --------------------------------------------------------------------------------------------------------

ALL = dict(ttt_lora_targets="q,k,v,o,attn,mlp,head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["window", "cache"])
def test_document_adapters_begin_as_nothing(dtype, context):
    """B = 0, and A uniform within 1 / sqrt(inputs): not one bit of a score is another."""
    s = tiny(ttt="lora_docs", eval_context=context, ttt_lora_lr=0, ttt_lora_rank=64, **ALL)
    model, stream = ref.randomise(tg.GPT(s, dtype), 3), stream_of()
    predictor = predictor_of(s, model, stream)
    plain = predictor_of(tg.replace(s, ttt="off"), model, stream)
    assert torch.equal(scored(predictor, s, stream), scored(plain, s, stream))
    for a, b in starting(predictor).values():
        assert not b.any() and a.abs().max() <= s.model_dim**-0.5 and abs(a.std() * (3 * s.model_dim) ** 0.5 - 1) < 0.1
        assert abs(a.mean()) < 0.05


@pytest.mark.parametrize("context", ["window", "cache"])
def test_document_adapters_side_by_side_never_meet(context):
    """Each of them changed: not one bit of another's score is."""
    s, stream = tiny(ttt="lora_docs", eval_context=context, **ALL), stream_of()
    model = ref.randomise(tg.GPT(s), 3)
    plain = scored(predictor_of(s, model, stream), s, stream)
    rng = np.random.default_rng(0)
    assert len(adaptation.documents(stream)) > s.ttt_batch_size
    for a, b in adaptation.documents(stream):
        if b - a < 3:
            continue
        tokens = stream.tokens.clone()
        tokens[a + 1 : b] = torch.from_numpy(rng.integers(2, 32, b - a - 1))
        nats = scored(predictor_of(s, model, stream), s, stream._replace(tokens=tokens))
        elsewhere = torch.ones(len(plain), dtype=torch.bool)
        elsewhere[a:b] = False
        assert torch.equal(nats[elsewhere], plain[elsewhere]) and not torch.equal(nats, plain)


@pytest.mark.parametrize("kind", [LORA, DOCS], ids=lambda kind: kind["ttt"])
def test_each_visit_of_depth_recurrence_has_adapters_of_its_own(kind):
    s = tiny(num_loops=2, loop_start=0, loop_end=1, **kind, **ALL)
    stream = stream_of(40, bos=0)
    predictor = predictor_of(s, ref.randomise(tg.GPT(s), 3), stream)
    ends = {(visit, what) for visit in range(6) for what in "q k v o attn mlp".split()} | {(None, "head")}
    assert starting(predictor).keys() == ends
    scored(predictor, s, stream)
    maps = predictor.adapters.of(predictor.adapter_weights.detach()).slots
    assert len({slot.q.args[0][0].sum().item() for slot in maps}) == 6
    assert len({slot.v.args[1][0].sum().item() for slot in maps}) == 6


# --- training before the score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, dict(ttt_optimizer="adamw", ttt_lr=0.002, ttt_min_lr=0.3, byte_weighted_ttt=True, ttt_freeze_blocks=1)],
    ids=["sgd", "adamw"])
def test_training_on_the_validation_text_is_on_all_of_it(changes, tmp_path):
    """Every pass over every target, with one cosine over all steps, as the reference does it; and it is said."""
    s = tiny(**{**FULL, **changes, "ttt": "before", "allow_invalid": True, "ttt_epochs": 3, "device": "cpu"})
    stream = stream_of()
    run, model = tg.Run(s, tg.Runtime(s, {}), tmp_path, tg.attend_sdpa), ref.double(s, 3)
    tg.train_on_validation(run, model, stream)
    net = adaptation.Net(s, 3, 9)
    everything = np.arange(len(stream.bytes))
    adaptation.Weights(s, net, stream).fit(everything, 3, lambda progress: adaptation.cosine(s, progress))
    for (name, weight), want in zip(model.named_parameters(), net.model.parameters()):
        assert far(weight.detach(), want.detach()) < CLOSE, name
    assert len(run.validity.reasons) == 1 and "C3" in run.validity.reasons[0]


SAME = "TTT_OPTIMIZER=adamw", "TTT_LR=0.002", "TTT_EPOCHS=2", "TTT_BATCH_SEQS=4"


def test_training_before_scoring_flatters_the_score_and_says_so(toy, artifact, tmp_path):
    honest = evaluated(toy, artifact, tmp_path / "full", "TTT=full", *SAME)
    early = evaluated(toy, artifact, tmp_path / "before", "TTT=before", "ALLOW_INVALID=1", *SAME)
    assert honest["valid"] == "yes" and early["valid"] == early["eligible"] == "no"
    assert any("C3" in why for why in early["reasons"])
    assert early["val_bpb"] < honest["val_bpb"] - 0.01
    (said,), lines = events(tmp_path / "before", "final"), log_lines(tmp_path / "before")
    assert said["valid"] == "no" and "ttt_before" in said["name"]
    assert any("final_" in line and "valid:no" in line for line in lines)
    done = call(command(toy, tmp_path / "not", "PHASES=eval", f"ARTIFACT={artifact[0]}", "TTT=before"))
    refused(done, 2, "TTT=before", "C3", "ALLOW_INVALID=1")


def test_training_on_the_text_before_packing_is_in_the_artifact_and_said(toy, artifact, tmp_path):
    run = summary(good(call(command(toy, tmp_path / "a", "ITERATIONS=20", "TTT=prequant", "ALLOW_INVALID=1", *SAME))))
    assert run["valid"] == run["eligible"] == "no" and any("C3" in why for why in run["reasons"])
    plain = evaluated(toy, artifact, tmp_path / "b")
    honest = evaluated(toy, artifact, tmp_path / "c", "TTT=full", *SAME)
    assert plain["valid"] == honest["valid"] == "yes"
    assert run["val_bpb"] < min(plain["val_bpb"], honest["val_bpb"]) - 0.01
    later = evaluated(toy, (tmp_path / "a" / "model.pg",), tmp_path / "d")
    assert later["val_bpb"] == run["val_bpb"], "the artifact is what learnt"
    (said,) = events(tmp_path / "a", "ttt_trainable")
    assert said["parameters"] == run["params"] and said["frozen"] == 0


# --- temperature -----------------------------------------------------------------------------------------------------


def best_temperature(logits, targets):
    """Of logits (N, V): the minimum of the loss, which is convex in 1 / T, by halving the interval of its slope."""
    low, high = 0.2, 5.0
    for _ in range(60):
        inverse = (low + high) / 2
        share = np.exp(inverse * (logits - logits.max(1, keepdims=True)))
        slope = ((share * logits).sum(1) / share.sum(1) - logits[np.arange(len(targets)), targets]).sum()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return 1 / low


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that has learnt something: settings {name: value}, weights."""
    folder = tmp_path_factory.mktemp("learned")
    changes = dict(**training.text(folder), eval_temperature=0, tie_embeddings=False, logit_softcap=0, iterations=40,
                   matrix_lr=0.02)
    return changes, training.trained(ref.small(**changes), folder / "run")[0]


@pytest.mark.parametrize("scale", [0.3, 0.7, 1, 2, 4])
def test_the_fitted_temperature_is_the_best_on_the_next_training_text(scale, learned, tmp_path):
    """The head's weights times a scale, so that the best temperature is as many times as high."""
    s, weights = ref.small(**learned[0]), {**learned[1], "head.weight": scale * learned[1]["head.weight"]}
    run, trainer = training.begun(s, tg.Runtime(s, {}), tmp_path / "fit")
    trainer.model.load_state_dict(weights)
    with torch.no_grad():
        fitted = trainer.fit_temperature()
    ids, parameters = training.walk(1500), {name: weight.double().numpy() for name, weight in weights.items()}
    rows = [ids[i : i + 17] for i in range(0, s.train_batch_tokens, 16)]
    logits = np.concatenate([ref.forward(parameters, s, row[:-1])[1] for row in rows])
    best = best_temperature(logits, np.concatenate([row[1:] for row in rows]))
    assert abs(fitted - best) < 1e-3 * best
    (said,) = events(tmp_path / "fit", "temperature")
    assert abs(said["fitted"] - fitted) < 1e-4 and said["tokens"] == len(logits)


@pytest.mark.parametrize("tokens, changes", [(96, {}), (96, dict(micro_batch_tokens=16)), (16, {}), (10**6, {}), (
    24, dict(doc_mask="attention", loader="packed"))], ids=["rows", "small micro-batches", "one row", "all", "packed"])
def test_the_fitted_temperature_does_not_depend_on_ranks(tokens, changes, learned, tmp_path, monkeypatch):
    """Of a step of 128 tokens some are taken, and the same ones whichever ranks have them."""
    s = ref.small(**{**learned[0], "train_batch_tokens": 128, **changes})
    monkeypatch.setattr(tg, "TEMPERATURE_TOKENS", tokens)

    def fitted(rt):
        _, trainer = training.begun(s, rt, tmp_path / f"run{rt.world}")
        trainer.model.load_state_dict(learned[1])
        return trainer.fit_temperature()

    alone = fitted(ref.alone())
    assert 0.3 < alone < 3 and [set(ref.Ranks(world).together(fitted)) for world in (2, 4)] == 2 * [{alone}]
    said = [events(tmp_path / f"run{world}", "temperature")[0]["tokens"] for world in (1, 2, 4)]
    assert said == 3 * [min(tokens, 128)]


def test_a_fitted_temperature_is_in_the_artifact_and_needs_no_validation_text(toy, artifact, tmp_path):
    data = Path(next(word for word in toy if word.startswith("DATA_PATH=")).partition("=")[2])
    other = tmp_path / "data"
    shutil.copytree(data, other)
    tokens = tg.read_shard(other / "fineweb_val_000000.bin")
    starts = np.flatnonzero(tokens == ref.BOS).tolist() + [len(tokens)]
    documents = [tokens[a:b].tolist() for a, b in zip(starts, starts[1:])]
    write_shard(other / "fineweb_val_000000.bin", sum(documents[5:], []))
    words = "ITERATIONS=20", "EVAL_TEMPERATURE=0"
    runs = [summary(good(call(command(toy, tmp_path / name, *words, f"DATA_PATH={folder}"))))
            for name, folder in (("a", data), ("b", other))]
    fitted = [events(tmp_path / name, "temperature")[0]["fitted"] for name in "ab"]
    assert fitted[0] == fitted[1] and abs(fitted[0] - 1) > 0.01 and runs[0]["valid"] == runs[1]["valid"] == "yes"
    packed = tmp_path / "a" / "model.pg",
    scores = [evaluated(toy, packed, tmp_path / f"t{t}", f"EVAL_TEMPERATURE={t}")["val_bpb"]
              for t in (0, round(fitted[0], 4), 1)]
    assert scores[0] == scores[1] == runs[0]["val_bpb"] != scores[2]
    done = call(command(toy, tmp_path / "c", "PHASES=eval", f"ARTIFACT={artifact[0]}", "EVAL_TEMPERATURE=0"))
    refused(done, 2, "EVAL_TEMPERATURE=0", artifact[0])
