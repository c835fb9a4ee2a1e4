"""Values and gradients of every loss against closed forms in numpy, and against sums written out
over a small vocabulary.

The sampled forms are enumerated, not sampled: every possible draw is put in the place of the random
one, weighted by its probability. So a mean is exact, and a bias of one part in a million shows.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import assert_refused, run_process

import losses

GENERATOR = torch.Generator().manual_seed(5)
DRAFT, TARGET = (2 * torch.randn(6, 9, generator=GENERATOR) for _ in range(2))


def numpy_softmax(logits):
    e = np.exp(np.asarray(logits, dtype=np.float64))
    return e / e.sum(-1, keepdims=True)


Q, P = numpy_softmax(DRAFT), numpy_softmax(TARGET)
M, R = (P + Q) / 2, (P > Q).astype(float)
MU = (Q * R).sum(-1).mean()
SIGMA = np.sqrt(MU * (1 - MU))
TVD, KLD = np.abs(P - Q).sum(-1) / 2, (P * np.log(P / Q)).sum(-1)
OVERLAP = np.minimum(P, Q).sum(-1)
POSITION = (Q * R).sum(-1)
POSITION_SIGMA = np.sqrt(POSITION * (1 - POSITION))
VALUES = {"kld": KLD, "rkld": (Q * np.log(Q / P)).sum(-1), "tvd": TVD, "tvd++": TVD / SIGMA,
          "tvd++-position": TVD / POSITION_SIGMA, "nla": -np.log(OVERLAP),
          "jsd": ((P * np.log(P / M)).sum(-1) + (Q * np.log(Q / M)).sum(-1)) / 2,
          "lk": np.exp(-3 * OVERLAP) * KLD + (1 - np.exp(-3 * OVERLAP)) * TVD}


def centred(f):
    """Gradient in the draft logits of sum_x q(x) f(x) with f held fixed: q (f - E_q[f])."""
    return Q * (f - (Q * f).sum(-1, keepdims=True))


TVD_GRADIENT = Q * ((Q * R).sum(-1, keepdims=True) - R)
LAMBDA = np.exp(-3 * OVERLAP)[:, None]
GRADIENTS = {"kld": Q - P, "rkld": centred(np.log(Q / P)), "jsd": centred(np.log(Q / M)) / 2,
             "tvd": TVD_GRADIENT, "tvd++": TVD_GRADIENT / SIGMA,
             "tvd++-position": TVD_GRADIENT / POSITION_SIGMA[:, None],
             "nla": TVD_GRADIENT / OVERLAP[:, None],
             "lk": LAMBDA * (Q - P) + (1 - LAMBDA) * TVD_GRADIENT}


def gradient(loss, draft, target, **options):
    draft = draft.clone().requires_grad_()
    loss(draft, target, **options).sum().backward()
    return draft.grad


SAMPLED = {"tvd-sampled", "tvd++-sampled"}


def test_every_loss_is_covered_here():
    assert set(losses.LOSSES) == set(VALUES) | SAMPLED and set(VALUES) == set(GRADIENTS)


@pytest.mark.parametrize("name", VALUES)
def test_values_and_gradients_equal_their_closed_forms(name):
    value = losses.LOSSES[name](DRAFT, TARGET)
    assert value.shape == (6,) and value.dtype == torch.float32
    np.testing.assert_allclose(value, VALUES[name], rtol=1e-5)
    found = gradient(losses.LOSSES[name], DRAFT, TARGET)
    np.testing.assert_allclose(found, GRADIENTS[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_target_gets_no_gradient(name):
    draft, target = DRAFT.repeat(20, 1).requires_grad_(), TARGET.repeat(20, 1).requires_grad_()
    losses.LOSSES[name](draft, target).sum().backward()
    assert target.grad is None and draft.grad.abs().sum() > 0


@pytest.mark.parametrize("name", VALUES)
def test_equal_distributions_are_the_minimum(name):
    equal = losses.LOSSES[name](TARGET + 3, TARGET)
    torch.testing.assert_close(equal, torch.zeros(6), atol=1e-3, rtol=0)
    assert (losses.LOSSES[name](DRAFT, TARGET) > 0.01).all()


def test_tvd_is_the_probability_of_a_refusal():
    # Draw x from q, refuse it with probability 1 - min(1, p / q).
    refused = (Q * (1 - np.minimum(1, P / Q))).sum(-1)
    np.testing.assert_allclose(losses.tvd(DRAFT, TARGET), refused, rtol=1e-5)
    np.testing.assert_allclose(1 - losses.overlap(DRAFT, TARGET), refused, rtol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 0.4, MU])
def test_the_policy_gradient_enumerated_over_the_vocabulary(baseline):
    """-sum_x q(x) A(x) grad log q(x), where the gradient of log q(x) in the logits is onehot(x) - q
    and A(x) is the reward less the baseline. Any constant baseline gives the gradient of tvd; the
    mean of the rewards, with a division by their deviation, gives that of tvd++."""
    score = np.eye(9)[None] - Q[:, None, :]                                    # (N, x, logit)
    tvd_like = -np.einsum("nx,nx,nxl->nl", Q, R - baseline, score)
    np.testing.assert_allclose(tvd_like, TVD_GRADIENT, atol=1e-12)
    plus_plus = -np.einsum("nx,nx,nxl->nl", Q, (R - MU) / SIGMA, score)
    found = gradient(losses.tvd_plus_plus, DRAFT, TARGET)
    np.testing.assert_allclose(found, plus_plus, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ["spread", "peaked", "one token", "outside the draft vocabulary",
                                  "nearly equal"])
def test_gradients_are_those_of_the_docstrings_over_a_space_of_distributions(case):
    """What comes in is a number of its own at each position, as in a chunk of a scaled mean."""
    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def through_q(f):
        """sum_x q grad f where f is constant: q(y) (f(y) - E_q[f]) in the draft logit of y."""
        return q * (f - (q * f).sum(-1, keepdim=True))

    generator = torch.Generator().manual_seed(7)
    size, scale = 1 if case == "one token" else 300, 12 if case == "peaked" else 2
    draft, target = (random(40, size) * scale for _ in range(2))
    if case == "nearly equal":
        draft = target + 1e-2 * draft
    if case == "outside the draft vocabulary":
        draft[:, ::7] = -torch.inf
        draft[:5, 1::7] = -150                        # not impossible, but under the floor
    log_q, log_p = (x.log_softmax(-1).clamp(min=-100) for x in (draft, target))
    q, p = draft.softmax(-1), target.softmax(-1)
    log_m = ((p + q) / 2).log()
    covered, overlap = p * (log_q > -100), torch.minimum(p, q).sum(-1, keepdim=True)
    weight = torch.exp(-3 * overlap)
    expected = {"tvd": -through_q((p > q).double()),
                "kld": q * covered.sum(-1, keepdim=True) - covered,
                "rkld": through_q(log_q - log_p),
                "jsd": through_q(log_q - log_m) / 2}
    expected["nla"] = expected["tvd"] / overlap
    expected["lk"] = weight * expected["kld"] + (1 - weight) * expected["tvd"]
    incoming = random(40)
    for name, formula in expected.items():
        logits = draft.float().requires_grad_()
        loss = losses.LOSSES[name](logits, target.float())
        found, = torch.autograd.grad(loss, logits, incoming.float())
        wanted = (formula * incoming[:, None]).float()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def in_pieces(loss, chunk, draft, target):
    """Value and gradient of the mean loss over the batch, `chunk` positions at a time."""
    draft = draft.clone().requires_grad_()
    total = 0.0
    options = losses.step_options(loss, len(draft), chunk, lambda rows: (draft[rows], target[rows]))
    for at, known in zip(range(0, len(draft), chunk), options, strict=True):
        part = loss(draft[at:at + chunk], target[at:at + chunk], **known).sum() / len(draft)
        part.backward()
        total += part.item()
    return total, draft.grad


EVERY_LOSS = {name: {} for name in losses.LOSSES}
EVERY_LOSS |= {f"tvd-sampled, {name}": {"baseline": name, "samples": 2}
               for name in losses.BASELINES}
EVERY_LOSS |= {f"tvd++-sampled, {name}": {"baseline": name, "samples": 3}
               for name in losses.BASELINES}


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_the_batch_is_the_optimisers_step_however_it_is_cut(name):
    def new_loss():
        return losses.choose(name.split(",")[0], generator=torch.Generator().manual_seed(2),
                             **EVERY_LOSS[name])

    N = 37
    generator = torch.Generator().manual_seed(11)
    # Several steps, since the running mean has a memory.
    steps = [[3 * torch.randn(N, 13, generator=generator) for _ in range(2)] for _ in range(3)]
    found = {}
    for chunk in (N, 1, 7, N + 1):
        loss = new_loss()
        found[chunk] = [in_pieces(loss, chunk, *step) for step in steps]
    loss = new_loss()
    whole = []
    for draft, target in steps:                       # without step_options: all positions at once
        draft = draft.clone().requires_grad_()
        value = loss(draft, target).mean()
        value.backward()
        whole.append((value.item(), draft.grad))
    for chunk, results in found.items():
        for (value, grad), (expected_value, expected_grad) in zip(results, whole):
            assert value == pytest.approx(expected_value, rel=1e-5)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_a_loss_of_ones_own_gets_the_steps_mu_and_sigma_too():
    def mine(draft_logits, target_logits, sigma=None):
        return losses.tvd(draft_logits, target_logits) * sigma

    assert in_pieces(mine, 2, DRAFT, TARGET)[0] == pytest.approx(TVD.mean() * SIGMA, rel=1e-5)

    def ours(draft_logits, target_logits, mu=None, sigma=None):
        scale, shift = 1 if sigma is None else sigma, 0 if mu is None else mu
        return losses.tvd(draft_logits, target_logits) * scale + shift

    assert in_pieces(ours, 2, DRAFT, TARGET)[0] == pytest.approx(TVD.mean() * SIGMA + MU, rel=1e-5)


def test_mu_and_sigma_of_the_expected_rewards():
    rewards = losses.expected_reward(DRAFT, TARGET)
    np.testing.assert_allclose(rewards, POSITION, rtol=1e-5)
    np.testing.assert_allclose(losses.mean_and_deviation(rewards), [MU, SIGMA], rtol=1e-5)
    # Sampled rewards are 0 or 1: sigma is their own deviation.
    ones = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert losses.mean_and_deviation(ones)[1].item() == pytest.approx(ones.std(correction=0).item())


ONE_HOT, FLAT = torch.tensor([[1e4, -1e4, 0.0, 5.0]]), torch.zeros(1, 4)
EXTREMES = {"one-hot target": (FLAT, ONE_HOT), "one-hot draft": (ONE_HOT, FLAT),
            "opposite": (ONE_HOT, ONE_HOT.flip(1)), "equal one-hot": (ONE_HOT, ONE_HOT),
            "equal": (FLAT, FLAT), "half": (DRAFT.half(), TARGET.half()),
            "bfloat16": (DRAFT.bfloat16(), TARGET.bfloat16()),
            "a drafter without two of the tokens": (
                torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]]),
                torch.tensor([[1.0, 2.0, 3.0, 4.0]]))}


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_stay_finite(name, case):
    draft, target = EXTREMES[case]
    assert losses.LOSSES[name](draft, target).isfinite().all()
    assert gradient(losses.LOSSES[name], draft, target).isfinite().all()


def test_implied_tau():
    assert losses.implied_tau(0.0, 3) == 1 and losses.implied_tau(1.0, 3) == 4
    assert losses.implied_tau(0.6, 3) == pytest.approx((1 - 0.6 ** 4) / 0.4)


# ---- The sampled form --------------------------------------------------------------------------

def constant(rewards, p, q, mu):
    return 0.37


settled = losses.RunningMean(decay=1.0)           # enumeration needs a mean that stays where it is
settled.mean = settled.after = 0.6
UNBIASED = {"none": losses.no_baseline, "expected": losses.expected_at_position,
            "least-variance": losses.least_variance, "running": settled, "constant": constant}


def enumerated_mean(monkeypatch, rows, samples, loss=losses.tvd_sampled, **options):
    """The mean over all draws of the sampled gradient at these rows: a sum over
    V^(rows x samples) cases."""
    draft, target, q = DRAFT[rows].double(), TARGET[rows].double(), torch.tensor(Q[rows])
    total, weights = torch.zeros_like(draft), 0.0
    with monkeypatch.context() as patch:
        for drawn in itertools.product(range(9), repeat=len(q) * samples):
            x = torch.tensor(drawn).view(len(q), samples)
            weight = q.gather(1, x).prod()
            patch.setattr(losses, "draw", lambda q, coins: x)
            total += weight * gradient(loss, draft, target, samples=samples, **options)
            weights += weight.item()
    assert weights == pytest.approx(1)
    return total.numpy()


@pytest.mark.parametrize("baseline", UNBIASED)
def test_an_unbiased_baseline_leaves_the_mean_of_the_sampled_gradient_at_the_exact_gradient(
        monkeypatch, baseline):
    mean = enumerated_mean(monkeypatch, [0, 1], 1, baseline=UNBIASED[baseline])
    np.testing.assert_allclose(mean, TVD_GRADIENT[:2], atol=1e-6)


def test_leave_one_out_is_unbiased_and_needs_two_samples(monkeypatch):
    mean = enumerated_mean(monkeypatch, [2], 3, baseline="leave-one-out")
    np.testing.assert_allclose(mean, TVD_GRADIENT[2:3], atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 samples"):
        losses.tvd_sampled(DRAFT, TARGET, baseline="leave-one-out")


def test_a_sample_in_its_own_mean_shrinks_the_gradient_by_one_part_in_the_batch(monkeypatch):
    for rows, samples in (([0, 3], 1), ([0, 3, 5], 1), ([4], 2)):
        mean = enumerated_mean(monkeypatch, rows, samples, baseline="batch")
        shrunk = 1 - 1 / (len(rows) * samples)
        np.testing.assert_allclose(mean, TVD_GRADIENT[rows] * shrunk, atol=1e-6)


def test_dividing_by_the_deviation_of_the_same_batch_turns_the_gradient(monkeypatch):
    """The bias of whitening, measured: with four samples in the batch the mean is 0.4 degrees off
    the exact gradient's direction, while without the division it is parallel. (With two or three
    samples, all batches whose gradient is not zero have the same deviation. In a large batch the
    deviation hardly depends on any one sample.)"""
    rows = [0, 3, 1, 5]
    exact = TVD_GRADIENT[rows].ravel()

    def turned(**options):
        mean = enumerated_mean(monkeypatch, rows, 1, baseline="batch", **options).ravel()
        cosine = mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact)
        return np.degrees(np.arccos(min(1.0, cosine)))

    assert turned() < 0.001 and 0.3 < turned(whiten=True) < 0.6


def test_no_constant_has_less_variance_than_the_least_variance_baseline():
    p, q = losses.example(0.6, positions=4, vocab=12)
    baseline = losses.least_variance(None, p, q, None)
    best = losses.exact_noise(p, q, baseline)[1]
    for value in torch.linspace(-0.5, 1.5, 81):
        assert losses.exact_noise(p, q, value)[1] >= best
    assert losses.exact_noise(p, q, baseline + 0.01)[1] > best


def test_examples_have_the_overlap_asked_for_and_noise_falls_as_one_over_the_samples():
    p, q = losses.example(0.7)
    asked_for = torch.full((32,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(torch.minimum(p, q).sum(-1), asked_for, rtol=1e-9, atol=0)
    torch.testing.assert_close(q.sum(-1), torch.ones(32, dtype=torch.float64))
    expected = losses.expected_at_position(None, p, q, None)
    for name, baseline in (("none", 0.0), ("expected", expected)):
        one = losses.exact_noise(p, q, baseline)
        four = losses.measured_noise(p, q, 4, name, False, repeats=1500)
        assert four[0] == pytest.approx(one[0] / 4, rel=0.05)
        assert four[1] == pytest.approx(one[1] / 4, rel=0.05)


def test_tokens_are_drawn_from_q_and_the_value_estimates_tvd():
    generator = torch.Generator().manual_seed(0)
    x = losses.draw(torch.tensor(Q), losses.toss(len(Q), 20000, generator))
    share = torch.stack([row.bincount(minlength=9) for row in x]) / 20000
    assert (share - torch.tensor(Q)).abs().max() < 0.015
    value = losses.tvd_sampled(DRAFT, TARGET, samples=20000, generator=generator)
    np.testing.assert_allclose(value, TVD, atol=0.015)
    zero = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    assert set(losses.draw(zero, losses.toss(1, 5000, generator)).unique().tolist()) == {0, 2}


def test_the_running_mean_forgets_and_each_training_has_its_own():
    baseline, means = losses.RunningMean(0.5), []
    for _ in range(3):
        baseline.begin_step(torch.tensor(1.0))
        # Twice a step: a batch in two pieces.
        means += [baseline(None, None, None, None) for _ in range(2)]
    assert means == [0.0, 0.0, 0.5, 0.5, 0.75, 0.75]
    one, other = (losses.choose("tvd-sampled", baseline="running") for _ in range(2))
    assert one.keywords["baseline"] is not other.keywords["baseline"]


def test_equal_distributions_have_no_reward_and_whitening_stays_finite():
    for name in SAMPLED:
        assert not gradient(losses.LOSSES[name], TARGET, TARGET).any()


# ---- A loss of one's own -----------------------------------------------------------------------

def test_a_students_loss_is_tried_before_it_is_used(tmp_path):
    def write(body, name="mine"):
        (tmp_path / "my_loss.py").write_text(
            f"import torch\ndef {name}(draft_logits, target_logits):\n    {body}\n")
        return f"{tmp_path / 'my_loss.py'}:mine"

    good = "return ((draft_logits - target_logits.detach()) ** 2).mean(-1)"
    function = losses.choose(write(good))
    assert function(DRAFT, TARGET).shape == (6,)
    for body, message in [
            ("return ((draft_logits - target_logits.detach()) ** 2).mean()",
             r"returned \(\) .*one loss a position"),
            ("return 1.0", "returned float"),
            ("return draft_logits.sum(-1) / 0", "not finite"),
            ("p, q = target_logits.detach().softmax(-1), draft_logits.softmax(-1)\n"
             "    return (p * (p.log() - q.log())).sum(-1)", "look for a log"),
            ("q = draft_logits.softmax(-1)\n    q.clamp_(min=1e-8)\n    return q.log().sum(-1)",
             "fails on draft and target logits .*in-?place"),
            ("return target_logits.detach().sum(-1)", "has no gradient"),
            ("return draft_logits.sum(-1) * 0 + 1", "missing, zero or not finite"),
            ("return (draft_logits - draft_logits.detach()).abs().sqrt().sum(-1)",
             "square roots at 0"),
            ("return ((draft_logits - target_logits) ** 2).mean(-1)", "reaches target_logits"),
            ("return draft_logits @ target_logits",
             "fails on draft and target logits .*RuntimeError"),
            ("return draft_logits[", "fails when read")]:
        with pytest.raises(ValueError, match=message) as caught:
            losses.choose(write(body))
        assert "\n" not in str(caught.value).split("RuntimeError")[0]
    with pytest.raises(ValueError, match="defines no function mine"):
        losses.choose(write(good, name="other"))
    # A file called losses.py that imports this project's.
    own = tmp_path / "losses.py"
    own.write_text("import losses\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
                   "    a: 'int' = 0\ndef mine(d, t, coins=None, mu=None):\n"
                   "    return losses.kld(d, t) + A().a\n")
    mine = losses.choose(f"{own}:mine")
    assert torch.equal(mine(DRAFT, TARGET), losses.kld(DRAFT, TARGET))
    found = losses.step_options(mine, 6, 4, lambda rows: (DRAFT[rows], TARGET[rows]))
    assert [*found[0]] == ["mu"]                      # coins are only for losses that can use them
    with pytest.raises(ValueError, match="is no file"):
        losses.choose("nowhere.py:mine")
    for name in losses.LOSSES:                        # the project's own pass the same check
        losses.check(losses.LOSSES[name], name)


def test_options_of_the_sampled_losses_are_refused_elsewhere():
    for options, message in [
            ({"name": "tvd", "samples": 4}, "are for the sampled losses"),
            ({"name": "kld", "baseline": "batch"}, "are for the"),
            ({"name": "tvd-sampled", "baseline": "mean"}, "none of none, batch"),
            ({"name": "tvd-sampled", "baseline": "leave-one-out"}, "at least 2 samples"),
            ({"name": "mse"}, "is none of kld")]:
        with pytest.raises(ValueError, match=message):
            losses.choose(**options)
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        loss = losses.choose("tvd++-sampled", samples=3, generator=generator)
        found.append(loss(DRAFT, TARGET))
    assert torch.equal(*found)


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    for out, message in ((tmp_path / "a.odd", "not supported"), (tmp_path, "is a folder")):
        assert_refused(run_process("losses.py", "--levels", "0.9", "--out", out), message)
