"""Distillation losses: how far the drafter's distribution is from the target's, and which distance
to follow.

At one position let p = softmax(target logits) and q = softmax(draft logits). (Goel et al., 2024,
arXiv 2403.00858, write q for the target and p_theta for the drafter; here, as in the literature on
speculative decoding, p is the target and q the drafter, everywhere.) A drafted token x ~ q is
accepted with probability min(1, p(x) / q(x)), so

    P(accepted) = sum_x q(x) min(1, p(x) / q(x)) = sum_x min(p(x), q(x)) = 1 - TVD(p, q)

So the chance of a refusal at a position is exactly the total variation distance, `tvd`; the other
losses are ways there. N is the number of positions, V the vocabulary's size; [condition] is 1 where
it is true, else 0.

Write your own in six lines: a function of draft logits (N, V) and target logits (N, V), one row a
position, that returns the loss of each position (N,). Convert both to float, detach the target, add
it to LOSSES under a name:

    def hellinger(draft_logits, target_logits):
        q = torch.softmax(draft_logits.float(), -1)
        p = torch.softmax(target_logits.detach().float(), -1)
        return 1 - (p * q + 1e-20).sqrt().sum(-1)      # the small number: no gradient of sqrt at 0

    LOSSES["hellinger"] = hellinger                    # python distill.py finetune --loss hellinger

or leave this file alone and write it into your own: --loss my_loss.py:hellinger. A loss may also
take mu=None and sigma=None, the mean and deviation of the rewards over the optimiser's step (see
tvd_plus_plus). All losses return (N,) in fp32; the caller takes the mean. Gradients reach the draft
logits only.

    python losses.py            how noisy the sampled gradients are: a table, and a picture
                                (out/variance.png)
"""

import argparse
import functools
import inspect
import math
import sys
import types
from pathlib import Path

import torch

# ---- Total variation distance, and its policy gradient -----------------------------------------

def tvd(draft_logits, target_logits):
    """Total variation distance (1/2) sum_x |p - q| = 1 - sum_x min(p, q): P(refused).

    Its gradient is a policy gradient: an average over x ~ q of a reward times grad log q(x). Only
    tokens with p > q contribute q to the minimum, so with the reward r(x) = [p(x) > q(x)]:

        grad TVD = -sum_x r(x) grad q(x) = -E_{x~q}[ r(x) grad log q(x) ]

    since grad q = q grad log q. In the draft logit of token y this is q(y) (E_q[r] - r(y)). Both
    sum to 1, so the half sum of |p - q| is the sum of its positive part max(p - q, 0) alone. Ties
    have r = 0, as in the equation: relu's derivative at 0 is 0.
    """
    q, p = probabilities(draft_logits, target_logits)
    return (p - q).relu().sum(-1)


def tvd_plus_plus(draft_logits, target_logits, mu=None, sigma=None):
    """TVD++ (Goel et al., 2024, section 3.2), exact form: the reward becomes the advantage
    A(x) = (r(x) - mu) / sigma, with mean and deviation of the rewards over the batch.

    The exact gradient is -E_{x~q}[A grad log q] = -(1/sigma) E[r grad log q] + (mu/sigma)
    E[grad log q], and the last expectation is 0, for sum_x q grad log q = grad sum_x q = grad 1.
    So mu, a baseline that does not depend on x, changes nothing here: the gradient is that of TVD,
    divided by sigma. tvd / sigma has exactly this gradient, and a value worth logging (that of
    -sum_x q A itself is 0 on average, whatever q is). What the baseline does reduce is the noise of
    the sampled form, where a few x ~ q stand for the expectation.

    The batch is the optimiser's step, however it is cut into pieces: step_options gives mu and
    sigma. None takes them from the positions given.
    """
    if sigma is None:
        mu, sigma = mean_and_deviation(expected_reward(draft_logits, target_logits))
    return tvd(draft_logits, target_logits) / sigma


def tvd_plus_plus_position(draft_logits, target_logits):
    """tvd++ with mu and sigma of each position by itself, under its own q: the paper does not say
    over what they are taken.

    It divides each position's gradient by a number of its own, so positions are weighed anew: those
    where rewards are rare, or nearly sure, count more. Not tvd up to a scale. (A third reading,
    seen in public code, averages over the vocabulary without the weight q, in mu, sigma and the
    loss itself: the gradient of another function.)
    """
    mu = expected_reward(draft_logits, target_logits)
    return tvd(draft_logits, target_logits) / deviation(mu)


