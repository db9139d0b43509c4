"""Settings compared over seeds."""

import statistics
from typing import NamedTuple

from reports.facts import names_of
from reports.table import NONE, OF_THE_PLACE, aligned, bits, differing_settings, text_of

# Settings in which runs of one configuration differ. Those of a sweep may begin with the weights of another run.
OF_ONE_RUN = (*OF_THE_PLACE, "SEED", "RESUME", "PHASES", "ARTIFACT", "CHECKPOINT_EVERY", "TRAIN_LOG_EVERY")


class Comparison(NamedTuple):
    """Groups of runs that differ in nothing but the seed; the first is the reference of the others."""

    head: list  # of columns
    lines: list  # of cells, one a group
    notes: list  # sentences: runs that do not count, and why


def compare(every):
    """The Comparison of these runs."""
    groups = {}
    for name, facts in zip(names_of(every), every):
        key = frozenset((setting, value) for setting, value in facts["settings"].items() if setting not in OF_ONE_RUN)
        groups.setdefault(key, []).append((name, facts))
    scored = [facts for facts in every if facts["valid"] == "yes" and facts["final_bpb"] is not None]
    text = text_of(scored[0]) if scored else None
    differing = differing_settings([dict(key) for key in groups])
    lines = []
    notes = []
    reference = {}
    for place, runs in enumerate(groups.values()):
        counted = []
        for name, facts in runs:
            why_not = not_counted(facts, text)
            counted += [] if why_not else [facts]
            notes += [f"{name}, seed {facts['seed']}: {why_not}"] if why_not else []
        scores = by_seed(counted)
        if place == 0:
            reference = scores
        changed = [f"{name}={values[place]}" for name, *values in differing
                   if place == 0 or values[place] != values[0]]
        lines.append([
            f"group {place + 1}" if place else "reference", str(len(scores)), mean(scores.values(), ".4f"),
            paired(scores, reference) if place else "", mean([facts["total_bytes"] for facts in counted], ",.0f"),
            mean([facts["tokens_per_second"] for facts in counted], ",.0f"), " ".join(changed)])
    head = ["", "seeds", "mean BPB", "difference by seed", "bytes in total", "tokens per second", "settings"]
    return Comparison(head, lines, notes)


def not_counted(facts, text):
    """Why the score of a run does not count, or ""."""
    if facts["final_bpb"] is None:
        return f"no score, {facts['ended']}"
    if facts["valid"] != "yes":
        return f"INVALID, {bits(facts['final_bpb'])} is not counted: {'; '.join(facts['reasons']) or 'not finished'}"
    if text_of(facts) != text:
        return f"NOT COMPARABLE, {bits(facts['final_bpb'])} is not counted: it is of another text than the first score"
    return ""


def by_seed(counted):
    """{seed: mean score of its runs}."""
    scores = {}
    for facts in counted:
        scores.setdefault(facts["seed"], []).append(facts["final_bpb"])
    return {seed: statistics.fmean(values) for seed, values in scores.items()}


def mean(values, form):
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else NONE


def paired(scores, reference):
    """Mean difference over the seeds that both have, and its standard error where these are more than one."""
    differences = [scores[seed] - reference[seed] for seed in scores if seed in reference]
    if not differences:
        return NONE
    shown = bits(statistics.fmean(differences), "+")
    if len(differences) > 1:
        shown += f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.4f}"
    return shown if len(differences) == len(scores) else f"{shown} ({len(differences)} of {len(scores)} seeds)"


def comparison(every):
    """The lines of compare()."""
    found = compare(every)
    table = [found.head, *found.lines]
    for line, cells in zip(aligned([cells[:-1] for cells in table]), table):
        yield f"{line}  {cells[-1]}".rstrip()
    yield "\nDifference: mean over the seeds that both have, ± its standard error where these are more than one."
    yield from found.notes
