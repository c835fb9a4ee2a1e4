"""The graders of tests/exercises: each passes its solution, and fails the stub, stubs that return
something trivial, and planted mistakes. An exercise that has been begun is no failure here.

A planted mistake is a function with the arguments of the one that it replaces, and the solution's
functions before them, as `right`. Of those that train, 15 and 16, the cheap checks are tested.
"""

import functools
import inspect
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import losses

EXERCISES = ROOT / "tests" / "exercises"
sys.path.insert(0, str(EXERCISES))

import grade  # noqa: E402  (after the path is set)

SOLUTIONS = EXERCISES / "solutions"
NUMBERS = sorted(grade.CHECKS)
handed_out = pytest.mark.skipif(not SOLUTIONS.is_dir(), reason="the solutions have been taken away")


def earned(results):
    return sum(result.points for result in results if result.problem is None)


def replaced(number, folder, functions):
    """The Results of the exercise in the folder, with these {name: function} in its own's place;
    each is given the folder's functions, `right`, before its arguments."""
    def load():
        its, right = grade.load(number, folder), grade.load(number, folder)
        for name, function in functions.items():
            setattr(its, name, functools.partial(function, right))
        its.load_again = load
        return its
    return grade.examine(number, load)


def stub(number):
    """The exercise as it was handed out; skips where it has been begun."""
    try:
        its = grade.load(number)
        codes = [getattr(its, name).__code__ for name in MISTAKES[number]]
    except (Exception, SystemExit):
        codes = []
    if not codes or not all("NotImplementedError" in code.co_names for code in codes):
        pytest.skip(f"exercise {number} has been begun")
    return its


# ---- Solutions and stubs -----------------------------------------------------------------------

@handed_out
@pytest.mark.parametrize("number", NUMBERS)
def test_each_solution_earns_all_points(number):
    assert [r for r in grade.grade(number, SOLUTIONS) if r.problem is not None] == []


@pytest.mark.parametrize("number", NUMBERS)
def test_each_exercise_gives_ten_points_and_its_stub_none(number):
    assert sum(row[0] for row in grade.CHECKS[number] + grade.TRAINED.get(number, [])) == 10
    stub(number)
    results = grade.grade(number)
    assert earned(results) == 0 and all("NotImplementedError" in r.problem for r in results)


@handed_out
@pytest.mark.parametrize("number", NUMBERS)
def test_stub_and_solution_ask_and_give_the_same(number):
    asked, solved = stub(number), grade.load(number, SOLUTIONS)
    assert asked.__doc__ == solved.__doc__ and f"grade.py {number:02}" in asked.__doc__
    for name, function in vars(asked).items():
        if inspect.isfunction(function):
            other = getattr(solved, name)
            assert inspect.signature(function) == inspect.signature(other)
            assert function.__doc__ == other.__doc__
            given = name not in MISTAKES[number]
            assert (function.__code__.co_code == other.__code__.co_code) == given


def zero(right, *arguments):
    return 0


def nothing(right, *arguments):
    return None


def first_input(right, *arguments):
    return arguments[0] if arguments else None


@pytest.mark.parametrize("trivial", [zero, nothing, first_input])
@pytest.mark.parametrize("number", NUMBERS)
def test_functions_that_return_something_trivial_fail(number, trivial):
    stub(number)
    results = replaced(number, EXERCISES, dict.fromkeys(MISTAKES[number], trivial))
    assert 2 * earned(results) <= sum(r.points for r in results)


# ---- Planted mistakes --------------------------------------------------------------------------

def unweighted(right, p, q):
    return (p / q).clamp(max=1).mean()


def divided(right, p, q):
    return (q * (p / q).clamp(max=1)).sum()


def larger_of_both(right, p, q):
    return torch.maximum(p, q).sum()


def not_normalised(right, p, q):
    return (p - q).clamp(min=0)


def absolute_difference(right, p, q):
    return (p - q).abs() / (p - q).abs().sum()


