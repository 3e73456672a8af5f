"""`python -m slm.evaluate`, which `slm evaluate` runs."""

from slm.evaluate.command import main

if __name__ == "__main__":
    main()
