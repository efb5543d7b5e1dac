"""Tasks that need a long memory: samples of any length, scores, and the rolling of models through them."""

from longroll.tasks._task import Sample, Task
from longroll.tasks.babi import Story, read_stories
from longroll.tasks.babilong import BABILong, open_babilong
from longroll.tasks.copying import Copying, CopyRows, copying_tokenizer
from longroll.tasks.evaluate import Row, evaluate_grid, wilson
from longroll.tasks.generate import Answers, answer
from longroll.tasks.haystack import NoiseHaystack, TextHaystack, open_haystack
from longroll.tasks.niah import Niah
from longroll.tasks.passkey import Passkey
from longroll.tasks.recall import Recall, recall_tokenizer
from longroll.tasks.run import run_task
from longroll.tasks.state_tracking import StateTracking, TrackingRows, tracking_tokenizer
from longroll.tasks.training import TaskRows, open_tasks, training_rows
from longroll.tasks.variables import Variables

__all__ = [
    "Answers",
    "BABILong",
    "CopyRows",
    "Copying",
    "Niah",
    "NoiseHaystack",
    "Passkey",
    "Recall",
    "Row",
    "Sample",
    "StateTracking",
    "Story",
    "Task",
    "TaskRows",
    "TextHaystack",
    "TrackingRows",
    "Variables",
    "answer",
    "copying_tokenizer",
    "evaluate_grid",
    "open_babilong",
    "open_haystack",
    "open_tasks",
    "read_stories",
    "recall_tokenizer",
    "run_task",
    "tracking_tokenizer",
    "training_rows",
    "wilson",
]
