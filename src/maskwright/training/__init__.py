"""From a system and a data set to trained weights: recipes, the loop, going on after an interruption."""

from maskwright.training.guards import load_batch, replay
from maskwright.training.logs import Logger
from maskwright.training.loop import Objective, train
from maskwright.training.preview import show_batch
from maskwright.training.recipe import RECIPES, Recipe, named_recipe

__all__ = ["RECIPES", "Logger", "Objective", "Recipe", "load_batch", "named_recipe", "replay", "show_batch", "train"]
