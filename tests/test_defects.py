"""The defects that were found in the five systems whose techniques this trainer has, one by one: what keeps each out.

NUMBERS.  9.1: #518.  9.2: #1311.  9.3: #1539.  9.4: #967.  9.5: #1033.  9.6: its second folder.  The table says which
tests would fail if the defect came in, or why it cannot: LATER for what needs a part that is not built. The tests that
are not at home elsewhere are below it.
"""

import ast
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
from process import REPO
from runs import call, command, events, good, log_lines, summary
from toy import write_shard
from training import captured_whole, text, trained

import train_gpt as tg

LATER = "not built: "
TTT = LATER + "test-time training"
QAT = "test_the_compiled_graph_rounds_and_was_compiled_in_warm_up test_it_begins_when_the_learning_rate_has_fallen_so_far"
NGRAM, SLOT, RANS = LATER + "n-gram mixtures", LATER + "adaptation of a window", LATER + "an entropy coder of its own"
FREEZE = LATER + "freezing of blocks"

TABLE = {
    # validation text before the score
    "9.1.1": "test_validation_before_the_freeze_is_c3_except_for_reports "
             "test_a_run_reads_the_shards_in_the_allowed_order",
    "9.1.2": "test_the_size_that_is_stated_is_that_on_the_disk "
             "test_an_artifact_over_the_limit_is_kept_and_scored_and_ends_with_code_3",
    "9.1.3": "test_a_run_over_either_time_limit_is_no_record",
    "9.1.4": QAT + " test_what_is_validated_is_not_rounded",
    "9.1.5": "test_swa_is_what_is_exported test_normuon_reads_muon_beta2 test_every_field_of_training_has_a_case",
    "9.1.6": TTT,
    "9.1.7": "test_sliding_windows_score_every_target_of_every_row_once_with_its_context "
             "test_targets_scored_twice_or_never_are_c4",
    "9.1.8": "test_a_missing_package_is_named_before_training_and_at_loading "
             "test_the_kernel_that_was_chosen_and_those_passed_over_are_one_line",
    "9.1.9": "test_labels_say_what_was_done",
    "9.1.10": "test_smear_gate_takes_nothing_from_the_document_before "
              "test_rotary_frequencies_are_those_of_every_length test_zero_and_tiny_rows_decode",
    "9.2.1": "test_ema_start_is_a_fraction_of_the_clock",
    "9.2.2": QAT + " test_the_rounded_forward_is_that_of_the_decoded_artifact",
    "9.2.3": "test_no_switch_of_a_published_script_is_silently_ignored",
    "9.2.4": "test_the_warm_up_gives_the_optimizer_back_as_it_was test_warm_up_steps_are_made_and_undone",
    "9.2.5": "test_two_ranks_make_the_weights_of_one test_the_clip_is_that_of_the_global_gradient",
    "9.2.6": "test_other_validation_text_exports_the_same_weights "
             "test_best_is_the_candidate_of_least_loss_on_the_held_out_end_of_the_training_text",
    "9.2.7": "test_training_and_scoring_in_two_commands_is_the_same_as_in_one",
    "9.2.8": "test_labels_say_what_was_done test_the_size_that_is_stated_is_that_on_the_disk "
             "test_the_warmdown_is_a_straight_line test_the_percentile_is_chosen_for_each_row_by_itself",
    "9.2.9": "test_every_parameter_has_one_role_and_the_right_one test_a_parameter_without_a_role_is_an_error",
    "9.2.10": FREEZE,
    "9.3.1": "test_validation_before_the_freeze_is_c3_except_for_reports "
             "test_a_run_reads_the_shards_in_the_allowed_order",
    "9.3.2": "test_a_run_over_either_time_limit_is_no_record test_each_second_is_charged_to_the_innermost_phase_only "
             "test_calibration_is_part_of_the_budget test_the_schedule_ends_where_calibration_begins",
    "9.3.3": FREEZE,
    "9.3.4": TTT,
    "9.3.5": "test_moments_are_those_of_every_position_and_visit test_the_cache_goes_on_as_the_whole_text_would "
             "test_the_text_does_not_depend_on_the_number_of_ranks",
    "9.3.6": "test_gptq_with_and_without_act_order_is_optimal_brain_surgery "
             "test_act_order_pivots_are_conditional_variances",
    "9.3.7": "test_the_real_command_obeys_the_order_and_its_settings_line_can_be_fed_back "
             "test_labels_say_what_was_done",
    "9.3.8": SLOT,
    "9.3.9": "test_every_field_of_training_has_a_case test_every_setting_is_read_by_the_program",
    "9.3.10": "test_rows_are_those_of_the_matrix_as_stored test_polar_express_uses_its_last_coefficients",
    "9.3.11": "test_depth_recurrence_starts_at_its_fraction_of_the_clock "
              "test_depth_recurrence_that_never_came_is_said_and_stays_off "
              "test_no_graph_is_captured_inside_the_clock",
    "9.3.12": RANS,
    "9.3.13": "test_the_log_starts_with_the_source_and_the_versions",
    "9.3.14": "test_required_kernels_that_are_not_here_are_an_error_that_names_them "
              "test_an_artifact_needs_only_the_package_it_was_packed_with",
    "9.4.1": "test_distributions_that_do_not_sum_to_one_are_c2",
    "9.4.2": FREEZE,
    "9.4.3": NGRAM,
    "9.4.4": LATER + "a temperature",
    "9.4.5": "test_gptq_with_and_without_act_order_is_optimal_brain_surgery "
             "test_a_hessian_without_an_inverse_is_one_line_that_says_what_to_raise",
    "9.4.6": QAT + " test_a_grid_rounds_as_the_exporter_does_and_hands_gradients_on",
    "9.4.7": "test_gptq_does_not_refill_what_was_pruned test_the_smallest_weights_become_zero",
    "9.4.8": "test_a_bad_value_is_named_with_what_would_be_right "
             "test_an_impossible_kernel_that_was_asked_for_is_an_error",
    "9.4.9": "test_labels_say_what_was_done",
    "9.4.10": "test_a_token_outside_the_vocabulary_is_named_by_its_byte_offset "
              "test_targets_scored_twice_or_never_are_c4",
    "9.5.1": "test_distributions_that_do_not_sum_to_one_are_c2 "
             "test_what_breaks_a_condition_is_caught test_nothing_is_found_in_an_honest_predictor",
    "9.5.2": "test_a_bonus_for_the_right_token_in_a_later_chunk_or_row_is_c2",
    "9.5.3": NGRAM,
    "9.5.4": QAT + " test_rounding_costs_less_after_it",
    "9.5.5": "test_complementary_weights_keep_the_size_of_the_loss_and_forget_nothing "
             "test_complementary_weights_count_the_text_of_all_ranks",
    "9.5.6": FREEZE,
    "9.5.7": "test_the_log_starts_with_the_source_and_the_versions",
    "9.5.8": "test_every_field_of_training_has_a_case test_every_setting_is_read_by_the_program",
    "9.5.9": TTT,
    "9.5.10": TTT,
    "9.5.11": "test_a_cpu_takes_math_and_says_why test_required_kernels_that_are_not_here_are_an_error_that_names_them",
    "9.6.1": TTT,
    "9.6.2": "test_a_renamed_setting_says_what_it_is_now test_no_switch_of_a_published_script_is_silently_ignored",
    "9.6.3": FREEZE,
}
FOUND = {"9.1": 10, "9.2": 10, "9.3": 14, "9.4": 10, "9.5": 11, "9.6": 3}


