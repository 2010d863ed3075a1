"""Comparison of systems on a person's own data: equal budgets, one page, intervals instead of single figures."""

from maskwright.comparison.profile import DataProfile, choose_systems
from maskwright.comparison.running import compare
from maskwright.comparison.state import Candidate, Comparison

__all__ = ["Candidate", "Comparison", "DataProfile", "choose_systems", "compare"]
