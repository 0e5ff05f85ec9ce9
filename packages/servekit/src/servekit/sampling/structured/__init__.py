"""Structured output: JSON schema, regular expression, choice or grammar, as a mask over the vocabulary at each token.

``limits`` refuses what is wrong or too large by reading it; ``guard`` compiles it in a child process that can be
killed; ``matcher`` follows it token by token in the engine. The engine is llguidance (extra ``servekit[grammar]``).
"""
