"""Small bases of many families with a tokenizer of some twenty words, and rows for tasks that tell
labels apart."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GOOD = "good great fine lovely superb nice happy".split()
BAD = "bad poor awful sad ugly nasty dull".split()
OTHER = "table house river tree stone paper glass".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *OTHER, ","]
PAD, CLS, SEP = 0, 2, 3
ROLES = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {**SIZE, "intermediate_size": 128, "vocab_size": len(VOCABULARY), **ROLES}
ENDS = {**SHAPE, "cls_token_id": CLS, "sep_token_id": SEP}
TWO_SIDES = {
    **{f"{side}_{what}": number for side in ("encoder", "decoder")
       for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))},
    "d_model": 64, "vocab_size": len(VOCABULARY), "decoder_start_token_id": SEP,
    "forced_eos_token_id": SEP, **ROLES,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SHAPE),
    "modernbert": ("ModernBertForMaskedLM", {**ENDS, "local_attention": 16}),
    "deberta": (
        "DebertaV2ForMaskedLM",
        {**SHAPE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "roberta": ("RobertaForMaskedLM", SHAPE),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **ENDS},
    ),
    "llama": ("LlamaForCausalLM", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", {**SHAPE, "num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", {**SHAPE, "num_key_value_heads": 2}),
    "bart": ("BartForConditionalGeneration", TWO_SIDES),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
         "vocab_size": len(VOCABULARY), "decoder_start_token_id": PAD, **ROLES},
    ),
}  # fmt: skip


def make_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, which begins a text with [CLS] and ends it with [SEP]."""
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(VOCABULARY)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_max_length=64,
        **more,
    )


def make_base(folder: Path, family: str, **changed: Any) -> Path:
    """Write a random base of a family as it is published: with the head of the task that it was
    made for, and that alone. Embeddings are as large as in trained models."""
    name, shape = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**{**shape, **changed})
    torch.manual_seed(0)
    network = kind(config)
    network.get_input_embeddings().weight.data.normal_()
    network.save_pretrained(folder)
    parts = family in ("bert", "deberta")
    names = ["input_ids", *["token_type_ids"] * parts, "attention_mask"]
    make_tokenizer(model_input_names=names).save_pretrained(folder)
    return folder


def make_texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return texts with whether their one telling word is good or bad, or that there is none."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        label = drawn.choice(["good", "bad", "neutral"])
        words = [drawn.choice(OTHER) for _ in range(drawn.randint(2, 9))]
        if label != "neutral":
            words[drawn.randrange(len(words))] = drawn.choice(GOOD if label == "good" else BAD)
        rows.append((" ".join(words), label))
    return rows


def write_classes(file: Path, count: int, seed: int = 0) -> Path:
    """Write a table of texts and labels."""
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *make_texts(count, seed)])
    return file


def write_tags(file: Path, count: int, seed: int = 0) -> Path:
    """Write rows of words with a tag each."""
    tags = {**dict.fromkeys(GOOD, "B-GOOD"), **dict.fromkeys(BAD, "B-BAD")}
    rows = [text.split() for text, _ in make_texts(count, seed)]
    made = [{"tokens": words, "tags": [tags.get(word, "O") for word in words]} for words in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def write_questions(file: Path, count: int, seed: int = 0) -> Path:
    """Write texts of up to forty words with questions after their good or their bad words, which
    stand together; one text in four has none."""
    drawn = random.Random(seed)
    with file.open("w") as opened:
        for _ in range(count):
            kind = drawn.choice([GOOD, BAD])
            words = [drawn.choice(OTHER) for _ in range(drawn.randint(4, 37))]
            text, answers = " ".join(words), []
            if drawn.random() < 0.75:
                answer = " ".join(drawn.choice(kind) for _ in range(drawn.randint(1, 3)))
                before = " ".join(words[: drawn.randrange(1, len(words))])
                text = f"{before} {answer}{text.removeprefix(before)}"
                answers = [{"text": answer, "answer_start": len(before) + 1}]
            row = {"question": kind[0], "context": text, "answers": answers}
            opened.write(json.dumps(row) + "\n")
    return file


def write_pairs(file: Path, count: int, seed: int = 0) -> Path:
    """Write rows of a text and the beginning of it, backwards."""
    texts = [text.split() for text, _ in make_texts(count, seed)]
    made = [{"source": " ".join(words), "target": " ".join(words[2::-1])} for words in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


ROWS = {
    "sequence_classification": ("train.csv", write_classes),
    "token_classification": ("train.jsonl", write_tags),
    "question_answering": ("train.jsonl", write_questions),
    "seq2seq_lm": ("train.jsonl", write_pairs),
}


def write_recipe(folder: Path, task: str, base: Path, method: str = "lora", **more: str) -> Path:
    """Write a recipe that trains four steps on sixteen rows, and saves after two."""
    name, write = ROWS[task]
    rows = write(folder / name, 16)
    training = "learning_rate: 0.01, max_steps: 4, save_strategy: steps, save_steps: 2, " + (
        f"per_device_train_batch_size: 4, logging_steps: 1{more.get('training', '')}"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"task: {task}\nmethod: {method}\n"
        f"model: {{name_or_path: {base}, dtype: float32{more.get('model', '')}}}\n"
        f"lora: {{r: 4, lora_alpha: 8{more.get('lora', '')}}}\n"
        f"data: {{path: {rows}{more.get('data', '')}}}\n"
        f"training: {{{training}}}\noutput_dir: {folder / 'run'}\n"
    )
    return recipe
