"""`python -m slm.report`, which `slm report` runs."""

from slm.report.command import main

if __name__ == "__main__":
    main()