def probabilities(draft_logits, target_logits):
    """(q, p), (N, V) each, in fp32; the target detached. A logit of -inf has probability 0."""
    return (torch.softmax(draft_logits.float(), -1),
            torch.softmax(target_logits.detach().float(), -1))


def overlap(draft_logits, target_logits):
    """sum_x min(p, q), (N,): the probability that a drafted token is accepted at this position
    (Leviathan et al., 2023, arXiv 2211.17192, corollary 3.6)."""
    return torch.minimum(*probabilities(draft_logits, target_logits)).sum(-1)


@torch.no_grad()
def expected_reward(draft_logits, target_logits):
    """E_{x~q}[r(x)] = sum_x q(x) [p(x) > q(x)] at each position, (N,)."""
    q, p = probabilities(draft_logits, target_logits)
    return (q * (p > q)).sum(-1)


def mean_and_deviation(rewards):
    """mu and sigma of rewards, or of expected rewards, over all their positions: two numbers."""
    mu = rewards.mean()
    return mu, deviation(mu)


def deviation(mu):
    """The standard deviation of rewards with mean mu: a reward is 0 or 1, so its variance is
    mu (1 - mu). It is at least 0.001: where p = q nearly everywhere no reward is left, and a
    division by 0 would make noise of rounding errors."""
    return (mu * (1 - mu)).clamp(min=1e-6).sqrt()


def implied_tau(alpha, gamma):
    """The block efficiency tau, tokens per pass of the target, that an acceptance rate alpha would
    imply with gamma guesses per block, if each were accepted independently: 1 + alpha + ... +
    alpha^gamma. Real acceptances come in runs, so measure tau."""
    return sum(alpha ** k for k in range(gamma + 1))


# ---- Other divergences -------------------------------------------------------------------------

def logarithms(draft_logits, target_logits):
    """(log q, log p), (N, V) each, in fp32, floored at -100: a token with q = 0 makes KL large, not
    infinite. The target is detached."""
    return (torch.log_softmax(draft_logits.float(), -1).clamp(min=-100.0),
            torch.log_softmax(target_logits.detach().float(), -1).clamp(min=-100.0))


