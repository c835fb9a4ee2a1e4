"""Everyday instructions for the drafter's training data: short lists of forms and of what to put into them.

    python data/everyday.py --count 2400                              -> out/everyday.jsonl
    python data/everyday.py --count 2000 --tasks open --seed 1 --out out/everyday-open.jsonl
    python data/everyday.py --count 300 --follow-up data/smollm2-everyday.jsonl.gz --out out/follow-ups.jsonl
    python data/splits.py --train out/everyday.jsonl --drop out/everyday-clean.jsonl
    python distill.py generate --target DIR --prompts out/everyday-clean.jsonl --out out/records-3.jsonl

Instructions that a small chat model writes itself ask for odd and long-winded things. People ask shorter and plainer
ones, and a drafter that has never seen the answers to those guesses them badly. Five tasks, as in data/prompts. The passages
to summarise are the tiny world's, which the chat model wrote. People also ask on: --follow-up makes second turns from records
of `distill.py generate`. Same seed, same prompts.
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
    "activity": """learning to swim | growing tomatoes | baking bread | saving money | learning a language | keeping a diary | playing chess | riding
        a bike in the city | cooking for a large family | painting a room | taking better photos | reading more books | making new friends | getting
        up early | studying for an exam | looking after a puppy | training for a marathon | speaking in public | playing the guitar | keeping
        houseplants alive | packing light | writing a novel | working from home | eating more vegetables | staying calm under pressure | moving to a
        new town | knitting a scarf | drawing portraits | repairing a bicycle | camping with children | drinking enough water | organising a desk |
        fishing in a lake | dancing at a wedding | learning to type fast | growing herbs indoors | buying a used car | losing weight safely | walking
        every day | learning to sew | starting a blog | meditating | learning to draw | keeping a budget | growing roses | making your own pasta |
        travelling alone | running a small shop | teaching children to read | learning to ski | swimming in cold water | cleaning a kitchen |
        restoring old furniture | planning a wedding | keeping chickens | learning to juggle | writing poems | saving electricity | buying a house |
        looking after an elderly parent | learning the piano | hosting a dinner | remembering names | stretching after sport | storing vegetables |
        keeping bees | giving a presentation | choosing a laptop | making soap""",
    "machine": """a bicycle | a refrigerator | a microwave oven | a telescope | a battery | an aeroplane | a camera | a vaccine | the internet | a
        compass | a thermometer | a solar panel | a washing machine | a lift | a submarine | a violin | a clock | a radio | a hot-air balloon | a dam
        | a light bulb | an electric car | a printer | a windmill | a microphone | a steam engine | a traffic light | a pair of glasses | a telephone
        | a sewing machine | a helicopter | a bread machine | a vacuum cleaner | a piano | a barometer | a wind turbine | a toaster | a pendulum | a
        rocket | a calculator | a water pump | a lock | a zip | a pencil sharpener | a smoke detector | a hearing aid | a projector | an escalator |
        a bridge | a nuclear power plant | a touch screen | a barcode | a diesel engine""",
    "why": """do cats purr | does ice float on water | do we yawn | is the sea salty | do birds sing in the morning | do stars twinkle | does bread
        rise | do people dream | is snow white | do dogs wag their tails | does iron rust | do we need sleep | do onions make us cry | is the desert
        cold at night | do volcanoes erupt | does the moon change its shape | do bears sleep in winter | is exercise good for the heart | do flowers
        smell | do our fingers wrinkle in water | does thunder follow lightning | do we have seasons | do trees have rings | is it warm near the
        equator | do some people write with the left hand | do spiders build webs | does hot air rise | do magnets attract iron | do leaves fall | do
        we laugh | do babies cry | is the sky blue | do we get hiccups | do apples turn brown | do cats have whiskers | do we have to brush our teeth
        | do bees dance | do ships float | does salt melt ice | do owls hunt at night | does popcorn pop | do we forget dreams | is honey sweet | is
        reading good for us | do people collect stamps | do planets orbit the sun | do whales sing | is biodiversity important | do languages change
        | do prices rise | do some metals shine | do we feel pain | do eyes have different colours | does milk go sour | do we vote | do flags have
        colours | does wood burn""",
    "how": """do fish breathe | do plants drink water | do birds find their way | do spiders make silk | do clouds form | do caterpillars become
        butterflies | do glaciers move | do penguins keep warm | is paper made | is cheese made | is glass made | is chocolate made | do mountains
        form | do rainbows appear | do our eyes see colours | do muscles grow | do bats hunt in the dark | do ants talk to each other | does rain
        fall | does a seed become a tree | does the heart pump blood | do computers store pictures | do snakes move | do whales sleep | is salt made
        | do bees find flowers | does soap clean | are pearls formed | do frogs grow | do planes stay in the air | is wine made | do we hear sounds |
        do tides work | is steel made | do trees survive the winter | does yeast work | do fireflies glow | is cotton turned into cloth | does memory
        work | do rivers shape the land | do vaccines protect us | is electricity brought to our homes | do camels live without water | does the
        stomach digest food | are diamonds formed | do birds build nests | do crabs grow | is coffee made | are movies made | do dolphins talk to
        each other | is rubber made""",
    "thing": """an old oak tree | a lost key | the first snow | a brave mouse | my grandmother's kitchen | a lighthouse | a train at night | a stray
        dog | the moon | a broken clock | a summer storm | a market in the morning | a quiet library | a paper boat | two sisters | a dragon who is
        afraid of fire | the last day of school | a robot that learns to cook | an empty beach | a garden in spring | a red balloon | a long journey
        | a lost letter | the sound of rain | a football match | a friendly ghost | a baker | a blue door | a talking parrot | a sleepy bear | a
        violin | a winter evening | an old photograph | a small island | my first bicycle | a fox and a crow | the last leaf of autumn | a chess game
        | a sailor | the smell of bread | a forgotten garden | a rainy Monday | a kind stranger | a snowman | a river | a wolf who sings | an
        astronaut | a candle | a mountain | a girl who can talk to birds | a hidden door | a clockmaker | the north wind | a paper lantern | a
        sunflower""",
    "scene": """a busy kitchen in a restaurant | a forest after a storm | a city street at midnight | a mountain lake at sunrise | a crowded bus | a
        farm in winter | an old bookshop | a harbour in the evening | a desert under the stars | a classroom on the first day | a park on a Sunday
        afternoon | a small café in Paris | a train station at rush hour | a cave by the sea | a children's playground | a snowy village | a village
        market | a lonely road in the rain | a hospital waiting room | a garden full of bees | the kitchen of my childhood | a ferry at dawn | an
        empty theatre | a crowded beach in August | a castle on a hill | a river in flood | a carpenter's workshop | a wedding in the countryside | a
        rooftop in summer | a fishing boat at sea | a library on a rainy day | a bakery at five in the morning""",
    "message": """invites a colleague to lunch | thanks a teacher | asks the landlord to repair a heater | apologises for being late | congratulates
        a friend on a new job | cancels an appointment with a dentist | asks for a day off | wishes an aunt a happy birthday | complains about a late
        parcel | recommends a restaurant | welcomes a new neighbour | reminds the team of a meeting | asks a shop for a refund | says goodbye to a
        colleague | invites parents to a school concert | asks a professor for advice | asks a friend for help with moving | thanks a nurse | invites
        the neighbours to a party | says sorry for a broken window | asks a colleague for feedback | announces a new opening time | recommends a
        student | asks a hotel about a lost scarf | turns down an invitation | introduces a new team member | asks a bank for an appointment | wishes
        a friend luck for an exam | explains a delay to a customer | asks a teacher about homework | thanks a host for a dinner""",
    "pair": """a frog and a toad | weather and climate | a lake and a pond | tea and coffee | butter and margarine | a novel and a short story | a
        virus and a bacterium | a crocodile and an alligator | a violin and a cello | cement and concrete | a comet and an asteroid | jam and jelly |
        a horse and a donkey | stocks and bonds | a fruit and a vegetable | mass and weight | an island and a peninsula | a mosque and a church | a
        salary and a wage | a moth and a butterfly | baking powder and baking soda | empathy and sympathy | a turtle and a tortoise | a river and a
        canal | a hurricane and a tornado | bacon and ham | rice and barley | a star and a planet | a debit card and a credit card | an alloy and a
        metal | a rabbit and a hare | a simile and a metaphor | speed and velocity | a cold and the flu | a bee and a wasp | a mandarin and an orange
        | a guitar and a ukulele | a president and a prime minister | an opera and a musical | heat and temperature | a squid and an octopus | dark
        and milk chocolate | jogging and sprinting | a glacier and an iceberg""",
    "subject": """gravity | photosynthesis | inflation | the water cycle | democracy | electricity | evolution | the solar system | DNA | recycling |
        the Roman Empire | a budget | friendship | the human skeleton | earthquakes | the French Revolution | black holes | vitamins | the greenhouse
        effect | insurance | a computer program | the Silk Road | the immune system | tides | jazz | yoga | supply and demand | magnetism | the
        Renaissance | fractions | fossils | the stock market | climate change | nutrition | the Middle Ages | a mortgage | the periodic table |
        volcanoes | the brain | the internet of things | globalisation | poetry | antibiotics | coral reefs | the Cold War | philosophy | probability
        | the ozone layer | the industrial revolution | ancient Egypt | meditation | taxes | artificial intelligence | the food chain | atoms | the
        Olympic Games | marketing | cholesterol | human rights | renewable energy | the nervous system | logic | the theory of relativity | the
        United Nations | cells | sleep | stress | teamwork | migration | calcium | language | bacteria""",
    "occasion": """a picnic in the park | a job interview | a week at the seaside | a dinner with friends | a rainy weekend | a long flight | a
        wedding | a school trip to a museum | a visit to the dentist | a barbecue | a ski holiday | a child's first day at school | a power cut | a
        housewarming party | a road trip | a day in the forest | a cold winter morning | a birthday party at home | a hike in the hills | an
        interview by video | a picnic with small children | an exam | a move to another city | a storm | a business trip | a garden party | a concert
        | a camping weekend | a first date | a family reunion | a long bus ride | a graduation | a day at the beach""",
    "idea": """a gift for my father | a healthy breakfast | a game for a rainy day | a name for a cat | a weekend trip | an easy dessert | a school
        science project | a hobby that costs little | a family film night | a costume party | a dinner without meat | a garden on a balcony | a book
        club | a song for a birthday | a story for children | a walk in the city | a New Year's resolution | a small business | a gift for a teacher
        | a quick lunch | a holiday with grandparents | a rainy afternoon with children | a blog about food | a party game | a vegetable soup | a
        name for a bakery | a birthday cake | a weekend without money | a photo project | a school play | a surprise for my sister | a cosy evening |
        a slogan for a bicycle shop | a small kitchen | an essay about the sea | a walk with a dog | a gift for a new baby | a healthy snack""",
    "advice": """cannot fall asleep | have an argument with my best friend | want to eat less sugar | am nervous about an exam | feel lonely in a new
        city | often forget names | have a headache | want to learn to cook | need to write a speech | cannot decide what to study | spend too much
        time on my phone | lost my wallet | have a noisy neighbour | want to ask my boss for a raise | keep arriving late | spilled coffee on my
        laptop | want to wake up earlier | cannot concentrate at work | am afraid of flying | have too many clothes | want to make new friends | have
        back pain from sitting | burnt the dinner | want to learn a new skill | feel tired in the afternoon | forgot a friend's birthday | want to
        read more | need to save for a holiday | have a shy child | am bored at weekends | do not like vegetables | want to stop biting my nails |
        missed my train | have to give a speech at a wedding | want to adopt a cat | am worried about money""",
    "person": """Albert Einstein | Cleopatra | Leonardo da Vinci | Isaac Newton | Charles Darwin | William Shakespeare | Nelson Mandela | Wolfgang Amadeus Mozart |
        Galileo Galilei | Frida Kahlo | Martin Luther King | Ada Lovelace | Mahatma Gandhi | Vincent van Gogh | Napoleon | Jane Austen | Thomas Edison | Julius
        Caesar | Amelia Earhart | Louis Pasteur | Marco Polo | Florence Nightingale | Rosa Parks | Johann Sebastian Bach | Aristotle | Queen Victoria | Pablo Picasso""",
    "place": """Japan | Brazil | Egypt | Iceland | Kenya | India | Norway | Peru | Australia | Canada | Greece | Morocco | Vietnam | Mexico | Italy | Turkey | Spain |
        Ireland | Thailand | New Zealand | South Africa | Portugal | the Amazon rainforest | the Sahara | the Alps | Antarctica | the Great Barrier Reef""",
    "animal": """elephants | owls | penguins | octopuses | horses | bats | sharks | honeybees | kangaroos | wolves | hedgehogs | parrots | dolphins | camels | snails |
        giraffes | polar bears | butterflies | crows | turtles | squirrels | salmon | tigers | frogs | goats""",
    "dish": """pancakes | tomato soup | a fruit salad | rice pudding | an omelette | vegetable curry | banana bread | lentil soup | pizza dough | a green salad | roast
        chicken | apple pie | mashed potatoes | scrambled eggs | hummus | chocolate cookies | fried rice | a cheese sandwich | lemonade | pasta with tomato sauce""",
    "job": """a nurse | a firefighter | a pilot | a librarian | an architect | a farmer | a journalist | a carpenter | a teacher | a software developer | a chef | a
        veterinarian | an accountant | a photographer | a plumber | a lawyer | a translator | a gardener | a police officer | a scientist""",
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
        List the advantages and disadvantages of {activity}. | Write a haiku about {thing}. | Is {activity} difficult? |
        Who was {person}? | Why is {person} famous? | Tell me about the life of {person}. | What is {place} known for? | What should I see in {place}? | Tell me three facts about
        {place}. | What is the weather like in {place}? | What do {animal} eat? | Where do {animal} live? | Write a short story about {animal}. | Tell me five facts about {animal}. |
        How do I make {dish}? | Give me a simple recipe for {dish}. | What do I need to cook {dish}? | What does {job} do all day? | How do I become {job}? | Is it hard to be {job}? |
        Give me some tips for {activity} as a beginner. | What mistakes do people make when {activity}? | Write a paragraph about {subject}. |
        Write a title for a story about {thing}. | Give an example of {subject} from daily life. | What is the history of {machine}?"""),
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


