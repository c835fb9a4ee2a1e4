"""Everyday instructions for the drafter's training data: short lists of forms and of what to put into them.

    python data/everyday.py --count 2400                              -> out/everyday.jsonl
    python data/splits.py --train out/everyday.jsonl --drop out/everyday-clean.jsonl
    python distill.py generate --target DIR --prompts out/everyday-clean.jsonl --out out/records-3.jsonl

Instructions that a small chat model writes itself ask for odd and long-winded things. People ask shorter and plainer
ones, and a drafter that has never seen the answers to those guesses them badly. Five tasks, as in data/prompts. The passages
to summarise are the tiny world's, which the chat model wrote. Same seed, same prompts.
"""

import argparse
import random
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is data/, the root is one up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data import files

SHARES = {"open": 0.48, "summarisation": 0.13, "translation": 0.13, "reasoning": 0.13, "code": 0.13}


def listed(text):
    """The entries of a list written with ' | ' between them."""
    return [" ".join(entry.split()) for entry in text.split("|")]


FILL = {name: listed(text) for name, text in {
    "activity": """learning to swim | growing tomatoes | baking bread | saving money | learning a language | keeping a diary | playing chess |
        riding a bike in the city | cooking for a large family | painting a room | taking better photos | reading more books | making new
        friends | getting up early | studying for an exam | looking after a puppy | training for a marathon | speaking in public | playing the
        guitar | keeping houseplants alive | packing light | writing a novel | working from home | eating more vegetables | staying calm under
        pressure | moving to a new town | knitting a scarf | drawing portraits | repairing a bicycle | camping with children | drinking enough
        water | organising a desk | fishing in a lake | dancing at a wedding | learning to type fast | growing herbs indoors | buying a used car""",
    "machine": """a bicycle | a refrigerator | a microwave oven | a telescope | a battery | an aeroplane | a camera | a vaccine | the internet | a compass |
        a thermometer | a solar panel | a washing machine | a lift | a submarine | a violin | a clock | a radio | a hot-air balloon | a dam |
        a light bulb | an electric car | a printer | a windmill | a microphone | a steam engine | a traffic light | a pair of glasses""",
    "why": """do cats purr | does ice float on water | do we yawn | is the sea salty | do birds sing in the morning | do stars twinkle | does bread rise |
        do people dream | is snow white | do dogs wag their tails | does iron rust | do we need sleep | do onions make us cry | is the desert
        cold at night | do volcanoes erupt | does the moon change its shape | do bears sleep in winter | is exercise good for the heart | do
        flowers smell | do our fingers wrinkle in water | does thunder follow lightning | do we have seasons | do trees have rings | is it warm
        near the equator | do some people write with the left hand | do spiders build webs | does hot air rise | do magnets attract iron""",
    "how": """do fish breathe | do plants drink water | do birds find their way | do spiders make silk | do clouds form | do caterpillars become butterflies |
        do glaciers move | do penguins keep warm | is paper made | is cheese made | is glass made | is chocolate made | do mountains form | do
        rainbows appear | do our eyes see colours | do muscles grow | do bats hunt in the dark | do ants talk to each other | does rain fall |
        does a seed become a tree | does the heart pump blood | do computers store pictures | do snakes move | do whales sleep | is salt made""",
    "thing": """an old oak tree | a lost key | the first snow | a brave mouse | my grandmother's kitchen | a lighthouse | a train at night | a stray dog |
        the moon | a broken clock | a summer storm | a market in the morning | a quiet library | a paper boat | two sisters | a dragon who is
        afraid of fire | the last day of school | a robot that learns to cook | an empty beach | a garden in spring | a red balloon | a long
        journey | a lost letter | the sound of rain | a football match | a friendly ghost | a baker | a blue door | a talking parrot""",
    "scene": """a busy kitchen in a restaurant | a forest after a storm | a city street at midnight | a mountain lake at sunrise | a crowded bus |
        a farm in winter | an old bookshop | a harbour in the evening | a desert under the stars | a classroom on the first day | a park on
        a Sunday afternoon | a small café in Paris | a train station at rush hour | a cave by the sea | a children's playground | a snowy village""",
    "message": """invites a colleague to lunch | thanks a teacher | asks the landlord to repair a heater | apologises for being late | congratulates a friend on
        a new job | cancels an appointment with a dentist | asks for a day off | wishes an aunt a happy birthday | complains about a late
        parcel | recommends a restaurant | welcomes a new neighbour | reminds the team of a meeting | asks a shop for a refund | says
        goodbye to a colleague | invites parents to a school concert | asks a professor for advice""",
    "pair": """a frog and a toad | weather and climate | a lake and a pond | tea and coffee | butter and margarine | a novel and a short story | a virus and a
        bacterium | a crocodile and an alligator | a violin and a cello | cement and concrete | a comet and an asteroid | jam and jelly | a
        horse and a donkey | stocks and bonds | a fruit and a vegetable | mass and weight | an island and a peninsula | a mosque and a church |
        a salary and a wage | a moth and a butterfly | baking powder and baking soda | empathy and sympathy""",
    "subject": """gravity | photosynthesis | inflation | the water cycle | democracy | electricity | evolution | the solar system | DNA | recycling | the
        Roman Empire | a budget | friendship | the human skeleton | earthquakes | the French Revolution | black holes | vitamins | the
        greenhouse effect | insurance | a computer program | the Silk Road | the immune system | tides | jazz | yoga | supply and demand |
        magnetism | the Renaissance | fractions | fossils | the stock market""",
    "occasion": """a picnic in the park | a job interview | a week at the seaside | a dinner with friends | a rainy weekend | a long flight | a wedding |
        a school trip to a museum | a visit to the dentist | a barbecue | a ski holiday | a child's first day at school | a power cut | a
        housewarming party | a road trip | a day in the forest | a cold winter morning""",
    "idea": """a gift for my father | a healthy breakfast | a game for a rainy day | a name for a cat | a weekend trip | an easy dessert | a school science
        project | a hobby that costs little | a family film night | a costume party | a dinner without meat | a garden on a balcony | a book
        club | a song for a birthday | a story for children | a walk in the city | a New Year's resolution | a small business""",
    "advice": """cannot fall asleep | have an argument with my best friend | want to eat less sugar | am nervous about an exam | feel lonely in a new city | often forget
        names | have a headache | want to learn to cook | need to write a speech | cannot decide what to study | spend too much time on my
        phone | lost my wallet | have a noisy neighbour | want to ask my boss for a raise | keep arriving late | spilled coffee on my laptop""",
    "language": "French | Spanish | German | Italian | Portuguese",
    "sentence": """Where is the library? | I am very hungry. | The train is late again. | We live in a small house near the river. | Can you help me, please? | My brother
        plays football every Saturday. | It is going to rain tomorrow. | I forgot my umbrella at the office. | She bought three apples and a
        loaf of bread. | What time does the shop open? | The dog is under the table. | Happy birthday to you! | I have never been to
        London. | He reads a book before he sleeps. | Good morning, how are you? | The soup is too hot. | They will arrive on Monday. | I
        like your new shoes. | Our teacher speaks four languages. | The film starts at eight o'clock. | Please close the window. | My
        grandfather was a fisherman. | How much does this cost? | The flowers are yellow and red. | We are looking for a quiet hotel.""",
    "foreign": """Das Wasser ist sehr kalt. | Wo wohnst du? | Ich trinke jeden Morgen Kaffee. | Der Zug kommt um neun Uhr. | Meine Mutter kocht gern. | Bonjour, comment
        allez-vous? | Je voudrais acheter du pain. | Il fait beau aujourd'hui. | Nous avons deux enfants. | La maison est petite mais jolie. |
        ¿Dónde está la estación? | Me gusta leer por la noche. | El perro duerme en el jardín. | Tengo mucha hambre. | Buenos días, amigos. |
        Vorrei un bicchiere di vino. | Il gatto è sul tetto. | Oggi è una bella giornata. | Dove abiti? | Mi piace la musica.""",
    "task": """adds two numbers | reverses a string | checks whether a number is prime | sorts a list of names | finds the shortest word in a sentence | converts Celsius to
        Fahrenheit | computes the factorial of a number | removes duplicates from a list | counts the words in a text | merges two dictionaries |
        returns the average of a list of numbers | prints the first ten even numbers | finds the second largest number | checks whether two
        words are anagrams | capitalises every word | computes the area of a circle | returns the last element of a list | multiplies two
        matrices | counts how often each letter occurs | generates the Fibonacci sequence | draws a triangle of stars | checks whether a year
        is a leap year | flattens a nested list | returns the squares of a list | computes the greatest common divisor | splits a list in halves""",
    "concept": """a list comprehension | a function | a class | a for loop | a while loop | a set | a string | an exception | a module | recursion | a variable | a lambda |
        a decorator | a generator | inheritance | a boolean | slicing | a virtual environment""",
    "python": """open a file | sort a dictionary by its values | install a package | get the length of a list | join two strings | round a number | generate a random
        number | get today's date | loop over a dictionary | convert a string to an integer | write to a file | check if a key is in a
        dictionary | make a copy of a list | ask the user for input | handle an error | split a string at commas""",
    "name": "Tom | Lena | Omar | Priya | Sam | Julia | Ben | Mia | Carlos | Nora",
    "item": "apples | marbles | books | stickers | coins | eggs | cards | bottles | tickets | chairs",
}.items()}

