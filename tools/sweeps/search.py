"""Search beyond a grid: Optuna proposes the points, and is told what their runs scored."""

from common import BadInput
from sweeps.plan import PlanRow


class Search:
    """A study in memory: the same command asks the same questions again, and finds their runs made."""

    def __init__(self, axes):
        try:
            import optuna
        except ImportError:
            raise BadInput("a search over a range needs optuna: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        self.axes = axes
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self.trials = {}  # row name -> trial

    def ask(self, count):
        """Rows of `count` new points, less those that were asked for before."""
        rows = []
        for _ in range(count):
            trial = self.study.ask()
            changes = tuple(axis.suggest(trial) for axis in self.axes)
            name = " ".join(changes)
            if name not in self.trials:
                rows.append(PlanRow(name, changes, None, "search"))
            self.trials.setdefault(name, []).append(trial)
        return rows

    def tell(self, name, score):
        """What a row scored in the mean, None if it could not be scored."""
        from optuna.trial import TrialState

        for trial in self.trials[name]:
            if trial.number in self.told():
                continue
            if score is None:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.study.tell(trial, score)

    def told(self):
        return {trial.number for trial in self.study.trials if trial.state.is_finished()}
