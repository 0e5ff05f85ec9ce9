"""The loops: one function each for epoch and step."""