def test_the_table_names_every_defect_and_only_tests_that_exist():
    assert list(TABLE) == [f"{part}.{i}" for part, count in FOUND.items() for i in range(1, count + 1)]
    trees = [ast.parse(path.read_text()) for path in (REPO / "tests").rglob("test_*.py")]
    tests = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {name for answer in TABLE.values() if not answer.startswith(LATER) for name in answer.split()}
    assert not named - tests, f"TABLE in tests/test_defects.py names tests that are not there: {sorted(named - tests)}"


# Time


@pytest.fixture
def clocked(monkeypatch):
    """A clock that stands still but for one second in each step: (now, [(second, weights) after each step])."""
    now, history = [0.0], []
    backward, update = tg.Training.backward, tg.Average.update

    def slow(self, micro):
        now[0] += 1
        return backward(self, micro)

    def recorded(self, *args):
        update(self, *args)
        history.append((now[0], [bank.weight.clone() for bank in self.banks], args))

    monkeypatch.setattr(tg, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=lambda _: "now"))
    monkeypatch.setattr(tg.Training, "backward", slow)
    monkeypatch.setattr(tg.Average, "update", recorded)
    return history


def by_the_clock(folder, **changes):
    """Settings of a run of ten seconds, which the fake clock makes ten steps."""
    return ref.small(**{**text(folder), "iterations": 0, "max_wallclock_seconds": 10, **changes})


