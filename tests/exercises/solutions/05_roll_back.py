"""Exercise 5: roll back the caches. (30 minutes)

A model with a KV cache reads each token once: its keys and values stay in the cache's columns,
column j for token j of the text. cache.length columns are in use. A model that is called with
tokens appends them behind these columns; to forget the last ones, set cache.length.

In speculative decoding both models read guesses that the target then refuses. Afterwards each cache
must hold a prefix of the text, and no more: the columns of refused guesses are wrong. But the two
have not read the same tokens. The target read every guess, the drafter all but its own last one,
which it wrote and never read. After a block that was kept whole, that matters.

Write unread, what a model has still to read, and roll_back. generate, given, is greedy decoding
around them. The text alone shows little: the target corrects whatever a broken drafter's cache
makes the drafter guess. The grader compares the guesses, too, and counts what was read.

Grade: python tests/exercises/grade.py 05
"""

import torch

import model


def unread(text, cache):
    """The tokens of the text (a list of ints) that are not in the cache yet: a list of ints."""
    return text[cache.length:]


def roll_back(cache, text):
    """Set cache.length so that the cache holds nothing but a prefix of the text. Returns nothing.

    Called for each model after each block. text: a list of ints, all that now counts; its newest
    token was drawn from the target's p and read by neither model.
    """
    # The target has read too much. The drafter, after a block that was kept whole, has read less
    # than this: one guess is missing, and rolling back never adds columns.
    cache.length = min(cache.length, len(text) - 1)


# ---- Given -------------------------------------------------------------------------------------

def read(llama, cache, text, places):
    """Read what is new; the model's favourite next token behind the last `places` tokens."""
    return llama(torch.tensor([unread(text, cache)]), cache)[0, -places:].argmax(-1).tolist()


@torch.inference_mode()
def generate(target, draft, prompt, new_tokens, gamma):
    """Greedy speculative decoding: (tokens, blocks), the new tokens and each block's guesses."""
    text, blocks, end = list(prompt), [], len(prompt) + new_tokens
    target_cache, draft_cache = (model.KVCache(llama.config, 1, end + gamma)
                                 for llama in (target, draft))
    while len(text) < end:
        guesses = []
        for _ in range(gamma):
            guesses += read(draft, draft_cache, text + guesses, 1)
        choices = read(target, target_cache, text + guesses, gamma + 1)
        kept = 0
        while kept < gamma and guesses[kept] == choices[kept]:
            kept += 1
        text += guesses[:kept] + [choices[kept]]
        roll_back(target_cache, text)
        roll_back(draft_cache, text)
        blocks.append(guesses)
    return text[len(prompt):end], blocks
