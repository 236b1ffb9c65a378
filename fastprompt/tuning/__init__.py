# SPDX-License-Identifier: Apache-2.0
"""Training loops with progress, logs, checkpoints and bit-identical resume."""

from fastprompt.tuning.config import TuneConfig, learning_rate
from fastprompt.tuning.continual import ContinualResult, Task, continual, split_classes
from fastprompt.tuning.evaluation import EvalResult, evaluate
from fastprompt.tuning.plot import plot_log
from fastprompt.tuning.supervised import TuneResult, tune

__all__ = [
    "ContinualResult", "EvalResult", "Task", "TuneConfig", "TuneResult", "continual", "evaluate", "learning_rate",
    "plot_log", "split_classes", "tune",
]  # fmt: skip
