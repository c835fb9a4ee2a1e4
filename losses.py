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

All functions here return (N,) in fp32; the caller takes the mean. Gradients reach the draft logits only.
"""

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

    since grad q = q grad log q. In the draft logit of token y this is q(y) (E_q[r] - r(y)). The sum below is
    1 - sum min(p, q) with the minimum written as a choice, so that ties fall on r = 0 as in the equation (an
    automatic derivative of |p - q| or of a minimum would choose for us).
    """
    p, q = target_p(target_logits), torch.softmax(draft_logits.float(), dim=-1)
    return 1 - torch.where(p > q, q, p).sum(-1)


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


LOSSES = {"kld": kld, "rkld": rkld, "jsd": jsd, "tvd": tvd, "tvd++": tvd_plus_plus, "nla": nla, "lk": lk}
