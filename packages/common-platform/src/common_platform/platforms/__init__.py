"""Devices: what is here and what it can do."""

from common_platform.platforms.detect import detect
from common_platform.platforms.platform import DeviceFacts, Platform

__all__ = ["DeviceFacts", "Platform", "detect"]