def flat(banks):
    return torch.cat([bank.flatten() for bank in banks]).double()


def exported(monkeypatch):
    """The weights that training leaves, shaped like the banks."""
    seen, apply = [], tg.Average.apply
    monkeypatch.setattr(tg.Average, "apply", lambda self, weights: (seen.append(weights), apply(self, weights)))
    return seen


def test_ema_start_is_a_fraction_of_the_clock(clocked, monkeypatch, tmp_path):
    """9.2.1: 40 % of the run was 40 % of the steps so far, so it was always over."""
    out = exported(monkeypatch)
    trained(by_the_clock(tmp_path / "text", ema_start_frac=0.4, ema_decay=0.7), tmp_path)
    assert [second for second, *_ in clocked] == list(range(1, 11))
    mean = flat(clocked[4][1])  # of the first step that began at or after 4 seconds
    for _, weights, _ in clocked[5:]:
        mean = 0.7 * mean + 0.3 * flat(weights)
    torch.testing.assert_close(flat(out[-1]), mean, rtol=1e-5, atol=1e-6)


def test_swa_is_what_is_exported(clocked, monkeypatch, tmp_path):
    """9.1.5: sums that nothing ever read."""
    out = exported(monkeypatch)
    trained(by_the_clock(tmp_path / "text", average="swa", swa_every=2, swa_start_scale=0.9), tmp_path)
    taken = [weights for i, (_, weights, (_, _, scale)) in enumerate(clocked, 1) if i % 2 == 0 and scale < 0.9]
    assert len(taken) == 2
    torch.testing.assert_close(flat(out[-1]), sum(map(flat, taken)) / 2, rtol=1e-5, atol=1e-6)


def test_the_warmdown_is_a_straight_line(clocked, tmp_path):
    """9.2.8: it was called a cosine. Of the clock, not of the steps."""
    trained(by_the_clock(tmp_path / "text", warmdown_frac=0.5, min_lr=0.3), tmp_path)
    np.testing.assert_allclose([scale for *_, (_, _, scale) in clocked], [1] * 6 + [0.8, 0.6, 0.4, 0.3], rtol=1e-6)


@pytest.mark.parametrize("length", [dict(warmdown_frac=0.5), dict(warmdown_frac=0.0, warmdown_seconds=3.0)],
                         ids=["fraction", "seconds"])
def test_the_schedule_ends_where_calibration_begins(clocked, tmp_path, length):
    """9.3.2: two minutes of it after the clock had stopped. Here the learning rate falls to what is left.

    It falls over half of that time, or over three seconds. Late QAT begins below its threshold.
    """
    s = by_the_clock(tmp_path / "text", matrix_quant="gptq", gptq_calibration_tokens=64,
                     gptq_reserve_seconds=4.0, late_qat_threshold=0.7, **length)
    _, rows = trained(s, tmp_path)
    np.testing.assert_allclose([scale for *_, (_, _, scale) in clocked], [1] * 4 + [2 / 3, 1 / 3], rtol=1e-6)
    assert [row["reserved_seconds"] for row in rows if row["event"] == "calibrate"] == [4]
    assert [row["step"] for row in rows if row["event"] == "late_qat"] == [4]


LOOP = dict(num_loops=1, loop_start=1, loop_end=1, enable_looping_at=0.35)


def visits(monkeypatch):
    """How many blocks each forward of a training step visits."""
    seen, forward = [], tg.Objective.forward
    monkeypatch.setattr(tg.Objective, "forward",
                        lambda self, *args: (seen.append(len(self.model.plan)), forward(self, *args))[1])
    return seen


def test_depth_recurrence_starts_at_its_fraction_of_the_clock(clocked, monkeypatch, tmp_path):
    """9.3.11: at a number of steps, which slower hardware never reached."""
    seen = visits(monkeypatch)
    _, rows = trained(by_the_clock(tmp_path / "text", train_batch_tokens=16, **LOOP), tmp_path)
    assert seen == [3] * 4 + [4] * 6, "from the first step that begins at or after 3.5 seconds"
    assert not [row for row in rows if row["event"] == "never_reached" and row["what"] == "ENABLE_LOOPING_AT"]


