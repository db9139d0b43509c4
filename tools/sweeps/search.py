"""Search beyond a grid: Optuna proposes the points, and is told what their runs scored."""

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from sweeps.plan import FIELDS, PlanRow, Range


def distribution(name, values):
    """What Optuna is asked for, of a setting and its values in a plan."""
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if FIELDS[name].type is int:
        return IntDistribution(int(values.low), int(values.high))
    by_factor = values.low > 0 and values.high / values.low >= 4  # rates and decays differ by factors
    return FloatDistribution(values.low, values.high, log=by_factor)


def search(ranges, trials, at_once, scores_of):
    """Try points, some at a time. scores_of(rows) gives the mean score of each row, or None; with nothing it ends the
    search. The study is kept in memory: the same command asks the same questions again, and finds their runs made.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
    distributions = {name: distribution(name, values) for name, values in ranges.items()}
    while len(study.trials) < trials:
        asked = [study.ask(distributions) for _ in range(min(at_once, trials - len(study.trials)))]
        rows = []
        for trial in asked:
            changes = tuple(f"{name}={f'{value:.4g}' if isinstance(value, float) else value}"
                            for name, value in trial.params.items())
            rows.append(PlanRow(" ".join(changes), changes, None, "search"))
        scores = scores_of(rows)
        if not scores:
            return
        for trial, score in zip(asked, scores):
            study.tell(trial, score, TrialState.FAIL if score is None else None)
