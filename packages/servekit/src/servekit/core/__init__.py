"""The part of the engine that decides: requests, scheduler, blocks, prefix cache. Imports no torch."""
