"""Run by vLLM's own Python: its ``bench serve``. The CPU build's command ``vllm`` does not find its own metadata."""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
