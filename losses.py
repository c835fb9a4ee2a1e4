"""Distillation losses: how far the drafter's distribution is from the target's, and which distance to follow.

At one position let p = softmax(target logits) and q = softmax(draft logits). (Goel et al., 2024, arXiv 2403.00858, write
q for the target and p_theta for the drafter; here, as in the literature on speculative decoding, p is the target and q
the drafter, everywhere.) A drafted token x ~ q is accepted with probability min(1, p(x) / q(x)), so

    P(accepted) = sum_x q(x) min(1, p(x) / q(x)) = sum_x min(p(x), q(x)) = 1 - TVD(p, q)

What speculative decoding pays for is thus exactly the total variation distance, `tvd`; the others are ways there.

Write your own in six lines: a function of draft logits (N, V) and target logits (N, V), one row a position, that
returns the loss of each position (N,). Raise both to float, detach the target, enter it in LOSSES under a name:

    def hellinger(draft_logits, target_logits):
        q, p = torch.softmax(draft_logits.float(), -1), torch.softmax(target_logits.detach().float(), -1)
        return 1 - (p * q + 1e-20).sqrt().sum(-1)      # the small number: sqrt has no gradient at 0

    LOSSES["hellinger"] = hellinger                     # then: python distill.py finetune --loss hellinger ...

or leave this file alone and write it into your own: python distill.py finetune --loss my_loss.py:hellinger ...

All functions here return (N,) in fp32; the caller takes the mean. Gradients reach the draft logits only.

    python losses.py            the noise of every sampled estimator: a table, and the picture out/variance.png
"""

import argparse
import functools
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def draft_log_q(draft_logits):
    """log q (N, V) in fp32. A token the drafter cannot draft (logit -inf) has q = 0; see kld for what that means."""
    return torch.log_softmax(draft_logits.float(), dim=-1)


def target_p(target_logits):
    """p (N, V) in fp32, detached: the target is never trained."""
    return torch.softmax(target_logits.detach().float(), dim=-1)


def overlap(draft_logits, target_logits):
    """sum_x min(p, q), (N,): the probability that a drafted token is accepted at this position (Leviathan et al., 2023,
    arXiv 2211.17192, corollary 3.6)."""
    return torch.minimum(target_p(target_logits), torch.softmax(draft_logits.float(), dim=-1)).sum(-1)


def implied_tau(alpha, gamma):
    """The block efficiency that acceptance rate alpha would imply if every token were accepted independently:
    1 + alpha + ... + alpha^gamma = (1 - alpha^(gamma + 1)) / (1 - alpha). Real acceptances come in runs, so measure tau.
    """
    return sum(alpha ** k for k in range(gamma + 1))


# ---- Divergences -----------------------------------------------------------------------------------------------------

def kld(draft_logits, target_logits):
    """KL(p || q) = sum_x p (log p - log q). Gradient in the draft logits: q - p.

    The drafter must cover all that the target might say. Where q is 0 and p is not it would be infinite; log q is
    floored at -100 there, which leaves those tokens out of the gradient.
    """
    log_q = draft_log_q(draft_logits).clamp(min=-100)
    log_p = torch.log_softmax(target_logits.detach().float(), dim=-1).clamp(min=-100)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)    # p (log p - log q), in one pass


def rkld(draft_logits, target_logits):
    """KL(q || p) = sum_x q (log q - log p): mode-seeking, the drafter may ignore what it cannot imitate. log p is
    floored at -100, so that a token the target rules out costs much but not infinitely much."""
    log_q = draft_log_q(draft_logits)
    q = log_q.exp()
    log_p = torch.log_softmax(target_logits.detach().float(), dim=-1).clamp(min=-100)
    return (q * (log_q.clamp(min=-100) - log_p)).sum(-1)


