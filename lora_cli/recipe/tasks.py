"""The tables of what a model is trained to do and by what: a row per task and per objective.

Everyone asks `recipe.task` and `recipe.objective`; nobody else knows their names. Nothing heavy is
imported here: classes of other libraries are named, and imported when they are needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.common import LoraError
from lora_cli.recipe.upstream_fields import SFT_CONFIG, TRAINING_ARGUMENTS, read_fields


@dataclass(frozen=True)
class Task:
    """What a model does with its input."""

    name: str
    peft_type: str | None
    """PEFT's `task_type`; None of a task for which PEFT has none."""
    auto_class: str
    """transformers' class that loads such a model."""
    does: str
    """What such models do, to complete the sentence `models that …`."""
    architectures: tuple[str, ...]
    """How the names of such models' classes end."""
    whole_class: str | None = None
    """transformers' class that loads a base of which such a model is a part, with the rest."""
    peft_heads: tuple[str, ...] = ()
    """Ends of the modules' names that PEFT trains whole without being asked."""
    counts_labels: bool = False
    """Whether it tells labels apart, of which a head has one output each."""
    places_labels: bool = False
    """Whether each token of a row has a label, and not the row."""
    metrics: tuple[str, ...] = ()
    """What an evaluation measures beside the loss."""
    shown: tuple[str, ...] = ()
    """Which of them the screen shows."""
    long_rows: tuple[str, ...] = ("drop", "truncate", "split", "error")
    """What `data.on_long_row` may be; the first where a recipe does not say."""
    own_keys: tuple[str, ...] = ()
    """Keys of `data` that no other task reads."""
    num_outputs: int | None = None
    """How many outputs its head has, where that is not the number of labels."""
    lost_inputs: tuple[str, ...] = ()
    """Inputs that PEFT's class for this task takes and does not hand on to the model."""
    encoder: str = ""
    """What makes rows ready to train on, where that is not the Renderer of what writes: a class of
    a file in data/, as `file.Class`."""
    scorer: str = ""
    """What computes its loss and its metrics, where they are not those of next tokens: a class of a
    file in scoring/, as `file.Class`."""
    predictor: str = ""
    """What answers rows in `lora predict`: a class of a file in evaluate/, as `file.Class`."""
    text_columns: tuple[str, ...] = ("input_ids",)
    """The columns of a row that are texts, as token ids."""
    reads_pictures: bool = False
    """Whether its input is pictures, and not texts."""

    @property
    def has_targets(self) -> bool:
        """Whether the labels of a row are a text of their own, which a decoder writes."""
        return "labels" in self.text_columns

    @property
    def writes_text(self) -> bool:
        """Whether a model's head gives the next token of a text: no files of a base lack it."""
        return self.writes_next_tokens or self.has_targets

    @property
    def writes_next_tokens(self) -> bool:
        """Whether a model foretells the next token of a text, and nothing else."""
        return self.peft_type == "CAUSAL_LM"

    @property
    def unit(self) -> str:
        """What its rows are counted by."""
        return "pictures" if self.reads_pictures else "tokens"

    def find_auto_class(self, config: Any) -> Any:
        """Return transformers' class that loads the base of a configuration, with all its parts:
        `auto_class` would leave the tower for pictures of some bases out, and refuse others."""
        transformers = importlib.import_module("transformers")
        if self.whole_class is None:
            found = getattr(transformers, self.auto_class)
            if type(config) not in found._model_mapping or not self._knows_class(config, found):
                raise LoraError(
                    f"transformers has no {config.model_type} model to {self.does}",
                    "take a base of another family",
                )
            return found
        whole = getattr(transformers, self.whole_class)
        is_part = config.get_text_config() is not config and type(config) in whole._model_mapping
        return whole if is_part else getattr(transformers, self.auto_class)

    def _knows_class(self, config: Any, auto_class: Any) -> bool:
        """Return whether the class of such a model is one of `architectures`: by its name a model
        that is loaded later is known again."""
        return str(auto_class._model_mapping[type(config)].__name__).endswith(self.architectures)


