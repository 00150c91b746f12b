"""A task by the name that the user gave, or as a finished run's folder describes it."""

import argparse
from dataclasses import replace

from evaluation.baselines import BASELINES
from evaluation.tasks.classification import OWN_TASKS, TextTask, own_task, text_task
from evaluation.tasks.glue import GLUE_TASKS
from evaluation.tasks.ner import find_ner_task, ner_task
from evaluation.tasks.ranking import ranking_task
from evaluation.tasks.squad import SQUAD_TASKS, squad_task
from evaluation.tasks.task import Task
from pretrain.json_values import nearest

TASKS = (*GLUE_TASKS, *SQUAD_TASKS, "ner", *OWN_TASKS)
TASK_HELP = (
    f"of GLUE {', '.join(GLUE_TASKS)}; squad1 or squad2 for SQuAD 1.1 or 2.0; ner for "
    "tagged words in CoNLL's format; classification, regression or ranking for your own files: TSV, CSV or JSONL with "
    "the columns sentence, label or sentence1, sentence2, label (ranking: question, sentence, label), or a folder of "
    "texts for each label"
)
SQUAD_FLAGS = ("doc_stride", "max_query_length", "max_answer_length")


def find_task(args: argparse.Namespace) -> Task:
    """The task by its name; ValueError names the nearest one for a misspelt name."""
    name = args.task.lower()
    if name not in TASKS:
        raise ValueError(f"--task {args.task} is unknown; choose one of {', '.join(TASKS)}{nearest(name, TASKS)}")
    if not args.data_dir.is_dir():
        raise ValueError(f"--data-dir {args.data_dir}: no such folder")
    lengths = {flag: getattr(args, flag) for flag in SQUAD_FLAGS if getattr(args, flag) is not None}
    if lengths and name not in SQUAD_TASKS:
        raise ValueError(f"--{next(iter(lengths)).replace('_', '-')} goes with --task squad1 or squad2; leave it out")
    if args.checkpoint in BASELINES and name not in (*GLUE_TASKS, *OWN_TASKS):
        raise ValueError(
            f"--checkpoint {args.checkpoint} answers with one label or score a row, which {name} has not; "
            "compare with --checkpoint random"
        )
    if args.tag_scheme and name != "ner":
        raise ValueError("--tag-scheme goes with --task ner; leave it out")
    if name == "ner":
        return find_ner_task(args.data_dir, args.train_file, args.dev_file, args.tag_scheme)
    if name in SQUAD_TASKS:
        return squad_task(name, args.train_file, args.dev_file, **lengths)
    if name in OWN_TASKS:
        form = own_task(name, args.data_dir, args.train_file, args.dev_file)
        return ranking_task(form) if name == "ranking" else text_task(form)
    form = GLUE_TASKS[name]
    form = replace(form, train_file=args.train_file or form.train_file, dev_file=args.dev_file or form.dev_file)
    return text_task(form)


def restore_task(settings: dict, scores: dict) -> Task:
    """The task that run.json describes, for a model with these dev scores: SQuAD 2.0's threshold is among them."""
    if settings["name"] in SQUAD_TASKS:
        return squad_task(**settings, null_threshold=scores.get("null_threshold"))
    if settings["name"] == "ner":
        return ner_task(**settings)
    form = TextTask(**{key: tuple(value) if type(value) is list else value for key, value in settings.items()})
    return ranking_task(form) if form.name == "ranking" else text_task(form)
