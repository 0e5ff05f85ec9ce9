"""What only the first rank does, by the path that Lightning has for it."""

from trainkit.ranks import rank_zero_info, rank_zero_only, rank_zero_warn


@rank_zero_only
def rank_zero_deprecation(message: str, stacklevel: int = 4) -> None:
    """A warning about something that is going to go, on the first rank."""
    import warnings

    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


__all__ = ["rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn"]
