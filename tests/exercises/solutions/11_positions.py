"""Exercise 11: which positions count in a training record? (25 minutes)

A record holds the ids of a prompt and those of the target's answer. The drafter reads both, and
learns at each position whose *next* token belongs to the answer. The position of the last prompt
token therefore counts. The last position never does: nothing follows.

If the answer ended by itself, the end-of-turn token is its last token and is learnt, too. If it
was cut off at a limit of length, the target would have gone on, so no end token follows. A record
is cut at `context` tokens. A record in which no position counts is dropped.

train.read_examples and train.collate do this for files and batches; the grader compares with them.

Grade: python tests/exercises/grade.py 11
"""


def positions(prompt_ids, response_ids, ended, context, end_id):
    """(tokens, answer): the ids to read, at most `context`, and for each of them whether it counts.

    prompt_ids, response_ids: lists of ints, the second may be empty; ended: a bool; context: an
    int; end_id: the end-of-turn token. tokens: a list of ints; answer: a list of bools of the same
    length. A record that is dropped gives ([], []).
    """
    tokens = (prompt_ids + response_ids + [end_id] * ended)[:context]
    first, last = len(prompt_ids) - 1, len(tokens) - 1
    answer = [first <= i < last for i in range(len(tokens))]
    return (tokens, answer) if any(answer) else ([], [])