def nothing_over_nothing(right, p, q):
    return not_normalised(right, p, q) / not_normalised(right, p, q).sum()


def target_itself(right, p, q):
    return p


def changes_what_it_is_judged_by(right, p, q):
    kept = torch.minimum(p, q)
    p.copy_(kept + (1 - kept.sum()) * q)
    return q


def follows_p_after_a_refusal(right, guesses, q, p, coins):
    kept, _ = right.verify(guesses, q, p, coins)
    return kept, p[kept]


def goes_on_behind_a_refusal(right, guesses, q, p, coins):
    below = coins < p[range(len(guesses)), guesses] / q[range(len(guesses)), guesses]
    kept = int(below.sum())
    return kept, right.verify(guesses, q, p, coins)[1]


def keeps_at_a_coin_of_zero(right, guesses, q, p, coins):
    return right.verify(guesses, q, p, coins - 1e-9)


def always_keeps(right, guesses, q, p, coins):
    return len(guesses), p[-1]


def never_keeps(right, guesses, q, p, coins):
    return 0, p[0]


def shares_a_coin(right, guesses, q, p, coins):
    return right.verify(guesses, q, p, coins[:1].expand(len(coins)))


def runs_past_the_last_token(right, distribution, coin):
    return int(torch.searchsorted(distribution.cumsum(0), coin, right=True))


def favourite(right, distribution, coin):
    return int(distribution.argmax())


def guess_stands(right, guesses, p, coins):
    kept, token = right.verify(guesses, p, coins)
    return kept, guesses[kept] if kept < len(guesses) else token


def coin_of_the_next_position(right, guesses, p, coins):
    kept, _ = right.verify(guesses, p, coins)
    return kept, right.token_at(p[kept], coins[min(kept + 1, len(guesses))])


def sum_of_minima(right, p, q):
    return torch.minimum(p, q).sum().item()


def adds_a_column(right, cache, text):
    cache.length = len(text) - 1


def forgets_nothing(right, cache, text):
    pass


def forgets_everything(right, cache, text):
    cache.length = 0


def forgets_one_too_many(right, cache, text):
    cache.length = min(cache.length, len(text) - 2)


def last_token_alone(right, text, cache):
    return text[-1:] if cache.length else text


def without_the_targets_own_token(right, alpha, gamma):
    return right.implied_tau(alpha, gamma) - 1


def fraction(right, alpha, gamma):
    return (1 - alpha ** (gamma + 1)) / (1 - alpha)


def at_least_one(right, alpha, draft_cost, pass_costs, largest):
    return max(1, right.best_gamma(alpha, draft_cost, pass_costs, largest))


def largest_left_out(right, alpha, draft_cost, pass_costs, largest):
    return right.best_gamma(alpha, draft_cost, pass_costs, max(0, largest - 1))


def free_passes(right, alpha, draft_cost, pass_costs, largest):
    return right.best_gamma(alpha, draft_cost, [1] * len(pass_costs), largest)


def largest_of_equal_ones(right, alpha, draft_cost, pass_costs, largest):
    best = right.best_gamma(alpha, draft_cost, pass_costs, largest)
    costs = [gamma * draft_cost + pass_costs[gamma + 1] for gamma in range(largest + 1)]
    values = [right.implied_tau(alpha, gamma) / cost for gamma, cost in enumerate(costs)]
    return max(gamma for gamma in range(largest + 1) if values[gamma] == values[best])


def upside_down(right, draft_logits, target_logits):
    return target_logits.softmax(-1) - draft_logits.softmax(-1)


def of_the_reversed_kl(right, draft_logits, target_logits):
    q, difference = draft_logits.softmax(-1), draft_logits.log_softmax(-1) - target_logits
    return q * (difference - (q * difference).sum(-1, keepdim=True)) * 0.5


def of_the_whole_sum(right, draft_logits, target_logits):
    return 2 * right.tvd_gradient(draft_logits, target_logits)