def jsd(draft_logits, target_logits):
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (Lin, 1991): symmetric, between 0 and log 2."""
    p, log_q = target_p(target_logits), draft_log_q(draft_logits).clamp(min=-100)
    q = log_q.exp()
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    return (torch.xlogy(p, p) - p * log_m + q * (log_q - log_m)).sum(-1) / 2


# ---- Total variation distance, and its policy gradient ---------------------------------------------------------------

def tvd(draft_logits, target_logits):
    """Total variation distance (1/2) sum_x |p - q| = 1 - sum_x min(p, q): the probability of a refusal.

    Its gradient is a policy gradient. Only tokens with p > q contribute q to the minimum, so with the reward
    r(x) = 1 where p(x) > q(x), else 0:

        grad TVD = -sum_x r(x) grad q(x) = -E_{x~q}[ r(x) grad log q(x) ]

    since grad q = q grad log q. In the draft logit of token y this is q(y) (E_q[r] - r(y)). Both sum to 1, so the half sum of
    |p - q| is the sum of its positive part max(p - q, 0) alone, and where that is 0 its derivative is 0, so that ties
    fall on r = 0 as in the equation (an automatic derivative of |p - q| or of a minimum would choose for us).
    """
    p, q = target_p(target_logits), torch.softmax(draft_logits.float(), dim=-1)
    return F.relu(p - q).sum(-1)          # torch.where(p > q, q, p) would do, in twice the time


def reward_mean_and_deviation(draft_logits, target_logits, floor=1e-3):
    """mu and sigma of the reward r(x) = [p(x) > q(x)] for x ~ q, over all positions given; two detached numbers.

    mu is the mean over positions of E_{x~q}[r]. A reward is 0 or 1, so its variance is mu (1 - mu). sigma is floored:
    when p = q nearly everywhere no reward is left, and dividing by 0 would make noise of rounding errors.
    """
    with torch.no_grad():
        p, q = target_p(target_logits), torch.softmax(draft_logits.float(), dim=-1)
        mu = torch.where(p > q, q, 0.0).sum(-1).mean()
        return mu, (mu * (1 - mu)).sqrt().clamp(min=floor)


def tvd_plus_plus(draft_logits, target_logits, sigma=None):
    """TVD++ (Goel et al., 2024, section 3.2), exact form: the reward becomes the advantage A(x) = (r(x) - mu) / sigma.

    The exact gradient is -E_{x~q}[A grad log q] = -(1/sigma) E[r grad log q] + (mu/sigma) E[grad log q], and the last
    expectation is 0, for sum_x q grad log q = grad sum_x q = grad 1 = 0. So a baseline that does not depend on x
    changes nothing here: the gradient is that of TVD, divided by sigma. tvd / sigma has exactly this gradient, and a
    value worth logging (the surrogate's own mean is always 0). What the baseline does reduce is the noise of the
    sampled form, where the expectation is replaced by a few x ~ q.

    sigma: None takes it from the positions given, which are the batch in the paper's sense; a caller that goes
    through its batch in pieces gives one for all of them (reward_mean_and_deviation).
    """
    if sigma is None:
        sigma = reward_mean_and_deviation(draft_logits, target_logits)[1]
    return tvd(draft_logits, target_logits) / sigma


# ---- After the paper -------------------------------------------------------------------------------------------------

def nla(draft_logits, target_logits):
    """-log sum_x min(p, q): the negative log of the acceptance rate. Gradient: that of tvd divided by the acceptance
    rate, so positions the drafter still gets wrong weigh more (Samarin et al., 2026, arXiv 2602.23881)."""
    return -torch.log((1 - tvd(draft_logits, target_logits)).clamp(min=1e-8))


def lk(draft_logits, target_logits):
    """lambda KL(p || q) + (1 - lambda) TVD with lambda = exp(-3 alpha), alpha = sum min(p, q) at that position, detached:
    KL while the drafter is bad, where TVD has little gradient, then TVD (Samarin et al., 2026, arXiv 2602.23881).
    Some implementations average alpha over the batch; here each position has its own."""
    distance = tvd(draft_logits, target_logits)
    weight = torch.exp(-3 * (1 - distance.detach()))
    return weight * kld(draft_logits, target_logits) + (1 - weight) * distance


# ---- The sampled form: REINFORCE, and what a baseline does for it ----------------------------------------------------

# The exact gradient sums over the whole vocabulary. Policy-gradient methods (Williams, 1992) cannot: they draw a few
# x ~ q and average (r(x) - b) s(x), with the score s(x) = grad log q(x). Its mean is the exact gradient for every b that
# does not depend on x, since E_q[s] = 0; its noise depends on b very much. A baseline is a function
#
#     baseline(rewards, p, q) -> b, to be taken off the rewards (it must broadcast to their shape)
#
# of the samples' rewards (N, K) and both distributions (N, V). Write your own and enter it in BASELINES.

def no_baseline(rewards, p, q):
    """b = 0. Unbiased. Every sampled token with a reward is pushed up, and none is pushed down."""
    return 0.0


def batch_mean(rewards, p, q):
    """The mean reward of the whole batch, M = N K samples: the paper's mu. Assumes that positions are alike.

    Biased, because each sample sits in its own mean: own term r s / M, all others independent of s. So the mean is the
    exact gradient times 1 - 1/M: a matter of scale only, and small in a large batch.
    """
    return rewards.mean()


def expected_reward(rewards, p, q):
    """E_{x~q}[r] at each position, summed over the vocabulary: the value function, known exactly here. Unbiased.

    Where it can be had, so can the exact gradient; it shows what a learnt critic would be after.
    """
    return torch.where(p > q, q, 0.0).sum(-1, keepdim=True)


def leave_one_out(rewards, p, q):
    """For each of K samples the mean of the other K - 1 at its position (Kool et al., 2019). Unbiased: it never sees
    its own sample, and positions need not be alike. Needs samples >= 2."""
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError("baseline leave-one-out needs at least 2 samples a position; give --samples 2 or more")
    return (rewards.sum(-1, keepdim=True) - rewards) / (K - 1)


class RunningMean:
    """A mean over earlier batches, b <- decay b + (1 - decay) mean(r), 0 at first. Unbiased: it depends on the past only.
    Assumes that the drafter changes slowly. It has a memory, `mean`, so each training makes its own and saves it."""

    def __init__(self, decay=0.9):
        self.decay, self.mean = decay, 0.0

    def __call__(self, rewards, p, q):
        before, self.mean = self.mean, self.decay * self.mean + (1 - self.decay) * rewards.mean().item()
        return before


def least_variance(rewards, p, q):
    """The constant that minimises the variance at each position, E_q[r |s|^2] / E_q[|s|^2]. Unbiased.

    d/db E|(r - b) s|^2 = 0 gives it. In the draft logits s(x) = e_x - q, so |s(x)|^2 = 1 - 2 q(x) + sum q^2: rare tokens
    have long scores and count more than in the expected reward.
    """
    weight = q * (1 - 2 * q + q.pow(2).sum(-1, keepdim=True))
    return torch.where(p > q, weight, 0.0).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-20)


BASELINES = {"none": no_baseline, "batch": batch_mean, "expected": expected_reward, "leave-one-out": leave_one_out,
             "running": RunningMean(), "least-variance": least_variance}


def draw(q, samples, generator=None):
    """samples tokens a position from q (N, V) -> (N, samples), by inversion of the cumulative sum. The random numbers come
    from the generator's own device, so that one on the CPU serves a GPU too."""
    total = q.double().cumsum(-1)
    u = torch.rand(len(q), samples, dtype=torch.float64, generator=generator, device=generator.device if generator else q.device)
    return torch.searchsorted(total, u.to(q.device) * total[:, -1:], right=True).clamp(max=q.shape[-1] - 1)


def tvd_sampled(draft_logits, target_logits, samples=1, baseline="none", whiten=False, generator=None, floor=1e-3):
    """TVD by policy gradient: x ~ q drawn afresh at each position (never the answer's own token, which came from p).

    baseline: a name in BASELINES, or a function. whiten: divide by the standard deviation of this batch's rewards,
    floored. That is biased: rewards and their deviation come from the same samples, so the division is by a number
    that knows the sample (measured in tests/test_losses.py).
    The gradient is -(1/K) sum_k (r(x_k) - b) / sigma  grad log q(x_k). The value is an estimate of TVD, for the log.
    """
    log_q = draft_log_q(draft_logits)                                                    # (N, V)
    with torch.no_grad():
        p, q = target_p(target_logits), torch.softmax(draft_logits.float(), dim=-1)      # computed alike: equal logits, equal p and q
        x = draw(q, samples, generator)                                                  # (N, K)
        rewards = (p.gather(-1, x) > q.gather(-1, x)).float()
        advantage = rewards - (BASELINES[baseline] if isinstance(baseline, str) else baseline)(rewards, p, q)
        if whiten:
            advantage = advantage / rewards.std(correction=0).clamp(min=floor)
        value = 1 - (p.gather(-1, x) / q.gather(-1, x)).clamp(max=1).mean(-1)            # E_q[min(1, p/q)] is the acceptance
    surrogate = -(advantage * log_q.gather(-1, x)).mean(-1)
    return value + surrogate - surrogate.detach()                                        # this value, that gradient


def tvd_plus_plus_sampled(draft_logits, target_logits, samples=1, baseline="batch", whiten=True, generator=None):
    """TVD++ as published: advantages (r - mu) / sigma with the batch's own mean and deviation of the sampled rewards."""
    return tvd_sampled(draft_logits, target_logits, samples, baseline, whiten, generator)


LOSSES = {"kld": kld, "rkld": rkld, "jsd": jsd, "tvd": tvd, "tvd++": tvd_plus_plus, "nla": nla, "lk": lk,
          "tvd-sampled": tvd_sampled, "tvd++-sampled": tvd_plus_plus_sampled}


# ---- Choosing a loss, one's own included -----------------------------------------------------------------------------

def choose(name, samples=1, baseline=None, generator=None):
    """The loss function of a name in LOSSES, or of my_loss.py:my_loss, which is tried on a small case first.

    samples, baseline (a name in BASELINES; None is the loss's own) and generator go to the sampled forms. ValueError
    says what is wrong with the name or the function.
    """
    if ":" in name:
        path, function_name = name.rsplit(":", 1)
        return check(load_function(Path(path), function_name), name)
    if name not in LOSSES:
        raise ValueError(f"--loss {name} is none of {', '.join(LOSSES)}, nor FILE.py:FUNCTION")
    if not name.endswith("-sampled"):
        if baseline or samples != 1:
            raise ValueError(f"--samples and --baseline are for the sampled losses; {name} sums over the vocabulary")
        return LOSSES[name]
    if baseline and baseline not in BASELINES:
        raise ValueError(f"--baseline {baseline} is none of {', '.join(BASELINES)}")
    if samples < 1 or (baseline == "leave-one-out" and samples < 2):
        raise ValueError(f"--samples {samples}: expected at least 1, or 2 for --baseline leave-one-out")
    options = {"baseline": RunningMean() if baseline == "running" else baseline} if baseline else {}
    return functools.partial(LOSSES[name], samples=samples, generator=generator, **options)


def load_function(path, name):
    """The function `name` of a Python file. ValueError if there is no such file, or it fails, or lacks the function."""
    if not path.is_file():
        raise ValueError(f"--loss {path}:{name}: {path} is no file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: fails when read ({type(error).__name__}: {error})") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path}: defines no function {name}; it has {', '.join(n for n in vars(module) if not n.startswith('_')) or 'none'}")
    return getattr(module, name)