def test_depth_recurrence_that_never_came_is_said_and_stays_off(toy, tmp_path):
    words = ("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "ENABLE_LOOPING_AT=0.9", "ITERATIONS=3", "EVAL_STRIDE=0")
    good(call(command(toy, tmp_path, *words, "AVERAGE=none")))
    (row,) = [row for row in events(tmp_path, "never_reached") if row["what"] == "ENABLE_LOOPING_AT"]
    assert "does not loop" in row["consequence"]
    assert tg.load_artifact(tmp_path / "model.pg")[1].looping is False
    validated, scored = (events(tmp_path, name)[-1]["val_loss"] for name in ("val", "final"))
    assert scored == pytest.approx(validated, abs=0.02), "what is scored has the depth of what was trained"


@pytest.mark.parametrize("changes", [dict(train_seq_schedule="8@0.4,16@1", **LOOP),
                                     dict(loader="packed", doc_mask="attention", complement_alpha=0.5)], ids=str)
def test_no_graph_is_captured_inside_the_clock(monkeypatch, tmp_path, changes):
    """9.3.11: half a minute of compilation in the middle of the ten. Captured whole, with no code generated."""
    s = ref.small(**{**text(tmp_path / "text"), "iterations": 6, "warmup_steps": 1, "compile": "on",
                     "val_loss_every": 2, "num_layers": 2, "ve_layers": (1,), **changes})
    counts = captured_whole(monkeypatch)
    _, rows = trained(s, tmp_path)
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0 and sum(row["event"] == "train" for row in rows) == 6


@pytest.mark.parametrize("seconds, word", [
    ({"train": 599, "calibrate": 2}, "training took 601"), ({"train": 601}, "training took 601"),
    ({"train": 599, "eval": 601}, "evaluation took 601"), ({"train": 599, "eval": 599, "validate": 99}, None)])
def test_a_run_over_either_time_limit_is_no_record(tmp_path, seconds, word):
    """9.1.3, 9.3.2: 1384 s of evaluation reported as 845; minutes of work between the two clocks."""
    s = ref.small(device="cpu")
    run = tg.Run(s, tg.Runtime(s, {}), tmp_path, tg.attend_sdpa)
    run.clock.seconds.update({name: float(count) for name, count in seconds.items()})
    tg.summarise(run)
    (row,) = events(tmp_path, "summary")
    said = [reason for reason in row["eligible_reasons"] if "took" in reason]
    assert row["eligible"] == "no" and ([word in reason for reason in said] == [True] if word else not said)
    assert {name: row[f"{name}_seconds"] for name in seconds} == seconds


# Optimizer


def test_normuon_reads_muon_beta2(tmp_path):
    """9.1.5, 9.3.9, 9.5.8: four systems read it from the environment and used it nowhere."""
    runs = []
    for normuon, beta2 in ((True, 0.9), (True, 0.1), (False, 0.9)):
        s = ref.small(**text(tmp_path / "text"), iterations=4, average="none", normuon=normuon, muon_beta2=beta2)
        runs.append(trained(s, tmp_path / f"{normuon}{beta2}")[0])
    name = "blocks.1.mlp.up.weight"
    assert all((a[name] - b[name]).abs().max() > 1e-4 for i, a in enumerate(runs) for b in runs[:i])


def test_the_warm_up_gives_the_optimizer_back_as_it_was(tmp_path, monkeypatch):
    """9.2.4: moments and step counts of twenty discarded steps were kept, on some numbers of GPUs."""
    s = ref.small(**text(tmp_path / "text"), warmup_steps=2, normuon=True, mtp_num_heads=1)
    run = tg.Run(s, tg.Runtime(s, {}), tmp_path, tg.attend_sdpa)
    state = tg.Training(run, ref.randomise(tg.GPT(s), spread=0.2))
    before, weights = state.optimizer.state_dict(), [bank.weight.clone() for bank in state.optimizer.banks]
    steps, step = [], tg.MuonAdam.step
    monkeypatch.setattr(tg.MuonAdam, "step", lambda self, *args: (steps.append(self.t), step(self, *args)))
    state.warm_up()
    assert steps == [0, 1]
    after = state.optimizer.state_dict()
    assert after.keys() == before.keys() and after["t"] == 0
    for name in set(before) - {"t"}:
        assert all(torch.equal(a, b) and not a.any() for a, b in zip(after[name], before[name])), name
    assert all(torch.equal(bank.weight, weight) for bank, weight in zip(state.optimizer.banks, weights))


def test_the_clip_is_that_of_the_global_gradient():
    """9.2.5: clipped before it was summed, the update depended on the number of GPUs. Here one norm for all of it."""
    s = ref.small(grad_clip_norm=0.5)
    model = ref.randomise(tg.GPT(s))
    optimizer = tg.MuonAdam(model, s, ref.alone())
    for parameter in model.parameters():
        parameter.grad.fill_(0.3)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer._clip([bank.grad for bank in optimizer.banks])
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), 0.5 / math.sqrt(count), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("rows, cols", [(40, 12), (12, 40), (16, 16)])
def test_rows_are_those_of_the_matrix_as_stored(rows, cols):
    """9.3.10: tall matrices had been transposed before, so their columns were normalised."""
    g = torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(-2, 2, rows, dtype=torch.float64)[None, :, None]
    across = torch.logspace(-1, 1, cols, dtype=torch.float64)
    ortho = [tg.newton_schulz(z, 5, "classic", True, torch.float64) for z in (g, g * sizes, g * across)]
    torch.testing.assert_close(ortho[0], ortho[1], rtol=1e-9, atol=1e-9)
    assert (ortho[0] - ortho[2]).abs().max() > 0.05
    plain = [tg.newton_schulz(z, 5, "classic", False, torch.float64) for z in (g, g * sizes)]
    assert (plain[0] - plain[1]).abs().max() > 0.05