def not_centred(right, draft_logits, target_logits):
    q, p = draft_logits.softmax(-1), target_logits.softmax(-1)
    return -q * (p > q)


def writes_on_its_inputs(right, draft_logits, target_logits):
    draft_logits.copy_(target_logits)
    return torch.zeros_like(draft_logits)


def summed_over_samples(right, draft_logits, target_logits, tokens):
    return tokens.shape[1] * right.surrogate(draft_logits, target_logits, tokens)


def exact_and_blind(right, draft_logits, target_logits, tokens):
    return losses.tvd(draft_logits, target_logits).double()


def with_a_baseline(right, draft_logits, target_logits, tokens):
    log_q = draft_logits.log_softmax(-1).gather(1, tokens).mean(-1)
    return right.surrogate(draft_logits, target_logits, tokens) + 0.3 * log_q


def acceptance_for_reward(right, draft_logits, target_logits, tokens):
    log_q = draft_logits.log_softmax(-1).gather(1, tokens)
    log_p = target_logits.log_softmax(-1).gather(1, tokens)
    return -((log_p - log_q).exp().clamp(max=1).detach() * log_q).mean(-1)


def peeks(right, rewards, p, q, mu):
    return rewards


def mean_of_the_batch(right, rewards, p, q, mu):
    return mu


def none_at_all(right, rewards, p, q, mu):
    return 0.0


def mean_under_p(right, rewards, p, q, mu):
    return (p * (p > q)).sum(-1, keepdim=True)


def one_of_the_projects(right, rewards, p, q, mu):
    return losses.least_variance(rewards, p, q, mu)


def another_of_the_projects(right, rewards, p, q, mu):
    return losses.BASELINES["expected"](rewards, p, q, mu)


def one_cosine_a_position(right, loss_a, loss_b, draft_logits, target_logits):
    a, b = (right.gradient(loss, draft_logits, target_logits) for loss in (loss_a, loss_b))
    return torch.cosine_similarity(a, b, dim=-1).mean()


def of_the_values(right, loss_a, loss_b, *logits):
    return torch.cosine_similarity(loss_a(*logits), loss_b(*logits), dim=0)


def same_position_twice(right):
    return [logits[:1].repeat(2, 1) for logits in right.unequal_batch()]


def large_sigma(right):
    draft_logits, target_logits, tokens = right.mixed_batch()
    return target_logits, draft_logits, tokens * 0


def half_text(right, loss, tokens):
    def mixed(draft_logits, target_logits):
        text = F.cross_entropy(draft_logits, tokens, reduction="none")
        return 0.5 * loss(draft_logits, target_logits) + 0.5 * text
    return mixed


def always_ends(right, prompt_ids, response_ids, ended, context, end_id):
    return right.positions(prompt_ids, response_ids, True, context, end_id)


def never_ends(right, prompt_ids, response_ids, ended, context, end_id):
    return right.positions(prompt_ids, response_ids, False, context, end_id)


def one_late(right, *record):
    tokens, answer = right.positions(*record)
    return tokens, ([False] + answer)[:len(answer)]


def prompt_counts(right, *record):
    tokens, _ = right.positions(*record)
    return tokens, [True] * (len(tokens) - 1) + [False] * bool(tokens)


def cut_in_front(right, prompt_ids, response_ids, ended, context, end_id):
    tokens, answer = right.positions(prompt_ids, response_ids, ended, 10 ** 6, end_id)
    return tokens[-context:], answer[-context:]


