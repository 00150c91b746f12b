"""A task by the name that the user gave, or as run.json of a finished run describes it."""

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


def find_task(options) -> Task:
    """The task that the options of `evaluation.finetune` name. For `ner` and one's own tasks, the headers and labels of
    the files define it. Raises ValueError for an unknown name, an option that does not go with the task, and files that
    do not define one.
    """
    name, train_file, dev_file = options.task.lower(), options.train_file, options.dev_file
    if name not in TASKS:
        raise ValueError(f"--task {options.task} is unknown; choose one of {', '.join(TASKS)}{nearest(name, TASKS)}")
    if not options.data_dir.is_dir():
        raise ValueError(f"--data-dir {options.data_dir}: no such folder")
    lengths = {flag: getattr(options, flag) for flag in SQUAD_FLAGS if getattr(options, flag) is not None}
    if lengths and name not in SQUAD_TASKS:
        raise ValueError(f"--{next(iter(lengths)).replace('_', '-')} goes with --task squad1 or squad2; leave it out")
    if options.tag_scheme and name != "ner":
        raise ValueError("--tag-scheme goes with --task ner; leave it out")
    if options.checkpoint in BASELINES and name not in (*GLUE_TASKS, *OWN_TASKS):
        raise ValueError(
            f"--checkpoint {options.checkpoint} predicts one label or score per example, which does not fit {name}; "
            "compare with --checkpoint random"
        )
    if name in SQUAD_TASKS:
        return squad_task(name, train_file, dev_file, **lengths)
    if name == "ner":
        return find_ner_task(options.data_dir, train_file, dev_file, options.tag_scheme)
    if name in OWN_TASKS:
        return _from_description(own_task(name, options.data_dir, train_file, dev_file))
    glue = GLUE_TASKS[name]
    return text_task(replace(glue, train_file=train_file or glue.train_file, dev_file=dev_file or glue.dev_file))


def restore_task(settings: dict, scores: dict) -> Task:
    """The task with these `Task.settings`. SQuAD 2.0 takes its threshold from the model's dev `scores`."""
    if settings["name"] in SQUAD_TASKS:
        return squad_task(**settings, null_threshold=scores.get("null_threshold"))
    if settings["name"] == "ner":
        return ner_task(**settings)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return _from_description(TextTask(**fields))


def _from_description(description: TextTask) -> Task:
    return ranking_task(description) if description.name == "ranking" else text_task(description)
