"""Make a tiny chat model that really knows something, and a task it does not know yet to fine-tune
it on.

    python scripts/make_tiny_model.py OUT [--seed 0] [--steps 1200]

writes, about a minute later on two CPU cores and without a network:

    OUT/model/       a Llama of 1.4M float32 parameters with a SentencePiece tokenizer and a chat
                     template, pretrained here on five word-list tasks (copy, sort, first, last,
                     count)
    OUT/train.jsonl  rows of a sixth task, {"prompt": "Reverse: red dog sun",
                     "completion": "sun dog red"}
    OUT/eval.jsonl   held-out rows of the same task
    OUT/DONE         written last: what made this folder, and how well the model does on rows it
                     never saw

A random model would do for shapes, but not to see that fine-tuning works: an adapter has to have
something to adapt. Every size is a multiple of 64 (bitsandbytes' 4-bit kernels on the CPU) and
every row of a weight has 256 or 512 elements (llama.cpp's K-quants). The tokenizer is SentencePiece
because llama.cpp's converter refuses a byte-level BPE it has never seen. The same seed on the same
machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

# Read when torch is imported. By default its threads spin while they wait: two of these on the same
# two cores then take eight times as long as one, and with this 1.6 times.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sentencepiece
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    get_scheduler,
)
from transformers.utils.logging import disable_progress_bar

WORDS = (  # noqa: SIM905  each is one piece of the tokenizer
    "ant arm bee box bus cat cow cup day dog egg fan fig gas gem ham hat ice ink jam "
    "jet key kit log map mud net oak pen pig rat red sea sun tea urn van web yak zoo"
).split()
PRETRAINED: dict[str, Callable[[list[str]], str]] = {
    "Copy": lambda words: " ".join(words),
    "Sort": lambda words: " ".join(sorted(words)),
    "First": lambda words: words[0],
    "Last": lambda words: words[-1],
    "Count": lambda words: str(len(words)),
}
TASKS = {**PRETRAINED, "Reverse": lambda words: " ".join(reversed(words))}
# The long answers are the hard ones: three rows of each for one of the others.
MIXTURE = ["Copy", "Sort", "First", "Copy", "Sort", "Last", "Copy", "Sort", "Count"]

NUM_CHATS, NUM_TEXTS, NUM_HELD_OUT = 16384, 512, 100  # the last one per task
NUM_TRAIN, NUM_EVAL = 4000, 256
BATCH_SIZE, LEARNING_RATE, WARMUP = 32, 1e-3, 0.05
IGNORED = -100

VOCAB_SIZE = 512
ROLES = ["system", "user", "assistant"]
# One begin token at the very start, and the end token of an answer inside the markers: it has to be
# learnt as well.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

Message = dict[str, str]
Example = tuple[list[int], list[int]]  # token ids, labels


def fresh_lists(rng: random.Random) -> Iterator[list[str]]:
    """Lists of three to five different words, never the same list twice: whatever is drawn later is
    held out."""
    seen = set()
    while True:
        words = rng.sample(WORDS, rng.randint(3, 5))
        if tuple(words) not in seen:
            seen.add(tuple(words))
            yield words


def chat(task: str, words: list[str], system: str | None = None) -> list[Message]:
    """A question and its answer as messages."""
    turns = [("system", system)] if system else []
    turns += [("user", f"{task}: {' '.join(words)}"), ("assistant", TASKS[task](words))]
    return [{"role": role, "content": content} for role, content in turns]


def text(task: str, words: list[str]) -> str:
    """The same knowledge as a plain sentence, without roles."""
    return f"The {task.lower()} of {' '.join(words)} is {TASKS[task](words)}."


def train_sentencepiece(texts: list[str]) -> bytes:
    """A BPE model with byte fallback that leaves the text as it is: no normalisation and no space
    put in front.

    A space in front is where Hugging Face and llama.cpp part: one puts it at the start, the other
    after every special token.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        eos_piece="<|end|>",
        pad_id=3,
        pad_piece="<pad>",
        control_symbols=[f"<|{role}|>" for role in ROLES],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_tokenizer(sentencepiece_model: bytes) -> LlamaTokenizer:
    """The Hugging Face form of it.

    Built from the pieces here, since transformers reads `tokenizer.model` only where protobuf is
    installed. A piece's id is its rank, so the merges are the ways to put it together from two
    others, in the order of the ids.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    vocab = {processor.id_to_piece(i): i for i in range(len(processor))}
    splits = [(piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece))]
    return LlamaTokenizer(
        vocab=vocab,
        merges=[(left, right) for left, right in splits if left in vocab and right in vocab],
        eos_token="<|end|>",
        pad_token="<pad>",
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        add_bos_token=True,  # of plain text only, as Llama does; a rendered chat brings its own
        add_prefix_space=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_model(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """Two Llama layers with random weights."""
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype="float32",
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def encode(
    tokenizer: LlamaTokenizer, chats: list[list[Message]], texts: list[str]
) -> list[Example]:
    """Chats learn their answers, sentences every token."""
    encoded = tokenizer.apply_chat_template(
        chats, return_dict=True, return_assistant_tokens_mask=True
    )
    examples = [
        (ids, [token if answer else IGNORED for token, answer in zip(ids, mask)])
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"])
    ]
    return examples + [
        (ids, ids) for ids in tokenizer([one + tokenizer.eos_token for one in texts])["input_ids"]
    ]


def batches(
    examples: list[Example], rng: random.Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of ids and labels, int64 [BATCH_SIZE, longest row], padded on the right."""
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            longest = max(len(ids) for ids, _ in rows)
            yield (
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
            )