FORMS = {
    "open": listed("""Give me three tips for {activity}. | What are some good tips for {activity}? | How do I start {activity}? | What do I need for {activity}? |
        What are the benefits of {activity}? | How can I get better at {activity}? | How does {machine} work? | Who invented {machine}? | What is {machine} used for? |
        Why {why}? | Explain why {why} in a few sentences. | How {how}? | Can you explain how {how}? | Write a short poem about {thing}. |
        Write a short story about {thing}. | Tell me a story about {thing}. | Write three sentences about {thing}. | Describe {scene}. | Write a short description of {scene}. |
        Write a short email that {message}. | Write a note that {message}. | Write a polite message that {message}. | What is the difference between {pair}? |
        How can I tell {pair} apart? | What is {subject}? | Explain {subject} to a child. | Explain {subject} in simple words. | Why is {subject} important? |
        Tell me something interesting about {subject}. | What should I bring to {occasion}? | How do I prepare for {occasion}? | What should I wear for {occasion}? |
        Give me five ideas for {idea}. | Suggest {idea}. | Can you think of {idea}? | I {advice}. What should I do? | What can I do if I {advice}? |
        List the advantages and disadvantages of {activity}. | Write a haiku about {thing}. | Is {activity} difficult?"""),
    "summarisation": listed("""Summarise this text in one sentence: {passage} | Summarise the following passage. {passage} | What is this text about? {passage} | Give a short
        summary: {passage} | Shorten this text: {passage} | What is the most important point here? {passage} | Write a headline for this text: {passage} |
        TL;DR: {passage} | Summarise in your own words: {passage}"""),
    "translation": listed("""Translate into {language}: {sentence} | Translate this sentence to {language}: {sentence} | How do you say "{sentence}" in {language}? | What is
        "{sentence}" in {language}? | Translate to English: {foreign} | What does "{foreign}" mean in English? | Please translate: {foreign} | Write this in {language}: {sentence}"""),
    "reasoning": listed("""{name} has {a} {item} and gives away {b}. How many {item} are left? | There are {b} boxes with {a} {item} each. How many {item} are there in all? | A
        ticket costs {a} euros. How much do {b} tickets cost? | {name} is {b} years older than a sister who is {a}. How old is {name}? | A car drives {a} kilometres an
        hour. How far does it get in {b} hours? | What is {a} plus {b}? | What is {a} times {b}? | What is half of {a}? | {name} reads {b} pages a day. How many days does a
        book of {a} pages take? | {name} buys {b} {item} for {a} cents each. How much is that? | A film starts at {b}:15 and lasts {a} minutes. When does it end? | What
        comes next: {b}, {a}, {b}, {a}? | Is {a} an even number? | If it is {b} o'clock now, what time will it be in five hours? | {name} has {a} {item}, and {b} more are found. How
        many are there now? | {a} {item} are shared by {b} children. How many does each get? | Which is larger, {a} or {b}? Explain. | If all {item} are blue and this is one
        of the {item}, what colour is it?"""),
    "code": listed("""Write a Python function that {task}. | Write a Python program that {task}. | Write a function that {task} and explain it. | How do I {python} in Python? |
        Explain what {concept} is in Python. | Give a simple example of {concept} in Python. | What is {concept} in programming? | Show me how to {python} with Python. |
        Write a JavaScript function that {task}. | Write a short script that {task}."""),
}


