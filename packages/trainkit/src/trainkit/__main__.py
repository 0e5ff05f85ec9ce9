"""``python -m trainkit`` is ``trainkit``."""

from trainkit.cli.main import run

if __name__ == "__main__":
    run()
