"""Losses: every branch by hand, padding that holds NaN, and microbatches that add up."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.math import (
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    entropy_mean,
    importance_weights,
    kl_loss,
    nll_loss,
    token_logprobs,
    value_loss,
)

ONE = torch.ones(1, 1)
YES = torch.ones(1, 1, dtype=torch.bool)


def policy_token(ratio: float, advantage: float, clip: float | tuple[float, float] = 0.2):
    """Loss, gradient and metrics of a single token; the gradient is to its log-prob."""
    new = torch.full((1, 1), math.log(ratio), requires_grad=True)
    loss, metrics = clipped_policy_loss(new, 0 * ONE, advantage * ONE, YES, clip=clip, denominator=1)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad.item(), {name: value.item() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "cut"),
    [
        (1.5, 1.0, -1.2, 0.0, 1.0),  # rose, and should: enough
        (1.5, -1.0, 1.5, 1.5, 0.0),  # rose, and should not: pushed back
        (0.5, 1.0, -0.5, -0.5, 0.0),  # fell, and should not: pushed back
        (0.5, -1.0, 0.8, 0.0, 1.0),  # fell, and should: enough
        (1.1, 1.0, -1.1, -1.1, 0.0),  # inside: both ways
        (0.9, -1.0, 0.9, 0.9, 0.0),
    ],
)
def test_the_clip_cuts_the_gradient_only_of_a_ratio_that_went_far_the_right_way(ratio, advantage, loss, gradient, cut):
    got_loss, got_gradient, metrics = policy_token(ratio, advantage)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert got_gradient == pytest.approx(gradient, rel=1e-6)
    assert metrics["policy/clip_fraction"] == cut


@pytest.mark.parametrize(("ratio", "advantage", "cut"), [(1.25, 1.0, 0.0), (1.3, 1.0, 1.0), (0.75, -1.0, 1.0)])
def test_the_upper_clip_may_be_higher_than_the_lower(ratio, advantage, cut):
    _, gradient, metrics = policy_token(ratio, advantage, clip=(0.2, 0.28))
    assert metrics["policy/clip_fraction"] == cut
    assert (gradient == 0) == bool(cut)


def test_at_ratio_1_the_gradient_is_reinforces():
    logits = torch.tensor([[0.3, -0.2, 0.1, 0.0]], requires_grad=True)
    actions, advantages = torch.tensor([[2, 0, 0]]), torch.tensor([[1.0, -2.0, 0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    logprobs = logits.log_softmax(-1).gather(1, actions)
    loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask, clip=0.2, denominator=3)
    (got,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(-1)[0]  # ∇ log p_a = onehot(a) - p
    want = -sum(a * (torch.eye(4)[k] - p) for a, k in zip([1.0, -2.0, 0.5], [2, 0, 0], strict=True)) / 3
    assert_close(got[0], want)


def test_weighed_samples_of_another_policy_have_the_gradient_of_samples_of_this_one():
    generator = torch.Generator().manual_seed(0)
    theirs, ours, advantages = torch.randn(3, 8, 1, generator=generator, dtype=torch.float64).unbind()
    mask = torch.ones(8, 1, dtype=torch.bool)

    def gradient(sampled, weighed):  # in expectation over the sampler: each of 8 arms once, by its probability
        logits = ours.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        weights = importance_weights(logprobs.detach(), sampled, mask, cap=1e9) if weighed else 1.0
        expected = advantages * weights * sampled.exp()
        loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), expected, mask, clip=0.2, denominator=1)
        return torch.autograd.grad(loss, logits)[0]

    want = gradient(ours.log_softmax(0), weighed=False)
    assert_close(gradient(theirs.log_softmax(0), weighed=True), want, rtol=0, atol=1e-12)
    assert (gradient(theirs.log_softmax(0), weighed=False) - want).abs().max() > 0.1


def test_a_weight_is_cut_at_the_cap_and_1_in_the_padding():
    old, sampled = torch.tensor([[-1.0, -3.0, -1.0, math.nan]]), torch.tensor([[-1.0, -1.0, -9.0, 0.0]])
    weights = importance_weights(old, sampled, torch.tensor([[True, True, True, False]]), cap=2.0)
    assert_close(weights, torch.tensor([[1.0, math.exp(-2), 2.0, 1.0]]))


def test_policy_metrics_worked_by_hand():
    ratio = torch.tensor([[2.0, 0.5, 1.0], [1.0, math.nan, math.nan]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    _, metrics = clipped_policy_loss(ratio.log(), 0 * ratio, torch.ones(2, 3), mask, clip=0.2, denominator=4)
    assert metrics["policy/ratio_mean"].item() == pytest.approx(4.5 / 4)
    assert metrics["policy/ratio_min"].item() == pytest.approx(0.5)
    assert metrics["policy/ratio_max"].item() == pytest.approx(2.0)
    # k3 of KL(old‖new), samples of old: ρ - 1 - ln ρ = 1 - .693147 and -.5 + .693147
    assert metrics["policy/kl_old_new"].item() == pytest.approx(0.5 / 4)
    assert metrics["policy/clip_fraction"].item() == 0.25
    assert metrics["policy/loss"].item() == pytest.approx(-(1.2 + 0.5 + 1 + 1) / 4)


def test_the_diagnostic_kl_is_of_old_to_new_on_samples_of_old():
    old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()  # each action once: expectation exact
    _, metrics = clipped_policy_loss(new, old, torch.zeros(1, 2), torch.ones(1, 2).bool(), clip=0.2, denominator=2)
    want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert metrics["policy/kl_old_new"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_absurd_log_ratio_gives_a_finite_loss_and_gradient(shift, advantage):
    new = torch.full((1, 1), shift, requires_grad=True)
    loss, metrics = clipped_policy_loss(new, 0 * ONE, advantage * ONE, YES, clip=0.2, denominator=1)
    loss.backward()
    assert loss.isfinite()
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert metrics["policy/ratio_max"] <= math.exp(20.001)


# ------------------------------------------------------------------------------------------------- value


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "cut"),
    [  # old value 0, ε = .2
        (0.1, 1.0, 0.405, -0.9, 0.0),  # inside the clip: plain squared error
        (0.5, 1.0, 0.32, 0.0, 1.0),  # moved past the clip, towards the return: ½(.2 - 1)², no gradient
        (0.5, -1.0, 1.125, 1.5, 0.0),  # moved past it, away from the return: pushed back
        (-0.5, -1.0, 0.32, 0.0, 1.0),
        (-0.5, 1.0, 1.125, -1.5, 0.0),
    ],
)
def test_a_value_that_moved_far_the_right_way_has_no_gradient(value, target, loss, gradient, cut):
    v = torch.full((1, 1), value, requires_grad=True)
    got, metrics = value_loss(v, 0 * ONE, target * ONE, YES, clip=0.2, denominator=1)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert v.grad is not None
    assert v.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics["value/clip_fraction"] == cut
    assert metrics["value/loss"].item() == pytest.approx(loss, rel=1e-5)


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    got, metrics = value_loss(0.5 * ONE, 0 * ONE, ONE, YES, clip=None, denominator=1)
    assert got.item() == 0.125
    assert metrics["value/clip_fraction"] == 0


# ------------------------------------------------------------------------------------------------- pairs


def preferred(chosen, rejected, targets=None, weights=None, *, center, denominator, decided=None):
    """The loss where nothing else is said: every chosen answer won, and every pair counts once."""
    ones = torch.ones_like(chosen)
    targets, weights = (ones if x is None else torch.tensor(x) for x in (targets, weights))
    return bradley_terry_loss(
        chosen, rejected, targets, weights, center=center, denominator=denominator, decided=decided or len(chosen)
    )


def test_bradley_terry_worked_by_hand():
    # margins 2 and -1: -ln σ(2) = .126928, -ln σ(-1) = 1.313262
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    loss, metrics = preferred(chosen, rejected, center=0.0, denominator=2)
    assert_close(loss, torch.tensor((0.126928 + 1.313262) / 2))
    assert metrics["reward_model/accuracy"] == 0.5
    assert metrics["reward_model/margin"] == 0.5
    centered, metrics = preferred(chosen, rejected, center=0.1, denominator=2)
    assert_close(centered - loss, torch.tensor(0.1 * (4**2 + 3**2) / 2))
    assert_close(metrics["reward_model/loss"], loss)


def test_a_tie_costs_the_mean_of_both_outcomes_and_pulls_the_scores_together():
    # margin 2: -ln σ(2) = .126928, -ln σ(-2) = 2.126928, their mean 1.126928; its gradient σ(2) - T is .880797 - .5
    chosen, rejected = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0])
    loss, metrics = preferred(chosen, rejected, [0.5], center=0.0, denominator=1, decided=1)
    loss.backward()
    assert_close(loss, torch.tensor(1.126928))
    assert_close(chosen.grad, torch.tensor([0.380797]))
    assert metrics["reward_model/accuracy"] == 0  # nobody was right


def test_a_soft_label_costs_both_outcomes_by_their_probability_and_its_favorite_is_what_counts_as_right():
    # T = .7 at margin 2: .7·.126928 + .3·2.126928 = .726928; T = .2 at margin -1: .2·1.313262 + .8·.313262 = .513262
    loss, metrics = preferred(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), [0.7, 0.2], center=0.0, denominator=2)
    assert_close(loss, torch.tensor((0.726928 + 0.513262) / 2))
    assert metrics["reward_model/accuracy"] == 1


def test_accuracy_is_of_decided_pairs_alone():
    chosen, rejected = torch.tensor([1.0, 1.0, 5.0, -5.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    _, metrics = preferred(chosen, rejected, [1.0, 1.0, 0.5, 0.5], center=0.0, denominator=4, decided=2)
    assert metrics["reward_model/accuracy"] == 0.5


def test_a_pair_of_weight_2_is_that_pair_twice():
    chosen, rejected = torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 2.0])
    want, _ = preferred(chosen, rejected, center=0.1, denominator=3)
    got, _ = preferred(chosen[:2], rejected[:2], weights=[1.0, 2.0], center=0.1, denominator=3)
    assert_close(got, want)


def test_swapping_a_pair_flips_its_margin():
    chosen, rejected = torch.tensor([1.7]), torch.tensor([0.4])
    _, one = preferred(chosen, rejected, center=0.0, denominator=1)
    _, other = preferred(rejected, chosen, center=0.0, denominator=1)
    assert one["reward_model/margin"] == -other["reward_model/margin"]
    assert one["reward_model/accuracy"] == 1 - other["reward_model/accuracy"] == 1


def test_a_constant_reward_model_is_not_accurate_and_its_loss_is_not_below_log_2():
    same = torch.full((4,), 3.0)
    _, metrics = preferred(same, same, center=0.01, denominator=4)
    assert metrics["reward_model/accuracy"] == 0
    assert metrics["reward_model/loss"].item() == pytest.approx(math.log(2))


def test_a_hopeless_pair_costs_its_margin_not_inf():
    loss, _ = preferred(torch.tensor([-500.0]), torch.tensor([500.0]), center=0.0, denominator=1)
    assert loss.item() == 1000


# ------------------------------------------------------------------------------------------------- means


def test_nll_is_the_cross_entropy_of_the_counted_tokens():
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    got = nll_loss(logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], mask, denominator=4)
    assert_close(got, torch.nn.functional.cross_entropy(logits[mask], targets[mask]))


def test_entropy_and_kl_are_means_over_the_denominator():
    x = torch.tensor([[1.0, 3.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    assert entropy_mean(x, mask, denominator=8) == 0.5
    assert kl_loss(x, 0 * x, mask, denominator=8) == (0.5 + 4.5) / 8  # k2: d²/2


# ------------------------------------------------------------------------------------------------ padding, microbatches

LENGTHS = torch.tensor([5, 1, 3, 2, 4, 1, 5, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


def losses(new, entropy, values, old, old_values, advantages, returns, mask, denominator):
    """The whole objective of a step, and its metrics."""
    policy, policy_metrics = clipped_policy_loss(new, old, advantages, mask, clip=(0.1, 0.2), denominator=denominator)
    value, value_metrics = value_loss(values, old_values, returns, mask, clip=0.2, denominator=denominator)
    kl = kl_loss(new, old - 0.1, mask, denominator=denominator)
    bonus = entropy_mean(entropy, mask, denominator=denominator)
    return policy + 0.1 * value + 0.05 * kl - 0.01 * bonus, policy_metrics | value_metrics


def fixed_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 5, generator=generator, dtype=torch.float64) * 0.3 for _ in range(4)]


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf])
def test_what_the_padding_holds_reaches_neither_losses_nor_gradients_nor_metrics(padding):
    clean = [torch.where(MASK, torch.randn(8, 5, dtype=torch.float64), 0.0) for _ in range(7)]

    def everything(inputs):
        inputs = [x.clone().requires_grad_(i < 3) for i, x in enumerate(inputs)]
        loss, metrics = losses(*inputs, MASK, float(MASK.sum()))
        return [loss, *metrics.values(), *torch.autograd.grad(loss, inputs[:3])]

    want = everything(clean)
    dirty = [torch.where(MASK, x, padding) for x in clean]
    each_alone = [[*clean[:i], dirty[i], *clean[i + 1 :]] for i in range(7)]
    for inputs in [dirty, *each_alone]:
        for a, b in zip(want, everything(inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_microbatches_of_ragged_rows_add_up_to_the_step(size):
    torch.manual_seed(0)
    hidden, head, value_head = torch.randn(8, 5, 6).double(), torch.randn(9, 6).double(), torch.randn(6).double()
    targets = torch.randint(9, (8, 5))
    old, old_values, advantages, returns = fixed_inputs()

    def step(rows: slice):
        """Loss of some rows, gradients to both heads, metrics; each row cut to the longest among them."""
        r = int(LENGTHS[rows].max())
        mask = MASK[rows, :r]
        w, v = head.clone().requires_grad_(), value_head.clone().requires_grad_()
        new, entropy = (torch.zeros(mask.shape).double() for _ in range(2))
        logprobs, entropies = token_logprobs(hidden[rows, :r][mask], w, targets[rows, :r][mask])
        new, entropy = new.masked_scatter(mask, logprobs), entropy.masked_scatter(mask, entropies)
        rest = (x[rows, :r] for x in (old - 2.0, old_values, advantages, returns))
        loss, metrics = losses(new, entropy, hidden[rows, :r] @ v, *rest, mask, float(LENGTHS.sum()))
        return loss, *torch.autograd.grad(loss, (w, v)), metrics

    whole_loss, whole_head, whole_value, whole_metrics = step(slice(0, 8))
    parts = [step(slice(i, i + size)) for i in range(0, 8, size)]
    assert_close(sum(part[0] for part in parts), whole_loss)
    assert (sum(part[1] for part in parts) - whole_head).abs().max() <= 1e-12
    assert (sum(part[2] for part in parts) - whole_value).abs().max() <= 1e-12
    for name, want in whole_metrics.items():
        combine = {"policy/ratio_min": min, "policy/ratio_max": max}.get(name, sum)
        assert_close(combine(part[3][name] for part in parts), want, rtol=1e-6, atol=1e-6)
    assert 0 < whole_metrics["policy/clip_fraction"] < 1  # the rows do exercise both branches
    assert 0 < whole_metrics["value/clip_fraction"] < 1


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient():
    # ρ = e and 1/e, bounded to 1.28 and 0.8; L = -(1.28·2·log π₁ + 0.8·3·log π₂)/2
    new = torch.tensor([[-1.0, -2.0, math.nan]], dtype=torch.float64).requires_grad_()
    old = torch.tensor([[-2.0, -1.0, math.nan]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, 3.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    loss, metrics = cispo_loss(new, old, advantages, mask, clip=(0.2, 0.28), denominator=2)
    assert_close(loss.detach(), torch.tensor(3.68, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, new)
    assert_close(gradient, torch.tensor([[-1.28, -1.2, 0.0]], dtype=torch.float64))
    assert metrics["policy/clip_fraction"] == 1
