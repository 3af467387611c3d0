"""`ranker tune`: search for a run's settings by its validation split, one training a trial.

By Optuna's TPE (Bergstra et al. 2011).

What is searched is the metric that ``training.monitor`` names, at its best. Trials are run folders; of all but the best
the checkpoints are removed. The study is a journal in the folder: the same command goes on with it, and repeats a trial
that was interrupted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from features.config_file import dump_config, load_config
from features.config_yaml import read_yaml
from features.dataset import Dataset
from features.errors import UserError
from features.progress import Progress, log
from ranker.compare.launching import ChildProcesses
from ranker.compare.running import tail
from ranker.config import TrainConfig
from ranker.run import Run, write_json, write_text
from ranker.training import checkpoint

if TYPE_CHECKING:
    from optuna import Study, Trial

_RANGE = re.compile(r"^(?P<low>[^,]+)\.\.(?P<high>[^,]+?)(?P<log> log)?$")


class Dimension(NamedTuple):
    """One key to search: between `low` and `high`, in whole numbers if both are whole, or among choices (as JSON)."""

    key: str
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Trial) -> str:
        """The trial's value, as JSON."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return json.dumps(trial.suggest_int(self.key, self.low, self.high, log=self.log))
        return json.dumps(trial.suggest_float(self.key, self.low, self.high, log=self.log))


def parse_space(texts: Sequence[str]) -> list[Dimension]:
    """From KEY=LOW..HIGH, KEY=LOW..HIGH log, or KEY=A,B,C.

    Raises:
        UserError: none of these, or a key twice.

    >>> parse_space(["optimizer.lr=1e-4..1e-1 log"])[0]
    Dimension(key='optimizer.lr', low=0.0001, high=0.1, log=True, choices=())
    """
    found: dict[str, Dimension] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        match = _RANGE.match(values)
        if not equals or not values or key in found or (".." in values and match is None):
            raise UserError(f"--space {text}: must be KEY=LOW..HIGH, KEY=LOW..HIGH log or KEY=A,B,C, each key once")
        if match is not None:
            low, high = (_yaml(text, match[end]) for end in ("low", "high"))
            numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
            if not numbers or low >= high or (match["log"] and low <= 0):
                raise UserError(f"--space {text}: LOW and HIGH must be numbers that ascend, above 0 with log")
            found[key] = Dimension(key, low, high, match["log"] is not None)
        else:
            found[key] = Dimension(key, choices=tuple(json.dumps(v) for v in _yaml(text, f"[{values}]")))
    return list(found.values())


def _yaml(option: str, text: str) -> Any:
    problems: list[Any] = []
    value = read_yaml(text, option, problems).value
    if problems:
        raise UserError(f"--space {option}: {text!r} is not valid YAML ({problems[0].message})")
    return value


def tune(path: Path, out: Path, space: Sequence[str], trials: int, settings: Sequence[str] = ()) -> dict[str, str]:
    """Search until there are so many trials, those of an earlier call included; the best one's settings.

    Raises:
        UserError: a config or space that cannot be used, no validation split, another space than the folder's, no
            Optuna, or no trial that ended well.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("ranker tune needs Optuna: pip install 'ranker[search]', or pip install optuna") from None
    dimensions, config = parse_space(space), load_config(path, TrainConfig, settings)
    split = config.training.validation_split
    if split is None or split not in Dataset(config.dataset).manifest.filled_splits():
        raise UserError(f"training.validation_split: {split!r} is not in {config.dataset}; a search is judged by it")
    _same_space(out, dimensions, config)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(out / "study.log")))
    direction = "maximize" if config.training.monitor in ("auc", "uauc") else "minimize"
    study = optuna.create_study(storage=storage, study_name="tune", direction=direction, load_if_exists=True)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was ended
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    done = [t for t in study.trials if t.state.is_finished() and "told" in t.user_attrs]
    # a seeded sampler that starts again would draw the same trials again
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
    with Progress("tune", trials, True, len(done)) as progress:
        for _ in range(trials - len(done)):
            trial = study.ask()
            chosen = [f"{d.key}={d.suggest(trial)}" for d in dimensions]
            value = _train(trial.number, out, lambda: load_config(path, TrainConfig, [*settings, *chosen]))  # noqa: B023
            trial.set_user_attr("told", chosen)
            study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
            _keep_best(study, out)
            shown = "failed" if value is None else f"{config.training.monitor} {value:.4f}"
            log(f"trial {trial.number}: {shown}  {' '.join(chosen)}")
            progress.advance()
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise UserError(f"{out}: no trial ended well; their logs are in {out / 'trials'}")
    best = study.best_trial
    log(f"best: trial {best.number}, {config.training.monitor} {best.value:.4f}; {out / 'best.yaml'} is its config")
    log("  " + " ".join(f"--set '{setting}'" for setting in best.user_attrs["told"]))
    write_text(out / "best.yaml", (_trial(out, best.number) / "config.yaml").read_text())
    return dict(setting.split("=", 1) for setting in best.user_attrs["told"])


def _trial(out: Path, number: int) -> Path:
    return out / "trials" / f"{number:04}"


def _train(number: int, out: Path, config_of: Callable[[], TrainConfig]) -> float | None:
    """The monitored metric of a trial at its best; None where its settings are refused, or training fails."""
    run, output = _trial(out, number), out / "trials" / f"{number:04}.log"
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    try:
        config = config_of()
    except UserError as error:
        log(str(error))
        return None
    write_text(out / "trials" / f"{number:04}.yaml", dump_config(config))
    launcher = ChildProcesses(config.training.threads)
    try:
        code = launcher.train(out / "trials" / f"{number:04}.yaml", run, False, output)
    except BaseException:
        launcher.stop()
        raise
    if code:
        log(f"trial {number}: exit code {code} ({output}):\n{tail(output)}")
        return None
    best = checkpoint.position_of(Run(run).checkpoints()[-1]).best
    assert best is not None  # there is a validation split
    return best if config.training.monitor in ("auc", "uauc") else -best


def _keep_best(study: Study, out: Path) -> None:
    """Remove the checkpoints of every trial but the best."""
    complete = [trial for trial in study.trials if trial.value is not None]
    for trial in complete:
        if trial.number != study.best_trial.number:
            shutil.rmtree(_trial(out, trial.number) / "checkpoints", ignore_errors=True)


def _same_space(out: Path, dimensions: list[Dimension], config: TrainConfig) -> None:
    """Record what is searched, and refuse to go on with anything else."""
    wanted = {
        "space": [dimension._asdict() | {"choices": list(dimension.choices)} for dimension in dimensions],
        "config": config.model_dump(mode="json"),
    }
    path = out / "space.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    elif json.loads(path.read_text()) != wanted:
        raise UserError(f"{out}: was searched with another space or config ({path}); choose another --out")
