"""Exercise 14: adaptive gamma. (90 minutes)

No gamma serves all texts: a drafter that is always right should write long blocks, a useless one
should not write at all. Choose each block's length from what happened to this text's earlier blocks
(speculate.speculative_generate calls `choose` before each block). Costs are known, in plain steps.

What is graded, over 256 tokens, with a drafter step of 0.1 and a target pass that costs 0.05 more
for each token beyond the first:

  - with a drafter that is always wrong, the whole costs at most 1.03 of plain decoding;
  - with one that is always right, the second half drafts at least 6 of at most 8 guesses a block;
  - a drafter that is wrong for the first 64 tokens and right from then on must get its chance: then
    the whole costs at most 0.85 of plain decoding.

The choice must follow from the past blocks alone. If it looked at the guesses of the block that it
chooses for, some texts would be favoured over others, and the text would no longer be the target's.

A hint: estimate alpha from the past, forget the distant past, and use exercise 6. A drafter that
was given up must be tried again, but not often. speculate.auto_gamma is one solution: write yours
before you read it.

Grade: python tests/exercises/grade.py 14
"""


def make_choose(draft_cost, pass_costs):
    """A function choose(blocks) -> gamma, an int from 0 to len(pass_costs) - 2.

    draft_cost: a number, the cost of one drafter step; pass_costs[n]: of a target pass over n
    tokens; both over one plain target step, so pass_costs[1] is 1. blocks: a list of (drafted,
    kept) of this text's past blocks, oldest first; a block of (n, k) gave k + 1 tokens.
    """
    def cost(gamma):
        return gamma * draft_cost + pass_costs[gamma + 1]

    def choose(blocks):
        # alpha over the last ten drafted blocks or so; to begin with, one guess in two is kept.
        kept_before, examined = 1.0, 2.0
        for drafted, kept in blocks:
            if drafted:
                kept_before = 0.9 * kept_before + kept
                examined = 0.9 * examined + min(kept + 1, drafted)
        alpha = kept_before / examined

        def tokens_per_cost(gamma):
            return sum(alpha ** k for k in range(gamma + 1)) / cost(gamma)

        best = max(range(len(pass_costs) - 1), key=tokens_per_cost)
        # Where drafting does not pay, one guess every eighth block finds out whether it does again.
        return 1 if best == 0 and len(blocks) % 8 == 0 else best
    return choose
