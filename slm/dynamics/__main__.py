"""`python -m slm.dynamics`, which `slm dynamics` runs."""

from slm.dynamics.command import main

if __name__ == "__main__":
    main()