def prompts(count, seed, tasks):
    """`count` different prompts of these tasks, drawn in the proportions of SHARES. A prompt that is there already is drawn again:
    the more are asked for, the fewer of them are open questions and code, which run out first."""
    rng, rows, seen, repeated = random.Random(seed), [], set(), 0
    texts = passages(rng)
    while len(rows) < count:
        task = rng.choices(tasks, [SHARES[task] for task in tasks])[0]
        b = rng.randint(2, 12)
        chosen = {"a": str(b * rng.randint(2, 12)), "b": str(b)}           # what a form names twice is the same both times

        def fill(match, chosen=chosen):
            name = match[1]
            if name not in chosen:
                chosen[name] = next(texts) if name == "passage" else rng.choice(FILL[name])
            return chosen[name]
        text = re.sub(r"\{(\w+)\}", fill, rng.choice(FORMS[task]))
        repeated = repeated + 1 if text in seen else 0
        if repeated == 1000:
            raise ValueError(f"--count {count}: after {len(rows)} different prompts no new one was found; ask for fewer, or add to the lists")
        if not repeated:
            seen.add(text)
            rows.append({"task": task, "prompt": text})
    return rows


FOLLOW_UPS = listed("""Can you explain that in simpler words? | Can you give me an example? | Why is that? | Can you say that in one sentence? | Thank you. What should I do next? |
    Tell me more about that. | Can you make it shorter? | Is there anything I should avoid? | How long does that take? | What if that does not work? | Can you write
    that as a list? | What is the most important point? | Where can I learn more about it? | That is interesting. Can you go on? | How much does that cost? |
    Can you give me another one? | Who could help me with that? | Can you rewrite it in a friendlier tone? | Do you have any other suggestions? | Is that always true?""")