def mean_of_means(right, hidden, head, target_logits, loss, chunk):
    def scaled(draft_logits, target_logits):
        weight = len(hidden) / (len(draft_logits) * -(-len(hidden) // chunk))
        return weight * loss(draft_logits, target_logits)
    return right.backward_in_chunks(hidden, head, target_logits, scaled, chunk)


def all_at_once(right, hidden, head, target_logits, loss, chunk):
    return right.backward_in_chunks(hidden, head, target_logits, loss, len(hidden))


def summed_before_one_backward(right, hidden, head, target_logits, loss, chunk):
    total = 0.0
    for begin in range(0, len(hidden), chunk):
        rows = hidden[begin:begin + chunk]
        total = total + loss(rows @ head.T, target_logits(begin, begin + len(rows))).sum()
    (total / len(hidden)).backward()
    return total.item() / len(hidden)


def through_the_layers_each_time(right, hidden, head, target_logits, loss, chunk):
    total = 0.0
    for begin in range(0, len(hidden), chunk):
        rows = hidden[begin:begin + chunk]
        value = loss(rows @ head.T, target_logits(begin, begin + len(rows))).sum() / len(hidden)
        value.backward(retain_graph=True)
        total += value.item()
    return total


def layers_forgotten(right, hidden, head, *rest):
    return right.backward_in_chunks(hidden.detach().requires_grad_(), head, *rest)


def token_by_token(right, guesses, q, p):
    ratios = (p[range(len(guesses)), guesses] / q[range(len(guesses)), guesses]).clamp(max=1)
    reached = torch.cat([torch.ones(1), ratios.cumprod(0), torch.zeros(1)])
    return reached[:-1] - reached[1:]


def w_for_h(right, guesses, q, p):
    h = torch.tensor(right.weights(guesses, q, p))
    later = torch.cat([(1 - h[1:]).flip(0).cumprod(0).flip(0), torch.ones(1)])
    return (h * later).double()


def first_below_wins(right, guesses, q, p):
    return right.keep_probabilities(guesses, q, p).flip(0)


def w_forgotten(right, guesses, q, p, kept):
    rest = (p[kept] - q[kept]).clamp(min=0) if kept < len(guesses) else p[kept]
    return rest / rest.sum()


def always_eight(right, draft_cost, pass_costs):
    return lambda blocks: 8


def always_none(right, draft_cost, pass_costs):
    return lambda blocks: 0


def always_two(right, draft_cost, pass_costs):
    return lambda blocks: 2


def gives_up_for_good(right, draft_cost, pass_costs):
    choose = right.make_choose(draft_cost, pass_costs)
    lost = [(n, 0) for n in (2, 1, 1, 1)]
    return lambda blocks: 0 if blocks[:4] == lost else choose(blocks)


def counts_its_calls(right, draft_cost, pass_costs):
    choose, calls = right.make_choose(draft_cost, pass_costs), []

    def counting(blocks):
        calls.append(len(blocks))
        return max(0, choose(blocks) - len(calls) % 2)
    return counting


def tosses_a_coin(right, draft_cost, pass_costs):
    choose = right.make_choose(draft_cost, pass_costs)
    return lambda blocks: max(0, choose(blocks) - int(torch.randint(2, ())))


def favourites_alone(right, draft, prompts, new_tokens, end_id, generator):
    head = draft.head
    draft.head = lambda hidden: 1000 * head(hidden)
    try:
        return right.write(draft, prompts, new_tokens, end_id, generator)
    finally:
        draft.head = head


def never_stops(right, draft, prompts, new_tokens, end_id, generator):
    return right.write(draft, prompts, new_tokens, -1, generator)


def learns_one_early(right, *arguments):
    tokens, answer = right.write(*arguments)
    return tokens, torch.cat([answer[:, 1:], answer[:, :1]], 1)


def written_once(right, *arguments):
    write, texts = right.write, []

    def again(*given):
        texts.append(texts[0] if texts else write(*given))
        return texts[0]
    right.write = again
    return right.distil(*arguments)


def the_target_writes(right, draft, target, *rest):
    write = right.write
    right.write = lambda _, *given: write(target, *given)
    return right.distil(draft, target, *rest)


def half_of_tvdpp(right, draft_logits, target_logits):
    return losses.tvd_plus_plus(draft_logits, target_logits) / 2


def kl_and_a_constant(right, draft_logits, target_logits):
    return losses.kld(draft_logits, target_logits) + 1


def one_number(right, draft_logits, target_logits):
    return right.my_loss(draft_logits, target_logits).mean()


def trains_the_target(right, draft_logits, target_logits):
    return right.my_loss(draft_logits, target_logits) + target_logits.square().mean(-1)


MISTAKES = {
    1: {"acceptance_rate": [unweighted, divided, larger_of_both]},
    2: {"leftover": [not_normalised, absolute_difference, nothing_over_nothing, target_itself,
                     changes_what_it_is_judged_by]},
    3: {"verify": [follows_p_after_a_refusal, goes_on_behind_a_refusal, keeps_at_a_coin_of_zero,
                   always_keeps, never_keeps, shares_a_coin]},
    4: {"token_at": [runs_past_the_last_token, favourite],
        "verify": [guess_stands, coin_of_the_next_position], "acceptance": [sum_of_minima]},
    5: {"roll_back": [adds_a_column, forgets_nothing, forgets_everything, forgets_one_too_many],
        "unread": [last_token_alone]},
    6: {"implied_tau": [without_the_targets_own_token, fraction],
        "best_gamma": [at_least_one, largest_left_out, free_passes, largest_of_equal_ones]},
    7: {"kl_gradient": [upside_down, of_the_reversed_kl, writes_on_its_inputs],
        "tvd_gradient": [of_the_whole_sum, not_centred]},
    8: {"surrogate": [summed_over_samples, exact_and_blind, with_a_baseline,
                      acceptance_for_reward]},
    9: {"baseline": [peeks, mean_of_the_batch, none_at_all, mean_under_p, one_of_the_projects,
                     another_of_the_projects]},
    10: {"gradient_cosine": [one_cosine_a_position, of_the_values],
         "unequal_batch": [same_position_twice], "mixed_batch": [large_sigma],
         "with_text": [half_text]},
    11: {"positions": [always_ends, never_ends, one_late, prompt_counts, cut_in_front]},
    12: {"backward_in_chunks": [mean_of_means, all_at_once, summed_before_one_backward,
                                through_the_layers_each_time, layers_forgotten]},
    13: {"keep_probabilities": [token_by_token, w_for_h, first_below_wins],
         "follow": [w_forgotten]},
    14: {"make_choose": [always_eight, always_none, always_two, gives_up_for_good,
                         counts_its_calls, tosses_a_coin]},
    15: {"write": [favourites_alone, never_stops, learns_one_early],
         "distil": [written_once, the_target_writes]},
    16: {"my_loss": [half_of_tvdpp, kl_and_a_constant, one_number, trains_the_target]},
}
PLANTED = [pytest.param(number, name, mistake, id=f"{number:02}-{mistake.__name__}")
           for number, functions in MISTAKES.items()
           for name, mistakes in functions.items() for mistake in mistakes]


@handed_out
@pytest.mark.parametrize("number, name, mistake", PLANTED)
def test_each_planted_mistake_fails(number, name, mistake):
    results = replaced(number, SOLUTIONS, {name: mistake})
    assert earned(results) < sum(r.points for r in results)
    # It fails because it is wrong, not because the mistake was planted badly.
    assert not any("NameError" in (r.problem or "") for r in results)


# ---- What an exercise may do to the grader -----------------------------------------------------

@pytest.mark.parametrize("content, word", [
    ("def acceptance_rate(p, q)\n    return 1\n", "SyntaxError"),
    ("import sys\nsys.exit(0)\n", "SystemExit"),
    ("raise KeyError('a\\nb')\n", "KeyError"), ("", "AttributeError"),
    ("def acceptance_rate(p, q):\n    raise NotImplementedError\n", "NotImplementedError"),
    ("def acceptance_rate(p, q):\n    raise RuntimeError('no')\n", "RuntimeError"),
    ("def acceptance_rate(p, q):\n    exit()\n", "SystemExit"), (None, "FileNotFoundError"),
    ("def acceptance_rate(p, q):\n    return acceptance_rate(p, q)\n", "RecursionError"),
])
def test_a_broken_file_costs_its_own_points_and_says_why_in_a_line(tmp_path, content, word):
    if content is not None:
        (tmp_path / "01_acceptance_rate.py").write_text(content)
    results = grade.grade(1, tmp_path)
    assert earned(results) == 0
    assert all(word in r.problem and "\n" not in r.problem for r in results)


RIGHT = "def acceptance_rate(p, q):\n    return p.minimum(q).sum()\n"


def test_an_answer_may_use_a_dataclass(tmp_path):
    (tmp_path / "01_acceptance_rate.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        f"class A:\n    a: int = 0\n{RIGHT}")
    assert earned(grade.grade(1, tmp_path)) == 10


@handed_out
@pytest.mark.parametrize("number, name, wrapped", [
    (4, "token_at", "return torch.tensor(_given(*a))"),
    (14, "make_choose", "return lambda blocks: torch.tensor(_given(*a)(blocks)).numpy()[()]")])
def test_an_answer_may_be_a_number_of_torch_or_numpy(number, name, wrapped, tmp_path):
    path = next(SOLUTIONS.glob(f"{number:02}_*.py"))
    more = f"\nimport torch\n_given = {name}\n\ndef {name}(*a):\n    {wrapped}\n"
    (tmp_path / path.name).write_text(path.read_text() + more)
    assert earned(grade.grade(number, tmp_path)) == 10


def test_an_edit_within_the_same_second_is_seen(tmp_path):
    path = tmp_path / "01_acceptance_rate.py"
    for content, points in ((RIGHT, 10), (RIGHT.replace("min", "max"), 0), (RIGHT, 10)):
        path.write_text(content)
        os.utime(path, (10 ** 9, 10 ** 9))        # same size, same time: Python's cache would do
        assert (earned(grade.grade(1, tmp_path)) == 10) == (points == 10)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_an_exercise_changes_around_it_does_not_last(tmp_path):
    (tmp_path / "01_acceptance_rate.py").write_text(
        "import torch, losses\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_grad_enabled(False)\nlosses.LOSSES['mine'] = losses.tvd\n"
        "losses.BASELINES.clear()\ntorch.manual_seed(3)\n" + RIGHT)
    before, known = torch.random.get_rng_state(), (dict(losses.LOSSES), dict(losses.BASELINES))
    assert earned(grade.grade(1, tmp_path)) == 10
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert (losses.LOSSES, losses.BASELINES) == known
    assert torch.equal(before, torch.random.get_rng_state())


# ---- The command -------------------------------------------------------------------------------

def run(monkeypatch, capsys, *arguments):
    """Exit code and standard output of grade.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["grade.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        grade.main()
    return int(stopped.value.code), capsys.readouterr().out


def test_the_exit_code_is_0_with_all_points_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "01_acceptance_rate.py").write_text(RIGHT)
    code, said = run(monkeypatch, capsys, "01", "--folder", tmp_path)
    assert code == 0 and "10 of 10 points" in said and "hint" not in said
    (tmp_path / "02_leftover.py").write_text("def leftover(p, q):\n    return p * float('nan')\n")
    code, said = run(monkeypatch, capsys, "01", "02", "--folder", tmp_path)
    assert code == 1 and said.count("hint: ") == len(grade.CHECKS[2]) and "10 of 20 points" in said


def test_what_trains_is_graded_with_slow_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "none").mkdir()
    code, said = run(monkeypatch, capsys, "--folder", tmp_path / "none")
    assert code == 1 and "exercise 14\n" in said and "exercise 15\n" not in said
    assert run(monkeypatch, capsys, "15")[0] == 2 and run(monkeypatch, capsys, "17")[0] == 2
    assert run(monkeypatch, capsys, "15", "--slow", "--world", tmp_path)[0] == 2
