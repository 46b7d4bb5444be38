"""What the large model is asked to write about when it writes the built-in proxy's pretraining text.

Broad rather than tuned to any data set: everyday chat, questions about things of every kind that WordNet's nouns name,
instructions of the usual kinds, sums, documents without any prompt, and questions that the model asks itself. No
prompt contains text of an evaluation data set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
USER, TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

TOPICS = """moving house; a new job; a terrible commute; what to cook tonight; a birthday surprise; a broken phone;
exam stress; a road trip; a video game; a new series; a football match; learning guitar; a cat that hides; a dog at
the vet; a first date; a wedding; siblings; a baby; grandparents; a noisy neighbour; the weather; a storm; gardening;
running a marathon; the gym; a diet; pizza; coffee; baking bread; a restaurant; a film; superheroes; a favourite book;
a concert; band practice; dancing; photography; painting; knitting; woodwork; fixing a car; a bike ride; camping;
hiking; the beach; skiing; a delayed flight; a lost suitcase; visiting a new city; learning a language; homework;
a maths class; a science project; a boring meeting; a kind boss; a mean boss; quitting; saving money; a bank mistake;
rent; online shopping; a wrong parcel; clothes; a haircut; shoes; make-up; allergies; a cold; the dentist; sleep;
dreams; anxiety; good news; bad news; an argument; an apology; a secret; gossip; a joke; memes; social media; privacy;
robots; space; dinosaurs; the ocean; insects; birds; politics; the news; volunteering; church; holidays; Christmas;
Halloween; New Year; summer plans; winter; childhood; school memories; college; roommates; a party; karaoke; board
games; chess; a puzzle; a bet; luck; money; music; the internet being slow; a computer crash; programming; a museum;
a library; history; travel by train; food trucks; ice cream; tea; breakfast; chocolate; cooking for one; a picnic;
fishing; horses; sports practice; swimming; basketball; baseball; tennis; a sprained ankle; a doctor's visit; a long
walk; loneliness; making friends; missing home; love; a breakup; a crush; texting back; being late; parking; a speeding
ticket; driving lessons; a scary night; a ghost story; a strange sound; a power cut; the moon; stars; wishes""".replace(
    "\n", " "
)

CHAT_TASKS = (
    "Write a casual text message chat between two friends about {t}.",
    "Two people who just met chat online about {t}. Write only their messages, one per line.",
    "Write ten short informal text messages that one person sends to a friend about {t}. Use casual spelling.",
    "Write the messages of a teenager texting about {t}. lowercase, short lines, some slang like lol and haha.",
    "A person tells a story about {t} in a chat, message by message. Write only the messages.",
    "Pretend you are chatting with me about {t}. Tell me how your day was and ask me questions.",
    "Write a friendly conversation where one person asks questions about {t} and the other answers honestly.",
    "Write an informal blog comment thread about {t}.",
    "Write a diary entry about {t} in a relaxed, personal voice.",
    "In first person, say what you think about {t}, the way people talk.",
)
PLAIN_TASKS = (
    "Explain {t} to a curious adult in a few paragraphs.",
    "Write a short story about {t}.",
    "Give practical advice about {t}.",
    "List questions people ask about {t} and answer each.",
    "Write a short letter about {t}.",
    "Describe {t} in detail.",
)
OPENERS = (
    "hey\nhow are you doing?\n",
    "hi there!\n",
    "lol that is so funny\n",
    "i dont know\nmaybe?\n",
    "haha yeah\n",
    "so what do you do?\n",
    "good morning!\nhow did you sleep?\n",
    "omg guess what\n",
    "what are you up to today?\n",
    "I just got home from work\n",
    "nice\n",
    "that sounds fun!\n",
    "where are you from?\n",
    "i'm so tired lol\n",
    "What kind of music do you like?\n",
    "Yeah I think so too\n",
    "no way!\n",
    "do you have any pets?\n",
    "thanks :)\n",
    "well it was nice talking to you\n",
    "i love that movie\n",
    "hmm\nlet me think\n",
    "Hello!\n",
    "are you there?\n",
    "oh cool\n",
    "my favorite food is",
    "I'm a student and I",
    "Honestly, I",
    "Today I",
    "When I was a kid",
)
ANY = (
    "What is {n}?", "Explain {n}.", "Tell me about {n}.", "What is {n} and why does it matter?", "Define {n}.",
    "Write a short paragraph about {n}.", "Give three facts about {n}.", "What are the main kinds of {n}?",
)  # fmt: skip
BY_KIND = {
    "state": (
        "What are the signs of {n}?", "What causes {n}?", "How is {n} treated?", "How can {n} be prevented?",
        "Who is at risk of {n}?", "How common is {n}?", "How do doctors find out whether someone has {n}?",
        "What should I do about {n}?", "Can people recover from {n}?",
    ),
    "artifact": ("How does {n} work?", "What is {n} used for?", "How do I choose {n}?", "How is {n} made?"),
    "animal": ("Where does {n} live?", "What does {n} eat?", "Describe {n}.", "Is {n} dangerous?"),
    "plant": ("How do I grow {n}?", "What is {n} used for?", "Describe {n}."),
    "food": ("How do I cook {n}?", "Is {n} healthy?", "Give me a recipe with {n}."),
    "body": ("What does the {n} do?", "Which illnesses affect the {n}?", "Where is the {n}?"),
    "substance": ("What is {n} made of?", "Is {n} safe?", "What are the side effects of {n}?", "What is {n} used for?"),
    "process": ("How does {n} happen?", "What are the steps of {n}?", "Why is {n} important?"),
    "person": ("Who was {n}?", "What does {n} do?", "Why is {n} known?"),
    "location": ("Where is {n}?", "What is {n} known for?", "Should I visit {n}?"),
    "cognition": ("What are the main ideas of {n}?", "Who studies {n}?", "Give an example of {n}."),
    "act": ("How do I learn {n}?", "What are the rules of {n}?", "What do I need for {n}?"),
    "event": ("What happened in {n}?", "When does {n} take place?", "Why did {n} happen?"),
}  # fmt: skip
KIND_OF_FILE = {
    3: "act", 4: "act", 5: "animal", 6: "artifact", 8: "body", 9: "cognition", 11: "event", 13: "food", 15: "location",
    18: "person", 20: "plant", 22: "process", 26: "state", 27: "substance",
}  # fmt: skip
INSTRUCTIONS = (
    "Give me a list of ideas for {t}.", "What are the pros and cons of {t}?", "Write a short poem about {t}.",
    "Write an email to a friend about {t}.", "Compare {n} and {m}.", "Name ten things that have to do with {n}.",
    "Which of these is not like the others: {n}, {m}, {t}?", "Write a product description for {n}.",
    "What is the difference between {n} and {m}?", "Make up a title for an article about {n} and {m}.",
    "Sort these into groups: {n}, {m}, {t}.", "Summarize what people should know about {n} in two sentences.",
    "Is it true that {n} has to do with {m}? Why?", "Give step by step instructions for {t}.",
    "Write a review of {n}.", "Suggest a plan for a weekend with {t}.", "What would happen without {n}?",
    "Brainstorm five questions about {n}.", "Extract the important words from a sentence about {n} that you make up.",
)  # fmt: skip
SUMS = (
    "Make up a school maths word problem about {t} and solve it step by step.",
    "Write a word problem with numbers about {n}, then its solution, one step a line, and the answer.",
)
SHARES = {
    "chat": 0.20, "openers": 0.12, "plain": 0.05, "nouns": 0.24, "instructions": 0.10, "sums": 0.04, "documents": 0.12,
    "asks": 0.13,
}  # fmt: skip
"""Shares of the texts, not of the tokens."""


MOST_TOKENS = 4
"""Of a noun that is asked about: longer ones are mostly Latin names that the large model knows nothing of."""


def nouns(wordnet: Path, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Kind -> the first word of each noun synset of that kind; what is of no kind in `BY_KIND` is under "other"."""
    found: dict[str, list[str]] = {}
    for line in (wordnet / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        fields = line.split(" ", 5)
        kind = KIND_OF_FILE.get(int(fields[1]), "other")
        word = fields[4].replace("_", " ")
        if len(tokenizer.encode(f" {word}").ids) <= MOST_TOKENS:
            found.setdefault(kind, []).append(word)
    return found


def prompts(tokenizer: Tokenizer, wordnet: Path, count: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Prompts as ids, each opened by the separator, and whether the model asks a question of its own there."""
    rng = random.Random(f"prompts/{seed}")
    topics = [topic.strip() for topic in TOPICS.split(";")]
    things = nouns(wordnet, tokenizer)
    kinds, weights = list(things), [len(things[kind]) ** 0.5 for kind in things]
    for name in rng.choices(list(SHARES), list(SHARES.values()), k=count):
        kind = rng.choices(kinds, weights)[0]
        words = {"t": rng.choice(topics), "n": rng.choice(things[kind]), "m": rng.choice(things[kind])}
        templates = {
            "chat": CHAT_TASKS, "plain": PLAIN_TASKS, "instructions": INSTRUCTIONS, "sums": SUMS,
            "nouns": BY_KIND.get(kind, ANY) if rng.random() < 0.6 else ANY,
        }.get(name)  # fmt: skip
        if templates:
            text = f"{USER}{rng.choice(templates).format(**words)}{TURN}"
        else:
            text = {"openers": rng.choice(OPENERS), "documents": "", "asks": USER}[name]
        yield tokenizer.encode(SEPARATOR + text).ids, name == "asks"


def answer_opening(tokenizer: Tokenizer) -> list[int]:
    """What follows the end of a question that the model asked itself."""
    return tokenizer.encode(TURN.removeprefix("<|im_end|>")).ids
