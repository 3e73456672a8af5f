"""`python -m slm.dashboard`, which `slm dashboard` runs."""

from slm.report.workspace import main

if __name__ == "__main__":
    main()