def kld(draft_logits, target_logits):
    """KL(p || q) = sum_x p (log p - log q): the drafter must cover all that the target might say.

    d log q(x) / d logit(y) = [x = y] - q(y), so its gradient is -sum_x p(x) ([x = y] - q(y)) =
    q(y) - p(y). Where q is 0 and p is not it would be infinite; log q is floored, which leaves
    those tokens out of the gradient.
    """
    log_q, log_p = logarithms(draft_logits, target_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkld(draft_logits, target_logits):
    """KL(q || p) = sum_x q (log q - log p): the drafter may ignore what it cannot imitate.

    sum_x q grad log q = 0, so in the draft logit of y its gradient is q(y) (f(y) - E_q[f]) with
    f = log q - log p. log p is floored: what the target rules out costs much, not infinitely much.
    """
    log_q, log_p = logarithms(draft_logits, target_logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(draft_logits, target_logits):
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (Lin, 1991): between 0 and log 2.

    What m adds cancels (sum_x m grad log m = 0), so its gradient is rkld's with m in the place of
    p, halved: q(y) (f(y) - E_q[f]) / 2 with f = log q - log m.
    """
    q, p = probabilities(draft_logits, target_logits)
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    log_q, log_p = logarithms(draft_logits, target_logits)
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def nla(draft_logits, target_logits):
    """-log sum_x min(p, q), the negative log of the acceptance rate (Samarin et al., 2026, arXiv
    2602.23881). Gradient: that of tvd over the acceptance rate, d(-log(1 - TVD)) = d TVD /
    (1 - TVD), so positions that the drafter still gets wrong weigh more (except where the overlap
    is 0 up to rounding: there it has no gradient)."""
    return -overlap(draft_logits, target_logits).clamp(min=1e-30).log()


def lk(draft_logits, target_logits):
    """w KL(p || q) + (1 - w) TVD with the weight w = exp(-3 alpha), alpha = sum min(p, q) at that
    position (Samarin et al., 2026, who call it lambda): KL while the drafter is bad, where TVD has
    little gradient, then TVD. w is detached, so the gradient is the same mixture of both gradients.
    Some implementations average alpha over the batch; here each position has its own."""
    distance = tvd(draft_logits, target_logits)
    weight = torch.exp(-3 * (1 - distance.detach()))
    return weight * kld(draft_logits, target_logits) + (1 - weight) * distance


# ---- The sampled form: REINFORCE, and what a baseline does for it ------------------------------

# The exact gradient sums over the whole vocabulary, which is possible here. Policy gradients
# (Williams, 1992) were made for cases where it is not: draw K tokens x ~ q at each position, and
# average (r(x) - b) s(x), with the score s(x) = grad log q(x). The mean of this is the exact
# gradient for every baseline b that does not depend on x, since E_q[s] = 0; its noise depends on b
# very much. The paper describes TVD++ so; this section shows what b is worth. A baseline is a
# function
#
#     baseline(rewards, p, q, mu) -> b, to be taken off the rewards (it must broadcast to them)
#
# of the samples' rewards (N, K), both distributions (N, V), and the mean reward mu over the whole
# batch. Write your own and enter it in BASELINES.

def no_baseline(rewards, p, q, mu):
    """b = 0. Unbiased. A sampled token with a reward is pushed up; one without is left alone."""
    return 0.0


def batch_mean(rewards, p, q, mu):
    """The mean reward of the whole batch, M = N K samples: the paper's mu. Assumes that all
    positions are similar.

    Biased, because mu contains the sample's own reward, divided by M. The other rewards do not
    depend on this sample and E[s] = 0, so E[(r - mu) s] = E[r s] - E[r s] / M: the exact gradient
    times 1 - 1/M. Only a matter of scale, and small in a large batch.
    """
    return mu


def expected_at_position(rewards, p, q, mu):
    """E_{x~q}[r] at each position: the value function, known exactly here. Unbiased.

    Where it can be had, so can the exact gradient; it shows what a learnt critic would be after.
    """
    return torch.where(p > q, q, 0.0).sum(-1, keepdim=True)


def leave_one_out(rewards, p, q, mu):
    """For each of K samples the mean of the other K - 1 at its position (Kool et al., 2019).
    Unbiased: it never sees its own sample, and positions need not be similar. K >= 2."""
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError("leave-one-out needs at least 2 samples a position: --samples 2")
    return (rewards.sum(-1, keepdim=True) - rewards) / (K - 1)


class RunningMean:
    """A mean over earlier steps, b <- decay b + (1 - decay) mu, 0 at first. Unbiased: it depends on
    the past only. Assumes that the drafter changes slowly. It has a memory, so each training makes
    its own and saves it."""

    def __init__(self, decay=0.9):
        self.decay, self.mean, self.after = decay, 0.0, 0.0        # after: with this step counted

    def begin_step(self, mu):
        self.mean = self.after
        self.after = self.decay * self.after + (1 - self.decay) * float(mu)

    def __call__(self, rewards, p, q, mu):
        return self.mean


def least_variance(rewards, p, q, mu):
    """The constant that minimises the variance at each position, E_q[r |s|^2] / E_q[|s|^2].
    Unbiased.

    The mean of (r - b) s does not depend on b, so its variance (summed over the logits) is smallest
    where E|(r - b) s|^2 is smallest: at this b the derivative, -2 E[(r - b) |s|^2], is 0. In the
    draft logits s(x) = e_x - q, where e_x is 1 at x and 0 elsewhere, so |s(x)|^2 = (1 - q(x))^2 +
    the other q^2 = 1 - 2 q(x) + sum q^2. Rare tokens have long scores and count more than in the
    expected reward.
    """
    weight = q * (1 - 2 * q + q.pow(2).sum(-1, keepdim=True))
    rewarded = torch.where(p > q, weight, 0.0).sum(-1, keepdim=True)
    return rewarded / weight.sum(-1, keepdim=True).clamp(min=1e-20)


BASELINES = {"none": no_baseline, "batch": batch_mean, "expected": expected_at_position,
             "leave-one-out": leave_one_out, "running": RunningMean(),
             "least-variance": least_variance}


def toss(positions, samples, generator=None):
    """Coins (positions, samples), uniform in [0, 1), from the generator (None is the global)."""
    return torch.rand(positions, samples, dtype=torch.float64, generator=generator,
                      device=generator.device if generator else None)


def draw(q, coins):
    """A token from q (N, V) for each coin (N, K) -> (N, K), by inverting the cumulative sum."""
    total = q.double().cumsum(-1)
    found = torch.searchsorted(total, coins.to(q.device) * total[:, -1:], right=True)
    return found.clamp(max=q.shape[-1] - 1)


@torch.no_grad()
def sampled_rewards(draft_logits, target_logits, coins):
    """Tokens x ~ q and their rewards [p(x) > q(x)], (N, K) each, then q and p (N, V)."""
    q, p = probabilities(draft_logits, target_logits)
    x = draw(q, coins)
    return x, (p.gather(-1, x) > q.gather(-1, x)).float(), q, p


def tvd_sampled(draft_logits, target_logits, samples=1, baseline="none", whiten=False,
                generator=None, coins=None, mu=None, sigma=None):
    """TVD by policy gradient: x ~ q drawn afresh at each position (never the answer's own token,
    which came from p).

    baseline: a name in BASELINES, or a function. whiten: divide by sigma, the standard deviation of
    the batch's rewards. That is biased: rewards and their deviation come from the same samples, so
    the division is by a number that knows the sample (measured in tests/test_losses.py). The
    gradient is -(1/K) sum_k (r(x_k) - b) grad log q(x_k), over sigma if whiten. The value is an
    estimate of TVD, for the log. coins (N, K), mu, sigma: see step_options.
    """
    coins = toss(len(draft_logits), samples, generator) if coins is None else coins
    x, rewards, q, p = sampled_rewards(draft_logits, target_logits, coins)
    baseline = BASELINES[baseline] if isinstance(baseline, str) else baseline
    if sigma is None:
        mu, sigma = begin_step(rewards, baseline)
    with torch.no_grad():
        advantage = (rewards - baseline(rewards, p, q, mu)) / (sigma if whiten else 1)
        # E_q[min(1, p/q)] is the acceptance rate.
        value = 1 - (p.gather(-1, x) / q.gather(-1, x)).clamp(max=1).mean(-1)
    log_q = torch.log_softmax(draft_logits.float(), -1).gather(-1, x)                    # (N, K)
    surrogate = -(advantage * log_q).mean(-1)
    return value + surrogate - surrogate.detach()                     # this value, that gradient


# TVD++ as published: advantages (r - mu) / sigma with the batch's own mean and deviation of the
# sampled rewards.
tvd_plus_plus_sampled = functools.partial(tvd_sampled, baseline="batch", whiten=True)

LOSSES = {"kld": kld, "rkld": rkld, "jsd": jsd, "tvd": tvd, "tvd++": tvd_plus_plus,
          "tvd++-position": tvd_plus_plus_position, "nla": nla, "lk": lk,
          "tvd-sampled": tvd_sampled, "tvd++-sampled": tvd_plus_plus_sampled}


# ---- One batch, cut into pieces ----------------------------------------------------------------

def begin_step(rewards, baseline=None, mean=torch.mean):
    """mu and sigma of one optimiser step from all its rewards; a RunningMean takes mu in."""
    mu = mean(rewards)
    if isinstance(baseline, RunningMean):
        baseline.begin_step(mu)
    return mu, deviation(mu)


@torch.no_grad()
def step_options(loss, count, chunk, logits, first=0, total=None, mean=torch.mean):
    """A list of dicts, one for each `chunk` of the `count` positions: the keyword options to call
    `loss` with there, so that the losses are those of one call on all positions.

    The logits (N, V) of a whole step do not fit into memory at once, but mu and sigma need all
    positions. So the pieces are gone through once here, for their rewards alone, and then once more
    by the caller. logits(rows) -> draft and target logits (n, V) of a slice of positions. A loss
    that takes mu= or sigma= gets what it takes. A sampled one (it takes coins=, samples=, baseline=
    and generator=) also gets its coins, so that it draws the same tokens both times. Other losses
    get nothing.

    Where several processes share a step, these are its positions first to first + count of total.
    All toss the same coins, for the whole step; mean(rewards) is taken over all processes.
    """
    pieces = [slice(at, min(at + chunk, count)) for at in range(0, max(count, 1), chunk)]
    options, baseline = [{} for _ in pieces], None
    takes = inspect.signature(loss).parameters
    if "mu" not in takes and "sigma" not in takes:
        return options
    if {"coins", "samples", "baseline", "generator"} <= takes.keys():
        baseline = takes["baseline"].default
        baseline = BASELINES[baseline] if isinstance(baseline, str) else baseline
        coins = toss(total or count, takes["samples"].default, takes["generator"].default)
        coins = coins[first:first + count]
        options = [{"coins": coins[rows]} for rows in pieces]
        rewards = [sampled_rewards(*logits(rows), coins[rows])[1] for rows in pieces]
    else:
        rewards = [expected_reward(*logits(rows)) for rows in pieces]
    mu, sigma = begin_step(torch.cat(rewards), baseline, mean)
    found = {name: x for name, x in (("mu", mu), ("sigma", sigma)) if name in takes}
    return [known | found for known in options]


# ---- Choosing a loss, one's own included -------------------------------------------------------

def choose(name, samples=1, baseline=None, generator=None):
    """The loss function of a name in LOSSES, or of my_loss.py:my_loss, which is tried on a small
    case first.

    samples, baseline (a name in BASELINES; None is the loss's own) and generator go to the sampled
    forms. ValueError says what is wrong with the name or the function.
    """
    sampled = name.endswith("-sampled")
    if not sampled and (baseline or samples != 1):
        raise ValueError(f"--samples and --baseline are for the sampled losses, not for {name}")
    if ":" in name:
        path, function_name = name.rsplit(":", 1)
        return check(load_function(Path(path), function_name), name)
    if name not in LOSSES:
        raise ValueError(f"--loss {name} is none of {', '.join(LOSSES)}, nor FILE.py:FUNCTION")
    if not sampled:
        return LOSSES[name]
    if baseline and baseline not in BASELINES:
        raise ValueError(f"--baseline {baseline} is none of {', '.join(BASELINES)}")
    if baseline == "leave-one-out":
        leave_one_out(torch.zeros(1, samples), None, None, None)          # refuses a single sample
    options = {"baseline": RunningMean() if baseline == "running" else baseline} if baseline else {}
    return functools.partial(LOSSES[name], samples=samples, generator=generator, **options)


def file_of(name):
    """The file that defines a loss: a student's of FILE.py:FUNCTION, or this one. What was trained
    with another content of it was trained with another loss."""
    return Path(name.rsplit(":", 1)[0] if ":" in name else __file__)


def load_function(path, name):
    """The function `name` of a Python file. ValueError if it is not there or its file fails."""
    if not path.is_file():
        raise ValueError(f"--loss {path}:{name}: {path} is no file; give FILE.py:FUNCTION")
    # Under its path: a file called losses.py must not hide this one. Dataclasses look for it there.
    module = types.ModuleType(str(path))
    sys.modules[str(path)], module.__file__ = module, str(path)
    try:
        # Compiled from its text: Python's cache of modules misses an edit within the same second.
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: fails when read ({type(error).__name__}: {error})") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path}: defines no function {name}")
    return getattr(module, name)


def check(function, name):
    """function, after a try on 64 positions and a vocabulary of 7. ValueError in one sentence for
    what training would choke on."""
    g = torch.Generator().manual_seed(0)
    # So wide apart that some probabilities are 0 in fp32: a naive log is found here, not in hours.
    draft, target = ((60 * torch.randn(64, 7, generator=g)).requires_grad_() for _ in range(2))

    def require(condition, problem):
        if not condition:
            raise ValueError(f"{name}: {problem}")

    try:
        loss = function(draft, target)
        getattr(loss, "requires_grad", False) and loss.sum().backward()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: fails on draft and target logits (64, 7): "
                         f"{type(error).__name__}: {error}") from None
    shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
    require(shape == (64,), f"returned {shape} for logits (64, 7), not one loss a position, (64,)")
    require(loss.isfinite().all(), "the loss is not finite: look for a log or a division by 0")
    require(loss.requires_grad, "the loss has no gradient: detach() or no_grad cut it off")
    require(draft.grad is not None and draft.grad.isfinite().all() and draft.grad.any(),
            "the gradient is missing, zero or not finite: see detach() and square roots at 0")
    require(target.grad is None or not target.grad.any(),
            "a gradient reaches target_logits: use target_logits.detach()")
    return function


# ---- The laboratory: how noisy is each estimator? ----------------------------------------------

def example(level, positions=32, vocab=64, seed=0):
    """p, q (N, V) with sum min(p, q) = level at each position: q = (1 - t) p + t r for an r of its
    own, t by bisection. Where r itself overlaps more, at few positions, q = r."""
    generator, double = torch.Generator().manual_seed(seed), torch.float64
    p, r = (torch.softmax(3 * torch.randn(positions, vocab, generator=generator, dtype=double), -1)
            for _ in range(2))
    low, high = torch.zeros(positions, 1, dtype=double), torch.ones(positions, 1, dtype=double)
    for _ in range(60):
        t = (low + high) / 2
        above = torch.minimum(p, (1 - t) * p + t * r).sum(-1, keepdim=True) > level
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    return p, (1 - t) * p + t * r


def exact_noise(p, q, baseline):
    """(noise, variance) of (r - b) s from one sample, enumerated over the vocabulary. baseline:
    (N, 1) or a number, constant in x.

    noise: E|g - Eg|^2 / |Eg|^2, summed over positions above and below; it does not change where g
    is multiplied by a number.
    """
    score = torch.eye(p.shape[-1], dtype=p.dtype) - q[:, None]           # (N, x, V): e_x - q
    g = ((p > q).to(p) - baseline)[..., None] * score
    mean = (q[..., None] * g).sum(1)                                     # (N, V)
    variance = (q * (g - mean[:, None]).pow(2).sum(-1)).sum()
    return (variance / mean.pow(2).sum()).item(), (variance / len(p)).item()


def measured_noise(p, q, samples, baseline, whiten, repeats=400, seed=0):
    """The same for `samples` a position, from `repeats` draws of the whole batch; g is what
    backward() gives."""
    generator = torch.Generator().manual_seed(seed)
    draft, target, g = q.log().float().requires_grad_(), p.log().float(), []
    for _ in range(repeats):
        loss = tvd_sampled(draft, target, samples, baseline, whiten, generator)
        g.append(torch.autograd.grad(loss.sum(), draft)[0].double())
    g = torch.stack(g)                                                   # (repeats, N, V)
    variance = g.var(0).sum()
    # The squared length of the mean of noisy gradients is too large, by variance / repeats on
    # average: E|mean|^2 = |Eg|^2 + variance / repeats.
    squared_mean = g.mean(0).pow(2).sum() - variance / repeats
    return (variance / squared_mean).item(), (variance / len(p)).item()


def main():
    parser = argparse.ArgumentParser(description="The noise E|g - Eg|^2 / |Eg|^2 of each sampled "
                                     "estimator of the gradient of TVD.")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.5, 0.9],
                        help="overlaps sum min(p, q) (default 0.2 0.5 0.9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/variance.png"))
    args = parser.parse_args()
    if not all(0.05 <= level < 1 for level in args.levels):
        parser.error(f"--levels {args.levels}: expected overlaps of at least 0.05 and below 1")
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder: give the name of a picture")
    torch.set_num_threads(1)                      # small tensors: a second thread only waits
    table = {}                                    # (label, level) -> noise of 1, 4 and 16 samples
    for level in args.levels:
        p, q = example(level, seed=args.seed)
        expected = expected_at_position(None, p, q, None)
        mu = expected.mean()
        print(f"\noverlap {level}: mu = E_q[r] = {mu:.3f} (from {expected.min():.3f} to "
              f"{expected.max():.3f}); 32 positions, 64 tokens\n{'estimator':34} noise: 1 sample"
              f"   4 samples  16 samples   variance: 1 sample   4 samples  16 samples")
        # One sample is enumerated, with the batch's mean at its expectation; nan: not defined.
        for label, baseline, constant, whiten in (
                ("none", "none", 0.0, False), ("batch mean", "batch", mu, False),
                ("batch mean, over deviation (tvd++)", "batch", mu, True),
                ("expected reward", "expected", expected, False),
                ("least variance", "least-variance", least_variance(None, p, q, None), False),
                ("running mean (settled)", lambda *_: mu.float(), mu, False),
                ("leave one out", "leave-one-out", math.nan, False)):
            found = [exact_noise(p, q, constant), *(
                measured_noise(p, q, samples, baseline, whiten, seed=args.seed)
                for samples in (4, 16))]
            noise, variance = zip(*found)
            table[label, level] = noise
            scale = mu * (1 - mu) if whiten else 1.0
            print("{:34} {:15.2f} {:11.2f} {:11.2f}   {:19.4f} {:11.4f} {:11.4f}".format(
                label, *noise, float(variance[0] / scale), *variance[1:]))
    try:
        draw_table(args.out, table, args.levels)
    except (OSError, ValueError) as error:
        parser.error(f"--out {args.out}: {error}")
    print(f"\nwrote {args.out}")


def draw_table(path, table, levels):
    """Bars of the noise with four samples, one group a level."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for label, _ in table))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, label in enumerate(labels):
        places = [i + (k - (len(labels) - 1) / 2) * 0.12 for i in range(len(levels))]
        axes.bar(places, [table[label, level][1] for level in levels], 0.11, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(levels)), [f"overlap {level}" for level in levels])
    axes.set(ylabel="noise  E|g - Eg|² / |Eg|²,  4 samples a position",
             title="What a reward baseline does to the sampled gradient of TVD")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
