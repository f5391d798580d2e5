"""The arithmetic of RLHF: pure functions of tensors, torch only. No config, no I/O, no model.

Shape letters: `B` rows, `R` response positions, `N` tokens, `D` hidden width, `V` vocabulary; `*S` is any
shape, `""` a scalar. These annotations are checked while the tests run and cost nothing else.
In a mask, True means *counts*, and a response's mask is True from its first token to its last: a prefix of each row.
Positions that do not count may hold anything, NaN included. Log-probabilities and KL are in nats.
"""

from tether.math.advantages import gae, group_advantages, place_rewards
from tether.math.bellman import bellman_loss
from tether.math.best_of_n import (
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_probabilities,
    best_of_n_score,
)
from tether.math.bootstrap import Interval, bootstrap_mean
from tether.math.diagnostics import (
    distinct_pairs,
    explained_variance,
    grouped_std,
    optimality_gap,
    optimality_gap_logmeanexp,
    shared_phrase,
)
from tether.math.ensemble import disagreement, pessimistic_mean
from tether.math.ilql import expectile_loss, ilql_logits, q_loss, q_targets
from tether.math.kl import hold_kl, kl_error, kl_k1, kl_k2, kl_k3, next_kl_coef
from tether.math.logprobs import Head, full_logprobs, token_logprobs
from tether.math.losses import (
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    entropy_mean,
    importance_weights,
    kl_loss,
    nll_loss,
    value_loss,
)
from tether.math.masked import masked_mean, masked_sum, masked_var, whiten
from tether.math.overoptimization import GoldFit, best_of_n_law, fit_best_of_n, fit_rl, rl_law
from tether.math.preference_losses import (
    ipo_loss,
    kto_loss,
    kto_point,
    log_odds,
    noisy_targets,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
    sum_answers,
    unpaired_loss,
)
