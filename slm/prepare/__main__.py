"""`python -m slm.prepare`, which `slm prepare` runs."""

from slm.prepare.command import main

if __name__ == "__main__":
    main()
