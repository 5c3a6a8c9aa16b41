"""Entry point of ``python -m trainers.ablations``."""

from trainers.ablations.running import main

if __name__ == "__main__":
    main()