def passages(rng):
    """Texts to summarise: four of the tiny world's passages on one topic each, without end."""
    topics = {}
    for row in files.read_jsonl(Path(__file__).parent / "tiny_world" / "passages.jsonl.gz"):
        topics.setdefault(row["word"], []).append(row["response"])
    words = sorted(word for word, texts in topics.items() if len(texts) >= 4)
    while True:
        yield " ".join(rng.sample(topics[rng.choice(words)], 4))


def prompts(count, seed):
    """`count` different prompts. Tasks are drawn in the proportions of SHARES; a prompt that is there already is drawn again, so
    of 2,400 only 37 % are open questions, and the more are asked for, the fewer: open questions and code run out first."""
    rng, rows, seen = random.Random(seed), [], set()
    texts = passages(rng)
    while len(rows) < count:
        task = rng.choices(list(SHARES), SHARES.values())[0]
        b = rng.randint(2, 12)
        chosen = {"a": str(b * rng.randint(2, 12)), "b": str(b)}           # what a form names twice is the same both times

        def fill(match, chosen=chosen):
            name = match[1]
            if name not in chosen:
                chosen[name] = next(texts) if name == "passage" else rng.choice(FILL[name])
            return chosen[name]
        text = re.sub(r"\{(\w+)\}", fill, rng.choice(FORMS[task]))
        if text not in seen:
            seen.add(text)
            rows.append({"task": task, "prompt": text})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2400, help="instructions (default 2400)")
    parser.add_argument("--out", type=Path, default=Path("out/everyday.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError(f"--count {args.count}: give at least 1")
    rows = prompts(args.count, args.seed)
    files.write_jsonl(args.out, rows)
    print(f"wrote {args.out}: {len(rows)} instructions: " + ", ".join(f"{sum(row['task'] == task for row in rows)} {task}" for task in SHARES))
    print("next: python data/splits.py --train", args.out, "--drop", args.out.with_stem(args.out.stem + "-clean"))


if __name__ == "__main__":
    files.run(main)