def check(function, name):
    """function, after a try on 64 positions of seven tokens. ValueError in one sentence for what training would choke on."""
    generator = torch.Generator().manual_seed(0)
    draft, target = (torch.randn(64, 7, generator=generator).requires_grad_() for _ in range(2))
    try:
        loss = function(draft, target)
    except Exception as error:
        raise ValueError(f"{name}: fails on draft and target logits (64, 7): {type(error).__name__}: {error}") from None
    if not isinstance(loss, torch.Tensor) or loss.shape != (64,):
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"{name}: returned {shape} for logits (64, 7); expected one loss a position, shape (64,): sum over the last dimension only")
    if not torch.isfinite(loss).all():
        raise ValueError(f"{name}: the loss is not finite on ordinary logits (first {loss[:3].tolist()}): look for a log or a division by 0")
    if not loss.requires_grad:
        raise ValueError(f"{name}: the loss has no gradient: it must depend on draft_logits by operations of torch, outside no_grad")
    loss.sum().backward()
    if draft.grad is None or not torch.isfinite(draft.grad).all() or not draft.grad.any():
        raise ValueError(f"{name}: the gradient in draft_logits is missing, zero or not finite: check detach() and square roots at 0")
    if target.grad is not None and target.grad.any():
        raise ValueError(f"{name}: a gradient reaches target_logits: the target is not trained, use target_logits.detach()")
    return function


