"""Strategies: how a module is spread over devices."""

from trainkit.strategies.base import Strategy
from trainkit.strategies.choose import make_strategy
from trainkit.strategies.ddp import DDPStrategy
from trainkit.strategies.single import SingleDevice

__all__ = ["DDPStrategy", "SingleDevice", "Strategy", "make_strategy"]
