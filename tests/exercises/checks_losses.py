"""Checks of the exercises on losses: 7 to 10 and 16."""

import itertools
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from checks import call, gradient, interval, near, p_and_q, plain_tvd, randoms, same, seeded

import losses

CHECKS, TRAINED = {}, {}
LOSSES = dict(losses.LOSSES)          # without any that an exercise enters


# ---- 7: gradients by hand ----------------------------------------------------------------------

def plain_kl(draft_logits, target_logits):
    log_q, log_p = torch.log_softmax(draft_logits, -1), torch.log_softmax(target_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def equals_autograd(function, loss):
    for seed, scale in ((0, 1.0), (1, 3.0)):
        generator = seeded(seed)
        draft, target = (randoms(generator, 6, 9, scale=scale) for _ in range(2))
        with torch.inference_mode():
            ours = call(function, draft, target)
        if not same(ours, gradient(loss, draft, target), 1e-9):
            return False
    return True


def kl_by_hand(its):
    return equals_autograd(its.kl_gradient, plain_kl)


def tvd_by_hand(its):
    return equals_autograd(its.tvd_gradient, plain_tvd)


CHECKS[7] = [
    (5, "KL's gradient equals the automatic one, to 1e-9", kl_by_hand,
     "only -sum p log q depends on the drafter; the derivative of log q(x) in y is [x = y] - q(y)"),
    (5, "TVD's gradient equals the automatic one, to 1e-9", tvd_by_hand,
     "-sum_x r(x) q(x) ([x = y] - q(y)): do not lose the second half")]


# ---- 8: TVD as REINFORCE -----------------------------------------------------------------------

def estimates(its, samples):
    """Every draw of `samples` tokens, the same at all positions: (its probability (N,), tokens
    (samples,), the surrogate's gradient); the exact gradient of TVD; p; q."""
    generator = seeded(samples)
    draft, target = (randoms(generator, 5, 4) for _ in range(2))
    q, every = torch.softmax(draft, -1), []
    for tokens in itertools.product(range(4), repeat=samples):
        tokens = torch.tensor(tokens)
        g = gradient(lambda d, t: its.surrogate(d, t.clone(), tokens.repeat(5, 1)), draft, target)
        every.append((q[:, tokens].prod(-1), tokens, g))
    return every, gradient(plain_tvd, draft, target), torch.softmax(target, -1), q


def mean_is_exact(its):
    for samples in (1, 2):
        every, exact, _, _ = estimates(its, samples)
        if not same(sum(weight[:, None] * g for weight, _, g in every), exact, 1e-9):
            return False
    return True


def each_draw_has_its_own_gradient(its):
    """-r(x) grad log q(x), and grad log q(x) in the logits is e_x - q."""
    every, _, p, q = estimates(its, 1)
    for _, (x,), g in every:
        rewards = (p > q)[:, x, None].double()
        if not same(g, -rewards * (torch.eye(4)[x] - q), 1e-9):
            return False
    return True


def only_the_drafter_learns(its):
    draft, target = (randoms(seeded(seed), 5, 4).requires_grad_() for seed in range(2))
    value = its.surrogate(draft, target, torch.arange(5)[:, None] % 4)
    value.sum().backward()
    untouched = target.grad is None or not target.grad.any()
    return value.shape == (5,) and draft.grad is not None and untouched


CHECKS[8] = [
    (5, "the mean over all draws of one or two tokens is TVD's exact gradient", mean_is_exact,
     "minus the mean over the K tokens of r(x) log q(x); rewards are 0 or 1"),
    (3, "one token's gradient is -r(x) grad log q(x)", each_draw_has_its_own_gradient,
     "look at the tokens given, not at the whole vocabulary; no baseline"),
    (2, "one loss a position, and no gradient in the target", only_the_drafter_learns,
     "compute rewards under no_grad; take the mean over K only")]


# ---- 9: an unbiased baseline -------------------------------------------------------------------

@contextmanager
def own_baselines_refuse():
    """The baselines of losses.py raise, by whatever name they are called."""
    def refuse(*_, **__):
        raise ValueError("a baseline of losses.py was called: write your own")
    names = {f.__name__: refuse for f in losses.BASELINES.values() if hasattr(f, "__name__")}
    with (mock.patch.multiple(losses, RunningMean=refuse, **names),
          mock.patch.dict(losses.BASELINES, dict.fromkeys(losses.BASELINES, refuse))):
        yield


def mean_stays_exact(its):
    """Two positions, three tokens, two samples each: all 81 draws, each with a fresh baseline."""
    p, q = p_and_q(3, 2, 3)
    r = (p > q).double()
    score = torch.eye(3, dtype=torch.float64) - q[:, None]                     # (N, x, V)
    exact, mean = ((q * r)[..., None] * score).sum(1), 0.0
    for draw in itertools.product(range(3), repeat=4):
        x = torch.tensor(draw).view(2, 2)
        rewards, weight = r.gather(1, x), q.gather(1, x).prod()
        with own_baselines_refuse():
            advantage = rewards - call(its.load_again().baseline, rewards, p, q, rewards.mean())
        if advantage.shape != (2, 2):
            return False
        s = score.gather(1, x[..., None].expand(2, 2, 3))
        mean = mean + weight * (advantage[..., None] * s).mean(1)
    return same(mean, exact, 1e-9)


def mixed_positions():
    levels = [losses.example(level, positions=8) for level in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)]
    return [torch.cat(both) for both in zip(*levels)]