@dataclass(frozen=True)
class Objective:
    """What training minimises, and the configuration of the trainer that does it."""

    name: str
    trainer: str
    """TRL's trainer, by the name people know."""
    config: str
    """TRL's configuration class."""
    fields: tuple[tuple[str, str, str], ...]
    """Where the fields of that class are declared."""
    losses: tuple[str, ...] = ()
    """What `preference.loss` may be; the first where a recipe does not say."""
    needs_reference: bool = False
    """Whether its losses are of how much likelier answers have become since the start."""
    unpaired: bool = False
    """Whether its rows have one answer each, and whether it is wanted; and not two answers."""
    usual: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are others than with most objectives where a recipe does not say them."""
    slower: float = 1.0
    """By how much its learning rate is below that of answers alone, as a first try."""

    @property
    def compares(self) -> bool:
        """Whether its rows say which answers are preferred; lora trains it itself."""
        return bool(self.losses)

    @property
    def has_pairs(self) -> bool:
        """Whether its rows are pairs of answers, of which one is preferred."""
        return self.compares and not self.unpaired

    @property
    def defaults(self) -> dict[str, Any]:
        """What keys of `preference:` are where a recipe does not say, and not what they mostly
        are."""
        return {"loss": self.losses[0], **self.usual} if self.losses else {}

    def find_config_class(self) -> Any:
        """Return TRL's configuration class."""
        return getattr(importlib.import_module("trl"), self.config)

    def list_own_fields(self) -> set[str]:
        """Return the fields of that class that transformers' own `TrainingArguments` lacks."""
        return read_fields(self.fields).keys() - read_fields(TRAINING_ARGUMENTS).keys()


