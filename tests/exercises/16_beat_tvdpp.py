"""Exercise 16: beat TVD++ with a loss of your own. (120 minutes, it trains)

Write a loss of the draft and the target logits that trains a better drafter than tvd++ does. It
must be a new one: on random logits its gradient has a cosine below 0.99 with that of every loss in
losses.LOSSES.

With --slow the grader runs `distill.py compare` in the tiny world, three seeds, with tvd++, kld and
yours. The acceptance rate on the test prompts of the training's topics must be higher than tvd++'s:
the 95 % interval of the difference, paired by seed, lies above 0. The learning rate that was chosen
on the development prompts, for tvd++ and for yours, must lie inside the grid: one at its edge has
not been chosen, so widen LEARNING_RATES. kld's difference is printed beside yours, because beating
tvd++ here says little if kld does so, too.

losses.py says what a loss must look like, and losses.check tries it.

Grade: python tests/exercises/grade.py 16 --slow      (after make demo; or --world DIR)
"""

LEARNING_RATES = [3e-3, 1e-2, 3e-2, 1e-1]


def my_loss(draft_logits, target_logits):
    """The loss of each position, (N,) fp32. Logits (N, V); no gradient may reach the target's."""
    raise NotImplementedError