def follow_ups(records, count, seed):
    """`count` second turns: what was asked and answered in a record of an open question with a short answer, and a question about it."""
    rng = random.Random(seed)
    short = [row for row in records if row.get("task") == "open" and row.get("ended") and 0 < len(row.get("response", "").split()) <= 150]
    if len(short) < count:
        raise ValueError(f"--count {count}: the records hold only {len(short)} open questions with a short answer; ask for fewer")
    return [{"task": "open", "messages": [*row["messages"], {"role": "assistant", "content": row["response"]},
                                          {"role": "user", "content": rng.choice(FOLLOW_UPS)}]} for row in rng.sample(short, count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2400, help="instructions (default 2400)")
    parser.add_argument("--tasks", nargs="+", default=list(SHARES), choices=list(SHARES), help="default: all")
    parser.add_argument("--follow-up", type=Path, metavar="RECORDS", help="second turns to these records instead")
    parser.add_argument("--out", type=Path, default=Path("out/everyday.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError(f"--count {args.count}: give at least 1")
    rows = follow_ups(files.read_jsonl(args.follow_up), args.count, args.seed) if args.follow_up else prompts(args.count, args.seed, args.tasks)
    files.write_jsonl(args.out, rows)
    print(f"wrote {args.out}: {len(rows)} instructions: " + ", ".join(f"{sum(row['task'] == task for row in rows)} {task}" for task in SHARES))
    print("next: python data/splits.py --train", args.out, "--drop", args.out.with_stem(args.out.stem + "-clean"))


if __name__ == "__main__":
    files.run(main)