def at(its, p, q, reward):
    """The baseline (N, 1) where every token that was drawn has this reward."""
    rewards = torch.full((len(p), 1), reward, dtype=torch.float64)
    with own_baselines_refuse():
        b = call(its.load_again().baseline, rewards, p, q, rewards.mean())
    return torch.as_tensor(b, dtype=torch.float64).expand(len(p), 1)


def same_whatever_was_drawn(its):
    p, q = mixed_positions()
    return same(at(its, p, q, 0.0), at(its, p, q, 1.0))


def less_noise_than_the_batch_mean(its):
    p, q = mixed_positions()
    batch_mean = (q * (p > q)).sum(-1).mean()
    noise, reference = (losses.exact_noise(p, q, b)[0] for b in (at(its, p, q, 0.0), batch_mean))
    return noise <= 0.85 * reference


CHECKS[9] = [
    (3, "the mean over all draws is TVD's exact gradient", mean_stays_exact,
     "a baseline that knows the reward it is subtracted from is biased"),
    (2, "it is a function of p and q, whatever was drawn", same_whatever_was_drawn,
     "use neither rewards nor mu"),
    (5, "at most 0.85 of the batch mean's noise where positions differ",
     less_noise_than_the_batch_mean,
     "one b for each position: the mean of r under q, or better with weights")]


# ---- 10: when TVD++ differs from TVD -----------------------------------------------------------

def cosine(loss_a, loss_b, draft, target):
    a, b = (gradient(loss, draft, target).double().flatten() for loss in (loss_a, loss_b))
    return (a @ b / (a.norm() * b.norm())).item()


def mixture(loss, tokens):
    return lambda d, t: 0.9 * loss(d, t) + 0.1 * F.cross_entropy(d, tokens, reduction="none")


def batch_10(scale=2.0):
    generator = seeded(10)
    return [scale * torch.randn(12, 9, generator=generator) for _ in range(2)]


def cosine_is_the_gradients(its):
    for a, b in itertools.combinations(("kld", "rkld", "tvd", "tvd++-position"), 2):
        ours = call(its.gradient_cosine, LOSSES[a], LOSSES[b], *batch_10())
        if not near(ours, cosine(LOSSES[a], LOSSES[b], *batch_10()), 1e-4):
            return False
    return True


def one_for_tvd_and_tvdpp(its):
    pair = LOSSES["tvd"], LOSSES["tvd++"]
    return all(near(call(its.gradient_cosine, *pair, *batch_10(scale)), 1, 1e-4)
               for scale in (0.5, 2.0, 4.0))


def differs_by_position(its):
    batch = its.unequal_batch()
    return (cosine(LOSSES["tvd"], LOSSES["tvd++-position"], *batch) < 0.99
            and cosine(LOSSES["tvd"], LOSSES["tvd++"], *batch) > 0.9999)


