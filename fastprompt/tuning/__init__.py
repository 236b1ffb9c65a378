# SPDX-License-Identifier: Apache-2.0
"""Training loops with progress, logs, checkpoints and bit-identical resume."""

from fastprompt.tuning.config import TuneConfig, learning_rate
from fastprompt.tuning.evaluation import EvalResult, evaluate
from fastprompt.tuning.plot import plot_log
from fastprompt.tuning.supervised import TuneResult, tune

__all__ = ["EvalResult", "TuneConfig", "TuneResult", "evaluate", "learning_rate", "plot_log", "tune"]
