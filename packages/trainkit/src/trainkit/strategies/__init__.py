"""Strategies: how a module is spread over devices."""

from trainkit.strategies.base import Strategy
from trainkit.strategies.choose import make_strategy
from trainkit.strategies.single import SingleDevice

__all__ = ["SingleDevice", "Strategy", "make_strategy"]
