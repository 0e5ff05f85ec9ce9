"""Capacity planning: the scheduler, blocks and prefix cache of ``servekit.core`` on virtual time and a cost model."""

from servekit.simulate.cost import CostModel, StepShape
from servekit.simulate.job import Job, MadeUpTokens
from servekit.simulate.simulation import Outcome, SimulationConfig, simulate

__all__ = ["CostModel", "Job", "MadeUpTokens", "Outcome", "SimulationConfig", "StepShape", "simulate"]