# ---- The laboratory: how noisy is each estimator? ---------------------------------------------------------------------

def example(level, positions=32, vocab=64, seed=0):
    """p, q (N, V) with sum min(p, q) = level at each position: q = (1 - t) p + t r for an r of its own, t by bisection."""
    generator = torch.Generator().manual_seed(seed)
    p, r = (torch.softmax(3 * torch.randn(positions, vocab, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    low, high = torch.zeros(positions, 1, dtype=torch.float64), torch.ones(positions, 1, dtype=torch.float64)
    for _ in range(60):
        t = (low + high) / 2
        above = torch.minimum(p, (1 - t) * p + t * r).sum(-1, keepdim=True) > level
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    return p, (1 - t) * p + t * r


def exact_noise(p, q, baseline):
    """(noise, variance) of (r - b) s from one sample, enumerated over the vocabulary. b: (N, 1) or a number, constant in x.

    noise: E|g - Eg|^2 / |Eg|^2, summed over positions above and below; rescaling g does not change it.
    """
    rewards = (p > q).to(p)
    score = torch.eye(p.shape[-1], dtype=p.dtype) - q[:, None]                           # (N, x, V): s(x) = e_x - q
    g = (rewards - baseline)[..., None] * score
    mean = (q[..., None] * g).sum(1)                                                     # (N, V)
    variance = (q * (g - mean[:, None]).pow(2).sum(-1)).sum()
    return (variance / mean.pow(2).sum()).item(), (variance / len(p)).item()


def measured_noise(p, q, samples, baseline, whiten, repeats=400, seed=0):
    """The same for `samples` a position, from `repeats` draws of the whole batch; g is what backward() gives."""
    generator, draft = torch.Generator().manual_seed(seed), q.log().float().requires_grad_()
    g = []
    for _ in range(repeats):
        loss = tvd_sampled(draft, p.log().float(), samples, baseline, whiten, generator)
        g.append(-torch.autograd.grad(loss.sum(), draft)[0].double())
    g = torch.stack(g)                                                                   # (R, N, V)
    variance = g.var(0).sum()
    # The mean of R noisy gradients is longer than their expectation: by variance / R, on average.
    return (variance / (g.mean(0).pow(2).sum() - variance / repeats)).item(), (variance / len(p)).item()


def main():
    parser = argparse.ArgumentParser(description="The noise E|g - Eg|^2 / |Eg|^2 of each sampled estimator of the gradient of TVD.")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.5, 0.9], help="overlaps sum min(p, q) (default 0.2 0.5 0.9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/variance.png"))
    args = parser.parse_args()
    if any(not 0.05 <= level < 1 for level in args.levels):
        raise ValueError(f"--levels {args.levels}: expected overlaps of at least 0.05 and below 1")
    table = {}                                    # (label, level) -> noise at 1 sample
    for level in args.levels:
        p, q = example(level, seed=args.seed)
        mu = torch.where(p > q, q, 0.0).sum(-1, keepdim=True)
        print(f"\noverlap {level}: mu = E_q[r] = {mu.mean():.3f} (from {mu.min():.3f} to {mu.max():.3f}); 32 positions, 64 tokens")
        print(f"{'estimator':40} noise: 1 sample   4 samples  16 samples   variance: 1 sample   4 samples  16 samples")
        for label, name, whiten in [("none", "none", False), ("batch mean", "batch", False), ("batch mean, over deviation (tvd++)", "batch", True),
                                    ("expected reward", "expected", False), ("least variance", "least-variance", False),
                                    ("running mean (settled)", mu.mean(), False), ("leave one out", "leave-one-out", False)]:
            # One sample is enumerated: the batch's mean is taken as its expectation there, the limit of a large batch.
            constant = {"none": 0.0, "batch": mu.mean(), "expected": mu, "least-variance": least_variance(None, p, q)}.get(name, name)
            sigma = (mu.mean() * (1 - mu.mean())).sqrt() if whiten else 1.0
            one = (float("nan"), float("nan")) if name == "leave-one-out" else exact_noise(p, q, constant)
            function = BASELINES[name] if isinstance(name, str) else lambda rewards, p, q: name.float()
            more = [measured_noise(p, q, samples, function, whiten, seed=args.seed) for samples in (4, 16)]
            table[label, level] = [one[0], more[0][0], more[1][0]]
            print(f"{label:40} {one[0]:15.2f} {more[0][0]:11.2f} {more[1][0]:11.2f}   {one[1] / float(sigma) ** 2:19.4f} "
                  f"{more[0][1]:11.4f} {more[1][1]:11.4f}")
    draw_table(args.out, table, args.levels)
    print(f"\nwrote {args.out}")


def draw_table(path, table, levels):
    """Bars of the noise with four samples, one group a level."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label for label, _ in table))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for k, label in enumerate(labels):
        axes.bar([i + (k - (len(labels) - 1) / 2) * 0.12 for i in range(len(levels))], [table[label, level][1] for level in levels], 0.11, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(levels)), [f"overlap {level}" for level in levels])
    axes.set(ylabel="noise  E|g - Eg|² / |Eg|²,  4 samples a position", title="What a reward baseline does to the sampled gradient of TVD")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
