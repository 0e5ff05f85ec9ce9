"""Benchmarks of a model loaded here and of any server that speaks OpenAI's HTTP, with the flags vLLM's users know."""