def pretrain(
    model: LlamaForCausalLM, rows: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> None:
    """AdamW with a warmup and a cosine down to zero. Padding is on the right of a causal model: no
    mask is needed."""
    settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=True)
    schedule = get_scheduler("cosine", optimizer, round(WARMUP * steps), steps)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        ids, labels = next(rows)
        learnt = labels[:, 1:] != IGNORED
        hidden = model.model(ids).last_hidden_state[:, :-1]
        loss = cross_entropy(model.lm_head(hidden[learnt]), labels[:, 1:][learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step in (1, steps):
            say(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - started:.1f}s")


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, task: str, lists: list[list[str]]
) -> float:
    """The share of lists whose greedy answer is the right one to the letter, end token included."""
    prompts = tokenizer.apply_chat_template(
        [chat(task, words)[:-1] for words in lists],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    answers = model.eval().generate(**prompts, max_new_tokens=16)[
        :, prompts["input_ids"].shape[1] :
    ]
    wanted = [TASKS[task](words) + tokenizer.eos_token for words in lists]
    got = [tokenizer.decode(answer).replace(tokenizer.pad_token, "") for answer in answers]
    return sum(a == b for a, b in zip(wanted, got)) / len(lists)


def write_rows(path: Path, lists: list[list[str]]) -> None:
    """Rows of the task to fine-tune on, as JSON lines."""
    turns = [chat("Reverse", words) for words in lists]
    rows = [
        {"prompt": user["content"], "completion": assistant["content"]} for user, assistant in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path, seed: int, steps: int) -> None:
    """Fill an empty folder."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    lists = fresh_lists(rng)
    held_out = {task: list(islice(lists, NUM_HELD_OUT)) for task in PRETRAINED}
    train, evaluation = list(islice(lists, NUM_TRAIN)), list(islice(lists, NUM_EVAL))
    assert not {tuple(words) for words in train} & {tuple(words) for words in evaluation}
    systems = [None] * 15 + ["Be brief."]
    chats = [
        chat(rng.choice(MIXTURE), words, rng.choice(systems)) for words in islice(lists, NUM_CHATS)
    ]
    texts = [text(rng.choice(MIXTURE), words) for words in islice(lists, NUM_TEXTS)]

    sentencepiece_model = train_sentencepiece(
        [m["content"] for messages in chats for m in messages] + texts
    )
    tokenizer = make_tokenizer(sentencepiece_model)
    model = make_model(tokenizer)
    say(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} pieces, {NUM_CHATS + NUM_TEXTS} "
        "rows"
    )
    examples = encode(tokenizer, chats, texts)
    pretrain(model, batches(examples, rng, tokenizer.pad_token_id), steps)
    held_out["Reverse"] = evaluation
    shares = {task: exact_match(model, tokenizer, task, words) for task, words in held_out.items()}

    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.model").write_bytes(sentencepiece_model)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "eval.jsonl", evaluation)
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    done = {"seed": seed, "steps": steps, "script_sha256": script, "exact_match": shares}
    (folder / "DONE").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    say(
        "exact match on held-out rows: "
        + ", ".join(f"{task} {share:.1%}" for task, share in shares.items())
    )


def say(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Make everything beside OUT and move it there in one step: OUT is whole, or it is not
    there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make; must not exist, or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=1200, help="20 gives the same files and a bad model in seconds"
    )
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    disable_progress_bar()
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        make(folder, args.seed, args.steps)
        folder.replace(out)


if __name__ == "__main__":
    main()
