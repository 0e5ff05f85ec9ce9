"""Errors by the names that Lightning has for them."""

from common_platform.errors import ConfigError as MisconfigurationException

__all__ = ["MisconfigurationException"]