def test_polar_express_uses_its_last_coefficients():
    """9.3.10: the fifth of five was dropped. Of a single number each iteration is a polynomial."""
    table = tg.NEWTON_SCHULZ["polar_express"]
    assert len(table) == 5
    x = 1 / (1 + 1e-7)
    for steps in range(1, 8):
        a, b, c = table[min(steps, 5) - 1]
        x = a * x + b * x**3 + c * x**5
        one = tg.newton_schulz(torch.ones(1, 1, 1, dtype=torch.float64), steps, "polar_express", dtype=torch.float64)
        assert one.item() == pytest.approx(x, rel=1e-9)


def test_complementary_weights_keep_the_size_of_the_loss_and_forget_nothing():
    """9.5.5: not divided by their mean, counted by each GPU for itself, in floats that stop at 2^24."""
    s, rng = ref.small(complement_alpha=1.0, vocab_size=8), np.random.default_rng(0)
    complement = tg.Complement(s, ref.alone())

    def batch():
        ids = torch.from_numpy(rng.integers(0, 8, (2, 17)))
        return [(row[None, :-1], row[None, 1:]) for row in ids]

    first = complement.weights(batch())
    assert all(torch.equal(w, torch.ones_like(w)) for w in first), "nothing has been counted"
    for _ in range(20):
        complement.observe(batch())
    weights = torch.cat([w.flatten() for w in complement.weights(batch())])
    assert weights.mean().item() == pytest.approx(1, abs=1e-6) and weights.std() > 0.01
    shares = []
    for times in (2**24, 2**25, 2**26):  # token 2 follows 1 every second time, however often 1 was seen
        complement.load_state_dict({"pairs": torch.tensor([8 + 2, 8 + 3]), "times": torch.tensor([times, times])})
        complement.observe([(torch.tensor([[1]]), torch.tensor([[2]]))])
        assert complement.pair_counts[10].item() == times + 1
        known, new = complement.weights([(torch.tensor([[1, 4]]), torch.tensor([[2, 4]]))])[0][0].tolist()
        shares.append(known / new)
    assert shares == pytest.approx([0.5] * 3, rel=1e-6)


# Model


@pytest.mark.parametrize("changes", [dict(), dict(smear_gate="scalar", gate_window=4),
                                     dict(trigram=True, trigram_vocab_size=9, trigram_dim=4)], ids=str)
