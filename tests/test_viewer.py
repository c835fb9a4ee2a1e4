"""The page that --html writes: its notes are the loop's, and a real browser shows them rightly.

The browser is a headless Chromium; where there is none, its tests are skipped.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT, assert_refused, run_script, tiny_llama

import speculate
from data import tokenizer, viewer

TINY = ROOT / "data" / "tiny_world"
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs the browser chromium")


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def no_complaints(request):
    """After each test that opened a page: nothing failed in it, and nothing else was loaded."""
    yield
    if "browser" in request.fixturenames:
        browser = request.getfixturevalue("browser")
        assert browser.errors == [] and len(set(browser.requests)) == 1


def notes_of(page):
    """The JSON of a page, read as strictly as a browser does."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.S)[1]
    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def tiny_page(tmp_path_factory):
    """A page of the pair that comes with the code, and the two Generations that it shows."""
    path, made = tmp_path_factory.mktemp("page") / "trace.html", []
    stream = speculate.speculative_stream

    def noted(*inputs):
        made.append(None)
        for made[-1] in stream(*inputs):
            yield made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "speculative_stream", noted)
        done = run_script("speculate.py", "--prompt", "What does a bear look like?", "--html", path,
                          "--beside", TINY / "drafter-base", "--temperature", 0.7, "--top-p", 1)
    assert done.returncode == 0, done.stderr
    assert "watched" not in speculate.VERIFY
    return path, made[1::2]                          # every first run only warms up


def shown(browser):
    """What the page says now, for comparing."""
    return browser.run("document.getElementById('main').innerText")


def text_of(browser, card=0):
    """The text that a card has so far, without the boxes."""
    return browser.run(f"""[...document.querySelectorAll('.run')[{card}].querySelectorAll(
        '.word')].map(word => word.firstChild?.nodeType === 3 ? word.firstChild.data : '')
        .join('')""")


# ---- What is written down ----------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_notes_are_the_models_own_distributions(rule):
    target, draft = tiny_llama(1, vocab=12), tiny_llama(2, vocab=12)
    tok = SimpleNamespace(piece=lambda token: bytes([97 + token]))
    watch, prompt = viewer.Watch(tok, speculate.VERIFY[rule]), [3, 1]
    speculate.VERIFY["watched"] = watch.verify
    try:
        made = [None]

        def stream():
            for made[0] in speculate.speculative_stream(
                    target, draft, torch.tensor([prompt]), 40, 3, 1.0, 1.0, (),
                    torch.Generator().manual_seed(0), "watched"):
                yield made[0]

        run = watch.run(stream())
    finally:
        del speculate.VERIFY["watched"]
    made, text = made[0], list(prompt)
    assert (run["tokens"], run["accepted"], run["tau"]) == (40, made.accepted, made.tau)
    assert [word for block in run["blocks"] for word in block["tokens"]] == [
        chr(97 + token) for token in made.tokens]
    examined = 0
    for block in run["blocks"]:
        for i, rows in enumerate(block.get("places", [])):
            if len(rows[0]) == 1:                    # behind a refusal: the guess alone
                assert i > block["kept"]
                continue
            behind = text + [ord(places[0][0]) - 97 for places in block["places"][:i]]
            p, q = (torch.softmax(llama(torch.tensor([behind]))[0, -1].double(), -1)
                    for llama in (target, draft))
            for word, *figures in rows:
                token = ord(word) - 97
                assert figures[0] == pytest.approx(p[token].item(), abs=2e-5)
                if i < len(block["coins"]):
                    assert figures[1] == pytest.approx(q[token].item(), abs=2e-5)
            if i < len(block["coins"]):
                both = torch.minimum(p, q).sum().item()
                assert block["both"][i] == pytest.approx(both, abs=2e-5)
                guess = ord(rows[0][0]) - 97
                assert block["ratios"][i] == pytest.approx(min(1, (p / q)[guess].item()),
                                                            abs=2e-4)
                examined += 1
                if i == block["kept"] and rule == "token":
                    left = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
                    for word, *figures in rows:
                        assert figures[2] == pytest.approx(left[ord(word) - 97].item(), abs=2e-4)
        text += [ord(word) - 97 for word in block["tokens"]]
    assert examined == made.drafted or rule == "block"


