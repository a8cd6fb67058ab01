"""Configuration as data: catalog entries, studies, run specs, and their validation."""

from costbp.config.catalog import ModelEntry as ModelEntry
from costbp.config.catalog import TaskEntry as TaskEntry
from costbp.config.load import load_plan as load_plan
from costbp.config.methods import BackpropSpec as BackpropSpec
from costbp.config.methods import MethodEntry as MethodEntry
from costbp.config.methods import OptimizerSpec as OptimizerSpec
from costbp.config.study import Cell as Cell
from costbp.config.study import Plan as Plan
from costbp.config.study import RunSpec as RunSpec
