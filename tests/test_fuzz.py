"""Files that were damaged by somebody who knows the formats: refused in one line, or they mean what they say.

A short form of `python tests/help/fuzzing.py artifacts --count 10000` and `... checkpoints --count 500`, which say
by seed and number which file it was.
"""

import math
import os

import fuzzing
import pytest

SEED = os.environ.get("TEST_SEED", "1")


@pytest.mark.parametrize("kind, count", [("artifacts", 150), ("checkpoints", 50)])
def test_damaged_files_are_refused_in_one_line_or_mean_what_they_say(tmp_path, kind, count):
    """Within 4 GiB of address space, and in seconds."""
    if kind == "artifacts":
        cases = fuzzing.Artifacts(tmp_path)
    else:
        cases = fuzzing.Checkpoints(tmp_path, *fuzzing.small_run(tmp_path))
    report = fuzzing.fuzz(cases, SEED, range(count))
    assert not report["failures"], "\n".join(report["failures"])
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == count
    good = sum(number for what, number in outcomes.items() if what.endswith(" good"))
    refused = sum(number for what, number in outcomes.items() if what.endswith(" refused"))
    assert good > count / 20 and refused > count / 2, outcomes


class Cases(fuzzing.Artifacts):
    """Files that a loader would deal with as `act` does."""

    def __init__(self, act):
        self.act = act

    def damage(self, rng):
        return self.offer, None

    def offer(self, case):
        return self.act()

    def describe(self, case):
        return "this file"


def wrong_weights():
    raise AssertionError("embed.weight is not what the file holds")


def traceback_of_a_loader():
    return [][0]


def much_memory():
    return bytearray(6 << 30)


def much_time():
    while True:
        math.sqrt(2)


def sudden_end():
    os._exit(3)


@pytest.mark.parametrize("act, words", [
    (wrong_weights, "not what the file holds"), (traceback_of_a_loader, "IndexError"),
    (much_memory, "MemoryError"),
    (much_time, "took more than 1 s"), (sudden_end, "the worker died")])
def test_the_fuzzer_notices(monkeypatch, act, words):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    (failure,) = fuzzing.fuzz(Cases(act), 7, [5])["failures"]
    assert words in failure and "seed 7 number 5" in failure


@pytest.mark.parametrize("line", ["two\nlines FILE", "FILE " + 300 * "x", "no name", "FILE \x1b[31m"])
def test_the_fuzzer_wants_one_printable_line_that_names_the_file(line):
    with pytest.raises(AssertionError):
        fuzzing.check_line(fuzzing.tg.BadInput(line), "FILE")
    fuzzing.check_line(fuzzing.tg.BadInput("FILE: not an artifact"), "FILE")
