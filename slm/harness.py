"""`python -m slm.harness`, which `slm harness` runs."""

from slm.evaluate.harness import main

if __name__ == "__main__":
    main()
