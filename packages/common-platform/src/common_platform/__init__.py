"""What trainkit and servekit share: devices, communication, the hand-off artifact, errors."""

__version__ = "0.1.0"
