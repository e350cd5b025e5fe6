"""What a run writes down of itself in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cfs.eval.skills import Score
from cfs.train.config import TrainConfig
from cfs.train.kl import KLEstimate
from cfs.train.loop import Progress


@dataclass(frozen=True)
class Measured:
    """What a finished model scored."""

    skills: dict[str, Score]
    kl: KLEstimate | None


def summarise(
    config: TrainConfig,
    progress: Progress,
    base: dict[str, Score],
    results: dict[str, Measured],
) -> dict[str, Any]:
    """The content of summary.json; accuracies are shares in [0, 1], memory is of one rank.

    results  of the one model, or of each variant of a sweep; the first is the run's own
    """
    first = next(iter(results.values()))
    found = {name: _measures(result, base) for name, result in results.items()}
    summary = {
        "method": config.method,
        "seed": config.seed,
        **_measures(first, base),
        "steps": progress.step,
        "targets_task": progress.targets_task,
        "targets_synthetic": progress.targets_synthetic,
        "train_seconds": progress.seconds,
        "new_skills": [name for name in first.skills if name in config.scored_skills],
    }
    return summary | ({"sweep": found} if len(found) > 1 else {})


def _measures(result: Measured, base: dict[str, Score]) -> dict[str, Any]:
    skills = {
        name: {
            "base": base[name].accuracy if base else None,
            "tuned": score.accuracy,
            "se": score.se,
        }
        for name, score in result.skills.items()
    }
    kl = result.kl
    return {
        "kl_nats": kl.nats if kl else None,
        "kl_se": kl.se if kl else None,
        "skills": skills,
    }
