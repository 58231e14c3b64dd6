"""The configuration of a run: `Train`, its `Task`s with their `Modality` and `Source`s, `Model`, `Optim` and four groups of options.

All are frozen dataclasses and `Record`s: each field is checked against its type when a record is made, and written in it; `__post_init__`
then checks ranges and never changes a value. Numbers that follow from others are properties.
A field's docstring is its text in `polyvit-fast train NAME --help`, where a new line in the docstring begins a new line.
"""

from polyvit_fast.config.modality import Decoder, Modality
from polyvit_fast.config.model import MODELS, Model
from polyvit_fast.config.optim import Optim
from polyvit_fast.config.options import ComputeOptions, DataOptions, DistributedOptions, LogOptions
from polyvit_fast.config.preprocessing import Preprocessing
from polyvit_fast.config.record import ConfigError, Record
from polyvit_fast.config.task import Source, Task
from polyvit_fast.config.train import Schedule, StepPlan, Train

__all__ = [
    "MODELS",
    "ComputeOptions",
    "ConfigError",
    "DataOptions",
    "Decoder",
    "DistributedOptions",
    "LogOptions",
    "Modality",
    "Model",
    "Optim",
    "Preprocessing",
    "Record",
    "Schedule",
    "Source",
    "StepPlan",
    "Task",
    "Train",
]