def differs_beside_text(its):
    given, words = batch_10(), torch.arange(12) % 9
    for name in ("tvd", "kld"):
        ours = gradient(its.with_text(LOSSES[name], words.clone()), *given)
        if not same(ours, gradient(mixture(LOSSES[name], words), *given), 1e-6):
            return False
    draft, target, tokens = its.mixed_batch()
    a, b = (mixture(LOSSES[name], tokens) for name in ("tvd", "tvd++"))
    return cosine(a, b, draft, target) < 0.99


CHECKS[10] = [
    (3, "gradient_cosine is the cosine of the two whole gradients", cosine_is_the_gradients,
     "one vector for all positions and tokens, not a cosine for each position"),
    (2, "it is 1 for tvd and tvd++", one_for_tvd_and_tvdpp,
     "the loss of the batch at once: tvd++ takes its sigma from the positions it is given"),
    (2, "the batch shows tvd++-position below 0.99", differs_by_position,
     "a position where q is nearly all on one token that p likes less has a small sigma"),
    (3, "the mixed batch shows tvd++ below 0.99 beside text", differs_beside_text,
     "dividing by sigma leaves less weight to the text: much less where sigma is small")]


# ---- 16: beat TVD++ ----------------------------------------------------------------------------

def batch_16():
    generator = seeded(16)
    return [2 * torch.randn(64, 50, generator=generator) for _ in range(2)]


def training_can_use_it(its):
    losses.check(its.my_loss, "my_loss")
    draft, target = batch_16()
    values = call(its.my_loss, draft, target), call(its.my_loss, target, target)
    return all(v.shape == (64,) and bool(torch.isfinite(v).all()) for v in values)


def it_is_new(its):
    draft, target = batch_16()
    if its.my_loss(draft, target).shape != (64,):
        return False
    for name, loss in LOSSES.items():
        torch.manual_seed(0)                      # of the sampled ones
        similar = cosine(its.my_loss, loss, draft, target)
        if not similar < 0.99:
            print(f"cosine {similar:.3f} with {name}")
            return False
    return True


CHECKS[16] = [
    (2, "training can use it", training_can_use_it,
     "one finite loss a position; losses.check says in a sentence what is wrong"),
    (3, "its direction is none of losses.LOSSES: every cosine is below 0.99", it_is_new,
     "a number in front of a loss changes nothing; a new weight for each position or token does")]


def compared(world, names, rates):
    """{loss: its runs over three seeds} of distill.py compare in the tiny world."""
    places = {"target": "target", "draft": "drafter-base", "data": "records.jsonl",
              "pretrain-data": "pretrain", "dev": "dev.jsonl", "test": "test.jsonl"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "distill.py", "compare", "--losses", *names, "--seeds", 3,
                   "--learning-rates", *rates, "--gamma", 3, "--prompts", 1, "--threads", 1,
                   "--out", out]
        for flag, name in places.items():
            command += [f"--{flag}", world.resolve() / name]
        subprocess.run([*map(str, command)], cwd=Path(losses.__file__).parent, check=True)
        runs = json.loads((Path(out) / "compare.json").read_text())["runs"]
    return {name: [run for run in runs if run["loss"] == name and "dev_alpha" not in run]
            for name in names}


def beats_tvdpp(its, world):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my_loss.py"        # a copy: no cache of compiled modules is there
        path.write_text(Path(its.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        mine = f"{path}:my_loss"
        runs = compared(world, ["tvd++", "kld", mine], its.LEARNING_RATES)
    key = next(key for key in runs["kld"][0] if key.startswith("alpha"))   # the training's topics
    for name, loss in (("kld", "kld"), ("yours", mine)):
        mean, half = interval([a[key] - b[key] for a, b in zip(runs[loss], runs["tvd++"])])
        print(f"{name}: {key} above tvd++'s by {mean:+.4f} ± {half:.4f}")
    rates = [runs[loss][0]["learning_rate"] for loss in ("tvd++", mine)]
    print(f"learning rates: tvd++ {rates[0]:g}, yours {rates[1]:g}")
    inside = all(min(its.LEARNING_RATES) < rate < max(its.LEARNING_RATES) for rate in rates)
    return mean - half > 0 and inside


TRAINED[16] = [
    (5, "a higher acceptance rate than tvd++'s, beyond the interval of three seeds", beats_tvdpp,
     "was each learning rate chosen inside the grid? kld's row says how hard this is")]
