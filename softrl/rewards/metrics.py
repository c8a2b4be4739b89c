"""Metrics of decoded texts by name, as `evaluate.Metric` objects.

`evaluate.load` fetches the script of a metric from a hub; ours need none, and every other name still goes there.
"""

import evaluate

from softrl.rewards.overlap_metrics import Rouge, Sacrebleu
from softrl.rewards.set_metrics import FrechetDistance, SelfBleu

_OURS = {"sacrebleu": Sacrebleu, "rouge": Rouge, "self_bleu": SelfBleu, "frechet": FrechetDistance}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric by name: "sacrebleu", "rouge", "self_bleu", "frechet", or whatever `evaluate.load` finds.

    Raises:
        ValueError: `evaluate.load` cannot find or reach it.
    """
    if name in _OURS:
        return _OURS[name](keep_in_memory=True)
    try:
        return evaluate.load(name)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"metric {name!r} cannot be loaded ({str(error).splitlines()[0]}); without a hub there are "
            f"{sorted(_OURS)}, and evaluate.load takes a local folder"
        ) from error
