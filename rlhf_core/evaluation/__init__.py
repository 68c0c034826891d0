"""Whether a policy became better: gold scores, KL, win rates, ratings, calibration."""

from rlhf_core.data.quality import length_bias
from rlhf_core.evaluation.best_of_n import best_of_n_curve, best_of_n_kl
from rlhf_core.evaluation.calibration import measure_calibration
from rlhf_core.evaluation.comparisons import (
    compare,
    comparisons_needed,
    length_controlled_win_rate,
)
from rlhf_core.evaluation.curves import draw_curves, read_run
from rlhf_core.evaluation.frontier import hypervolume, pareto_frontier
from rlhf_core.evaluation.policies import Evaluation, evaluate_policy
from rlhf_core.evaluation.ratings import davidson, elo, rate_players, win_rate
from rlhf_core.evaluation.refusals import refusal_rate
from rlhf_core.evaluation.report import write_report
from rlhf_core.significance import sign_test, wilson_interval

__all__ = [
    "Evaluation",
    "best_of_n_curve",
    "best_of_n_kl",
    "compare",
    "comparisons_needed",
    "davidson",
    "draw_curves",
    "elo",
    "evaluate_policy",
    "hypervolume",
    "length_bias",
    "length_controlled_win_rate",
    "measure_calibration",
    "pareto_frontier",
    "rate_players",
    "read_run",
    "refusal_rate",
    "sign_test",
    "wilson_interval",
    "win_rate",
    "write_report",
]
