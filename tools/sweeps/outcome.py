"""What came of a sweep: every score, the differences paired by seed, and how sure they are."""

import math
import statistics

from sweeps.plan import BASE, MATCHES
from sweeps.runs import NOT_MADE
from sweeps.timing import ITSELF


def sample_statistics(values):
    """Mean, extremes and standard deviation of a sample; None of an empty one."""
    values = list(values)
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def scores(runs):
    """{seed: score} of the runs whose score counts."""
    return {seed: run.bpb for seed, run in runs.items() if run.bpb is not None}


def paired(scores_of_row, reference):
    """{seed: difference} over the seeds that both have: what the seed itself does to a score cancels out."""
    return {seed: score - reference[seed] for seed, score in scores_of_row.items() if seed in reference}


def pooled_deviation(samples):
    """Standard deviation of one value about the mean of its sample, over all samples; None where none has two values.

    Two seeds alone say hardly anything about their spread; that of all rows together does.
    """
    samples = [values for values in samples if len(values) > 1]
    squares = sum((len(values) - 1) * statistics.variance(values) for values in samples)
    degrees = sum(len(values) - 1 for values in samples)
    return math.sqrt(squares / degrees) if degrees else None


def judge(rows, match):
    """Give every mean change of the rows its standard error, and say whether it is more than two of them."""
    # The best point of a grid differs by nothing from itself: that says nothing of the noise.
    samples = [list(row[match]["changes"].values()) for row in rows if any(row[match]["changes"].values())]
    deviation = pooled_deviation(samples)
    for change in filter(None, (row[match]["change"] for row in rows)):
        error = None if deviation is None else deviation / math.sqrt(change["count"])
        change["standard_error"] = error
        change["is_clear"] = error is not None and abs(change["mean"]) > 2 * error


def notes(runs, name):
    """Failed and invalid runs of a row, the same thing said once for all its seeds."""
    seeds_of = {}  # (match, note) -> seeds
    for match in MATCHES:
        for seed, run in runs.row(name, match).items():
            seeds_of.setdefault((match, run.note()), []).append(seed)
    return [f"{MATCHES[match]}, seed {', '.join(map(str, seeds))}: {note}"
            for (match, note), seeds in seeds_of.items() if note]


def row_result(plan, runs, row, speed):
    """What one row came to."""
    runs_of = {match: runs.row(row.name, match) for match in MATCHES}
    result = {"name": row.name, "changes": list(row.changes), "reference": row.reference,
              "settings": plan.settings[row.name].text(), "speed": speed._asdict() if speed else None}
    for match in plan.matches:
        of_seeds = scores(runs_of[match])
        result[match] = {
            "iterations": next((run.settings.iterations for run in runs_of[match].values()), None),
            "bpb": sample_statistics(of_seeds.values()),
            "scores": of_seeds,
            "changes": paired(of_seeds, scores(runs.row(row.reference, "steps"))),
        }
    result["runs"] = {match: [run.facts() for run in found.values()] for match, found in runs_of.items()}
    result["notes"] = notes(runs, row.name)
    if speed and speed.error:
        result["notes"].append(f"equal time: the time per step is unknown: {speed.error}")
    return result


def mean_of(sample):
    return sample["mean"] if sample else math.inf


def rank(plan, rows):
    """The rows, best first, those without a score last. In a grid the changes are those from the best point."""
    for match in plan.matches:
        best = min(rows, key=lambda row: mean_of(row[match]["bpb"]), default=None)
        for row in rows:
            found = row[match]
            if plan.grid:
                found["changes"] = paired(found["scores"], best[match]["scores"])
            found["change"] = sample_statistics(found["changes"].values())
        judge(rows, match)
    return sorted(rows, key=lambda row: mean_of(row[plan.matches[0]]["change"]))


def collect(plan, runs, speeds, about):
    """Everything as one object: `about` and what came of the runs so far."""
    base = runs.row(BASE, "steps")
    every = runs.by_folder.values()
    errors = [run.error for run in every if not run.stopped] + [speed.error for speed in speeds.values()]
    devices = {run.fact("device") for run in every if run.summary}
    return {
        **about,
        "steps": plan.steps,
        "seeds": plan.seeds,
        "matches": plan.matches,
        "code_sha256": runs.machine[0],
        "data": runs.texts.facts(plan.settings[BASE]),
        "devices": sorted(filter(None, devices)),
        "left_out": plan.left_out,
        "noise_floor": speeds[ITSELF]._asdict() if ITSELF in speeds else None,
        "base": {
            "words": plan.base_words,
            "settings": plan.settings[BASE].text(),
            "notes": notes(runs, BASE),
            "bpb": sample_statistics(scores(base).values()),
            "runs": [run.facts() for run in base.values()],
        },
        "rows": rank(plan, [row_result(plan, runs, row, speeds.get(row.name)) for row in plan.rows]),
        "failed": sum(bool(error) for error in errors),
        "complete": all(run.error != NOT_MADE for run in every),
        "trainings": sum(run.phase == "train" for run in every),
    }