def test_the_passes_of_both_models_are_timed(tiny_page):
    for run in notes_of(tiny_page[0].read_text())["runs"].values():
        for block in run["blocks"][1:]:
            assert len(block["ms"]) == len(block["coins"]) + 1 and min(block["ms"]) > 0


def test_infinity_and_nan_never_reach_a_page():
    with pytest.raises(ValueError):
        viewer.page({"coin": float("nan")})
    one_hot = torch.eye(4)
    tok = SimpleNamespace(piece=lambda token: b"x")
    watch = viewer.Watch(tok, speculate.verify_token)
    watch.verify(torch.tensor([1, 2]), one_hot[[1, 2]], one_hot[[0, 2, 3]], torch.zeros(2))
    notes = notes_of(viewer.page(watch.notes([0], 1, *watch.seen)))  # p = 0 at the guess, then q
    assert notes["ratios"] == [0, 1] and notes["places"][0] == [["x", 0, 1, 0], ["x", 1, 0, 1]]


def random_trace(count, runs=1, vocab=300, gamma=3):
    """A trace of so many tokens with full distributions, without any model: p and q are drawn."""
    generator = torch.Generator().manual_seed(0)
    tok = SimpleNamespace(piece=lambda token: f" w{token}".encode())
    watch, made = viewer.Watch(tok, speculate.verify_token), speculate.Generation([0])

    def stream():
        yield made
        while len(made.tokens) < count:
            wanted = min(gamma, count - len(made.tokens) - 1)
            p = torch.softmax(2 * torch.randn(wanted + 1, vocab, generator=generator), -1)
            other = torch.softmax(2 * torch.randn(wanted, vocab, generator=generator), -1)
            q = 0.7 * p[:-1] + 0.3 * other
            guesses = torch.multinomial(q, 1, generator=generator)[:, 0] if wanted else (
                torch.empty(0, dtype=torch.int64))
            kept, follow = watch.verify(guesses, q, p, torch.rand(wanted, generator=generator))
            watch.began += [0.0] * (wanted + 1)
            following = torch.multinomial(follow, 1, generator=generator)
            made.add(guesses, kept, following, q, p, ())
            yield made

    run = watch.run(stream())
    for block in run["blocks"]:
        block["ms"] = [1.0] * max(1, len(block["ms"]) - 1) + [5.0]
    return trace_of({f"drafter {i}": run for i in range(runs)}, [4.0] * (count - 1))


def trace_of(runs, plain_ms, prompt="A question"):
    flags = {"prompt": prompt, "verify": "token", "temperature": 1, "top_p": 1, "seed": 0}
    return {"flags": flags, "machine": "none", "names": {"<|end|>": 3}, "plain_ms": plain_ms,
            "runs": runs}


def test_a_page_is_small_and_a_long_one_shows_fewer_candidates():
    short, long = viewer.page(random_trace(256, runs=2)), viewer.page(random_trace(2000))
    assert len(short) < 200_000 and len(long) < 200_000
    blocks = notes_of(long)["runs"]["drafter 0"]["blocks"]
    rows = [len(block["places"][0]) for block in blocks[1:101]]
    assert min(rows[:40]) >= 8 and max(rows[-10:]) <= 6
    assert all(len(block["late"]) == 3 for block in blocks[101:-3])


