"""Whether a policy became better: gold scores, KL, win rates, Elo, best-of-n."""

from rlhf_core.data.quality import length_bias
from rlhf_core.evaluation.best_of_n import best_of_n_curve, best_of_n_kl
from rlhf_core.evaluation.policies import Evaluation, evaluate_policy
from rlhf_core.evaluation.ratings import elo, win_rate

__all__ = [
    "Evaluation",
    "best_of_n_curve",
    "best_of_n_kl",
    "elo",
    "evaluate_policy",
    "length_bias",
    "win_rate",
]
