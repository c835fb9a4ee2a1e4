"""Values and gradients of every loss against closed forms in numpy and sums written out over a small vocabulary."""

import numpy as np
import pytest
import torch

import losses

GENERATOR = torch.Generator().manual_seed(5)
DRAFT, TARGET = 2 * torch.randn(6, 9, generator=GENERATOR), 2 * torch.randn(6, 9, generator=GENERATOR)


def numpy_softmax(logits):
    e = np.exp(np.asarray(logits, dtype=np.float64))
    return e / e.sum(-1, keepdims=True)


Q, P = numpy_softmax(DRAFT), numpy_softmax(TARGET)
M, R = (P + Q) / 2, (P > Q).astype(float)
MU = (Q * R).sum(-1).mean()
SIGMA = np.sqrt(MU * (1 - MU))
TVD, KLD = np.abs(P - Q).sum(-1) / 2, (P * np.log(P / Q)).sum(-1)
OVERLAP = np.minimum(P, Q).sum(-1)
VALUES = {"kld": KLD, "rkld": (Q * np.log(Q / P)).sum(-1), "tvd": TVD, "tvd++": TVD / SIGMA, "nla": -np.log(OVERLAP),
          "jsd": ((P * np.log(P / M)).sum(-1) + (Q * np.log(Q / M)).sum(-1)) / 2,
          "lk": np.exp(-3 * OVERLAP) * KLD + (1 - np.exp(-3 * OVERLAP)) * TVD}


def centred(f):
    """Gradient in the draft logits of sum_x q(x) f(x) with f held fixed: q (f - E_q[f])."""
    return Q * (f - (Q * f).sum(-1, keepdims=True))


TVD_GRADIENT = Q * ((Q * R).sum(-1, keepdims=True) - R)
LAMBDA = np.exp(-3 * OVERLAP)[:, None]
GRADIENTS = {"kld": Q - P, "rkld": centred(np.log(Q / P)), "jsd": centred(np.log(Q / M)) / 2, "tvd": TVD_GRADIENT,
             "tvd++": TVD_GRADIENT / SIGMA, "nla": TVD_GRADIENT / OVERLAP[:, None], "lk": LAMBDA * (Q - P) + (1 - LAMBDA) * TVD_GRADIENT}


def gradient(loss, draft, target, **options):
    draft = draft.clone().requires_grad_()
    loss(draft, target, **options).sum().backward()
    return draft.grad


def test_every_loss_is_covered_here():
    assert set(losses.LOSSES) == set(VALUES) == set(GRADIENTS)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_values_and_gradients_equal_their_closed_forms(name):
    value = losses.LOSSES[name](DRAFT, TARGET)
    assert value.shape == (6,) and value.dtype == torch.float32
    np.testing.assert_allclose(value, VALUES[name], rtol=1e-5)
    np.testing.assert_allclose(gradient(losses.LOSSES[name], DRAFT, TARGET), GRADIENTS[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_target_gets_no_gradient(name):
    draft, target = DRAFT.clone().requires_grad_(), TARGET.clone().requires_grad_()
    losses.LOSSES[name](draft, target).sum().backward()
    assert target.grad is None and draft.grad.abs().sum() > 0


@pytest.mark.parametrize("name", losses.LOSSES)
def test_equal_distributions_are_the_minimum(name):
    torch.testing.assert_close(losses.LOSSES[name](TARGET + 3, TARGET), torch.zeros(6), atol=1e-3, rtol=0)
    assert (losses.LOSSES[name](DRAFT, TARGET) > 0.01).all()


def test_tvd_is_the_probability_of_a_refusal():
    refused = (Q * (1 - np.minimum(1, P / Q))).sum(-1)      # draw x from q, refuse with 1 - min(1, p / q)
    np.testing.assert_allclose(losses.tvd(DRAFT, TARGET), refused, rtol=1e-5)
    np.testing.assert_allclose(1 - losses.overlap(DRAFT, TARGET), refused, rtol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 0.4, MU])
def test_the_policy_gradient_enumerated_over_the_vocabulary(baseline):
    """-sum_x q(x) A(x) grad log q(x), where grad of log q(x) in the logits is onehot(x) - q: any constant baseline gives
    the gradient of tvd, and with the mean and deviation of the rewards that of tvd++."""
    score = np.eye(9)[None] - Q[:, None, :]                                  # (N, x, logit)
    tvd_like = -np.einsum("nx,nx,nxl->nl", Q, R - baseline, score)
    np.testing.assert_allclose(tvd_like, TVD_GRADIENT, atol=1e-12)
    plus_plus = -np.einsum("nx,nx,nxl->nl", Q, (R - MU) / SIGMA, score)
    np.testing.assert_allclose(gradient(losses.tvd_plus_plus, DRAFT, TARGET), plus_plus, rtol=1e-4, atol=1e-7)


def test_tvd_plus_plus_takes_one_sigma_for_all_pieces_of_a_batch():
    mu, sigma = losses.reward_mean_and_deviation(DRAFT, TARGET)
    np.testing.assert_allclose([mu, sigma], [MU, SIGMA], rtol=1e-5)
    pieces = torch.cat([losses.tvd_plus_plus(DRAFT[:2], TARGET[:2], sigma), losses.tvd_plus_plus(DRAFT[2:], TARGET[2:], sigma)])
    torch.testing.assert_close(pieces, losses.tvd_plus_plus(DRAFT, TARGET))


ONE_HOT, FLAT = torch.tensor([[1e4, -1e4, 0.0, 5.0]]), torch.zeros(1, 4)
EXTREMES = {"one-hot target": (FLAT, ONE_HOT), "one-hot draft": (ONE_HOT, FLAT), "opposite": (ONE_HOT, ONE_HOT.flip(1)),
            "equal one-hot": (ONE_HOT, ONE_HOT), "equal": (FLAT, FLAT), "half": (DRAFT.half(), TARGET.half()),
            "bfloat16": (DRAFT.bfloat16(), TARGET.bfloat16()),
            "a drafter without two of the tokens": (torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))}


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_stay_finite(name, case):
    draft, target = EXTREMES[case]
    assert losses.LOSSES[name](draft, target).isfinite().all()
    assert gradient(losses.LOSSES[name], draft, target).isfinite().all()


def test_implied_tau():
    assert losses.implied_tau(0.0, 3) == 1 and losses.implied_tau(1.0, 3) == 4
    assert losses.implied_tau(0.6, 3) == pytest.approx((1 - 0.6 ** 4) / 0.4)