def test_the_committed_page_is_what_the_template_makes_of_its_notes():
    page = (ROOT / "data" / "trace_example.html").read_text()
    assert len(page) < 200_000
    template = (ROOT / "data" / "trace.html").read_text()
    assert page == template.replace("{TRACE}", re.search(r'id="trace">(.*?)</script>', page)[1])
    assert set(re.findall(r"https?://[^\"' )]+", template)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("arguments, word", [
    (["--html", "{out}/a.html"], "--prompt"),
    (["--prompt", "Hello", "--beside", TINY / "drafter-base"], "--html"),
    (["--prompt", "Hello", "--html", "{out}/a.html", "--beside", "{other}"], "tokenizer"),
    (["--prompt", "Hello", "--html", "{out}/a.html", "--beside", "{out}/none"], "no such folder"),
    (["--prompt", "Hello", "--html", "{out}/file/a.html"], "file"),
    (["--prompt", "Hello", "--html", "{out}"], "folder"),
    (["--prompt", "long " * 600, "--html", "{out}/old.html"], "context")])
def test_bad_input_is_one_sentence_and_no_page_is_lost(arguments, word, tmp_path,
                                                       sentencepiece_folder):
    (tmp_path / "file").write_text("")
    (tmp_path / "old.html").write_text("an earlier page")
    arguments = [str(argument).format(out=tmp_path, other=sentencepiece_folder)
                 for argument in arguments]
    assert_refused(run_script("speculate.py", *arguments), word)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old.html"]
    assert (tmp_path / "old.html").read_text() == "an earlier page"


# ---- What the browser shows --------------------------------------------------------------------

@needs_browser
def test_totals_are_those_of_the_notes_and_of_the_generation(browser, tiny_page):
    path, made = tiny_page
    browser.emulate(1180, 900)
    browser.open(path)
    browser.press("End")
    cards = browser.run("[...document.querySelectorAll('.run')].map(card => ({...card.dataset}))")
    notes, tok = notes_of(path.read_text()), tokenizer.load(TINY / "target")
    for i, (card, run, generation) in enumerate(zip(cards, notes["runs"].values(), made,
                                                    strict=True)):
        expected = (len(generation.tokens), generation.accepted, generation.target_calls)
        assert (int(card["tokens"]), int(card["kept"]), int(card["calls"])) == expected
        assert (run["tokens"], run["accepted"]) == expected[:2]
        assert float(card["tau"]) == pytest.approx(generation.tau)
        assert run["tau"] == pytest.approx(generation.tau)
        assert text_of(browser, i) == tok.decode(generation.tokens)


@needs_browser
def test_keys_step_forward_and_back_to_the_same_places(browser, tiny_page):
    browser.emulate(1180, 900)
    browser.open(tiny_page[0])
    last, forward = int(browser.run("document.getElementById('slider').max")), [shown(browser)]
    for _ in range(last):
        browser.press("ArrowRight")
        forward.append(shown(browser))
    assert len(set(forward)) == last + 1             # each step says something of its own
    assert not any(re.search("NaN|undefined|Infinity|null", text) for text in forward)
    for expected in forward[-2::-1]:
        browser.press("ArrowLeft")
        assert shown(browser) == expected
    browser.press("ArrowLeft")                       # nothing lies before the start
    assert shown(browser) == forward[0]
    browser.press("End")
    assert shown(browser) == forward[-1]
    browser.press("Home")
    browser.press("ArrowRight", shift=True)
    assert shown(browser) == forward[3]
    browser.press(" ")
    assert browser.run("document.getElementById('play').textContent") == "Pause"
    assert browser.run("document.getElementById('live').ariaLive") == "off"
    browser.press(" ")
    assert browser.run("document.getElementById('play').textContent") == "Play"


@needs_browser
def test_focus_chooses_a_place_and_a_screen_reader_is_told_of_each_step(browser, tiny_page):
    browser.emulate(1180, 900)
    browser.open(tiny_page[0], "#2")
    for place in (0, 1):
        browser.run(f"document.querySelectorAll('.chips')[0].children[{place}].focus()")
        caption = browser.run("document.querySelector('caption').textContent")
        assert caption.startswith(f"Place {place + 1} of 3")
    assert "Block 1 of" in browser.run("document.getElementById('live').textContent")
    browser.press("ArrowRight")                      # the buttons are new, the focus is not lost
    assert browser.run("document.activeElement.closest('.chips') !== null")
    nameless = """[...document.querySelectorAll('button, input, svg[role=img], [role=region]')]
        .filter(e => !(e.ariaLabel || e.textContent.trim())).length"""
    assert browser.run(nameless) == 0


@needs_browser
def test_a_phone_has_no_sideways_scrolling_and_swipes(browser, tiny_page):
    browser.emulate(360, 740, mobile=True)
    browser.open(tiny_page[0])
    for step in range(int(browser.run("document.getElementById('slider').max")) + 1):
        browser.run(f"go({step})")
        assert browser.run("document.documentElement.scrollWidth") == 360
    browser.run("go(3)")
    for kind, x in (("touchStart", 300), ("touchMove", 200), ("touchEnd", None)):
        points = [] if x is None else [{"x": x, "y": 300}]
        browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert browser.run("step") == 4


@needs_browser
def test_dark_mode_and_less_motion_are_followed(browser, tiny_page):
    look = """(() => { const card = document.querySelector('.card'), style = getComputedStyle(card);
        return [style.backgroundColor, style.color,
                getComputedStyle(document.querySelector('.veil')).transitionDuration]; })()"""
    looks = []
    for dark in (False, True):
        browser.emulate(1180, 900, dark=dark, still=dark)
        browser.open(tiny_page[0])
        browser.press("ArrowRight")
        looks.append(browser.run(look))
    (light_ground, light_ink, motion), (dark_ground, dark_ink, stillness) = looks
    assert sum(map(int, re.findall(r"\d+", light_ground))) > 700 > 150 > sum(
        map(int, re.findall(r"\d+", dark_ground)))
    assert light_ink != dark_ink and motion.startswith("0.2s") and stillness == "0s"


def small_trace(words, prompt="A question"):
    """One block: three guesses, the last refused, the candidates there being all the words."""
    first, a, b, *candidates = words
    rows = [[word, 0.3, 0.0, 0.5] for word in candidates]
    rows[0] = [candidates[0], 0.0, 0.6, 0.0]
    block = {"ms": [1.0, 1.0, 1.0, 5.0], "tokens": [a, b, candidates[1]], "kept": 2,
             "coins": [0.1, 0.2, 0.3], "ratios": [1.0, 0.5, 0.0], "both": [0.9, 0.8, 0.0],
             "places": [[[a, 0.5, 0.4]], [[b, 0.2, 0.4]], rows]}
    run = {"blocks": [{"ms": [9.0], "tokens": [first]}, block], "tokens": 4, "accepted": 2,
           "tau": 3.0}
    return trace_of({"drafter": run}, [5.0] * 3, prompt)


def opened(browser, tmp_path, trace, fragment="#2"):
    path = tmp_path / "page.html"
    path.write_text(viewer.page(trace), encoding="utf-8")
    browser.open(path, fragment)
    assert browser.errors == []


BOXES = """[...document.querySelectorAll('.text .badge')].filter(box => box.offsetParent)
    .map(box => box.textContent)"""
LABELS = "[...document.querySelectorAll('tbody th bdi')].map(label => label.textContent)"


@needs_browser
@pytest.mark.parametrize("prompt", ["</script><script>alert(1)</script>", "<!--<script>", "&lt;<b>",
                                    "{TRACE} \\u003c \u2028 ' \" `${1}`", "half \ud83d a pair"])
def test_no_prompt_breaks_out_of_the_page(prompt, browser, tmp_path):
    opened(browser, tmp_path, small_trace(["A", prompt.encode("utf-8", "replace").decode("latin-1"),
                                           "b", "c", "d"], prompt))
    units = browser.run("Array.from(document.getElementById('prompt').textContent, "
                        "x => x.codePointAt(0))")
    assert "".join(map(chr, units)) == prompt
    assert browser.run("document.scripts.length") == 2
    browser.press("End")
    assert prompt.encode("utf-8", "replace").decode() in text_of(browser)


@needs_browser
def test_half_an_emoji_is_shown_as_bytes_until_it_is_whole(browser, tmp_path):
    party = "\U0001f389".encode().decode("latin-1")  # 4 bytes, one character each
    opened(browser, tmp_path, small_trace(
        ["Hi", " " + party[:2], "a", party[3], party[2:], "!", " é".encode().decode("latin-1"),
         party[:3], [3]]))                           # the "a" has broken what was begun
    assert sorted(browser.run(LABELS)) == sorted(["89", "8E 89", "!", " é", "F0 9F 8E", "<|end|>"])
    opened(browser, tmp_path, small_trace(
        ["Hi", " " + party[:2], party[2], party[3], "!", party[2:], party[:2]]))
    assert sorted(browser.run(LABELS)) == sorted(["\U0001f389", "!", "8E 89", "F0 9F"])
    browser.press("End")
    assert text_of(browser) == "Hi !" and browser.run(BOXES) == []
    opened(browser, tmp_path, small_trace(["Hi", "a", " " + party[:2], "x", party[2]]), "#9")
    assert text_of(browser) == "Hia " and browser.run(BOXES) == ["F0 9F 8E"]
    opened(browser, tmp_path, small_trace(["Hi", "a", " " + party[:3], "x", party[3]]), "#9")
    assert text_of(browser) == "Hia \U0001f389" and browser.run(BOXES) == []


@needs_browser
def test_letters_of_many_bytes_are_as_the_tokenizer_decodes_them(browser, tmp_path,
                                                                  sentencepiece_folder):
    tok = tokenizer.load(sentencepiece_folder)
    text = "grüße \U0001f468\u200d\U0001f469 שלום 12 \u4f60\u597d naïve"
    ids = tok.encode(text)
    words = [viewer.Watch(tok, None).word(token) for token in ids]
    run = {"blocks": [{"ms": [1.0], "tokens": words[:1]}], "tokens": len(ids), "accepted": 0,
           "tau": 1.0}
    run["blocks"] += [{"ms": [1.0], "tokens": [word], "kept": 0, "coins": [], "ratios": [],
                       "both": [], "places": [[[word, 1.0, 1.0]]]} for word in words[1:]]
    opened(browser, tmp_path, trace_of({"x": run}, [1.0] * (len(ids) - 1)), "#999999")
    assert text_of(browser) == tok.decode(ids) == text
    # Each token by itself, behind those before it: what it adds to the decoded text.
    for i in (1, len(ids) // 2, len(ids) - 1):
        before = tok.decode(ids[:i]).rstrip("\ufffd")
        browser.run(f"go({3 * i})")
        assert text_of(browser).startswith(before)


@needs_browser
def test_right_to_left_words_do_not_move_the_numbers_beside_them(browser, tmp_path):
    hebrew, arabic = (word.encode().decode("latin-1") for word in (" שלום", " مرحبا"))
    opened(browser, tmp_path, small_trace(["7", hebrew, arabic, hebrew, arabic, " 12", " 3)"],
                                          "כמה זה 3 + 4?"))
    apart = browser.run("""[...document.querySelectorAll('tbody tr:has(bdi)')].map(row => {
        const [label, ...numbers] = [row.querySelector('bdi'), ...row.querySelectorAll('td')]
            .map(cell => cell.getBoundingClientRect());
        return numbers.every(number => number.left >= label.right); })""")
    assert len(apart) >= 4 and all(apart)
    isolated = "getComputedStyle(document.querySelector('tbody bdi')).unicodeBidi"
    assert browser.run(isolated) == "isolate"
    detail = browser.run("document.querySelector('.detail').textContent")
    assert "p = 0, q = 0.600" in detail


@needs_browser
def test_an_answer_of_one_token_has_no_blocks_and_no_tau(browser, tmp_path):
    run = {"blocks": [{"ms": [9.0], "tokens": ["Yes"]}], "tokens": 1, "accepted": 0, "tau": None}
    opened(browser, tmp_path, trace_of({"drafter": run}, []), "#1")
    assert text_of(browser) == "Yes"
    assert not re.search("NaN|undefined|Infinity|null", shown(browser))


@needs_browser
def test_two_thousand_tokens_stay_responsive(browser, tmp_path):
    browser.emulate(1180, 900)
    opened(browser, tmp_path, random_trace(2000), "")
    milliseconds = browser.run("""(() => {
        const times = [], timed = wanted => {
            const begin = performance.now();
            go(wanted);
            document.body.offsetHeight;
            times.push(performance.now() - begin);
        };
        timed(steps);
        for (let i = 0; i < 30; i++) timed(step - 1);
        for (let i = 0; i < 30; i++) timed(step + 1);
        return times; })()""")
    assert milliseconds[0] < 2000 and sorted(milliseconds[1:])[30] < 100
    assert browser.run("document.querySelectorAll('.text .word').length") == 2000
    cards = browser.run("({...document.querySelector('.run').dataset})")
    assert cards["tokens"] == "2000"
    browser.press("Home")
    assert browser.run("document.querySelectorAll('.text .word').length") == 1
