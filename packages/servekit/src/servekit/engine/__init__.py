"""Requests in, outputs out: the loop that joins core and execution, and the clients of it."""
