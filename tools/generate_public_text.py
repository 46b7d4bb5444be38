"""Let the large LM write the public text that the built-in proxy is distilled on.

The modern, conversational half of the pretraining corpus is text that SmolLM2-135M-Instruct (Apache-2.0)
samples itself, from prompts written below. For every sampled token the teacher's `TOP_K` most likely
next tokens and their log-probabilities are kept, so that distillation needs no second teacher pass.

No prompt contains text of any evaluation data set.

    python tools/generate_public_text.py --large PATH --out DIR --tokens 1500000 --seed 1

Writes shards `gen-SEED-NNNN.safetensors` (atomically, resumable by shard) with

- `ids` uint16 `[tokens]`: sequences back to back, each opened by the separator token;
- `top_ids` uint16, `top_logprobs` float16 `[tokens, TOP_K]`: the teacher's untempered distribution for
  the token *after* each position (zeros where the position has no teacher answer).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

TOP_K = 32
SEPARATOR_ID = 0  # <|endoftext|>
NEW_TOKENS = 160

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


def prompts(rng: random.Random, tokenizer, count: int) -> list[list[int]]:
    """Draw one batch of prompts, as token ids; the prompt itself is not part of the text that is kept."""
    topics = [t.strip() for t in TOPICS.split(";")]

    def ask(task: str) -> list[int]:
        text = f"<|im_start|>user\n{task.format(t=rng.choice(topics))}<|im_end|>\n<|im_start|>assistant\n"
        return tokenizer(text).input_ids

    drawn = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.55:
            drawn.append(ask(rng.choice(CHAT_TASKS)))
        elif kind < 0.75:
            drawn.append(ask(rng.choice(PLAIN_TASKS)))
        elif kind < 0.92:
            drawn.append([SEPARATOR_ID, *tokenizer(rng.choice(OPENERS)).input_ids])
        else:  # the model asks itself
            drawn.append(tokenizer("<|im_start|>user\n").input_ids)
    return drawn


@torch.inference_mode()
def sample(model, batch: list[list[int]], rng: random.Random, generator: torch.Generator):
    """Sample `NEW_TOKENS` tokens after each prompt; return ids `[B, N]` and teacher top-k `[B, N, K]` twice."""
    width = max(map(len, batch))
    ids = torch.full((len(batch), width), SEPARATOR_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    temperature = torch.tensor([rng.choice((0.7, 0.85, 1.0)) for _ in batch]).unsqueeze(1)
    ids, mask, temperature = (tensor.to(model.device) for tensor in (ids, mask, temperature))
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out, top_ids, top_logprobs = [], [], []
    step = ids
    for _ in range(NEW_TOKENS):
        logits = (
            model(step, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            .logits[:, -1]
            .float()
        )
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        values, indices = logprobs.topk(TOP_K)
        # Nucleus sampling inside the top 512; the tail of a small teacher is noise nobody should learn from.
        wide_values, wide_indices = logits.topk(512)
        probabilities = (wide_values / temperature).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before > 0.95, 0.0)
        # The draw is made on the CPU, so that one seed means one text on every device (up to rounding).
        choice = torch.multinomial(probabilities.cpu(), 1, generator=generator)
        token = wide_indices.gather(1, choice.to(model.device))
        out.append(token)
        top_ids.append(indices)
        top_logprobs.append(values)
        step = token
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(out, 1).cpu(), torch.stack(top_ids, 1).cpu(), torch.stack(top_logprobs, 1).cpu()


def to_shard(ids, top_ids, top_logprobs, end_ids: set[int]) -> dict[str, torch.Tensor]:
    """Lay sequences back to back: a separator, then the tokens up to the first end-of-text token.

    `top_*[i]` is the teacher's answer for the token at `i + 1`, hence the shift by one.
    """
    flat_ids, flat_top_ids, flat_top_logprobs = [], [], []
    for row in range(ids.shape[0]):
        length = next((i for i, t in enumerate(ids[row].tolist()) if t in end_ids), ids.shape[1])
        if length < 8:
            continue
        flat_ids.append(torch.cat([torch.tensor([SEPARATOR_ID]), ids[row, :length]]))
        # The last position predicts the next sequence's separator; the teacher says nothing about it.
        nothing = torch.zeros(1, TOP_K)
        flat_top_ids.append(torch.cat([top_ids[row, :length], nothing.long()]))
        flat_top_logprobs.append(torch.cat([top_logprobs[row, :length], nothing]))
    return {
        "ids": torch.cat(flat_ids).to(torch.uint16),
        "top_ids": torch.cat(flat_top_ids).to(torch.uint16),
        "top_logprobs": torch.cat(flat_top_logprobs).to(torch.float16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", required=True, help="directory of the large model (transformers format)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="sequences per shard; larger on a GPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.large)
    model = AutoModelForCausalLM.from_pretrained(options.large, dtype=torch.bfloat16).eval().to(options.device)
    end_ids = {0, 1, 2}
    done, began = 0, time.time()
    for index in itertools.count():
        if done >= options.tokens:
            break
        path = options.out / f"gen-{options.seed}-{index:04d}.safetensors"
        rng = random.Random(f"{options.seed}/{index}")
        if path.exists():
            with safe_open(path, "pt") as shard:
                done += shard.get_slice("ids").get_shape()[0]
            continue
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        shard = to_shard(*sample(model, prompts(rng, tokenizer, options.batch), rng, generator), end_ids)
        partial = path.with_suffix(".part")
        save_file(shard, partial)
        os.replace(partial, path)
        done += len(shard["ids"])
        print(f"{path.name} tokens={done} rate={done / (time.time() - began):.0f}/s", flush=True)
        if index % 20 == 0:
            print(repr(tokenizer.decode(shard["ids"][:400].tolist())), flush=True)


if __name__ == "__main__":
    main()