def test_smear_gate_takes_nothing_from_the_document_before(changes):
    """9.1.10: the last token of a document leaked into the first position of the next, in all five systems."""
    ids = ref.tokens(32, 1, 12, bos=0)
    ids[0, 5] = tg.BOS
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 7) % 30 + 2
    embedded = {}
    for mask in ("inputs", "none"):
        model, seen = ref.double(ref.small(doc_mask=mask, **changes)), []
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with torch.no_grad():
            model.hidden(ids), model.hidden(other)
        embedded[mask] = [x[0, 5:] for x in seen]
    assert torch.equal(*embedded["inputs"])
    a, b = embedded["none"]
    assert (a[0] - b[0]).abs().max() > 1e-3, "without the mask it does"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 31, 64])
def test_rotary_frequencies_are_those_of_every_length(length):
    """9.1.10, 9.3.5: the base followed the length of the input, so short and long windows were other models."""
    s = ref.small(rope_dims=4, eval_seq_len=64)
    model, ids = ref.double(s, spread=0.3), ref.tokens(32, 1, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids[:, :length]), model.hidden(ids)[:, :length], rtol=1e-9, atol=1e-9)


# What is said and chosen


@pytest.mark.parametrize("words, size, final", [
    (["COMPRESSOR=zlib"], "int6+zlib", "final_int6_sliding_window"),
    (["MATRIX_BITS=5", "COMPRESSOR=lzma", "EVAL_STRIDE=0"], "int5+lzma", "final_int5_contiguous"),
    (["MATRIX_BITS=16", "COMPRESSOR=zlib", "EVAL_STRIDE=0"], "float16+zlib", "final_float16_contiguous"),
    (["MATRIX_BITS=8", "COMPRESSOR=brotli", "EVAL_STRIDE=64"], "int8+brotli", "final_int8_contiguous")])
def test_labels_say_what_was_done(toy, tmp_path, words, size, final):
    """9.1.9, 9.2.8, 9.4.9: "int8_zlib" for int6 and zstd, "int6" for int5."""
    done = good(call(command(toy, tmp_path, "ITERATIONS=1", *words)))
    lines = log_lines(tmp_path)
    assert sum(line.startswith(f"Total submission size {size}: ") for line in lines) == 1
    assert sum(line.startswith(final + " ") for line in lines) == 1 and summary(done)["predictor"] == final[6:]
    compressor = size.partition("+")[2]
    assert {chosen for _, chosen, *_ in tg.read_artifact(tmp_path / "model.pg")[0]["streams"]} == {compressor}


def test_the_size_that_is_stated_is_that_on_the_disk(toy, tmp_path):
    """9.1.2, 9.2.8: a size in the submission that no log had, and blobs of other sizes from run to run."""
    sizes = []
    for name in ("one", "two"):
        done = good(call(command(toy, tmp_path / name, "ITERATIONS=2", "EVAL_STRIDE=0")))
        said, code = summary(done), len(Path(tg.__file__).read_bytes())
        assert said["model_bytes"] == (tmp_path / name / "model.pg").stat().st_size and said["code_bytes"] == code
        assert said["total_bytes"] == said["model_bytes"] + code
        assert said["total_bytes"] == events(tmp_path / name, "artifact")[0]["total_bytes"]
        sizes.append(said["total_bytes"])
    assert sizes[0] == sizes[1]


def test_other_validation_text_exports_the_same_weights(toy, tmp_path):
    """9.2.6: the best of three candidates was chosen by the very score that was then reported."""
    source = Path(next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH=")))
    folder, hashes, scores = Path(shutil.copytree(source, tmp_path / "data")), [], []
    for name in ("one", "two"):
        done = good(call(command(toy, tmp_path / name, f"DATA_PATH={folder}", "AVERAGE=best", "HOLDOUT_TOKENS=700",
                                 "SWA_EVERY=1", "SWA_START_SCALE=1", "LAWA_FREQ=1", "LAWA_K=2", "EVAL_STRIDE=0",
                                 "VAL_LOSS_EVERY=2")))
        hashes.append(summary(done)["artifact_sha256"])
        scores.append(summary(done)["val_bpb"])
        write_shard(folder / "fineweb_val_000000.bin", [1, *np.random.default_rng(0).integers(8, 500, 3000)])
    assert hashes[0] == hashes[1] and scores[0] != scores[1]
