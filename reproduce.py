"""Run a study, a comparison of methods over seeds, and write its table and its figures.

    python reproduce.py methods --scale tiny --dry-run
    python reproduce.py methods --scale tiny --seeds 3 --out runs/methods-tiny

Each run is one process of train.py; several go at a time. Interrupted, the same command goes on:
a finished run is not run again.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cfs.cli import option, parse, run
from cfs.errors import UserError
from cfs.eval.studies import Flags, Study, known_studies, plan_runs, read_study
from cfs.eval.study_report import report_study
from cfs.eval.study_runs import (
    FailedRunsError,
    check_records,
    claimed,
    describe,
    num_cores,
    run_all,
)

TRAINER = [sys.executable, str(Path(__file__).with_name("train.py"))]
AGAIN = "run the same command again"


@dataclass(frozen=True)
class ReproduceConfig:
    """Flags of `reproduce.py`, in kebab-case there; the study's name may stand alone in front."""

    study: str = option(None, "what to run, also without its flag as the first word")
    scale: Literal["tiny", "paper"] = option("tiny", "TinyWorld on a laptop, or the paper's models")
    seeds: int = option(3, "runs of each setting, which differ in their seed")
    seed: int = option(0, "the first of the seeds")
    steps: int | None = option(None, "gradient steps of each run; default: the study's")
    only: list[str] | None = option(  # noqa: RUF009 (it makes a field)
        None, "run only these rows, and what they need", "LABEL"
    )
    jobs: int | None = option(None, "runs at a time; default: the number of cores")
    out: str | None = option(None, "where all goes; default: runs/STUDY-SCALE")
    dry_run: bool = option(False, "print the runs and what they will take, and stop")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "as in train.py")
    dtype: Literal["float32", "bfloat16"] | None = option(None, "as in train.py")

    def __post_init__(self) -> None:
        if self.study is None:
            raise UserError(f"no study is named; expected one of {', '.join(known_studies())}")
        for name in ("seeds", "jobs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: expected at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected 0 or more")

    def shared_flags(self, study: Study) -> Flags:
        """Flags of train.py for every run: the study's at this scale, under those given here."""
        if self.scale not in study.scales:
            known = ", ".join(study.scales)
            raise UserError(f"--scale {self.scale}: study {study.name} has only {known}")
        given = {"steps": self.steps, "dtype": self.dtype}
        if self.device != "auto":
            given["device"] = self.device
        return study.scales[self.scale] | {k: v for k, v in given.items() if v is not None}


def reproduce(config: ReproduceConfig) -> None:
    """One study from its flags to its figures. Raises `UserError`."""
    study = read_study(config.study)
    for label in config.only or []:
        if label not in [row.label for row in study.rows]:
            known = ", ".join(row.label for row in study.rows)
            raise UserError(f"--only {label}: study {study.name} has no such row; it has {known}")
    seeds = range(config.seed, config.seed + config.seeds)
    plan = plan_runs(study, config.shared_flags(study), seeds)
    out = Path(config.out or f"runs/{study.name}-{config.scale}")
    runs = plan.selected(study, config.only)
    jobs = config.jobs or num_cores()
    check_records(out, list(plan.runs.values()))
    if config.dry_run:
        print(describe(out, plan, runs, jobs))
        return
    with claimed(out):
        try:
            failures = run_all(out, runs, TRAINER, jobs)
        except KeyboardInterrupt:
            print(f"\n{sys.argv[0]}: interrupted; {AGAIN} to go on", file=sys.stderr)
            raise
        report_study(study, plan, out)
    if failures:
        raise FailedRunsError(
            f"{len(failures)} of {len(runs)} runs failed ({', '.join(failures)}); see "
            f"{out / 'logs'}, and {AGAIN} for those"
        )


def main() -> None:
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's wish
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--study", *arguments]
    reproduce(parse(ReproduceConfig, DESCRIPTION, arguments))


DESCRIPTION = (
    "Run a study (reproduce.py STUDY ...): every method that it compares, over several seeds, and "
    f"its table and figures from them. Studies: {', '.join(known_studies())}, or a FILE.yaml."
)

if __name__ == "__main__":
    run(main, resumes=AGAIN)
