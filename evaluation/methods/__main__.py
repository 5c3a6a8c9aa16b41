"""Entry point of ``python -m evaluation.methods``."""

from evaluation.methods.table import main

if __name__ == "__main__":
    main()
