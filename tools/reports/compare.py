"""Settings compared over seeds."""

import statistics

from reports.facts import names_of
from reports.table import NONE, OF_THE_PLACE, differing_settings, shown, text_of
from tables import Column, aligned

# Settings in which runs of one configuration differ. Those of a sweep may begin with the weights of another run.
OF_ONE_RUN = (*OF_THE_PLACE, "SEED", "RESUME", "PHASES", "ARTIFACT", "CHECKPOINT_EVERY", "TRAIN_LOG_EVERY")


def compare(every):
    """([{heading: cell} of a group], notes). A group is of runs that differ in nothing but the seed; the first is the
    reference of the others. The notes are sentences: runs that do not count, and why.
    """
    groups = {}
    for name, facts in zip(names_of(every), every):
        key = frozenset((setting, value) for setting, value in facts["settings"].items() if setting not in OF_ONE_RUN)
        groups.setdefault(key, {})[name] = facts
    text = next((text_of(facts) for facts in every if facts["valid"] == "yes" and facts["final_bpb"] is not None), None)
    differing = differing_settings([dict(key) for key in groups])
    lines = []
    notes = []
    reference = {}
    for place, runs in enumerate(groups.values()):
        why_not = {name: not_counted(facts, text) for name, facts in runs.items()}
        notes += [f"{name}, seed {runs[name]['seed']}: {why}" for name, why in why_not.items() if why]
        counted = [facts for name, facts in runs.items() if not why_not[name]]
        scores = {seed: statistics.fmean(facts["final_bpb"] for facts in counted if facts["seed"] == seed)
                  for seed in dict.fromkeys(facts["seed"] for facts in counted)}
        reference = reference if place else scores
        changed = [f"{name}={values[place]}" for name, values in differing.items()
                   if not place or values[place] != values[0]]
        lines.append({
            "": f"group {place + 1}" if place else "reference",
            "seeds": str(len(scores)),
            "mean BPB": mean(scores.values(), ".4f"),
            "difference by seed": paired(scores, reference) if place else "",
            "bytes in total": mean([facts["total_bytes"] for facts in counted], ",.0f"),
            "tokens per second": mean([facts["tokens_per_second"] for facts in counted], ",.0f"),
            "settings": " ".join(changed)})
    return lines, notes


def not_counted(facts, text):
    """Why the score of a run does not count, or ""."""
    score = shown(facts["final_bpb"])
    if score == NONE:
        return f"no score, {facts['ended']}"
    if facts["valid"] != "yes":
        return f"INVALID, {score} is not counted: {'; '.join(facts['reasons']) or 'not finished'}"
    if text_of(facts) != text:
        return f"NOT COMPARABLE, {score} is not counted: it is of another text than the first score"
    return ""


def mean(values, form):
    known = [value for value in values if value is not None]
    return shown(statistics.fmean(known) if known else None, form)


def paired(scores, reference):
    """Mean difference over the seeds that both have, and its standard error where these are more than one."""
    differences = [scores[seed] - reference[seed] for seed in scores if seed in reference]
    if not differences:
        return NONE
    difference = mean(differences, "+.4f")
    if len(differences) > 1:
        difference += f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.4f}"
    of_seeds = "" if len(differences) == len(scores) else f" ({len(differences)} of {len(scores)} seeds)"
    return difference + of_seeds


def comparison(every):
    """The lines of compare()."""
    lines, notes = compare(every)
    columns = [Column(heading, heading, None if heading in ("", "settings") else "") for heading in lines[0]]
    yield from (f"  {line}" for line in aligned(columns, lines))
    yield "\nDifference: mean over the seeds that both have, ± its standard error where these are more than one."
    yield from notes