WRITTEN_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact")
"""What is measured of texts that a model writes."""
ENCODER_DECODERS = (
    *("BartForConditionalGeneration", "BigBirdPegasusForConditionalGeneration"),  # MBart, PLBart
    *("BlenderbotForConditionalGeneration", "BlenderbotSmallForConditionalGeneration"),
    *("EncoderDecoderModel", "LEDForConditionalGeneration", "M2M100ForConditionalGeneration"),
    *("MarianMTModel", "MvpForConditionalGeneration", "NllbMoeForConditionalGeneration"),
    *("PegasusForConditionalGeneration", "PegasusXForConditionalGeneration"),
    *("SwitchTransformersForConditionalGeneration", "T5ForConditionalGeneration"),  # mT5, LongT5
)
"""Classes of models with an encoder and a decoder for texts, by how their names end: models that
look at pictures, or listen, have `ForConditionalGeneration` in their names, too."""
TASKS = (
    Task(
        "causal_lm",
        "CAUSAL_LM",
        "AutoModelForCausalLM",
        "write text",
        architectures=("ForCausalLM", "LMHeadModel"),
        whole_class="AutoModelForImageTextToText",
    ),
    Task(
        "sequence_classification",
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        "classify texts",
        architectures=("ForSequenceClassification",),
        peft_heads=("classifier", "score"),
        counts_labels=True,
        metrics=(
            *("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews"),
            *("f1", "precision", "recall", "mse", "mae", "pearson", "spearman", "r2"),
        ),
        shown=("accuracy", "f1", "f1_macro", "matthews", "mae", "pearson"),
        long_rows=("drop", "truncate", "error"),
        encoder="classify.LabelEncoder",
        scorer="classes.ClassScorer",
        predictor="classifier.Classifier",
    ),
    Task(
        "token_classification",
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        "tag words",
        architectures=("ForTokenClassification",),
        peft_heads=("classifier", "score"),
        counts_labels=True,
        places_labels=True,
        metrics=("f1", "precision", "recall", "f1_macro", "accuracy"),
        shown=("accuracy", "f1", "f1_macro"),
        long_rows=("drop", "truncate", "error"),
        encoder="tag.TagEncoder",
        scorer="tags.TagScorer",
        predictor="tagger.Tagger",
    ),
    Task(
        "question_answering",
        "QUESTION_ANS",
        "AutoModelForQuestionAnswering",
        "find answers in texts",
        architectures=("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        peft_heads=("qa_outputs",),
        metrics=(
            *("exact_match", "f1"),
            *("no_answer_accuracy", "has_answer_exact", "has_answer_f1"),
        ),
        shown=("exact_match", "f1"),
        long_rows=("split", "drop", "error"),
        own_keys=("stride", "longest_answer"),
        num_outputs=2,
        lost_inputs=("token_type_ids", "position_ids"),
        encoder="questions.QuestionEncoder",
        scorer="spans.AnswerScorer",
        predictor="answer_finder.AnswerFinder",
    ),
    Task(
        "seq2seq_lm",
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        "read a text and write another",
        architectures=ENCODER_DECODERS,
        metrics=("perplexity", *WRITTEN_METRICS),
        shown=("rougeL", "exact", "bleu", "chrf"),
        long_rows=("drop", "truncate", "error"),
        own_keys=("source_prefix", "source_language", "target_language", "max_target_length"),
        encoder="pairs.PairEncoder",
        scorer="texts.TextScorer",
        predictor="pair_writer.PairWriter",
        text_columns=("input_ids", "labels"),
    ),
    Task(
        "image_classification",
        None,
        "AutoModelForImageClassification",
        "classify pictures",
        architectures=(
            "ForImageClassification",
            "ForImageClassificationWithTeacher",
            "ForImageClassificationLearned",
            "ForImageClassificationFourier",
            "ForImageClassificationConvProcessing",
        ),
        counts_labels=True,
        metrics=(
            *("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews"),
            *("f1", "precision", "recall", "mse", "mae", "pearson", "spearman", "r2"),
        ),
        shown=("accuracy", "f1", "f1_macro", "matthews", "mae", "pearson"),
        encoder="classify_pictures.PictureEncoder",
        scorer="classes.ClassScorer",
        predictor="picture_classifier.PictureClassifier",
        reads_pictures=True,
    ),
)
PREFERENCE_METRICS = (
    *("rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected"),
    *("logps_chosen", "logps_rejected"),
)
"""What is measured of pairs, beside the loss."""
UNPAIRED_METRICS = (
    *("rewards_margin", "rewards_desirable", "rewards_undesirable"),
    *("logps_desirable", "logps_undesirable", "kl"),
)
"""… and of answers that are each wanted or not."""
OF_ONE_ANSWER = "SFTTrainer", "SFTConfig", SFT_CONFIG
DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down")
OBJECTIVES = (
    Objective("sft", *OF_ONE_ANSWER),
    Objective("dpo", *OF_ONE_ANSWER, DPO_LOSSES, needs_reference=True, slower=10),
    # eq. 6 of Hong et al. 2024, who take 0.1 (Mistral) to 0.25 for preference.beta
    Objective("orpo", *OF_ONE_ANSWER, ("odds_ratio",), usual={"sft_weight": 1.0}, slower=2),
    # where its authors' README says to begin: https://github.com/princeton-nlp/SimPO
    Objective("simpo", *OF_ONE_ANSWER, ("simpo",), usual={"beta": 2.0, "gamma": 1.0}, slower=10),
    # eq. 5 of Xu et al. 2024
    Objective(
        "cpo", *OF_ONE_ANSWER, ("sigmoid", "ipo", "hinge"), usual={"sft_weight": 1.0}, slower=10
    ),
    Objective("kto", *OF_ONE_ANSWER, ("kto",), needs_reference=True, unpaired=True, slower=10),
)
DEFAULT_TASK, DEFAULT_OBJECTIVE = TASKS[0], OBJECTIVES[0]


def name_objective(name: object) -> Objective:
    """Return the objective that a recipe calls so; `auto` is the task's own loss."""
    return next((each for each in OBJECTIVES if each.name == name), DEFAULT_OBJECTIVE)


def name_task(name: str) -> Task:
    """Return the task that a recipe calls so."""
    return next(task for task in TASKS if task.name == name)


def recognise_task(architectures: Sequence[str] | None) -> Task:
    """Return the task of models of these classes, as config.json names them; the default task where
    it names none that is known."""
    for name in architectures or ():
        for task in TASKS:
            if name.endswith(task.architectures):
                return task
    return DEFAULT_TASK


def find_task(peft_type: str | None, architecture: str = "") -> Task | None:
    """Return the task of an adapter by PEFT's `task_type`, or None where there is no such task.

    One that names none is of a task for which PEFT has none, if it names a class of such models as
    that of its base; else it counts as one of the default task, as in PEFT.
    """
    if peft_type is None:
        found = recognise_task([architecture])
        return found if found.peft_type is None else DEFAULT_TASK
    return next((task for task in TASKS if task.peft_type == peft_type), None)
