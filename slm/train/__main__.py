"""`python -m slm.train`, which `slm train` runs."""

from slm.train.command import main

if __name__ == "__main__":
    main()
