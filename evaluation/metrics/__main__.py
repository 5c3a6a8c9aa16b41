"""Entry point of ``python -m evaluation.metrics``."""

from evaluation.metrics.command import main

if __name__ == "__main__":
    main()
