"""Exercise 4: another rule, one coin a position. (30 minutes)

Let each position of the text have one coin, fixed by a seed and the position alone. A distribution
turns a coin into a token by inverting its cumulative sum: token 0 owns the coins in [0, p(0)),
token 1 those in [p(0), p(0) + p(1)), and so on. Plain decoding with these coins is a function of
the seed. The drafter uses *the same coins* with its q. A guess is kept where the target, with p and
the same coin, takes the same token; at the first other token the target's own token stands.

So the text is, token for token, that of plain decoding, with any drafter. The price: a guess is
kept only where the two intervals of a token overlap, and that is at most sum min(p, q), the
acceptance rate of exercise 3's rule. With two tokens both are the same; look at three.

Given: coin, and the loop around your functions, generate. Write token_at, verify, acceptance.

Trap: rounding may leave the last cumulative sum a little below 1, and a coin may lie above it.

Grade: python tests/exercises/grade.py 04
"""

import hashlib

import torch


def token_at(distribution, coin):
    """The token (an int) that owns this coin; never one of probability 0.

    distribution: (V,) fp64, summing to 1 up to rounding; coin: a float in [0, 1).
    """
    raise NotImplementedError


def verify(guesses, p, coins):
    """(kept, token): how many guesses are kept, 0 to gamma, and the token that follows; two ints.

    guesses: a list of gamma ints; p (gamma + 1, V) fp64; coins: a list of gamma + 1 floats.
    """
    raise NotImplementedError


def acceptance(p, q):
    """The probability, over one coin, that p and q give the same token: a number, in closed form.

    p, q: (V,) fp64, each summing to 1.
    """
    raise NotImplementedError


# ---- Given -------------------------------------------------------------------------------------

def coin(seed, position):
    """A float in [0, 1) that depends on nothing but these two ints."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2 ** 53


def generate(target, draft, prompt, new_tokens, gamma, seed):
    """The new tokens, a list of ints. target(text), draft(text): (V,) behind a list of tokens."""
    text, end = list(prompt), len(prompt) + new_tokens
    while len(text) < end:
        coins = [coin(seed, len(text) + i) for i in range(gamma + 1)]
        guesses = []
        for i in range(gamma):
            guesses.append(token_at(draft(text + guesses), coins[i]))
        # A model would read all guesses in one pass.
        p = torch.stack([target(text + guesses[:i]) for i in range(gamma + 1)])
        kept, token = verify(guesses, p, coins)
        text += guesses[:kept] + [token]
    return text[len(prompt):end]
